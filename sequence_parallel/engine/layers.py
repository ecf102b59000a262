"""The sequence-parallel layers that training uses. Korthikanti et al. 2022 (2205.05198), section 4.2.

What they add to the plain layers of `megatron_sp.py`:

- the gathered input of a column-parallel layer is not saved: backward gathers it again, which travels while the input's
  gradient is computed, and that gradient is scattered while the weight's is computed;
- the weight's gradient can be left for later (zero bubble, `core.model.linear`), and gathers its input then;
- without `sequence`, plain tensor parallelism, to compare with;
- one all-reduce for the gradients of all replicated parameters.

B batch, S sequence, H hidden, I and O in and out features, V vocabulary padded to a multiple of t, t ranks of the axis
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.gradients import sum_gradients
from core.mesh import Axis
from core.model.gpt import GPT, Block
from core.model.linear import Gradients, deferring, linear
from core.shards import shard, shard_of

SEQUENCE = 1  # the dimension of (B, S, ...) that is sharded


class _GatherLinear(torch.autograd.Function):
    """g, then x W^T + b with this rank's rows of W. Saves this rank's shard of x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.axis = weight, bias, axis
        return F.linear(comm.all_gather(x, axis, SEQUENCE), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, bias, axis = ctx.saved_tensors, ctx.weight, ctx.bias, ctx.axis

        def gather_again() -> comm.Pending | None:
            return comm.all_gather_async(x, axis, SEQUENCE, "all-gather again") if weight.requires_grad else None

        def of_parameters(again: comm.Pending | None) -> Gradients:
            rows = gradient.flatten(0, -2)
            of_bias = rows.sum(0) if bias is not None and bias.requires_grad else None
            return rows.T @ again.wait().flatten(0, -2) if again else None, of_bias

        deferred = deferring(weight)
        again = None if deferred else gather_again()
        of_x = comm.reduce_scatter_async(gradient @ weight, axis, SEQUENCE) if ctx.needs_input_grad[0] else None
        if deferred:
            found = deferred.put(weight, bias, lambda: of_parameters(gather_again()), (gradient, x))
        else:
            found = of_parameters(again)
        return of_x.wait() if of_x else None, *found, None


class ColumnParallelLinear(nn.Module):
    """This rank's (B, S/t, I) to its (B, S, O/t)."""

    def __init__(self, linear: nn.Linear, axis: Axis, sequence: bool = True):
        super().__init__()
        self.axis, self.sequence = axis, sequence
        self.weight = shard(linear.weight, 0, axis)
        self.register_parameter("bias", None if linear.bias is None else shard(linear.bias, 0, axis))

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence:
            return _GatherLinear.apply(x, self.weight, self.bias, self.axis)
        return linear(comm.copy_to(x, self.axis), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's (B, S, I/t) to its (B, S/t, O). The bias, replicated, is added to each token once."""

    def __init__(self, linear: nn.Linear, axis: Axis, sequence: bool = True):
        super().__init__()
        self.axis, self.sequence = axis, sequence
        self.weight = shard(linear.weight, 1, axis)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        y = comm.scatter_from(y, self.axis, SEQUENCE) if self.sequence else comm.reduce_from(y, self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """(B, S) int64 in [0, vocabulary), equal on all ranks, to this rank's (B, S/t, H); a rank has V/t rows."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(embedding.weight, 0, axis)

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - shard_of(self.weight).start
        elsewhere = (row < 0) | (row >= len(self.weight))
        found = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return comm.scatter_from(found.masked_fill_(elsewhere.unsqueeze(-1), 0.0), self.axis, SEQUENCE)


class PositionShard(nn.Module):
    """Positions (..., S) to embeddings (..., S/t, H) of this rank's shard of the sequence; the table is replicated."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = embedding.weight

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions.chunk(self.axis.size, -1)[self.axis.index], self.weight)


def parallelize_block(block: Block, axis: Axis, sequence: bool = True) -> Block:
    """Shard one transformer layer. With `sequence` False only as tensor parallelism does, to compare with.

    Raises:
        ValueError: heads or feed-forward have no equal shards.
    """
    heads = block.attention.qkv.in_features // block.attention.head_size
    for name, size in (("heads", heads), ("feed-forward", block.mlp.up.out_features)):
        if size % axis.size:
            raise ValueError(f"{size} {name} have no {axis.size} equal shards; use a multiple of {axis.size}")
    block.attention.qkv = ColumnParallelLinear(block.attention.qkv, axis, sequence)  # its rows are ordered by head
    block.attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A, S, S)
    block.attention.out = RowParallelLinear(block.attention.out, axis, sequence)
    block.mlp.up = ColumnParallelLinear(block.mlp.up, axis, sequence)
    block.mlp.down = RowParallelLinear(block.mlp.down, axis, sequence)
    if sequence:
        block.attention_dropout.split = block.mlp_dropout.split = (SEQUENCE, axis.index, axis.size)
    return block


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the GPT, or a pipeline stage of it, over the ranks of `axis`, the sequence included.

    It maps (B, S) tokens, or this rank's (B, S/t, H), to this rank's (B, S/t, H), or logits (B, S, V/t) for
    `engine.loss.token_loss`. After backward, `sum_replicated_gradients`.

    Raises:
        ValueError: heads or feed-forward have no equal shards, or the model is not of GPT-2's kind.
    """
    model.config.check_sharded("sequence parallelism")
    for block in model.blocks.values():
        parallelize_block(block, axis.labelled("layers"))
    if model.embed is not None:
        model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
        model.embed.position = PositionShard(model.embed.position, axis)
        model.embed.dropout.split = (SEQUENCE, axis.index, axis.size)
    if model.head is not None:
        model.head = ColumnParallelLinear(model.head, axis.labelled("head"))
        if model.config.tied and model.embed is not None:
            model.head.weight = model.embed.token.weight
    return model


def sum_replicated_gradients(model: GPT, axis: Axis) -> None:
    """Sum over the ranks the gradients of what is replicated: LayerNorms, biases of the row-parallel layers, positions.

    Each rank has seen its own tokens only, so its gradients are partial. One all-reduce for all of them.
    """
    sum_gradients((p for p in model.parameters() if shard_of(p) is None), axis.labelled("replicated gradients"))
