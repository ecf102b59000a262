"""Lecture 06: DeepSpeed-Ulysses (Megatron-LM SP 代码解析). Jacobs et al. 2023 (2309.14509).

    torchrun --nproc_per_node=8 sequence_parallel/ulysses.py

A rank has some tokens of all heads; for attention it wants all tokens of some heads. An all-to-all of each of Q, K and
V changes the one into the other, and one of the output changes back. Keys and values of fewer heads than ranks are
repeated first; queries and keys are already rotated, each by the position of its token.

read: ulysses.py:33-83; context.py:105-144; then engine/ulysses.py

B batch (paper: b), A heads (a), K of keys and values, S sequence (s), D head size, c ranks of the axis
"""

import sys
from math import lcm

import torch
from einops import rearrange
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.attention import dense_attention
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel.context import SequenceAttention, check_length
from sequence_parallel.engine.ulysses import context_parallel
from sequence_parallel.evidence import rules, ulysses
from sequence_parallel.evidence.training import compare, context_version


def tokens_to_heads(x: Tensor, axis: Axis) -> Tensor:
    """(B, A, S/c, D), some tokens of all heads, to (B, A/c, S, D), all tokens of some heads."""
    to_ranks = rearrange(x, "b (c a) s d -> c b a s d", c=axis.size)  # rank i gets the i-th heads of our tokens
    one_each = [1] * axis.size
    from_ranks = comm.all_to_all(to_ranks, axis, one_each, one_each)  # from rank i our heads of its tokens
    return rearrange(from_ranks, "c b a s d -> b a (c s) d")


def heads_to_tokens(x: Tensor, axis: Axis) -> Tensor:
    """(B, A/c, S, D) to (B, A, S/c, D): the way back."""
    to_ranks = rearrange(x, "b a (c s) d -> c b a s d", c=axis.size)  # rank i gets the i-th tokens of our heads
    one_each = [1] * axis.size
    from_ranks = comm.all_to_all(to_ranks, axis, one_each, one_each)  # from rank i its heads of our tokens
    return rearrange(from_ranks, "c b a s d -> b (c a) s d")


def to_heads(x: Tensor, axis: Axis) -> Tensor:
    """`tokens_to_heads` forward; its backward is the way back."""
    return comm.conjugate(x, lambda t: tokens_to_heads(t, axis), lambda g: heads_to_tokens(g, axis))


def to_tokens(x: Tensor, axis: Axis) -> Tensor:
    """`heads_to_tokens` forward."""
    return comm.conjugate(x, lambda t: heads_to_tokens(t, axis), lambda g: tokens_to_heads(g, axis))


def for_ranks(x: Tensor, ranks: int) -> Tensor:
    """Keys or values (B, K, S/c, D) to (B, lcm(K, c), S/c, D): each head repeated, until c divides their number.

    Then the block of them that a rank gets is the one that its query heads read. Backward adds up a head's copies.
    """
    return x.repeat_interleave(lcm(x.shape[1], ranks) // x.shape[1], 1)


class Ulysses(SequenceAttention):
    """For `parallelize`: rank r has the r-th S/c tokens, and the r-th A/c heads while attention is computed."""

    def __init__(self, axis: Axis):
        self.axis, self.ranks = axis, axis.size
        self.multiple = self.heads_over = axis.size

    def positions(self, sequence: int) -> Tensor:
        check_length(sequence, self.multiple)
        return torch.arange(sequence).chunk(self.axis.size)[self.axis.index]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        q, k, v = (to_heads(x, self.axis) for x in (q, for_ranks(k, self.ranks), for_ranks(v, self.ranks)))
        o = dense_attention(q, k, v, scale, starts)  # every head by itself, over all tokens
        return to_tokens(o, self.axis)


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    plain, engine = Ulysses(axis), context_parallel(axis, run.job.device, axis.size)
    ulysses.show_shapes(run, config, axis, tokens_to_heads, heads_to_tokens)
    pair = {"plain": plain, "engine": engine}
    versions = {name: context_version(run, config, attention, axis) for name, attention in pair.items()}
    compare(run, config, axis, versions)
    ulysses.claim_traffic(run, config, axis.size, versions)
    ulysses.claim_attention(run, config, axis, plain, engine)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: DeepSpeed-Ulysses",
        "Megatron-LM SP 代码解析",
        "Attention over a sharded sequence: an all-to-all gives each rank all tokens of some heads.",
    )
    add_model_flags(frame, layers=2, batch=3)
    frame.parser.set_defaults(steps=10)
    sys.exit(frame.main(rules.ulysses, lesson))
