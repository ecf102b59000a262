"""Lecture 05: the tensor-parallel layers (Megatron-LM TP 代码解析). Shoeybi et al. 2019 (1909.08053), section 3.

Each class takes a layer of the one-process model and keeps this rank's part of it. A column-parallel layer followed by
a row-parallel one needs one all-reduce forward and one backward, the paper's g and f: the tensor between the two stays
cut. `parallelize` puts them into the reference GPT.

B batch, S sequence, H hidden, I and O in and out features, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig
from core.model.linear import of_parameters
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
        # f: every rank has used x, so their gradients add up. The sum travels while the weight's gradient is computed.
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


class _Linear(nn.Module):
    """`linear` with the parameters cut as `dims` says; None leaves one whole."""

    def __init__(self, linear: nn.Linear, axis: Axis, weight_dim: int, bias_dim: int | None):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, weight_dim, axis)
        bias = linear.bias
        self.register_parameter("bias", bias if bias is None or bias_dim is None else shard(bias, bias_dim, axis))


class ColumnParallelLinear(_Linear):
    """(B, S, I), equal on all ranks, to this rank's (B, S, O/t).

    Named by the slide's Y = XA, whose A = W^T is cut by columns: the rows of torch's weight.
    """

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__(linear, axis, weight_dim=0, bias_dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.axis)


class RowParallelLinear(_Linear):
    """This rank's (B, S, I/t) to (B, S, O), equal on all ranks."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__(linear, axis, weight_dim=1, bias_dim=None)

    def forward(self, x: Tensor) -> Tensor:
        return _RowLinear.apply(x, self.weight, self.bias, self.axis)


# ---- Both ends of the model ------------------------------------------------------------------------------------------


class VocabParallelEmbedding(nn.Module):
    """(B, S) int64 in [0, vocabulary) to (B, S, H), equal on all ranks; each rank has V/t rows of the table.

    A token of another rank's rows gives zeros here, so that the sum over the ranks is the row itself.
    """

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


def check(config: GPTConfig, ranks: int) -> None:
    """Raises ValueError unless heads and feed-forward can be cut into `ranks` equal parts. The vocabulary is padded."""
    for name, size in (("heads", config.heads), ("feed-forward", config.feed_forward)):
        if size % ranks:
            raise ValueError(f"{size} {name} cannot be cut into {ranks} equal parts; use a multiple of {ranks}")


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Cut the GPT, or a pipeline stage of it, over the ranks of `axis`: by heads, by feed-forward, by vocabulary.

    LayerNorms, position embedding and the biases of row-parallel layers stay whole: every rank computes the same with
    them, and has the same gradients. The logits stay cut, for `vocab_parallel_cross_entropy`.

    Raises:
        ValueError: heads or feed-forward cannot be cut equally.
    """
    check(model.config, axis.size)
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
        if model.config.tied and model.embed is not None:
            model.head.weight = model.embed.token.weight
    return model
