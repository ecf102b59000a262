"""Lecture 05: the tensor-parallel layers as a training run needs them. Megatron-LM, `tensor_parallel/layers.py`.

Beside the plain version, `tensor_parallel.py`, this one

- overlaps f's all-reduce with the weight's gradient (wgrad), which does not need its result;
- can defer wgrad, for a zero-bubble pipeline (`core.model.linear`);
- adds the row-parallel bias in place, and takes a pipeline stage as well as a full model;
- refuses sizes that do not divide.

B batch, S sequence, H hidden, I and O in and out features, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT
from core.model.linear import of_parameters
from core.proof.rulebook import TP_FEED_FORWARD, TP_HEADS
from core.proof.rules import check
from core.shards import shard, shard_of

# ---- The two matrix products -----------------------------------------------------------------------------------------


class _ColumnLinear(torch.autograd.Function):
    """f, then x W^T + b with this rank's rows of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.axis = weight, bias, axis
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # f's all-reduce is in flight while wgrad is computed.
        summed = comm.all_reduce_async(gradient @ ctx.weight, ctx.axis) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = of_parameters(gradient, x, ctx.weight, ctx.bias)
        return summed.wait() if summed else None, of_weight, of_bias, None


class _RowLinear(torch.autograd.Function):
    """x W^T with this rank's columns of W, then g, then the bias: once, after the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        y = comm.all_reduce(F.linear(x, weight), axis)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        return of_x, *of_parameters(gradient, x, ctx.weight, ctx.bias), None


class ColumnParallelLinear(nn.Module):
    """(B, S, I), equal on all ranks, to this rank's (B, S, O/t)."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 0, axis)
        self.bias = None if linear.bias is None else shard(linear.bias, 0, axis)

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.axis)


class RowParallelLinear(nn.Module):
    """This rank's (B, S, I/t) to (B, S, O), equal on all ranks."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 1, axis)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return _RowLinear.apply(x, self.weight, self.bias, self.axis)


# ---- The embedding ---------------------------------------------------------------------------------------------------


class VocabParallelEmbedding(nn.Module):
    """(B, S) int64 in [0, vocabulary) to (B, S, H), equal on all ranks; each rank has V/t rows of the table."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(embedding.weight, 0, axis)

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - shard_of(self.weight).start
        elsewhere = (row < 0) | (row >= len(self.weight))
        found = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return comm.reduce_from(found.masked_fill_(elsewhere.unsqueeze(-1), 0.0), self.axis)


# ---- The model -------------------------------------------------------------------------------------------------------


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the GPT, or a pipeline stage of it, over the ranks of `axis`: heads, feed-forward, vocabulary.

    LayerNorms, the position embedding and the biases of row-parallel layers stay replicated. The logits stay sharded,
    for `vocab_parallel_cross_entropy`.

    Raises:
        ValueError: the ranks would not have equally many heads or feed-forward features, or the model is not of
            GPT-2's kind.
    """
    config = model.config
    config.check_sharded("tensor parallelism")
    sizes = SimpleNamespace(tp=axis.size, heads=config.heads, feed_forward=config.feed_forward)
    check(sizes, (TP_HEADS, TP_FEED_FORWARD))
    inside = axis.labelled("layers")
    for block in model.blocks.values():
        block.attention.qkv = ColumnParallelLinear(block.attention.qkv, inside)  # its rows are ordered by head
        block.attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A, S, S)
        block.attention.out = RowParallelLinear(block.attention.out, inside)
        block.mlp.up = ColumnParallelLinear(block.mlp.up, inside)
        block.mlp.down = RowParallelLinear(block.mlp.down, inside)
    if model.embed is not None:
        model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
    if model.head is not None:
        model.head = ColumnParallelLinear(model.head, axis.labelled("head"))
        if config.tied and model.embed is not None:
            model.head.weight = model.embed.token.weight
    return model
