"""Lecture 06: cross entropy where the vocabulary is cut for the logits and the sequence for the loss.

After the head each rank has the logits of all tokens for its part of the vocabulary; the loss is wanted where the
tokens are, each on one rank. So a token's three numbers (largest logit, sum of exponentials, logit of the target) go
from every rank to the one that has the token, in one all-to-all; half of what all-reduces of them would move.
Backward needs two numbers a token on all ranks, the logarithm of the sum and the loss's gradient: one all-gather.

N = B·S/t tokens of a rank, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core import comm
from core.mesh import Axis
from core.shards import Shard


class _CrossEntropy(torch.autograd.Function):
    """(t, N, V/t) logits, the tokens ordered by the rank that has them, to the (N) losses of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, part: Shard) -> Tensor:
        real = logits[..., : part.held]  # without the padding, which must not take part in the softmax
        row = targets - part.start
        here = (row >= 0) & (row < part.held)
        row = row.masked_fill(~here, 0).unsqueeze(-1)

        lowest = torch.finfo(logits.dtype).min
        largest = real.amax(-1) if part.held else torch.full_like(targets, lowest, dtype=logits.dtype)
        total = (real - largest.unsqueeze(-1)).exp().sum(-1)
        target = real.gather(-1, row).squeeze(-1) if part.held else torch.zeros_like(largest)
        own = torch.stack([largest, total, target.masked_fill(~here, 0.0)], 1)  # (t, 3, N): to rank i its tokens

        equal = [1] * axis.size
        largest, total, target = comm.all_to_all(own, axis, equal, equal).unbind(1)  # (t, N): of rank i's vocabulary
        log_total = (largest + total.log()).logsumexp(0)
        ctx.save_for_backward(logits, row, here, log_total)
        ctx.axis, ctx.part = axis, part
        return log_total - target.sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, row, here, log_total = ctx.saved_tensors
        part = ctx.part
        log_total, gradient = comm.all_gather(torch.stack([log_total, gradient])[None], ctx.axis).unbind(1)  # (t, N)
        softmax = (logits[..., : part.held] - log_total.unsqueeze(-1)).exp_()
        if part.held:
            softmax.scatter_add_(-1, row, -here.unsqueeze(-1).to(softmax.dtype))
        softmax.mul_(gradient.unsqueeze(-1))
        return F.pad(softmax, (0, part.length - part.held)) if part.held < part.length else softmax, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int) -> Tensor:
    """Cross entropy of this rank's tokens, (B, S/t).

    Args:
        logits: (B, S, V/t), this rank's part of the vocabulary for all tokens.
        targets: (B, S), int64, equal on all ranks.
        vocabulary: the size without padding.
    """
    ordered = "b (t s) ... -> t (b s) ..."
    part = Shard(1, axis.index, axis.size, vocabulary)
    assert logits.shape == (*targets.shape, part.length), f"{logits.shape} is not this rank's part of {vocabulary}"
    losses = _CrossEntropy.apply(
        rearrange(logits, ordered, t=axis.size), rearrange(targets, ordered, t=axis.size), axis, part
    )
    return losses.view(len(targets), -1)


def token_loss(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
    """This rank's share of the loss of `core.gpt.token_loss`: the sum over its tokens, divided by all `tokens`."""
    return cross_entropy(logits, targets, axis.within("loss"), vocabulary).sum() / tokens
