"""What the lessons on long sequences share: train a GPT whose sequence is cut beside one process, and measure.

b samples, s tokens in a sample, h hidden, a heads, c ranks
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from core.gradients import clip_and_total, sum_gradients
from core.ledger import Ledger, Traffic
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.seeded import generator
from core.proof.clock import Event, VirtualClock
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from core.proof.oracle import Oracle
from core.proof.training import Comparison, Replica, claim_replicated_parameters, train
from core.shards import counted_once
from sequence_parallel.context import SequenceAttention, parallelize, part

Sent = dict[tuple[str, str], Traffic]
# From dense attention of the same type. In bfloat16 each rounds several times, every time by up to 2^-8 = 0.004.
DIFFERENCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Trained:
    """A rank's model after the training, and what this rank has sent."""

    model: GPT
    worst: Comparison  # filled on rank 0
    forward: Ledger
    total: Ledger


def train_with(run: Run, config: GPTConfig, attention: SequenceAttention, axis: Axis) -> Trained:
    """Train with the sequence cut over `axis`, beside one process."""
    args, job, forward, both = run.args, run.job, Ledger(), Ledger()
    run.mesh = {"cp": axis.size}
    model = materialize(parallelize(GPT(config), attention), args.seed, job.device, run.dtype)
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        with both.recording_to(forward):
            logits = model(part(inputs, attention))
        loss = token_loss(logits, part(targets, attention), targets.numel())  # of the tokens of all ranks
        loss.backward()
        sum_gradients(model.parameters(), axis.labelled("gradients"))
        return loss.detach()

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], largest, share)

    with axis.ledger.recording_to(both):
        replica = Replica(model, optimizer_of(model.parameters()), forward_backward, clip)
        worst = train(run, {"": replica}, oracle)[""]
    return Trained(model, worst, forward, both)


def teach(run: Run, config: GPTConfig, attention: SequenceAttention, axis: Axis) -> Trained:
    """Train, and claim that it equals one process, that the ranks stay one, and what summing the gradients sends."""
    trained = train_with(run, config, attention, axis)
    if run.job.rank == 0:
        trained.worst.claim(run)
    claim_replicated_parameters(run, trained.model)
    everyone = run.job.gather(trained.total.traffic["all-reduce", f"{axis.name} gradients"].elements / run.args.steps)
    if everyone:
        size, c = sum(p.numel() for p in trained.model.parameters()), axis.size
        expected = 2 * (c - 1) / c * size
        formula = f"2Ψ(c-1)/c = {expected:,.0f}, Ψ = {size:,}"
        run.evidence.on_ranks("elements sent to sum all gradients, a step", formula, expected, everyone, 1e-9 * size)
    return trained


class Layer:
    """What each rank has sent for a layer in a step of the training; on rank 0."""

    def __init__(self, run: Run, config: GPTConfig, trained: Trained):
        self.run, self.times = run, config.layers * run.args.steps
        self.everyone: list[tuple[Sent, Sent]] = run.job.gather((trained.forward.traffic, trained.total.traffic))

    def claim(self, claim: str, formula: str, expected: float, names: Collection[str], backward: bool = False,
              messages: bool = False) -> list[float]:  # fmt: skip
        """The elements, or messages, of the operations of these names, in forward or backward.

        Returns:
            of every rank, on rank 0.
        """
        measured = []
        for forward, both in self.everyone:
            ahead, total = (count(sent, names, messages) / self.times for sent in (forward, both))
            measured.append(total - ahead if backward else ahead)
        if measured:
            self.run.evidence.on_ranks(claim, formula, expected, measured, 1e-9 * expected)
        return measured


def count(sent: Sent, names: Collection[str], messages: bool = False) -> float:
    """The elements, or messages, of the operations of these names, over all axes."""
    found = (traffic for (operation, _), traffic in sent.items() if operation in names)
    return sum(each.messages if messages else each.elements for each in found)


def spans(where: Tensor) -> str:
    """Runs of neighbouring tokens, as first-last."""
    positions = where.tolist()
    starts = [p for p in positions if p - 1 not in positions]
    ends = [p for p in positions if p + 1 not in positions]
    return " ".join(f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


# ---- Attention by itself ---------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of Q, and of K and V, over all ranks."""

    samples: int
    heads: int
    kv_heads: int
    sequence: int
    head_size: int


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that an operation makes within."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {storage_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tree_iter(made) if isinstance(t, Tensor) and storage_of(t) not in given]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in new)])
        return made


def storage_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@dataclass
class Measured:
    """Forward and backward of attention on one rank."""

    forward: Sent
    both: Sent
    saved: int  # bytes that autograd keeps for backward
    largest: int  # elements of the largest tensor made
    squares: Tensor  # of the differences from dense attention, and of that: the output and three gradients, (4, 2)
    ahead: list[Event]  # of a ring in forward, in virtual time
    back: list[Event]  # and in backward


def measure(run: Run, attention: SequenceAttention, axis: Axis, shape: Shape, dtype: torch.dtype) -> Measured:
    """Compute the attention of random numbers, forward and backward, and compare with one process of the same type."""
    b, a, kv, s, d = shape
    sizes = ((b, a, s, d), (b, kv, s, d), (b, kv, s, d), (b, a, s, d))
    numbers = [torch.randn(size, dtype=torch.float64, generator=generator(run.args.seed, "alone", i))
               for i, size in enumerate(sizes)]  # fmt: skip
    *whole, gradient = (x.to(run.job.device, dtype) for x in numbers)
    here = attention.positions(s).to(run.job.device)
    mine = [x[:, :, here].requires_grad_() for x in whole]
    innermost, clock = getattr(attention, "inner", attention), VirtualClock(run.job.device)
    innermost.clock = clock
    forward, both, saved, largest = Ledger(), Ledger(), SavedActivations([]), LargestTensor()
    with axis.ledger.recording_to(both), largest:
        with both.recording_to(forward), saved:
            out = attention(*mine)
        kept, ahead = saved.live, len(clock.events)
        out.backward(gradient[:, :, here])
    innermost.clock = None
    dense = [x.requires_grad_() for x in whole]
    expected = F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=a != kv)
    expected.backward(gradient)
    pairs = [(out.detach(), expected.detach())] + [(x.grad, y.grad) for x, y in zip(mine, dense, strict=True)]
    compared = [(x.double() - y[:, :, here].double(), y[:, :, here].double()) for x, y in pairs]
    squares = torch.stack([torch.stack([x.square().sum() for x in each]) for each in compared]).cpu()
    return Measured(
        forward.traffic, both.traffic, kept, largest.elements, squares, clock.events[:ahead], clock.events[ahead:]
    )


def claim_difference(
    run: Run, what: str, attention: SequenceAttention, axis: Axis, shape: Shape, dtype: torch.dtype
) -> list[Measured]:
    """Measure, and claim what `claim_dense` does.

    Returns:
        every rank's, on rank 0.
    """
    everyone = run.job.gather(measure(run, attention, axis, shape, dtype))
    if everyone:
        claim_dense(run, what, everyone, dtype)
    return everyone


def claim_dense(run: Run, what: str, everyone: Collection[Measured], dtype: torch.dtype) -> None:
    """Output and gradients, of all ranks together, equal those of dense attention in one process.

    Together, because a rank's part may be 0 but for rounding: so is the gradient of a first query, which sees one key.
    """
    apart, whole = sum(each.squares for each in everyone).unbind(1)
    worst = (apart / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt().max().item()
    claim = f"{what}: output and gradients of dense attention"
    run.evidence.claim(claim, f"relative difference 0, within {DIFFERENCE[dtype]:g}", 0, worst, DIFFERENCE[dtype])


def claim_saved(run: Run, everyone: Collection[Measured], shape: Shape, c: int) -> None:
    """Q, K, V, the output, and a number a token and head: nothing that grows with the square of the sequence."""
    b, a, _, s, d = shape
    wide = torch.promote_types(run.dtype, torch.float32).itemsize
    expected = (4 * b * s * a * d * run.dtype.itemsize + b * a * s * wide) / c
    formula = f"(4bsh of {run.dtype.itemsize} bytes + bas of {wide})/c = {expected:,.0f}"
    run.evidence.on_ranks("bytes attention keeps for backward", formula, expected, [each.saved for each in everyone])
