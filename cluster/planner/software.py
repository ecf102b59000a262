"""What a training program gets out of a machine: constants that no data sheet says, for named programs. Lecture 03.

At most four of a program are fitted to published runs, by `cluster/accuracy.py`, which says how well; they are in
`FITTED`. The others say what the program does, as its documentation has it, or what a paper measured.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from zero.engine.buckets import BUCKET_ELEMENTS


class Again(NamedTuple):
    """What a policy of several parts computes again of a layer, beside `Layout.recompute`; as parts of a forward."""

    products: float = 0.0  # of the matrix products' time
    moved: float = 0.0  # of the bytes moved between them
    dropped: float = 0.0  # of the bytes saved
    checkpoints: int = 0  # calls of torch.utils.checkpoint, each with operators of its own
    operators: int = 0  # that the host starts again


NOTHING_AGAIN = Again()


@dataclass(frozen=True)
class Software:
    """Named, with the constants of time. Those of `usual` are of Megatron-LM in 2021, in the ten runs of PTD-P."""

    name: str = "megatron-2021"
    gemm: float = 0.70  # of the peak, where a matrix product fills the device
    passes: float = 2.47  # how often a forward moves each byte of activations to or from memory
    links: float = 0.82  # of the links' bandwidth
    blocking: bool = False  # whether computation stops while a message travels between stages
    scattered: bool = False  # whether such a message is sharded over tp without sequence parallelism (2104.04473, 4.1)
    bucket: float = BUCKET_ELEMENTS  # of gradients or weights that travel at once
    again: Again = NOTHING_AGAIN
    schedules: tuple[str, ...] = ("1f1b", "interleaved")  # of pipelines that it has
    exchanges: bool = False  # whether it has the choices of --reduce, --reshard and --cp-kind
    zero_in_pipeline: int = 3  # the last stage of ZeRO that it has beside a pipeline
    bits: int = 16  # of what the layers' matrices are multiplied in; head and attention stay at 16
    bucket_a_rank: float = 0.0  # and at least so many for each data parallel rank
    balances: bool = False  # stages of a pipeline get layers so that the head is one rank's share
    # ---- Attention. 0: its products are as fast as others, and none is left out for causality.
    attention: float = 0.0  # of the peak, forward, of the half of the products that causality leaves, long sequences
    warming: float = 700.0  # tokens of a sequence with which it has half of that (2407.08608, figure 5)
    # ---- What lies between the products
    logits: float = 0.0  # bytes moved for a logit, forward and backward
    launch: float = 0.0  # seconds in which the host starts one operator; a device that is faster waits for it
    grouped: float = 1.0  # of `gemm`, in the products of many experts started together
    at_once: bool = False  # one kernel multiplies all experts; else the host starts each one's
    gemm8: float = 0.85  # of `gemm`, of the peak of 8-bit products: quantizing, and power
    # ---- Messages
    tp_seen: float = 1.0  # of tp's messages, that no computation hides
    ep_seen: float = 1.0  # of the experts' all-to-alls
    once_a_node: bool = False  # a token that several experts of a node want is sent there once (DeepEP)
    slowdown: float = 0.0  # of computation, for each second of messages beside it
    overlapped: bool = False  # gradients and weights of dp also travel behind a pipeline's first and last microbatches
    gradient: int = 2  # bytes of a gradient's element that is reduced
    pieces: int = 0  # messages of a layer's weights; 0: by buckets
    imbalance: float = 1.0  # rows of the rank with most routed tokens, over the mean
    # ---- Memory, see `residency.py`
    gradient_held: float = 4.0  # bytes of a gradient's element while gradients are added up
    state_held: float = 12.0  # bytes of the optimizer's states, the master weight among them
    fused_gate: bool = False  # the product of a gated MLP's two halves is not saved by itself: computed from them
    keeps_gathered: bool = False  # what tensor parallelism gathers of a sequence is saved, not gathered again
    saved8: bool = False  # what is multiplied in 8 bits is saved in 8 bits
    logits_held: float = 12.0  # bytes of a logit at the peak: itself, in float32 and its gradient
    logits_held_tp: float = 0.0  # the same where tensor parallelism shards the vocabulary; 0: as many
    grown: bool = False  # gradients come one by one in a step's first backward, as activations go
    reserve: float = 0.04  # of all it allocates, lost between allocations: what it reserves, over what it holds


# 2507.03114 measures 18.9 % in the mean for computation beside collectives, which take processors and bandwidth.
SLOWDOWN = 0.19
EP_OVERLAPPED = 0.25  # of all-to-alls, seen where they travel beside the other half of a batch
FLASH2, FLASH3 = 0.38, 0.62  # of an H100's peak, causal, heads of 128, forward: 2407.08608, figure 5

MEGATRON_2021 = Software()
FITTED: dict[str, tuple[str, ...]] = {
    "megatron-2021": ("gemm", "passes", "links"),
    "megatron-core": ("gemm", "tp_seen", "slowdown", "launch"),
    "fsdp-eager": ("gemm", "passes", "attention", "slowdown"),
    "fsdp2-eager": ("gemm", "passes"),
    "fsdp-compiled": ("gemm", "passes", "tp_seen", "slowdown"),
    "automodel": ("gemm", "passes", "launch", "slowdown"),
    "nanotron": ("gemm", "passes", "links"),
    "maxtext": ("gemm", "slowdown"),
    "deepspeed": ("gemm", "passes"),
    "here": ("gemm", "passes"),
}
MODERN = replace(MEGATRON_2021, gemm=0.85, passes=2.0, links=0.8, logits=30.0, gradient=4, attention=FLASH3)
# What PyTorch holds. A logit: in 16 bits, and in 32 its logarithm and two gradients, of the loss and through softmax;
# sharded over tp also its exponential (torch.distributed.tensor.parallel.loss). What tp has gathered is saved as it is.
FSDP2 = {"pieces": 1, "state_held": 10.0, "logits_held": 14.0, "logits_held_tp": 18.0, "keeps_gathered": True,
         "grown": True}  # fmt: skip
# Where fits begin: what papers and documentation say.
BEGIN = (
    MEGATRON_2021,
    # NeMo's recipes add up and reduce gradients in bfloat16: so it is that the memory they print is what they hold.
    replace(MODERN, name="megatron-core", passes=2.2, tp_seen=0.3, launch=30e-6, overlapped=True, slowdown=SLOWDOWN,
            bucket=40e6, bucket_a_rank=1e6, grouped=0.8, gradient=2, gradient_held=2.0, fused_gate=True,
            logits_held=8.0, saved8=True, reserve=0.02, zero_in_pipeline=1),
    # FSDP1 under Composer, flash attention of 2023; its fused cross entropy works in place.
    replace(MODERN, name="fsdp-eager", passes=4.0, attention=0.25, slowdown=SLOWDOWN, pieces=1, gradient=2,
            state_held=10.0, logits_held=4.0, grown=True),
    replace(MODERN, name="fsdp2-eager", **FSDP2, passes=3.0, attention=FLASH2, slowdown=SLOWDOWN),
    # torchtitan and its like: a gather along the sequence is copied once more, so tp is seen longer than it travels.
    replace(MODERN, name="fsdp-compiled", **FSDP2, passes=1.5, tp_seen=1.5, attention=FLASH2, slowdown=SLOWDOWN,
            fused_gate=True, reserve=0.06),
    # NeMo Automodel: FSDP2, its recipes train in bfloat16 throughout.
    replace(MODERN, name="automodel", passes=1.5, slowdown=SLOWDOWN, pieces=1, gradient=2, gradient_held=2.0,
            state_held=4.0, fused_gate=True, logits_held=8.0, launch=30e-6, grouped=0.8, at_once=True,
            once_a_node=True),
    # Gradients of 2 bytes beside the sums of 4, as its `FP32GradientAccumulator` has them; messages by tensor.
    replace(MODERN, name="nanotron", passes=3.0, attention=FLASH2, launch=8e-6, pieces=2, gradient_held=6.0,
            keeps_gathered=True, balances=True),
    replace(MODERN, name="maxtext", passes=1.5, slowdown=SLOWDOWN, pieces=1, state_held=10.0, fused_gate=True),
    replace(MODERN, name="deepspeed", passes=3.0, attention=FLASH2, pieces=1, bucket=5e8),
    # This project, of which no run on a cluster is published: as eager as FSDP2, whose constants it has.
    replace(MODERN, name="here", passes=3.0, attention=FLASH2, slowdown=SLOWDOWN, overlapped=True,
            schedules=("1f1b", "interleaved", "zb-h1", "zb-v", "dualpipev"), exchanges=True),
)  # fmt: skip
# And where they end: `cluster/accuracy.py` fits them, tests/cluster/test_published_runs.py fits them again.
CONSTANTS: dict[str, tuple[float, ...]] = {
    "megatron-2021": (0.70, 2.47, 0.82),
    "megatron-core": (0.8270, 0.5724, 0.1522, 3.220e-05),
    "fsdp-eager": (0.8750, 2.564, 0.2081, 0.5527),
    "fsdp2-eager": (0.6591, 3.194),
    "fsdp-compiled": (0.7639, 2.050, 1.947, 0.1275),
    "automodel": (0.8555, 1.169, 3.0e-05, 0.2778),
    "nanotron": (0.6482, 2.071, 0.6333),
    "maxtext": (0.9247, 0.1843),
    "deepspeed": (0.85, 3.0),
    "here": (0.6591, 3.194),
}
# To how many published runs, all of H100 but the first; 0: none is, its constants are of another program or of papers.
FITTED_TO = {"megatron-2021": 10, "megatron-core": 69, "fsdp-eager": 52, "fsdp2-eager": 2, "fsdp-compiled": 7,
             "automodel": 5, "nanotron": 23, "maxtext": 4, "deepspeed": 0, "here": 0}  # fmt: skip
BORROWED = {"deepspeed": "papers and its documentation", "here": "fsdp2-eager"}
BY_NAME = {software.name: software for software in BEGIN}
NAMED = {
    name: replace(BY_NAME[name], **dict(zip(names, CONSTANTS[name], strict=True))) for name, names in FITTED.items()
}


def constants_of(name: str) -> str:
    """Where a program's constants come from, in words."""
    if name in BORROWED:
        return f"borrowed from {BORROWED[name]}; no published run of {name} says enough to fit them"
    return f"fitted to {FITTED_TO[name]} published runs"


def with_features(software: Software, features: tuple[str, ...], bits: int = 16) -> Software:
    """The same program told to do more, by the words of `rows.FEATURES`."""
    changes: dict[str, object] = {"bits": bits}
    if "async-tp" in features:
        changes["tp_seen"] = software.tp_seen / 2  # half of the messages, the products' own: others do not wait
    if "ep-overlap" in features:
        changes["ep_seen"] = EP_OVERLAPPED
    if "deepep" in features:
        changes["once_a_node"] = True
    # Both moments in 2 bytes (2412.19437, section 3.3.2); of the master weight Megatron-Core's optimizer then keeps the
    # 2 bytes that the weight has not.
    if "small-moments" in features:
        changes["state_held"] = software.state_held - 6
    if "regathers" in features:
        changes["keeps_gathered"] = False
    if "graphs" in features:
        changes["launch"] = 0.0
    return replace(software, **changes)
