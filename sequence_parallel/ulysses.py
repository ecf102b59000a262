"""Lecture 06: DeepSpeed-Ulysses (Megatron-LM SP 代码解析). Jacobs et al. 2023 (2309.14509).

    torchrun --nproc_per_node=8 sequence_parallel/ulysses.py

A rank has some tokens of all heads; for attention it wants all tokens of some heads. An all-to-all of each of Q, K and
V changes the one into the other, and one of the output changes back.
"""

from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core import comm
from core.mesh import Axis
from sequence_parallel.context import SequenceAttention, check_length

HEADS, TOKENS = 1, 2  # dimensions of (B, A, S, D)


def switch(x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
    """Cut `x` along one dimension, give each rank its part, and join what arrives along the other."""
    equal = [1] * axis.size
    received = comm.all_to_all(torch.stack(x.chunk(axis.size, cut)), axis, equal, equal)
    return torch.cat(received.unbind(), joined)


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
        ctx.axis, ctx.cut, ctx.joined = axis, cut, joined
        return switch(x, axis, cut, joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return switch(gradient, ctx.axis, ctx.joined, ctx.cut), None, None, None


class Whole(SequenceAttention):
    """All tokens are here: torch's own attention."""

    ranks = 1

    def positions(self, sequence: int) -> Tensor:
        return torch.arange(sequence)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[HEADS] != k.shape[HEADS])


class Ulysses(SequenceAttention):
    """Attention of this rank's tokens, with heads in place of tokens while it is computed.

    Args:
        axis: over whose ranks the heads are cut.
        inner: computes the attention of some heads, of all tokens that the ranks of `axis` have together: all that
            there are, or (`hybrid.py`) one rank's part of a ring.
    """

    def __init__(self, axis: Axis, inner: SequenceAttention | None = None):
        self.axis, self.inner = axis, inner or Whole()
        self.ranks, self.heads_over = axis.size * self.inner.ranks, axis.size

    def positions(self, sequence: int) -> Tensor:
        ours = self.inner.positions(sequence)
        check_length(sequence, lcm(self.ranks, sequence // len(ours)))
        return ours.chunk(self.axis.size)[self.axis.index]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.axis.size == 1:
            return self.inner(q, k, v)
        u = self.axis.size
        if q.shape[HEADS] % u:
            raise ValueError(f"{q.shape[HEADS]} heads cannot be cut into {u} equal parts; use a multiple of {u}")
        # Where there are fewer key and value heads than ranks, some ranks need the same one.
        copies = lcm(k.shape[HEADS], u) // k.shape[HEADS]
        if copies > 1:
            k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)
        q, k, v = (_Switch.apply(x, self.axis, HEADS, TOKENS) for x in (q, k, v))
        return _Switch.apply(self.inner(q, k, v), self.axis, TOKENS, HEADS)

    def close(self) -> None:
        self.inner.close()
