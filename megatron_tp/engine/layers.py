"""Lecture 05: the tensor-parallel layers as a training run needs them. Megatron-LM, `tensor_parallel/layers.py`.

Beside the plain version, `tensor_parallel.py`, this one

- overlaps f's all-reduce with the weight's gradient (wgrad), which does not need its result;
- can defer wgrad, for a zero-bubble pipeline (`core.model.linear`);
- adds the row-parallel bias in place, and takes a pipeline stage as well as a full model;
- sums in one message what several ranks have parts of;
- refuses sizes that do not divide.

B batch, S sequence, H hidden, I and O in and out features, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.gradients import sum_gradients
from core.mesh import Axis
from core.model.gpt import GPT
from core.model.linear import of_input, of_parameters
from core.model.sharding import check_sizes, column_parallel, heads_norms, shard_latent
from core.shards import is_copied, shard, shard_of

# ---- The two matrix products -----------------------------------------------------------------------------------------


class _ColumnLinears(torch.autograd.Function):
    """f, then x W^T + b with this rank's rows of W, for each weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, weights: list[Tensor], biases: list[Tensor | None], *_: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.weights, ctx.biases, ctx.axis = weights, biases, axis
        return tuple(F.linear(x, *layer) for layer in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), summed = ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:  # f's all-reduce is in flight while wgrad is computed
            summed = comm.all_reduce_async(of_input(gradients, ctx.weights), ctx.axis, in_order=True)
        layers = zip(gradients, ctx.weights, ctx.biases, strict=True)
        found = [each for gradient, *layer in layers for each in of_parameters(gradient, x, *layer)]
        return summed.wait() if summed else None, None, None, None, *found


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
    """(B, S, I), equal on all ranks, to this rank's (B, S, O/t); of fewer shards than ranks (B, S, O/shards)."""

    def __init__(self, linear: nn.Linear, axis: Axis, shards: int | None = None):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 0, axis, shards)
        self.bias = None if linear.bias is None else shard(linear.bias, 0, axis, shards)

    def forward(self, x: Tensor) -> Tensor:
        (y,) = self.together(x, [self])
        return y

    @staticmethod
    def together(x: Tensor, layers: Sequence["ColumnParallelLinear"]) -> tuple[Tensor, ...]:
        """Several layers of one input, as q, k and v: one all-reduce for all of them."""
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        parameters = (p for layer in zip(weights, biases, strict=True) for p in layer)
        return _ColumnLinears.apply(x, layers[0].axis, weights, biases, *parameters)


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


def sum_partial_gradients(model: GPT, axis: Axis, same_heads: Axis) -> None:
    """After backward, add up what several ranks have parts of, each of its own heads.

    Args:
        same_heads: the ranks with the same heads of keys and values, `axis.split(config.kv_copies(axis.size))[0]`.
    """
    norms = heads_norms(model)
    sum_gradients((p for p in model.parameters() if p in norms), axis.labelled("gradients of heads"))
    sum_gradients(filter(is_copied, model.parameters()), same_heads.labelled("gradients of heads"))


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the model, or a pipeline stage of it, over the ranks of `axis`: heads, feed-forward, vocabulary.

    Norms, the position embedding and the biases of row-parallel layers stay replicated. Of fewer heads of keys and
    values than ranks each is on as many neighbouring ranks. The logits stay sharded, for
    `vocab_parallel_cross_entropy`. After backward, `sum_partial_gradients`.

    Raises:
        ValueError: the ranks would not have equally many heads or feed-forward features.
    """
    config = model.config
    check_sizes(config, axis.size)
    inside = axis.labelled("layers")
    for block in model.blocks.values():
        for module, name, shards in column_parallel(block):
            setattr(module, name, ColumnParallelLinear(getattr(module, name), inside, shards))
        shard_latent(block, inside, partial(comm.copy_to, axis=inside))
        block.attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A, S, S)
        block.attention.out = RowParallelLinear(block.attention.out, inside)
        block.mlp.down = RowParallelLinear(block.mlp.down, inside)
    if model.embed is not None:
        model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
    if model.head is not None:
        model.head = ColumnParallelLinear(model.head, axis.labelled("head"))
        if config.tied and model.embed is not None:
            model.head.weight = model.embed.token.weight
    return model
