"""Lecture 06: Megatron-LM sequence parallelism (Megatron-LM SP 代码解析). Korthikanti et al. 2022 (2205.05198).

    torchrun --nproc_per_node=8 sequence_parallel/megatron_sp.py

Tensor parallelism shards what is inside attention and MLP, and replicates what is between them: norms, dropout, the
residual stream. Here that is sharded too, along the sequence. The all-reduce at each border becomes its two halves, and
moves the same bytes. The paper's names, forward / backward:

    tensor parallelism     f  identity / all-reduce         f̄  all-reduce / identity (g in 1909.08053, lecture 05)
    with sequence          g  all-gather / reduce-scatter   ḡ  reduce-scatter / all-gather

The output layer gathers the sequence, and the loss is lecture 05's, unchanged, as in Megatron-LM. A cheaper one of our
own (`engine/loss.py`) is trained beside it. What this saves in memory is measured by `activations.py`.

read: megatron_sp.py:43-182; then engine/layers.py, engine/loss.py

B batch (paper: b), S sequence (s), H hidden (h), I and O in and out features, V vocabulary, t ranks of the axis
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

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
from sequence_parallel.engine import loss
from sequence_parallel.evidence import megatron, rules
from sequence_parallel.evidence.training import compare, tensor_engine, tensor_version

S = 1  # the dimension of (B, S, ...) that is sharded


def f_bar(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce forward, identity backward: lecture 05's g."""
    return comm.reduce_from(x, axis)


def g(x: Tensor, axis: Axis) -> Tensor:
    """(B, S/t, H) to (B, S, H): all-gather forward, reduce-scatter backward."""
    return comm.gather_for(x, axis, S)


def g_bar(x: Tensor, axis: Axis) -> Tensor:
    """(B, S, H), one term of a sum over the ranks, to (B, S/t, H): reduce-scatter forward, all-gather backward."""
    return comm.scatter_from(x, axis, S)


class ColumnParallelLinear(nn.Module):
    """(B, S/t, I) to (B, S, O/t): from a shard of the sequence to a shard of the features."""

    def __init__(self, linear: nn.Linear, axis: Axis, shards: int | None = None):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 0, axis, shards)  # (O/t, I); of fewer shards than t, neighbours hold copies
        self.bias = None if linear.bias is None else shard(linear.bias, 0, axis, shards)

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, [self])[0]

    @staticmethod
    def together(x: Tensor, layers: Sequence["ColumnParallelLinear"]) -> list[Tensor]:
        """Several layers of one input, as q, k and v, which one g gathers."""
        x = g(x, layers[0].axis)
        return [F.linear(x, layer.weight, layer.bias) for layer in layers]


class RowParallelLinear(nn.Module):
    """(B, S, I/t) to (B, S/t, O): from a shard of the features to a shard of the sequence."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 1, axis)  # (O, I/t)
        self.bias = linear.bias  # replicated: added after the sum, to each token once

    def forward(self, x: Tensor) -> Tensor:
        y = g_bar(F.linear(x, self.weight), self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """(B, S) tokens, the same on all ranks, to (B, S/t, H). A rank has V/t rows of the table."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(embedding.weight, 0, axis)  # (V/t, H)

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.axis.index * len(self.weight)
        elsewhere = (row < 0) | (row >= len(self.weight))
        found = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return g_bar(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.axis)


class PositionShard(nn.Module):
    """Positions (..., S) to embeddings (..., S/t, H) of this rank's shard of the sequence. The table is replicated."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = embedding.weight

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions.chunk(self.axis.size, -1)[self.axis.index], self.weight)


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the model over the ranks of `axis`: (B, S) tokens to (B, S, V/t) logits, and (B, S/t, H) in between."""
    check_sizes(model.config, axis.size)
    on_sequence = (S, axis.index, axis.size)  # what a dropout mask of (B, S/t, H) is a shard of
    layers = axis.labelled("layers")  # so that the ledger counts what the layers send
    model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
    if model.embed.position is not None:
        model.embed.position = PositionShard(model.embed.position, axis)
    model.embed.dropout.split = on_sequence
    for block in model.blocks.values():  # its norms stay as they are, and see S/t tokens
        for module, name, shards in column_parallel(block):  # qkv, or q, k and v: A/t heads; up, and gate
            setattr(module, name, ColumnParallelLinear(getattr(module, name), layers, shards))
        shard_latent(block, layers, partial(g, axis=layers))  # what each token's c^Q, c^KV and k^R are gathered by
        block.attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A/t, S, S)
        block.attention.out = RowParallelLinear(block.attention.out, layers)
        block.mlp.down = RowParallelLinear(block.mlp.down, layers)
        block.attention_dropout.split = block.mlp_dropout.split = on_sequence
    model.head = ColumnParallelLinear(model.head, axis.labelled("head"))
    if model.config.tied:
        model.head.weight = model.embed.token.weight
    return model


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int) -> Tensor:
    """-log softmax(logits)[target] of each token, (B, S), equal on all ranks: lecture 05's, with g by its name here.

    Args:
        logits: (B, S, V/t): the head's g has gathered the sequence, as Megatron-LM does before its output layer.
        targets: (B, S), equal on all ranks.
    """
    length = logits.shape[-1]
    start = axis.index * length
    padding = torch.arange(start, start + length, device=logits.device) >= vocabulary
    logits = wide(logits).masked_fill(padding, float("-inf"))  # V rounded up to a multiple of t: exp is 0

    largest = comm.all_reduce(logits.detach().amax(-1), axis, dist.ReduceOp.MAX)
    logits = logits - largest.unsqueeze(-1)  # so that no exponential overflows
    total = f_bar(logits.exp().sum(-1), axis)

    row = targets - start
    elsewhere = (row < 0) | (row >= length)
    logit = logits.gather(-1, row.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1)
    logit = f_bar(logit.masked_fill(elsewhere, 0.0), axis)
    return total.log() - logit


def token_loss(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
    """The sum over these tokens, divided by the `tokens` of the global batch; equal on all ranks."""
    return vocab_parallel_cross_entropy(logits, targets, axis.labelled("loss"), vocabulary).sum() / tokens


def sum_replicated_gradients(model: GPT, axis: Axis, same_heads: Axis) -> None:
    """After backward. What is replicated has seen a rank's own tokens only, or its own heads: partial gradients.

    Args:
        same_heads: with more ranks than heads of keys and values, those that hold the same one; else one rank.
    """
    for p in model.parameters():  # norms, also those of q and k, biases of the row-parallel layers, positions
        if shard_of(p) is None:
            comm.all_reduce(p.grad, axis.labelled("replicated gradients"))
        elif is_copied(p):  # weights of k and v: other ranks have other queries of the same head
            comm.all_reduce(p.grad, same_heads.labelled("gradients of heads"))


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=run.job.world_size)["tp"]
    megatron.show_shapes(run, parallelize(GPT(config), replace(axis, ledger=Ledger())))
    plain = tensor_version(run, config, axis, parallelize, token_loss, sum_replicated_gradients)
    versions = {
        "plain": plain,
        "engine": tensor_engine(run, config, axis, token_loss),
        "our loss": tensor_engine(run, config, axis, loss.token_loss, of_all_tokens=False),
    }
    compare(run, config, axis, versions)
    megatron.claim_traffic(run, config, axis.size, versions)
    megatron.claim_loss(run, axis.size, versions)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Megatron-LM sequence parallelism: code",
        "Megatron-LM SP 代码解析",
        "What tensor parallelism replicates on every rank is sharded along the sequence, for the same bytes.",
    )
    add_model_flags(frame, layers=2, batch=3, feed_forward=240)
    frame.parser.set_defaults(steps=10)
    sys.exit(frame.main(rules.megatron_sp, lesson))
