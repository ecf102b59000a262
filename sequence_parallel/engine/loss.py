"""Cross entropy where the logits are sharded along the vocabulary and the tokens along the sequence.

An improvement of ours, not Megatron-LM's, whose loss is lecture 05's (`megatron_sp.py` has it). A rank sends each
token's two numbers (logarithm of the sum of exponentials, logit of the target) only to the rank that has the token,
both in one all-to-all. Backward needs two numbers a token on all ranks, the logarithm of the full sum and the loss's
gradient: one all-gather. 4bs(t-1)/t elements, where the three all-reduces of lecture 05 send 6bs(t-1)/t. The combined
run (`cluster/train.py --sp`) uses this one, and its planner counts it.

B batch, S sequence, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.loss import statistics
from core.model.precision import wide
from core.shards import Shard


class _CrossEntropy(torch.autograd.Function):
    """(B, S, V/t) logits to the (B, S/t) losses of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, mark: Shard) -> Tensor:
        real = logits[..., : mark.unpadded]  # without the padding, which must stay out of the softmax
        row = targets - mark.start
        here = (row >= 0) & (row < mark.unpadded)
        row = row.masked_fill(~here, 0).unsqueeze(-1)
        target = real.gather(-1, row).squeeze(-1) if mark.unpadded else logits.new_zeros(targets.shape)
        own = torch.stack([real.logsumexp(-1), target.masked_fill(~here, 0.0)])

        log_total, target = _own_tokens(own, axis)
        ctx.save_for_backward(logits, row, here, log_total)
        ctx.axis, ctx.mark = axis, mark
        return log_total - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, row, here, log_total = ctx.saved_tensors
        mark = ctx.mark
        log_total, gradient = comm.all_gather(torch.stack([log_total, gradient]), ctx.axis, 2).unsqueeze(-1)
        softmax = (logits[..., : mark.unpadded] - log_total).exp_()
        if mark.unpadded:
            softmax.scatter_add_(-1, row, -here.unsqueeze(-1).to(softmax.dtype))
        softmax.mul_(gradient)
        padding = mark.length - mark.unpadded
        return F.pad(softmax, (0, padding)) if padding else softmax, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int) -> Tensor:
    """Cross entropy of this rank's tokens, (B, S/t).

    Args:
        logits: (B, S, V/t), this rank's shard of the vocabulary for all tokens.
        targets: (B, S), int64 in [0, vocabulary), equal on all ranks. Not checked: that would wait for the device.
        vocabulary: the size without padding.

    Raises:
        ValueError: the logits are not this rank's shard of the vocabulary.
    """
    mark = Shard(2, axis.index, axis.size, vocabulary)
    if logits.shape != (*targets.shape, mark.length):
        raise ValueError(
            f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)}: each of the {axis.size} ranks holds "
            f"{mark.length} of a vocabulary of {vocabulary}"
        )
    return _CrossEntropy.apply(wide(logits), targets, axis, mark)


def token_loss(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
    """This rank's share of the loss of `core.model.gpt.token_loss`: summed over its tokens, divided by all `tokens`."""
    return cross_entropy(logits, targets, axis.labelled("loss"), vocabulary).sum() / tokens


class _OverShards(torch.autograd.Function):
    """Each token's two numbers on this rank, (2, B, S), to the losses (B, S/t) of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, axis: Axis) -> Tensor:
        log_total, target = _own_tokens(own, axis)
        ctx.save_for_backward(own, log_total)
        ctx.axis = axis
        return log_total - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own, log_total = ctx.saved_tensors
        log_total, gradient = comm.all_gather(torch.stack([log_total, gradient]), ctx.axis, 2)
        return torch.stack([(own[0] - log_total).exp_().mul_(gradient), -gradient]), None


def _own_tokens(own: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """(2, B, S), lse and target's logit of all tokens on this rank, to those over all ranks of its tokens, (B, S/t)."""
    to_ranks = rearrange(own, "two b (t s) -> t two b s", t=axis.size)  # to rank i its shard of the sequence
    equal = [1] * axis.size
    of_shards, target = comm.all_to_all(to_ranks, axis, equal, equal).unbind(1)  # (t, B, S/t): by shard of V
    return of_shards.logsumexp(0), target.sum(0)


def chunked_token_loss(
    head: nn.Module, x: Tensor, targets: Tensor, tokens: int, chunk: int, axis: Axis, vocabulary: int
) -> Tensor:
    """The same share from the head with this rank's rows and its tokens, (B, S/t, H): `core.model.loss.statistics`.

    Like the whole head it keeps this rank's tokens only. Backward gathers the others' again; so does a W that is left
    for later, for itself.
    """
    of_head, mark = axis.labelled("head"), Shard(0, axis.index, axis.size, vocabulary)
    own = statistics(
        head, x, targets, mark, chunk,
        ahead=lambda x: comm.all_gather(x, of_head, 1), back=lambda g: comm.reduce_scatter(g, of_head, 1),
    )  # fmt: skip
    return _OverShards.apply(own.view(2, *targets.shape), axis.labelled("loss")).sum() / tokens
