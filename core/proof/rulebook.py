"""The rules that several topics share, each stated once. Lessons, planner and training apply these same objects.

A case has the sizes under the names of their flags (`heads`, `feed_forward`, `sequence`, `batch`, `microbatches`,
`experts`), those of the axes (`tp cp dp pp ep etp`), and what follows from them: `ranks` tp x cp x dp x pp, `inside`
tp x cp x dp, the ranks of one pipeline stage, `stages` of the pipeline. `world` is how many ranks are running.
"""

from math import gcd
from typing import Any

from core.proof.rules import Rule, at_least, nearest_multiple

# ---- The model -------------------------------------------------------------------------------------------------------


def usable_heads(case: Any) -> str:
    """The next smaller number of heads that divides hidden."""
    return f"--heads {max(a for a in range(1, min(case.heads, case.hidden) + 1) if case.hidden % a == 0)}"


HEADS = Rule(
    "heads",
    "--heads {heads}",
    lambda case: case.head_size is not None or case.hidden % case.heads == 0,
    "must divide --hidden {hidden}, so that heads are equal",
    usable_heads,
    "core.model.gpt",
    peer="Megatron-LM, validate_args: hidden_size % num_attention_heads",
)
ATTENTION = Rule(
    "attention",
    "--attention {attention}",
    lambda case: case.attention in ("sdpa", "softmax"),
    "must be sdpa or softmax",
    lambda case: "--attention sdpa",
    "core.model.gpt",
)
DROPOUT_SHARE = Rule(
    "dropout: a share",
    "--dropout {dropout}",
    lambda case: 0.0 <= case.dropout < 1.0,
    "must be in [0, 1)",
    lambda case: "--dropout 0.1",
    "core.model.gpt",
)
DROPOUT = Rule(
    "dropout",
    "--dropout {dropout}",
    lambda case: not case.dropout or case.attention == "softmax",
    "the masks drawn inside sdpa depend on the layout",
    lambda case: "--attention softmax",
    "core.model.gpt",
    peer="cannot be: sdpa draws a mask from the generator of its device, which no other layout has",
)
ONE_EXPERT = Rule(
    "experts: one",
    "--top-k {top_k}",
    lambda case: not case.experts or case.top_k >= 1,
    "a token needs an expert",
    lambda case: "--top-k 1",
    "2101.03961, section 2.1",
    peer="cannot be: what has no expert computes nothing",
)
TOP_K = Rule(
    "experts: top k",
    "--top-k {top_k}",
    lambda case: case.top_k <= case.experts,
    "a token cannot choose more than the --experts {experts}",
    lambda case: f"--top-k {case.experts}",
    "2101.03961, section 2.1",
    peer="torch.topk: selected index k out of range",
)
NORM = Rule(
    "norm",
    "norm {norm!r}",
    lambda case: case.norm in ("layer", "rms"),
    "must be layer or rms",
    lambda case: "norm 'layer'",
    "core.model.gpt",
)
KV_HEADS = Rule(
    "key and value heads",
    "--kv-heads {kv_heads}",
    lambda case: case.heads % case.query_groups == 0,
    "must divide --heads {heads}, so that each is read by as many query heads",
    lambda case: f"--kv-heads {gcd(case.heads, case.query_groups)}",
    "2305.13245, section 2.2",
)
ROTARY_PAIRS = Rule(
    "rotary positions",
    "head_size {head_size}",
    lambda case: case.learned_positions or case.rotary_dim % 2 == 0,
    "the size of a head must be even, because rotary positions turn pairs of features",
    lambda case: f"head_size {case.head_dim + 1}",
    "2104.09864, section 3.2",
)
SIZES = tuple(at_least(size, 1, 8) for size in ("vocabulary", "sequence", "hidden", "layers", "heads"))
MODEL = (*SIZES, HEADS, ATTENTION, DROPOUT_SHARE, DROPOUT, at_least("feed-forward", 0, 0), NORM)
DECODER = (KV_HEADS, ROTARY_PAIRS)  # of what is built

# ---- Ranks -----------------------------------------------------------------------------------------------------------


def axis(name: str) -> Rule:
    """An axis of the mesh."""
    return Rule(
        f"{name}: ranks",
        f"--{name} {{{name}}}",
        lambda case: getattr(case, name) >= 1,
        "an axis has at least one rank",
        lambda case: f"--{name} 1",
        "core.mesh",
    )


AXES = tuple(map(axis, ("tp", "cp", "dp", "pp", "ep", "etp")))
RANKS = Rule(
    "ranks",
    "--tp {tp} --cp {cp} --dp {dp} --pp {pp}",
    lambda case: case.ranks == case.world,
    "tp x cp x dp x pp = {ranks} ranks, but {world} are running",
    lambda case: f"torchrun --nproc_per_node={case.ranks}",
    "core.mesh",
    peer="torchtitan, ParallelDims._validate: the product must be WORLD_SIZE",
)
EXPERT_RANKS = Rule(
    "experts: ranks",
    "--ep {ep} --etp {etp}",
    lambda case: case.inside % (case.ep * case.etp) == 0,
    "ep x etp must divide tp x cp x dp = {inside}",
    lambda case: "--ep 1 --etp 1",
    "core.mesh",
    peer="torchtitan, ParallelDims._validate: expert_parallel_degree must divide dp_shard * cp * tp",
)

# ---- Equal shards ----------------------------------------------------------------------------------------------------

EQUAL = "what is sharded must be a multiple of the {tp} ranks, so that each gets as much"
BATCH = Rule(
    "batch",
    "--batch {batch}",
    lambda case: case.batch % (case.dp * case.microbatches) == 0,
    "must be a multiple of {dp} ranks x --microbatches {microbatches}, so that all micro-batches are equal",
    lambda case: f"--batch {nearest_multiple(case.batch, case.dp * case.microbatches)}",
    "lecture 01",
    peer="Megatron-LM, num_microbatches_calculator.py: not divisible by micro batch size times data parallel size",
)
TP_HEADS = Rule(
    "tp: heads",
    "--tp {tp} --heads {heads}",
    lambda case: case.heads % case.tp == 0,
    EQUAL,
    lambda case: f"--heads {nearest_multiple(case.heads, case.tp)}",
    "1909.08053, section 3",
    peer="Megatron-LM, TransformerConfig.__post_init__: num_attention_heads % tensor_model_parallel_size",
)


def fits_kv_heads(kv_heads: int, tp: int) -> bool:
    """Whether each rank has equally many whole heads of keys and values; several ranks may have the same one."""
    return kv_heads % tp == 0 or tp % kv_heads == 0


def usable_kv_heads(case: Any) -> int:
    """The nearest number that divides the heads, and fits the ranks."""
    fitting = [k for k in range(1, case.heads + 1) if case.heads % k == 0 and fits_kv_heads(k, case.tp)]
    return min(fitting, key=lambda k: abs(k - case.query_groups))


TP_KV_HEADS = Rule(
    "tp: key and value heads",
    "--tp {tp} --kv-heads {query_groups}",
    lambda case: case.latent is not None or fits_kv_heads(case.query_groups, case.tp),
    "must be a multiple of the {tp} ranks or divide them, so that each has whole heads, or as many have the same one",
    lambda case: f"--kv-heads {usable_kv_heads(case)}",
    "Megatron-LM, num_query_groups",
    peer="Megatron-LM, TransformerConfig: num_query_groups must be a multiple or divisor of tensor_model_parallel_size",
)
TP_FEED_FORWARD = Rule(
    "tp: feed-forward",
    "--tp {tp} --feed-forward {feed_forward}",
    lambda case: case.feed_forward % case.tp == 0,
    EQUAL,
    lambda case: f"--feed-forward {nearest_multiple(case.feed_forward, case.tp)}",
    "1909.08053, section 3",
    peer="Megatron-LM, ColumnParallelLinear: divide(output_size, world_size)",
)
TENSOR = (TP_HEADS, TP_KV_HEADS, TP_FEED_FORWARD)
SP_SEQUENCE = Rule(
    "sp: sequence",
    "--sp --tp {tp} --cp {cp} --sequence {sequence}",
    lambda case: not case.sp or case.sequence % (case.tp * case.cp) == 0,
    EQUAL,
    lambda case: f"--sequence {nearest_multiple(case.sequence, case.tp * case.cp)}",
    "2205.05198, 4.2.2",
    peer="Megatron-LM, mappings.py: first dimension should be divisible by tensor parallel size",
)


def expert_ranks_fit(size: int, ranks: int, among: int) -> bool:
    """Whether so many of the ranks have equal shards of what an expert layer shards, and are equal groups."""
    return ranks == 1 or (ranks > 1 and size > 0 and among % ranks == 0 and size % ranks == 0)


def usable_etp(case: Any) -> str:
    """The largest smaller one that fits, beside --ep where it is given."""
    both = gcd(case.inside, case.expert_size)
    fitting = [e for e in range(1, case.etp) if both % e == 0 and case.inside // e % max(1, case.ep) == 0]
    return f"--etp {max(fitting, default=1)}"


ETP_FEATURES = Rule(
    "experts: etp",
    "--etp {etp}",
    lambda case: case.etp == 1 or (case.experts > 0 and expert_ranks_fit(case.expert_size, case.etp, case.inside)),
    "must divide the {inside} ranks and the {expert_size} features of an expert",
    usable_etp,
    "CODE 04",
    peer="Megatron-LM, ColumnParallelLinear of an expert: divide(output_size, world_size)",
)
EP_EXPERTS = Rule(
    "experts: ep",
    "--ep {ep}",
    lambda case: expert_ranks_fit(case.experts, case.ep, case.inside // case.etp),
    "must divide the {inside} ranks / --etp {etp} and the --experts {experts}, so that each rank has as many",
    lambda case: f"--ep {gcd(case.experts, case.inside // case.etp)}",
    "2006.16668, section 3",
    peer="Megatron-LM, validate_args: num_experts % expert_model_parallel_size",
)

# ---- GPUs that ranks share -------------------------------------------------------------------------------------------

# Of a machine: `gpus`, and its `local_ranks`.
SHARED_GPU = (
    Rule(
        "share GPU: device",
        "--share-gpu --device {device}",
        lambda case: case.device == "cuda",
        "ranks share a GPU only where one is asked for",
        lambda case: "--device cuda --share-gpu",
    ),
    Rule(
        "share GPU: one",
        "--share-gpu",
        lambda case: case.gpus > 0,
        "this machine has no GPU to share",
        lambda case: "--device cpu, without --share-gpu",
    ),
    Rule(
        "share GPU: few",
        "--share-gpu",
        lambda case: case.gpus < case.local_ranks,
        "there are {gpus} GPUs for {local_ranks} ranks on this machine, and each rank has its own",
        lambda case: "--device cuda without --share-gpu",
    ),
)
