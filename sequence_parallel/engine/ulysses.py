"""Ulysses whose queries, keys and values travel at once. Jacobs et al. 2023 (2309.14509).

What it adds to the plain one of `ulysses.py`: the all-to-alls of Q, K and V are in flight together, and so are those of
their gradients; and any attention inside, so that the ranks of the axis can together be one member of a ring.
"""

from math import lcm
from typing import Any

import torch
from torch import Tensor

from core import comm
from core.mesh import Axis
from core.model.attention import dense_attention
from sequence_parallel.context import SequenceAttention, check_length
from sequence_parallel.engine.all_gather import OverlappedAllGather
from sequence_parallel.engine.ring import OverlappedRing

HEADS, TOKENS = 1, 2  # dimensions of (B, A, S, D)
CP_KINDS = ("ring", "all-gather")  # how ranks with the same heads get each other's keys and values


def switch(axis: Axis, sharded: int, gathered: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Give each rank its shard of each tensor along one dimension, and join what arrives along the other.

    All travel at once: none waits until another has arrived.
    """
    equal = [1] * axis.size
    pending = [comm.all_to_all_async(torch.stack(x.chunk(axis.size, sharded)), axis, equal, equal) for x in tensors]
    return tuple(torch.cat(each.wait().unbind(), gathered) for each in pending)


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, sharded: int, gathered: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.sharded, ctx.gathered = axis, sharded, gathered
        return switch(axis, sharded, gathered, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *switch(ctx.axis, ctx.gathered, ctx.sharded, *gradients)


class FullSequence(SequenceAttention):
    """All tokens are here: torch's own attention."""

    ranks = multiple = 1

    def positions(self, sequence: int) -> Tensor:
        return self.positions_of(0, sequence)

    def positions_of(self, _: int, sequence: int) -> Tensor:
        return torch.arange(sequence)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        return dense_attention(q, k, v, scale, starts)


class OverlappedUlysses(SequenceAttention):
    """Attention of this rank's tokens, with heads in place of tokens while it is computed.

    Args:
        axis: over whose ranks the heads are sharded.
        inner: computes the attention of some heads, over all tokens that the ranks of `axis` have together: the full
            sequence, or one member of a ring.
    """

    def __init__(self, axis: Axis, inner: SequenceAttention):
        self.axis, self.inner = axis, inner
        self.ranks, self.heads_over = axis.size * inner.ranks, axis.size
        self.multiple = lcm(self.ranks, inner.multiple)

    def positions(self, sequence: int) -> Tensor:
        check_length(sequence, self.multiple)
        return self.inner.positions(sequence).chunk(self.axis.size)[self.axis.index]

    def positions_of(self, rank: int, sequence: int) -> Tensor:
        """Those of a rank of the whole axis, of which the ranks of `self.axis` are neighbours."""
        check_length(sequence, self.multiple)
        group, index = divmod(rank, self.axis.size)
        return self.inner.positions_of(group, sequence).chunk(self.axis.size)[index]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        u = self.axis.size
        if u == 1:
            return self.inner(q, k, v, scale, starts)
        if q.shape[HEADS] % u:
            raise ValueError(f"{q.shape[HEADS]} heads have no {u} equal shards; use a multiple of {u}")
        # Where there are fewer key and value heads than ranks, some ranks need the same one.
        copies = lcm(k.shape[HEADS], u) // k.shape[HEADS]
        if copies > 1:
            k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)
        q, k, v = _Switch.apply(self.axis, HEADS, TOKENS, q, k, v)
        (output,) = _Switch.apply(self.axis, TOKENS, HEADS, self.inner(q, k, v, scale, starts))
        return output

    def close(self) -> None:
        self.inner.close()


def context_parallel(
    axis: Axis, device: torch.device, ulysses: int = 1, zigzag: bool = True, kind: str = CP_KINDS[0]
) -> OverlappedUlysses:
    """Attention for `sequence_parallel.context.parallelize`: a ring or all-gather, Ulysses, or both (`hybrid.py`).

    All ranks of the axis must call it at the same time.

    Args:
        axis: over whose ranks the sequence is sharded.
        ulysses: how many neighbouring ranks share heads; the rest of the axis is a ring. 1: only a ring.
        zigzag: the ring's placement of tokens.
        kind: "all-gather" in place of the ring.

    Raises:
        ValueError: `ulysses` does not divide the ranks.
    """
    inner, outer = axis.split(ulysses)
    if outer.size == 1:
        return OverlappedUlysses(inner, FullSequence())
    across = OverlappedAllGather(outer, zigzag) if kind == "all-gather" else OverlappedRing(outer, device, zigzag)
    return OverlappedUlysses(inner, across)
