"""Train the plain version and the engine of a lesson of lecture 01 beside one process, and measure what a rank sends.

Ψ parameters, N ranks, m micro-batches a step
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.comparison import claim_equal
from core.proof.figures import bars
from core.proof.flight import FLIGHT
from core.proof.lesson import Lesson, Run
from core.proof.memory import live_bytes
from core.proof.oracle import Oracle
from core.proof.rules import check as check_rules
from core.proof.training import train
from core.shards import LocalTensor, shard_of
from zero.engine.buckets import Bucket
from zero.engine.engine import Engine, MakeOptimizer
from zero.evidence.pictures import draw_owned
from zero.evidence.rules import RULES


def add_flags(lesson: Lesson) -> None:
    add_model_flags(lesson, layers=4, hidden=40, heads=4, sequence=24)
    lesson.parser.set_defaults(steps=8)
    flag = lesson.parser.add_argument
    flag("--microbatches", type=int, default=2, help="micro-batches of a rank in a step (default %(default)s)")
    flag("--bucket", type=int, default=2**16, help="elements in a bucket, about (default %(default)s)")


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the batch cannot be dealt out equally, or another flag does not fit."""
    check_model(args)
    check_rules(argparse.Namespace(**vars(args), ranks=ranks, dp=ranks), RULES)


# ---- What is trained -------------------------------------------------------------------------------------------------


class Technique(Protocol):
    """The plain version in a lesson."""

    optimizer: torch.optim.Optimizer  # over this rank's shards, which have their gradients after `forward_backward`

    def __init__(self, model: GPT, axis: Axis, make_optimizer: MakeOptimizer, master: torch.dtype): ...

    def forward_backward(self, microbatches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Tensor: ...

    def step(self) -> None: ...


class Data:
    """The samples of a global batch that are this rank's."""

    def __init__(self, run: Run, axis: Axis, masks: SampleMasks):
        self.axis, self.masks, self.m = axis, masks, run.args.microbatches
        self.samples = run.args.batch // (axis.size * self.m)  # of a micro-batch
        self.tokens = run.args.batch * run.args.sequence

    def microbatches(self, step: int, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(samples, S) each, of the global batch's."""
        for microbatch in range(self.m):
            first = (self.axis.index * self.m + microbatch) * self.samples
            self.masks.seek(step, first)
            FLIGHT.at("forward", microbatch)
            mine = slice(first, first + self.samples)
            yield inputs[mine], targets[mine]


class Plain:
    """A lesson's plain version, as `core.proof.training.train` trains and compares it."""

    compares_states = True

    def __init__(self, run: Run, axis: Axis, technique: Callable[..., Technique]):
        self.model, self.data, self.axis = *make_model(run, axis), axis
        self.gradient_types = watch_gradient_types(self.model)
        names = {p: name for name, p in self.model.named_parameters()}
        self.dtype = run.dtype
        self.technique = technique(self.model, axis, optimizer_of(run), run.precision.master)
        self.step = self.technique.step
        in_optimizer = [p for group in self.technique.optimizer.param_groups for p in group["params"]]
        self.shards = getattr(self.technique, "shards", in_optimizer)
        units = getattr(self.technique, "units", None)  # where there are several flat buffers
        self.replicated = hasattr(self.technique, "weights")  # else each unit is gathered and freed
        self.buckets = []
        for unit, shard in zip(units or [list(self.model.parameters())], self.shards, strict=True):
            size = sum(p.numel() for p in unit)
            self.buckets.append(Bucket([(names[p], p) for p in unit], 1 if len(shard) >= size else axis.size))
        self.shards_optimizer = any(bucket.padded > bucket.length for bucket in self.buckets)
        self.most_weights = watch_weights(self.model)

    def zero_grad(self) -> None:
        """`forward_backward` begins with it."""

    def forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.technique.forward_backward(self.data.microbatches(step, inputs, targets), self.data.tokens)

    def clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        counted = [p.grad for p in self.shards] if self.shards_optimizer or self.axis.index == 0 else []
        return clip_and_total(self.shards, counted, [self.axis], largest, share)

    def gradients(self) -> list[LocalTensor]:
        return self._local(p.grad.clone() for p in self.shards)  # as they are before clipping

    def weights(self) -> list[LocalTensor]:
        if self.replicated:
            return [LocalTensor(name, p.detach(), shard_of(p)) for name, p in self.model.named_parameters()]
        return self._local(p.detach().to(self.dtype) for p in self.shards)

    def master_weights(self) -> list[LocalTensor]:
        return self._local(p.detach() for p in self.shards)

    def guide(self, run: Run, oracle: Oracle | None) -> None:
        """There is nothing discrete."""

    def states(self) -> list[LocalTensor]:
        found = []
        for bucket, shard in zip(self.buckets, self.shards, strict=True):
            for key, value in self.technique.optimizer.state[shard].items():
                of_one_size = value if value.dim() else torch.zeros_like(shard)
                for name, own, mark in bucket.local_tensors(self._index(bucket), of_one_size):
                    # Adam counts the steps of all parameters at once.
                    found.append(LocalTensor((name, key), *((own, mark) if value.dim() else (value, None))))
        return found

    def memory_bytes(self) -> dict[str, int]:
        state = [v for values in self.technique.optimizer.state.values() for v in values.values() if v.dim()]
        return {
            "weights": live_bytes(self.model.parameters()),
            "gradients": live_bytes(p.grad for p in self.shards if p.grad is not None),
            "optimizer": live_bytes([*self.shards, *state]),
        }

    def _local(self, shards: Iterable[Tensor]) -> list[LocalTensor]:
        pairs = zip(self.buckets, shards, strict=True)
        return [t for bucket, shard in pairs for t in bucket.local_tensors(self._index(bucket), shard)]

    def _index(self, bucket: Bucket) -> int:
        return self.axis.index if bucket.padded > bucket.length else 0


class Fast:
    """A lesson's engine, as `core.proof.training.train` trains and compares it."""

    compares_states = True

    def __init__(self, run: Run, axis: Axis, make_engine: Callable[..., Engine]):
        self.model, self.data, self.axis = *make_model(run, axis), axis
        self.gradient_types = watch_gradient_types(self.model)
        options = {"master": run.precision.master, "elements": run.args.bucket}
        self.engine = engine = make_engine(self.model, axis, optimizer_of(run), **options)
        self.buckets = engine.buckets
        self.zero_grad, self.step, self.clip = engine.zero_grad, engine.step, engine.clip_and_total
        self.gradients, self.weights, self.states = engine.gradients, engine.weights, engine.states
        self.master_weights = engine.master_weights
        self.memory_bytes = engine.memory_bytes
        self.most_weights = watch_weights(self.model)

    def guide(self, run: Run, oracle: Oracle | None) -> None:
        """There is nothing discrete."""

    def forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        share = torch.zeros((), device=inputs.device)
        for i, (x, y) in enumerate(self.data.microbatches(step, inputs, targets), 1):
            loss = token_loss(self.model(x), y, self.data.tokens)
            self.engine.backward(loss, last=i == self.data.m)
            share = share + loss.detach()
        return share


def watch_weights(model: GPT) -> Callable[[], int]:
    """The most bytes that the parameters have had in the forward of a layer, this one's too."""
    found = [0]

    def sample(*_: object) -> None:
        found.append(max(found.pop(), live_bytes(model.parameters())))

    for block in model.blocks.values():
        block.register_forward_hook(sample)
    return lambda: found[0]


def watch_gradient_types(model: GPT) -> set[torch.dtype]:
    """In which types autograd adds up gradients from now on. Before an engine takes them away: hooks have an order."""
    found: set[torch.dtype] = set()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: found.add(p.grad.dtype))
    return found


def data_axis(run: Run) -> Axis:
    return Mesh(run.job.device.type, Ledger(), run.job.timeout, dp=run.job.world_size)["dp"]


def make_model(run: Run, axis: Axis) -> tuple[GPT, Data]:
    model = materialize(GPT(configuration(run.args)), run.args.seed, run.job.device, run.precision)
    return model, Data(run, axis, use_masks(model, SampleMasks(run.args.seed)))


def make_oracle(run: Run) -> Oracle | None:
    """On rank 0."""
    args, device = run.args, run.job.device
    return None if run.job.rank else Oracle(configuration(args), args.seed, device, optimizer_of(run), args.clip)


def optimizer_of(run: Run) -> MakeOptimizer:
    return partial(torch.optim.AdamW, lr=run.args.lr)


# ---- What is claimed -------------------------------------------------------------------------------------------------


def teach(
    run: Run,
    technique: Callable[..., Technique],
    make_engine: Callable[..., Engine],
    elements: Callable[[int, int], float],
    observe: Callable[[str, Plain | Fast], None] = lambda name, version: None,
) -> dict[str, Plain | Fast]:
    """Train both versions, and claim that they equal one process, and what they send.

    Args:
        elements: what the paper says that a rank sends in a step, in units of Ψ(N-1)/N, for (m, N).
        observe: called with each version before it trains.
    """
    axis = data_axis(run)
    run.mesh = {"dp": axis.size}
    trained = {
        "plain": Plain(run, replace(axis, ledger=Ledger()), technique),
        "engine": Fast(run, replace(axis, ledger=Ledger()), make_engine),
    }
    for name, each in trained.items():
        observe(name, each)
    compared = train(run, trained, make_oracle(run))
    sent = {name: run.job.gather(sent_in_a_step(run, each.axis)) for name, each in trained.items()}
    types = {name: run.job.gather(each.gradient_types) for name, each in trained.items()}
    if run.job.rank == 0:
        expected = elements(run.args.microbatches, axis.size)
        for name, each in trained.items():
            claim_elements(run, f", {name}", each.buckets, expected, [sum(rank.values()) for rank in sent[name]])
        series = {name: [*ranks[0].values()] for name, ranks in sent.items()}
        title = f"Sent by each of {axis.size} ranks in a step", f"{axis.size} 个 rank 中每个一步的发送量"
        run.draw(bars(title, ("elements", "元素"), [*sent["plain"][0]], series), chart=True)
        claim_equal(run, compared)
        claim_gradient_types(run, types)
    run.sent = {name: each.axis.ledger for name, each in trained.items()}
    if run.page:
        draw_owned(run, trained)
        size = sum(bucket.size for bucket in trained["engine"].buckets)
        run.formula = held_by_formula(run, size, technique.__name__)
    return trained


def held_by_formula(run: Run, size: int, technique: str) -> tuple[str, list[float]] | None:
    """What the paper's formula says of weights, gradients and optimizer on each rank, in bytes."""
    sharded = {"DataParallel": (), "Zero1": "o", "Zero2": "go", "Zero3": "wgo"}.get(technique)
    if sharded is None:
        return None
    n, precision = run.job.world_size, run.precision
    sizes = {
        "w": precision.parameters.itemsize, "g": precision.gradients.itemsize, "o": precision.optimizer_bytes
    }  # fmt: skip
    terms = [f"{each}Ψ" + "/N" * (kind in sharded) for kind, each in sizes.items()]
    expected = size * sum(each / (n if kind in sharded else 1) for kind, each in sizes.items())
    return f"{' + '.join(terms)} = {expected:,.0f}", [expected] * n


def claim_gradient_types(run: Run, types: dict[str, list[set[torch.dtype]]]) -> None:
    """A sum of a few micro-batches in 16 bits is off by no more than one of them: only its type tells. On rank 0."""
    usual = run.precision.gradients
    claim = f"gradients are added up in {str(usual).removeprefix('torch.')}"
    cases = [(f"{claim} ({name})", 0, len(set().union(*ranks) - {usual})) for name, ranks in types.items()]
    run.evidence.each(claim, "0 other types", cases, correctness=True)


def sent_in_a_step(run: Run, axis: Axis) -> dict[str, float]:
    """Elements that this rank has sent, by operation, but for the norm."""
    traffic = axis.ledger.traffic.items()
    return {operation: each.elements / run.args.steps for (operation, name), each in traffic if name == axis.name}


def claim_elements(run: Run, which: str, buckets: list[Bucket], expected: float, measured: list[float]) -> None:
    """What a rank sends in a step, in units of Ψ(N-1)/N. On rank 0."""
    n = len(measured)
    size, padded = sum(bucket.size for bucket in buckets), sum(bucket.padded for bucket in buckets)
    unit = padded * (n - 1) / n
    run.evidence.on_ranks(
        f"elements sent a step{which}",
        f"{expected:g}Ψ(N-1)/N = {expected * unit:,.0f}, Ψ = {size:,} + {padded - size} of padding; counted",
        expected * unit,
        measured,
        1e-9 * unit,
    )


def claim_gathered(run: Run, trained: dict[str, Plain | Fast]) -> None:
    """ZeRO-3: how many layers' weights there are at a time, beside both ends of the model."""
    for (name, each), layers in zip(trained.items(), (1, 2), strict=True):
        of_layers = [bucket.padded for bucket in each.buckets if bucket.members[0].name.startswith("blocks.")]
        ends = sum(bucket.padded for bucket in each.buckets) - sum(of_layers)
        expected = (ends + sum(of_layers[:layers])) * run.dtype.itemsize
        formula = f"both ends and {layers} of {len(of_layers)} layers = {expected:,}, and one element a parameter"
        more = len(list(each.model.parameters())) * run.dtype.itemsize
        everyone = run.job.gather(each.most_weights())
        if everyone:
            run.evidence.on_ranks(f"bytes of weights at the peak, {name}", formula, expected, everyone, more)
