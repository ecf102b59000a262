"""Lecture 05: the vocabulary-parallel loss as a training run needs it. Megatron-LM, `_VocabParallelCrossEntropy`.

Beside the plain version, `tensor_parallel.py`, this one

- reduces the sum of exponentials and the target's logit in one message: two all-reduces instead of three;
- has a backward of its own, softmax minus one-hot, and computes it in place;
- has label smoothing, for which the sum of the logits is reduced too;
- refuses logits that are not a shard of the vocabulary;
- over a large vocabulary never makes them whole (`core.model.loss`).

N tokens, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.loss import statistics
from core.model.precision import wide
from core.shards import Shard


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, shard: Shard, smoothing: float) -> Tensor:
        real = logits[:, : shard.unpadded]  # without the padding, which must not take part in the softmax
        row = targets - shard.start
        here = (row >= 0) & (row < shard.unpadded)
        row = row.masked_fill(~here, 0)

        lowest = logits.new_full((len(logits),), float("-inf"))
        largest = comm.all_reduce(real.amax(-1) if shard.unpadded else lowest, axis, dist.ReduceOp.MAX)
        shifted = real - largest.unsqueeze(-1)
        target = shifted.gather(-1, row.unsqueeze(-1)).squeeze(-1) if shard.unpadded else torch.zeros_like(largest)
        own = [shifted.exp().sum(-1), target.masked_fill(~here, 0.0)]
        if smoothing:
            own.append(shifted.sum(-1))
        total, target, *sums = comm.all_reduce(torch.stack(own), axis)  # one message for two or three numbers a token

        log_total = total.log()
        loss = log_total - target
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (log_total - sums[0] / shard.size)
        softmax = shifted.sub_(log_total.unsqueeze(-1)).exp_()
        ctx.save_for_backward(softmax, row, here)
        ctx.shard, ctx.smoothing = shard, smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        softmax, row, here = ctx.saved_tensors
        shard, smoothing = ctx.shard, ctx.smoothing
        of_logits = F.pad(softmax, (0, shard.length - shard.unpadded))  # the padding has no gradient
        if smoothing:
            of_logits[:, : shard.unpadded] -= smoothing / shard.size
        if shard.unpadded:
            of_logits.scatter_add_(-1, row.unsqueeze(-1), (smoothing - 1) * here.unsqueeze(-1).to(softmax.dtype))
        return of_logits.mul_(gradient.unsqueeze(-1)), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of each token, equal on all ranks: the shape of `targets`.

    Args:
        logits: (..., V/t), this rank's shard; computed in float32 at least.
        targets: (...), int64 in [0, vocabulary), equal on all ranks. Not checked: that would wait for the device.
        vocabulary: the size without padding.
        smoothing: label smoothing, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: the logits are not the rank's shard of this vocabulary.
    """
    shard = Shard(1, axis.index, axis.size, vocabulary)
    if logits.shape != (*targets.shape, shard.length):
        raise ValueError(
            f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)}: each of the {axis.size} ranks holds "
            f"{shard.length} of a vocabulary of {vocabulary}"
        )
    losses = _CrossEntropy.apply(wide(logits.flatten(0, -2)), targets.flatten(), axis, shard, smoothing)
    return losses.view(targets.shape)


def token_loss(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
    """The loss of `core.model.gpt.token_loss`, from sharded logits; equal on all ranks."""
    return vocab_parallel_cross_entropy(logits, targets, axis.labelled("loss"), vocabulary).sum() / tokens


class _OverShards(torch.autograd.Function):
    """Each token's two numbers on this rank, (2, N), to its loss (N), equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, axis: Axis) -> Tensor:
        lse, target = own
        largest = comm.all_reduce(lse.clone(), axis, dist.ReduceOp.MAX)
        total, target = comm.all_reduce(torch.stack([(lse - largest).exp(), target]), axis)
        log_total = largest + total.log()
        ctx.save_for_backward(own, log_total)
        return log_total - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own, log_total = ctx.saved_tensors
        return torch.stack([(own[0] - log_total).exp() * gradient, -gradient]), None


def chunked_token_loss(
    head: nn.Module, x: Tensor, targets: Tensor, tokens: int, chunk: int, axis: Axis, vocabulary: int
) -> Tensor:
    """The same loss from the head with this rank's rows and its input (B, S, H): `core.model.loss.statistics`."""
    mark = Shard(0, axis.index, axis.size, vocabulary)
    of_head = axis.labelled("head")
    own = statistics(head, x, targets, mark, chunk, back=lambda gradient: comm.all_reduce(gradient, of_head))
    return _OverShards.apply(own, axis.labelled("loss")).sum() / tokens
