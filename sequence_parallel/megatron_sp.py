"""Lecture 06: Megatron-LM sequence parallelism (Megatron-LM SP 代码解析). Korthikanti et al. 2022 (2205.05198).

    torchrun --nproc_per_node=8 sequence_parallel/megatron_sp.py

Tensor parallelism shards what is inside attention and MLP, and replicates what is between them: LayerNorm, dropout, the
residual stream. Here that is sharded too, along the sequence. The all-reduce at each border becomes its two halves,
and moves the same bytes. The paper's names, forward / backward:

    tensor parallelism     f  identity / all-reduce         f̄  all-reduce / identity
    with sequence          g  all-gather / reduce-scatter   ḡ  reduce-scatter / all-gather

What it saves in memory is measured by `activations.py`.

read: megatron_sp.py:36-148; then engine/layers.py, engine/loss.py

B batch (paper: b), S sequence (s), H hidden (h), I and O in and out features, V vocabulary, t ranks of the axis
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from core.shards import shard, shard_of
from sequence_parallel.evidence import megatron, rules
from sequence_parallel.evidence.training import compare, tensor_engine, tensor_version

S = 1  # the dimension of (B, S, ...) that is sharded


def g(x: Tensor, axis: Axis) -> Tensor:
    """(B, S/t, H) to (B, S, H): all-gather forward, reduce-scatter backward."""
    return comm.gather_for(x, axis, S)


def g_bar(x: Tensor, axis: Axis) -> Tensor:
    """(B, S, H), one term of a sum over the ranks, to (B, S/t, H): reduce-scatter forward, all-gather backward."""
    return comm.scatter_from(x, axis, S)


class ColumnParallelLinear(nn.Module):
    """(B, S/t, I) to (B, S, O/t): from a shard of the sequence to a shard of the features."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 0, axis)  # (O/t, I)
        self.bias = None if linear.bias is None else shard(linear.bias, 0, axis)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(g(x, self.axis), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """(B, S, I/t) to (B, S/t, O): from a shard of the features to a shard of the sequence."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = shard(linear.weight, 1, axis)  # (O, I/t)
        self.bias = linear.bias  # replicated: added after the sum, to each token once

    def forward(self, x: Tensor) -> Tensor:
        return g_bar(F.linear(x, self.weight), self.axis) + self.bias


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
    """Positions (S) to the embeddings (S/t, H) of this rank's shard of the sequence. The table is replicated."""

    def __init__(self, embedding: nn.Embedding, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = embedding.weight

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions.chunk(self.axis.size)[self.axis.index], self.weight)


def parallelize(model: GPT, axis: Axis) -> GPT:
    """Shard the GPT over the ranks of `axis`: (B, S) tokens to (B, S, V/t) logits, and (B, S/t, H) in between."""
    on_sequence = (S, axis.index, axis.size)  # what a dropout mask of (B, S/t, H) is a shard of
    layers = axis.labelled("layers")  # so that the ledger counts what the layers send
    model.embed.token = VocabParallelEmbedding(model.embed.token, axis.labelled("embedding"))
    model.embed.position = PositionShard(model.embed.position, axis)
    model.embed.dropout.split = on_sequence
    for block in model.blocks.values():  # its LayerNorms stay as they are, and see S/t tokens
        attention, mlp = block.attention, block.mlp
        attention.qkv = ColumnParallelLinear(attention.qkv, layers)  # its rows are ordered by head: A/t heads
        attention.dropout.split = (1, axis.index, axis.size)  # of the scores (B, A/t, S, S)
        attention.out = RowParallelLinear(attention.out, layers)
        block.attention_dropout.split = on_sequence
        mlp.up = ColumnParallelLinear(mlp.up, layers)
        mlp.down = RowParallelLinear(mlp.down, layers)
        block.mlp_dropout.split = on_sequence
    model.head = ColumnParallelLinear(model.head, axis.labelled("head"))
    if model.config.tied:
        model.head.weight = model.embed.token.weight
    return model


def token_loss(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
    """This rank's share of the loss: of its own S/t tokens, divided by the `tokens` of the global batch.

    Args:
        logits: (B, S, V/t), all tokens for this rank's shard of the vocabulary.
        targets: (B, S), the same on all ranks.
    """
    axis = axis.labelled("loss")
    first, rows = axis.index * logits.shape[-1], logits.shape[-1]
    padding = torch.arange(first, first + rows, device=logits.device) >= vocabulary
    logits = logits.masked_fill(padding, -torch.inf)  # V rounded up to a multiple of t
    elsewhere = (targets < first) | (targets >= first + rows)
    row = (targets - first).masked_fill(elsewhere, 0)
    target = logits.gather(-1, row.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)  # (B, S)
    target = g_bar(target, axis)  # (B, S/t): the one rank that has the target's row, and zeros
    lse = comm.gather_for(logits.logsumexp(-1)[None], axis, 0)  # (t, B, S): the logarithms of all ranks' sums
    lse = lse.chunk(axis.size, 2)[axis.index].logsumexp(0)  # (B, S/t): of the sum over the full vocabulary
    return (lse - target).sum() / tokens


def sum_replicated_gradients(model: GPT, axis: Axis) -> None:
    """After backward. Each rank has seen its own tokens only: what is replicated has partial gradients."""
    for p in model.parameters():  # LayerNorms, biases of the row-parallel layers, positions
        if shard_of(p) is None:
            comm.all_reduce(p.grad, axis.labelled("replicated gradients"))


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=run.job.world_size)["tp"]
    megatron.show_shapes(run, parallelize(GPT(config), replace(axis, ledger=Ledger())))
    plain = tensor_version(run, config, axis, parallelize, token_loss, sum_replicated_gradients)
    versions = {"plain": plain, "engine": tensor_engine(run, config, axis)}
    compare(run, config, axis, versions)
    megatron.claim_traffic(run, config, axis.size, versions)


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
