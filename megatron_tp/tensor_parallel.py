"""Lecture 05: tensor parallelism, the code (Megatron-LM TP 代码解析). Shoeybi et al. 2019 (1909.08053), section 3.

    torchrun --nproc_per_node=8 megatron_tp/tensor_parallel.py

A column-parallel linear layer followed by a row-parallel one: two matrix products, one all-reduce forward (g) and one
backward (f). The vocabulary is sharded too, and the loss never gathers the logits. The optimizer, and the rest of the
model, are those of one process.

Grouped heads (`--model llama`): a rank has K/t heads of keys and values. Where K < t, t/K neighbours
hold copies of one, each for query heads of its own, and add up the copies' gradients after backward. So do all ranks
with the norms of queries and keys, which are replicated and yet see a rank's own heads only. Latent attention: what is
made for each head (`q_up`, `kv_up`) is sharded by head; what is made once for all, before one f, is replicated.

read: tensor_parallel.py:48-197; then engine/layers.py; engine/loss.py; evidence/streams.py

B batch, S sequence, H hidden, A heads, K key and value heads, I and O in and out features, V vocabulary, t ranks; V/t
is rounded up, the rest padding
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT
from core.model.precision import wide
from core.model.sharding import check_sizes, column_parallel, shard_latent
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from core.shards import is_copied, shard, shard_of
from megatron_tp.engine import layers, loss
from megatron_tp.evidence.rules import check_tensor_parallel
from megatron_tp.evidence.streams import claim_streams
from megatron_tp.evidence.tensor_parallel import claim_memory, claim_smoothing, claim_traffic, show_shards
from megatron_tp.evidence.training import train_beside_one_process, version

# ---- f and g: each is the other's backward ---------------------------------------------------------------------------


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(gradient.clone(), ctx.axis), None  # in place, so of a copy


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return comm.all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def f(x: Tensor, axis: Axis) -> Tensor:
    """Identity forward, all-reduce backward: every rank uses x, so the gradients of x that they find add up."""
    return _F.apply(x, axis)


def g(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce forward, identity backward: every rank has one term of the sum."""
    return _G.apply(x, axis)


# ---- The layers ------------------------------------------------------------------------------------------------------


class ColumnParallelLinear(nn.Module):
    """Y_i = f(X) A_i + b_i: (B, S, I), equal on all ranks, to this rank's (B, S, O/t).

    The slide's A is (I, O), torch's weight its transpose: a shard of A's columns is one of the weight's rows.
    """

    def __init__(self, linear: nn.Linear, axis: Axis, shards: int | None = None):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 0, axis, shards)  # (O/t, I); of fewer shards than t, neighbours hold copies
        self.bias = None if linear.bias is None else shard(linear.bias, 0, axis, shards)  # (O/t)

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, [self])[0]

    @staticmethod
    def together(x: Tensor, layers: Sequence["ColumnParallelLinear"]) -> list[Tensor]:
        """Several layers of one X, as q, k and v: the gradients of X that they find are reduced once, by one f."""
        x = f(x, layers[0].axis)
        return [F.linear(x, layer.weight, layer.bias) for layer in layers]


class RowParallelLinear(nn.Module):
    """Y = g(X_i A_i) + b: this rank's (B, S, I/t) to (B, S, O), equal on all ranks."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 1, axis)  # (O, I/t)
        self.bias = linear.bias  # (O), replicated

    def forward(self, x: Tensor) -> Tensor:
        y = g(F.linear(x, self.weight), self.axis)
        return y if self.bias is None else y + self.bias  # after the sum, or it would be added t times


class VocabParallelEmbedding(nn.Module):
    """(B, S) tokens to (B, S, H), equal on all ranks; each rank has V/t rows of the table."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(embedding.weight, 0, axis)  # (V/t, H)

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - shard_of(self.weight).start
        elsewhere = (row < 0) | (row >= len(self.weight))  # zeros here, so that the sum over the ranks is the row
        x = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return g(x.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.axis)


# ---- The loss --------------------------------------------------------------------------------------------------------


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int) -> Tensor:
    """-log softmax(logits)[target] of each token, (B, S), equal on all ranks.

    Three numbers a token are reduced: the largest logit, the sum of exponentials, the logit of the target. To gather
    the logits would take V.

    Args:
        logits: (B, S, V/t), this rank's.
        targets: (B, S), equal on all ranks.
    """
    length = logits.shape[-1]
    start = axis.index * length
    padding = torch.arange(start, start + length, device=logits.device) >= vocabulary
    logits = wide(logits).masked_fill(padding, float("-inf"))  # exp is 0, and so is the gradient

    largest = comm.all_reduce(logits.detach().amax(-1), axis, dist.ReduceOp.MAX)
    logits = logits - largest.unsqueeze(-1)  # so that no exponential overflows
    total = g(logits.exp().sum(-1), axis)

    row = targets - start
    elsewhere = (row < 0) | (row >= length)
    logit = logits.gather(-1, row.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1)
    logit = g(logit.masked_fill(elsewhere, 0.0), axis)
    return total.log() - logit


def token_loss(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
    """The sum over these tokens, divided by the `tokens` of the global batch; equal on all ranks."""
    return vocab_parallel_cross_entropy(logits, targets, axis.labelled("loss"), vocabulary).sum() / tokens


# ---- The model -------------------------------------------------------------------------------------------------------


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the model's heads, feed-forward and vocabulary over the ranks of the axis.

    Norms, positions and biases of row-parallel layers stay replicated. The ledger counts each label by itself.
    """
    check_sizes(model.config, axis.size)
    inside = axis.labelled("layers")
    for block in model.blocks.values():
        for module, name, shards in column_parallel(block):  # qkv, or q, k and v: A/t heads; up, and gate
            setattr(module, name, ColumnParallelLinear(getattr(module, name), inside, shards))
        shard_latent(block, inside, partial(f, axis=inside))  # of latent attention q_up and kv_up, by head
        block.attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A, S, S)
        block.attention.out = RowParallelLinear(block.attention.out, inside)
        block.mlp.down = RowParallelLinear(block.mlp.down, inside)
    model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
    model.head = ColumnParallelLinear(model.head, axis.labelled("head"))  # the logits stay sharded
    if model.config.tied:
        model.head.weight = model.embed.token.weight
    return model


def sum_partial_gradients(model: GPT, axis: Axis, same_heads: Axis) -> None:
    """After backward: what several ranks hold, each for its own heads, has on each one term of its gradient."""
    for name, p in model.named_parameters():
        if is_copied(p):  # k and v; `same_heads` are the t/K ranks with copies of the same head
            comm.all_reduce(p.grad, same_heads.labelled("gradients of heads"))
        elif name.endswith(("q_norm.weight", "k_norm.weight")):  # (D), for all heads
            comm.all_reduce(p.grad, axis.labelled("gradients of heads"))


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config, t = configuration(run.args), run.job.world_size
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=t)["tp"]
    show_shards(run, GPT(config), parallelize(GPT(config), axis))
    versions = {
        "plain": version(run, config, axis, parallelize, token_loss, sum_partial_gradients),
        "engine": version(run, config, axis, layers.parallelize, loss.token_loss, layers.sum_partial_gradients),
    }
    train_beside_one_process(run, config, {name: each.replica for name, each in versions.items()})
    claim_traffic(run, config, versions)
    claim_memory(run, config, versions)
    claim_smoothing(run, axis, versions["engine"].model)
    claim_streams(run, config, axis, parallelize)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "05",
        "Megatron-LM tensor parallelism: code",
        "Megatron-LM TP 代码解析",
        "Column- and row-parallel layers, a sharded vocabulary, and two streams of random numbers.",
    )
    add_model_flags(frame, batch=3, layers=4, feed_forward=240)  # 4h / t would be h on 4 ranks
    frame.parser.set_defaults(steps=10)
    sys.exit(frame.main(check_tensor_parallel, lesson))
