"""The sequence-parallel layers that training uses. Korthikanti et al. 2022 (2205.05198), section 4.2.

What they add to the plain layers of `megatron_sp.py`:

- the gathered input of a column-parallel layer is not saved: backward gathers it again, which travels while the input's
  gradient is computed, and that gradient is scattered while the weight's is computed;
- the weight's gradient can be left for later (zero bubble, `core.model.linear`), and gathers its input then;
- without `sequence`, plain tensor parallelism, to compare with;
- one all-reduce for the gradients of all replicated parameters.

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
from core.model.gpt import GPT, Block
from core.model.linear import Gradients, deferring, linear, of_input
from core.model.sharding import check_sizes, column_parallel, shard_latent
from core.shards import is_copied, shard, shard_of

SEQUENCE = 1  # the dimension of (B, S, ...) that is sharded


class _GatherLinears(torch.autograd.Function):
    """g, then x W^T + b with this rank's rows of W, for each layer's W and b. Saves this rank's shard of x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, layers: Sequence[nn.Module], *_: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.axis, ctx.layers = axis, [(layer.weight, layer.bias) for layer in layers]
        full = comm.all_gather(x, axis, SEQUENCE)
        return tuple(F.linear(full, weight, bias) for weight, bias in ctx.layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), axis, layers, of_x = ctx.saved_tensors, ctx.axis, ctx.layers, None
        weights = [weight for weight, _ in layers]

        def gather_again() -> comm.Pending | None:
            trained = any(weight.requires_grad for weight in weights)
            return comm.all_gather_async(x, axis, SEQUENCE, "all-gather again") if trained else None

        def of_parameters(again: comm.Pending | None) -> Gradients:
            full, found = again.wait().flatten(0, -2) if again else None, []
            for gradient, (weight, bias) in zip(gradients, layers, strict=True):
                rows = gradient.flatten(0, -2)
                found.append(rows.T @ full if weight.requires_grad else None)
                found.append(rows.sum(0) if bias is not None and bias.requires_grad else None)
            return found

        deferred = deferring(weights[0])
        again = None if deferred else gather_again()
        if ctx.needs_input_grad[0]:
            of_x = comm.reduce_scatter_async(of_input(gradients, weights), axis, SEQUENCE)
        if deferred:
            parameters = [p for layer in layers for p in layer]
            found = deferred.put(parameters, lambda: of_parameters(gather_again()), (*gradients, x))
        else:
            found = of_parameters(again)
        return of_x.wait() if of_x else None, None, None, *found


class ColumnParallelLinear(nn.Module):
    """This rank's (B, S/t, I) to its (B, S, O/t); of fewer shards than ranks, to (B, S, O/shards)."""

    def __init__(self, linear: nn.Linear, axis: Axis, sequence: bool = True, shards: int | None = None):
        super().__init__()
        self.axis, self.sequence = axis, sequence
        self.weight = shard(linear.weight, 0, axis, shards)
        self.register_parameter("bias", None if linear.bias is None else shard(linear.bias, 0, axis, shards))

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, [self])[0]

    @staticmethod
    def together(x: Tensor, layers: Sequence["ColumnParallelLinear"]) -> Sequence[Tensor]:
        """Several layers of one input, as q, k and v: it is gathered once, and its gradient is scattered once."""
        axis = layers[0].axis
        if layers[0].sequence:
            return _GatherLinears.apply(x, axis, layers, *(p for each in layers for p in (each.weight, each.bias)))
        x = comm.copy_to(x, axis)
        return [linear(x, layer.weight, layer.bias) for layer in layers]


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
    """Shard one transformer layer. With `sequence` False only as tensor parallelism does, to compare with."""
    for module, name, shards in column_parallel(block):
        setattr(module, name, ColumnParallelLinear(getattr(module, name), axis, sequence, shards))
    to_heads = partial(comm.gather_for, axis=axis, dim=SEQUENCE) if sequence else partial(comm.copy_to, axis=axis)
    shard_latent(block, axis, to_heads)
    block.attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A, S, S)
    block.attention.out = RowParallelLinear(block.attention.out, axis, sequence)
    block.mlp.down = RowParallelLinear(block.mlp.down, axis, sequence)
    if sequence:
        block.attention_dropout.split = block.mlp_dropout.split = (SEQUENCE, axis.index, axis.size)
    return block


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the model, or a pipeline stage of it, over the ranks of `axis`, the sequence included.

    It maps (B, S) tokens, or this rank's (B, S/t, H), to this rank's (B, S/t, H), or logits (B, S, V/t) for
    `engine.loss.token_loss`. After backward, `sum_replicated_gradients`.

    Raises:
        ValueError: heads or feed-forward have no equal shards.
    """
    check_sizes(model.config, axis.size)
    for block in model.blocks.values():
        parallelize_block(block, axis.labelled("layers"))
    if model.embed is not None:
        model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
        if model.embed.position is not None:
            model.embed.position = PositionShard(model.embed.position, axis)
        model.embed.dropout.split = (SEQUENCE, axis.index, axis.size)
    if model.head is not None:
        model.head = ColumnParallelLinear(model.head, axis.labelled("head"))
        if model.config.tied and model.embed is not None:
            model.head.weight = model.embed.token.weight
    return model


def sum_replicated_gradients(model: GPT, axis: Axis, same_heads: Axis) -> None:
    """Sum over the ranks the gradients of what is replicated: norms, biases of the row-parallel layers, positions.

    Each rank has seen its own tokens only, or with the norms of queries and keys its own heads, so its gradients are
    partial. One all-reduce for all of them, and one for keys' and values' weights, where several ranks have the same.

    Args:
        same_heads: those ranks, `axis.split(config.kv_copies(axis.size))[0]`.
    """
    sum_gradients((p for p in model.parameters() if shard_of(p) is None), axis.labelled("replicated gradients"))
    sum_gradients(filter(is_copied, model.parameters()), same_heads.labelled("gradients of heads"))
