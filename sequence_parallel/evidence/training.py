"""Versions of a technique in training, beside one process, and what each has sent for a layer."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.gradients import clip_and_total, sum_gradients
from core.ledger import Ledger, Traffic
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.precision import MasterOptimizer
from core.model.seeded import SampleMasks
from core.model.sharding import parameters_on_a_rank
from core.proof.comparison import claim_equal, claim_replicated_parameters
from core.proof.lesson import Run
from core.proof.oracle import Oracle
from core.proof.trainable import Replica
from core.proof.training import train
from core.shards import counted_once
from sequence_parallel.context import SequenceAttention, loss_of, parallelize
from sequence_parallel.engine import layers
from sequence_parallel.engine.recompute import recompute

Sent = Mapping[tuple[str, str], Traffic]


@dataclass
class Version:
    """One version of a technique in training, and what this rank sends for it."""

    replica: Replica
    forward: Ledger
    total: Ledger

    @property
    def model(self) -> GPT:
        return self.replica.model


def version(
    run: Run,
    model: GPT,
    axis: Axis,
    loss: Callable[[Tensor, Tensor], Tensor],
    sum_gradients: Callable[[GPT, Axis], None],
    counts: bool = True,
) -> Version:
    """Make a model that is already parallelized ready to train.

    Args:
        model: this rank's shards, on the meta device.
        loss: this rank's share of the loss, of inputs and targets of the global batch.
        sum_gradients: after backward, over the ranks.
        counts: whether this rank's loss is counted. Of a loss that is equal on all ranks one is.
    """
    materialize(model, run.args.seed, run.job.device, run.precision)
    masks, forward, total = use_masks(model, SampleMasks(run.args.seed)), Ledger(), Ledger()

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        masks.seek(step)
        with axis.ledger.recording_to(total):
            with total.recording_to(forward):
                share = loss(inputs, targets)
            share.backward()
            sum_gradients(model, axis)
        return share.detach() if counts else torch.zeros_like(share)

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], largest, share)

    adamw = partial(torch.optim.AdamW, lr=run.args.lr)
    optimizer = MasterOptimizer(model.parameters(), adamw, run.precision.master)
    return Version(Replica(model, optimizer, forward_backward, clip), forward, total)


def tensor_version(
    run: Run,
    config: GPTConfig,
    axis: Axis,
    parallelize: Callable[[GPT, Axis], GPT],
    token_loss: Callable[[Tensor, Tensor, int, Axis, int], Tensor],
    sum_replicated_gradients: Callable[[GPT, Axis, Axis], None],
    of_all_tokens: bool = True,
) -> Version:
    """Megatron's sequence parallelism: the model and the sequence between its layers, over `axis`.

    Args:
        of_all_tokens: whether `token_loss` is that of all tokens, equal on all ranks; or of this rank's only.
    """
    model = parallelize(GPT(config), axis)

    def share(inputs: Tensor, targets: Tensor) -> Tensor:
        return token_loss(model(inputs), targets, targets.numel(), axis, config.vocabulary)

    same_heads, _ = axis.split(config.kv_copies(axis.size))
    sums = partial(sum_replicated_gradients, same_heads=same_heads)
    return version(run, model, axis, share, sums, not of_all_tokens or axis.index == 0)


def tensor_engine(
    run: Run, config: GPTConfig, axis: Axis, token_loss: Callable[..., Tensor], kind: str = "none",
    of_all_tokens: bool = True,
) -> Version:  # fmt: skip
    """`tensor_version` of the engine, with its recomputation."""

    def parallelize(model: GPT, axis: Axis) -> GPT:
        return recompute(layers.parallelize(model, axis), kind)

    return tensor_version(run, config, axis, parallelize, token_loss, layers.sum_replicated_gradients, of_all_tokens)


def context_version(run: Run, config: GPTConfig, attention: SequenceAttention, axis: Axis) -> Version:
    """The sequence over `axis`, attention included."""
    model = parallelize(GPT(config), attention)
    return version(run, model, axis, partial(loss_of, model, attention), sum_all_gradients)


def sum_all_gradients(model: GPT, axis: Axis) -> None:
    sum_gradients(model.parameters(), axis.labelled("gradients"))


def compare(run: Run, config: GPTConfig, axis: Axis, versions: Mapping[str, Version]) -> None:
    """Train all versions beside one process, and claim that each equals it, and that its ranks stay equal."""
    run.mesh = {axis.name: axis.size}
    optimizer = partial(torch.optim.AdamW, lr=run.args.lr)
    first = run.job.rank == 0
    oracle = Oracle(config, run.args.seed, run.job.device, optimizer, run.args.clip) if first else None
    compared = train(run, {name: each.replica for name, each in versions.items()}, oracle)
    run.formula = held_by_formula(run, config, axis)
    if oracle:
        claim_equal(run, compared)
    claim_replicated_parameters(run, {name: each.model for name, each in versions.items()})


def held_by_formula(run: Run, config: GPTConfig, axis: Axis) -> tuple[str, list[float]]:
    """Bytes of weights, gradients and Adam: sharded by tensor parallelism, by context parallelism on every rank."""
    each = run.precision.bytes
    if axis.name == "tp":
        expected, what = parameters_on_a_rank(config, axis.size) * each, "(sharded / t + replicated)"
    else:
        expected, what = sum(p.numel() for p in GPT(config).parameters()) * each, "Ψ, on every rank"
    return f"{each} bytes x {what} = {expected:,}", [expected] * axis.size


class LayerTraffic:
    """What each rank has sent in a step of the training, by version; on rank 0."""

    def __init__(self, run: Run, config: GPTConfig, versions: Mapping[str, Version]):
        self.run, self.layers = run, config.layers
        self.everyone: list[dict[str, tuple[Sent, Sent]]] = run.job.gather(
            {name: (each.forward.traffic, each.total.traffic) for name, each in versions.items()}
        )

    def claim(
        self,
        claim: str,
        formula: str,
        expected: float | Mapping[str, float],
        operations: Collection[str],
        direction: str = "forward",
        what: str = "elements",
        label: str = "",
    ) -> list[float]:
        """Claim what is sent for a layer, or over the axis with this `label`, in a step.

        Args:
            expected: of all versions, or by version of those about which the claim is.
            direction: "forward", "backward" or "both".
            what: "elements" or "messages".
            label: of the axis: of one part of the model; without it all with these operations is for layers.

        Returns:
            of every rank, in the last version, on rank 0.
        """
        cases, measured = [], []
        names = list(self.everyone[0]) if self.everyone else []
        by_version = expected if isinstance(expected, Mapping) else dict.fromkeys(names, expected)
        times = self.run.args.steps * (self.layers if label in ("", "layers") else 1)
        for name, right in by_version.items() if names else ():
            measured = []
            for rank, sent in enumerate(self.everyone):
                forward, both = (count(each, operations, what, label) / times for each in sent[name])
                measured.append({"forward": forward, "backward": both - forward, "both": both}[direction])
                cases.append((f"{claim} ({name}), rank {rank}", right, measured[-1]))
        if cases:
            self.run.evidence.each(claim, f"{formula}; counted", cases, 1e-9 * max(by_version.values()))
        return measured


def count(sent: Sent, operations: Collection[str], what: str = "elements", label: str = "") -> float:
    """The elements, or messages, of these operations, over the axes whose name ends with `label`."""
    found = [traffic for (operation, axis), traffic in sent.items() if operation in operations and axis.endswith(label)]
    return sum(getattr(traffic, what) for traffic in found)
