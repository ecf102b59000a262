"""Attention over a sharded sequence by itself: what it sends, keeps and makes, and how far it is from dense attention.

b samples, s tokens in a sample, a heads, k heads of keys and values, d head size, c ranks
"""

from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPTConfig
from core.model.seeded import generator
from core.proof.clock import Event, VirtualClock
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.all_gather import OverlappedAllGather
from sequence_parallel.engine.ring import OverlappedRing
from sequence_parallel.engine.ulysses import OverlappedUlysses
from sequence_parallel.evidence.training import Sent

# From dense attention of the same type. In bfloat16 each rounds several times, every time by up to 2^-8 = 0.004.
DIFFERENCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def spans(positions: list[int]) -> str:
    """Runs of consecutive tokens, as first-last."""
    starts = [p for p in positions if p - 1 not in positions]
    ends = [p for p in positions if p + 1 not in positions]
    return " ".join(f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


class Shape(NamedTuple):
    """Of Q, and of K and V, over all ranks."""

    samples: int
    heads: int
    kv_heads: int
    sequence: int
    head_size: int

    def elements(self, queries: int, keys: int) -> int:
        """Of the whole sequence: so many tensors like Q, and so many like K or V."""
        heads = queries * self.heads + keys * self.kv_heads
        return heads * self.samples * self.sequence * self.head_size

    def on_ranks(self, u: int) -> "Shape":
        """With as many heads of keys and values as u ranks exchange: of fewer, several get the same one."""
        return self._replace(kv_heads=lcm(self.kv_heads, u))


def shape_of(config: GPTConfig, args: Namespace) -> Shape:
    """Of the model's attention."""
    return Shape(args.batch, config.heads, config.query_groups, args.sequence, config.head_dim)


class LargestTensor(TorchDispatchMode):
    """How many bytes the largest tensor has that an operation makes within; not the scratch of a kernel of torch's."""

    nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {storage_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tree_iter(made) if isinstance(t, Tensor) and storage_of(t) not in given]
        self.nbytes = max([self.nbytes, *(t.untyped_storage().nbytes() for t in new)])
        return made


def storage_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@dataclass
class Measured:
    """Forward and backward of attention on one rank."""

    forward: Sent
    both: Sent
    saved: int  # bytes that autograd keeps for backward
    largest: int  # bytes of the largest tensor made
    squares: Tensor  # of the differences from dense attention, and of that: the output and three gradients, (4, 2)
    ahead: list[Event]  # of a ring, or what gathers, in forward, in virtual time
    back: list[Event]  # and in backward


def measure(run: Run, attention: SequenceAttention, axis: Axis, shape: Shape, dtype: torch.dtype) -> Measured:
    """Compute the attention of random numbers, forward and backward, and compare with one process of the same type."""
    b, a, kv, s, d = shape
    sizes = ((b, a, s, d), (b, kv, s, d), (b, kv, s, d), (b, a, s, d))
    numbers = [torch.randn(size, dtype=torch.float64, generator=generator(run.args.seed, "alone", i))
               for i, size in enumerate(sizes)]  # fmt: skip
    *full, gradient = (x.to(run.job.device, dtype) for x in numbers)
    here = attention.positions(s).to(run.job.device)
    mine = [x[:, :, here].requires_grad_() for x in full]
    clock = VirtualClock(run.job.device)
    timed = timed_part(attention)
    if timed:
        timed.clock = clock
    forward, both, saved, largest = Ledger(), Ledger(), SavedActivations([]), LargestTensor()
    with axis.ledger.recording_to(both), largest:
        with both.recording_to(forward), saved:
            out = attention(*mine)
        kept, ahead = saved.live, len(clock.events)
        out.backward(gradient[:, :, here])
    if timed:
        timed.clock = None
    dense = [x.requires_grad_() for x in full]
    expected = F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=a != kv)
    expected.backward(gradient)
    pairs = [(out.detach(), expected.detach())] + [(x.grad, y.grad) for x, y in zip(mine, dense, strict=True)]
    compared = [(x.double() - y[:, :, here].double(), y[:, :, here].double()) for x, y in pairs]
    squares = torch.stack([torch.stack([x.square().sum() for x in each]) for each in compared]).cpu()
    return Measured(
        forward.traffic, both.traffic, kept, largest.nbytes, squares, clock.events[:ahead], clock.events[ahead:]
    )


def timed_part(attention: SequenceAttention) -> OverlappedRing | OverlappedAllGather | None:
    """What records on a virtual clock, where it is not within an exchange of heads."""
    if isinstance(attention, OverlappedUlysses) and attention.axis.size == 1:
        attention = attention.inner
    return attention if isinstance(attention, OverlappedRing | OverlappedAllGather) else None


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

    Together, because a rank's may be 0 but for rounding: so is the gradient of a first query, which sees one key.
    """
    apart, dense = sum(each.squares for each in everyone).unbind(1)
    worst = (apart / dense.clamp_min(torch.finfo(dense.dtype).tiny)).sqrt().max().item()
    claim = f"{what}: output and gradients of dense attention"
    run.evidence.claim(claim, f"relative difference 0, within {DIFFERENCE[dtype]:g}", 0, worst, DIFFERENCE[dtype])


def claim_saved(run: Run, everyone: Collection[Measured], shape: Shape, c: int) -> None:
    """Q, K, V, the output, and a number a token and head: nothing that grows with the square of the sequence."""
    b, a, _, s, _ = shape
    wide = torch.promote_types(run.dtype, torch.float32).itemsize
    expected = (shape.elements(2, 2) * run.dtype.itemsize + b * a * s * wide) / c
    formula = f"(2bs(a+k)d of {run.dtype.itemsize} bytes + bas of {wide})/c = {expected:,.0f}"
    run.evidence.on_ranks("bytes attention keeps for backward", formula, expected, [each.saved for each in everyone])
