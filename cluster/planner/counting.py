"""A model's linear layers, parameters and floating-point operations, counted matrix by matrix. Lecture 03.

t ranks of tensor parallelism: a column-parallel matrix has outputs / t on each rank, a row-parallel one inputs / t.
"""

from functools import cache
from math import lcm, prod
from typing import NamedTuple

from cluster.planner.layout import Layout
from core.model.config import ModelConfig


class Matrix(NamedTuple):
    """A linear layer, and how tensor parallelism shards it: "column", "row" or "replicate"."""

    name: str
    inputs: int
    outputs: int
    sharding: str
    bias: bool
    of_heads: tuple[int, int] = (0, 1)  # of the outputs those of keys and values, and how many heads these have

    def shape(self, t: int) -> tuple[int, int]:
        """(inputs, outputs) of a rank's shard."""
        inputs = self.inputs // t if self.sharding == "row" else self.inputs
        if self.sharding != "column":
            return inputs, self.outputs
        size, heads = self.of_heads  # fewer heads than ranks are on several each
        return inputs, (self.outputs - size) // t + size // min(t, heads)

    def parameters(self, t: int = 1) -> int:
        """On one rank. A row-parallel layer's bias is replicated."""
        return prod(self.shape(t)) + (self.shape(t)[1] if self.bias else 0)


@cache
def attention_matrices(model: ModelConfig) -> list[Matrix]:
    h, heads, bias = model.hidden, model.heads, model.biases
    out = Matrix("out", model.value_size, h, "row", bias or model.out_bias)
    bias = bias or model.qkv_bias
    if model.latent is None:
        size = model.query_size + model.key_value_size
        key_values = model.key_value_size, model.query_groups
        return [Matrix("qkv", h, size, "column", bias, key_values), out]
    q, kv, rope, nope, value = model.latent
    return [
        *([Matrix("q down", h, q, "replicate", bias)] if q else []),
        Matrix("q up", q or h, heads * (nope + rope), "column", False),
        Matrix("kv down", h, kv + rope, "replicate", bias),
        Matrix("kv up", kv, heads * (nope + value), "column", False),
        out,
    ]


def read_by_heads(model: ModelConfig) -> int:
    """Numbers a token of what all heads read: the layer's input; or what it is compressed to, and the key of all."""
    if model.latent is None:
        return model.hidden
    return (model.latent.q_rank or model.hidden) + model.latent.kv_rank + model.latent.rope


def mlp_matrices(model: ModelConfig, f: int, biases: bool) -> list[Matrix]:
    """Of an MLP with f features; none where f is 0."""
    if not f:
        return []
    bias = model.biases or biases
    up = Matrix("up", model.hidden, 2 * f if model.gated else f, "column", bias)
    return [up, Matrix("down", f, model.hidden, "row", bias)]


@cache
def layer_matrices(model: ModelConfig, moe: bool) -> list[Matrix]:
    """Of one layer, but for its routed experts and their router; `moe`: a layer that has them."""
    if not moe:
        return attention_matrices(model) + mlp_matrices(model, model.feed_forward, model.mlp_bias)
    shared = mlp_matrices(model, model.shared_feed_forward, model.mlp_bias)
    # Every rank of tp has those, for tokens of its own.
    return attention_matrices(model) + [matrix._replace(sharding="replicate") for matrix in shared]


@cache
def expert_matrices(model: ModelConfig) -> list[Matrix]:
    """Of one routed expert."""
    return mlp_matrices(model, model.expert_size, model.expert_bias)


# ---- Parameters ------------------------------------------------------------------------------------------------------


def norm(model: ModelConfig, size: int) -> int:
    """Parameters of a norm of so many features."""
    return 2 * size if (model.biases or model.norm_bias) and model.norm == "layer" else size


def norm_parameters(model: ModelConfig) -> int:
    """Of one layer's norms, and of attention's sinks."""
    compressed = (model.latent.q_rank or 0) + model.latent.kv_rank if model.latent else 0
    of_heads = 0
    if model.qk_norm:
        of_heads = (model.heads + model.query_groups if model.qk_norm_all else 2) * model.head_dim
        of_heads *= 2 if model.biases and model.norm == "layer" else 1
    return norm(model, model.norms * model.hidden + compressed) + of_heads + model.sinks * model.heads


def outer_norms(model: ModelConfig) -> int:
    """Of the norms before and after all layers."""
    return model.outer_norms * norm(model, model.hidden)


def router_parameters(model: ModelConfig, moe: bool) -> int:
    return (model.experts + model.shared_gate) * model.hidden + model.router_bias * model.experts if moe else 0


def position_parameters(model: ModelConfig) -> int:
    return model.table * model.hidden


def vocabulary_shard(model: ModelConfig, t: int) -> int:
    """Rows of a rank's shard of the embedding, padding included."""
    return -(-model.vocabulary // t)


def parameters_of_shares(model: ModelConfig) -> int:
    """Of a layer with experts what every rank of tp has in full, and computes on tokens of its own."""
    shared = sum(m.parameters() for m in mlp_matrices(model, model.shared_feed_forward, model.mlp_bias))
    return shared + router_parameters(model, True)


@cache
def layer_parameters(model: ModelConfig, moe: bool, t: int = 1) -> int:
    """Of one layer on a rank, but for its routed experts."""
    matrices = sum(matrix.parameters(t) for matrix in layer_matrices(model, moe))
    return matrices + norm_parameters(model) + router_parameters(model, moe)


@cache
def expert_parameters(model: ModelConfig, etp: int = 1) -> int:
    """Of one routed expert of one layer on a rank."""
    return sum(matrix.parameters(etp) for matrix in expert_matrices(model))


def model_parameters(model: ModelConfig) -> int:
    """Of the full model."""
    moe_layer = layer_parameters(model, True) + model.experts * expert_parameters(model)
    layers = (model.layers - model.moe_layers) * layer_parameters(model, False) + model.moe_layers * moe_layer
    embedding = model.vocabulary * model.hidden
    head = 0 if model.tied else embedding
    bias = model.vocabulary if model.head_bias else 0
    return layers + embedding + position_parameters(model) + outer_norms(model) + head + bias


# ---- Floating-point operations ---------------------------------------------------------------------------------------


def attention_flops(model: ModelConfig) -> float:
    """Of one token's scores and weighted sum in one layer, 2 a multiplication, not halved for causality."""
    return 2 * model.keys * (model.query_size + model.value_size)


def layer_flops(model: ModelConfig, moe: bool) -> int:
    """Of one layer's forward for one token: 2 a weight, and those of attention."""
    matrices = layer_matrices(model, moe) + (model.top_k * expert_matrices(model) if moe else [])
    return 2 * sum(matrix.inputs * matrix.outputs for matrix in matrices) + attention_flops(model)


def flops_again(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """FLOP of matrix products that a rank computes twice of one layer and microbatch, attention's core among them.

    Under full recomputation all; but the second forward ends before the last product where nothing after it is saved:
    no dropout's mask, nothing of tp without sp. (Of a backward that is not split, whose products save after.)
    """
    tokens, t = layout.tokens(model.sequence), layout.tp
    flops = core_again(model, layout.recompute) * tokens * attention_flops(model) / t
    if layout.recompute != "full":
        return flops
    matrices = layer_matrices(model, moe)
    if not (moe or model.dropout or (t > 1 and not layout.sp)):
        matrices = matrices[:-1]
    rows = tokens / layout.sp_ranks * layout.etp * model.top_k
    flops += sum(2 * rows * prod(matrix.shape(layout.etp)) for matrix in expert_matrices(model)) if moe else 0.0
    return flops + sum(
        2 * tokens / (layout.sp_ranks if matrix.sharding == "replicate" else 1) * prod(matrix.shape(t))
        for matrix in matrices
    )


def core_again(model: ModelConfig, kind: str) -> float:
    """The share of attention's FLOP that this recomputation computes again.

    Of the two products of an attention that makes the matrix of scores QK^T only: backward reads what the second reads.
    """
    if kind == "full":
        return 1.0
    if model.attention == "softmax":
        return model.query_size / (model.query_size + model.value_size) if kind in ("selective", "operators") else 0.0
    return float(kind == "selective")


def step_flops(model: ModelConfig, batch: int, forwards: int = 1) -> int:
    """Of a step, matrix products only (2104.04473, equation 3): backward twice a forward, and `forwards` of it.

    With full recomputation there are two forwards of every layer, but one of the head.
    """
    dense = (model.layers - model.moe_layers) * layer_flops(model, False)
    moe = model.moe_layers * layer_flops(model, True)
    head = 2 * model.hidden * model.vocabulary
    return batch * model.sequence * ((2 + forwards) * (dense + moe) + 3 * head)


def keys_and_values(model: ModelConfig, layout: Layout) -> float:
    """Numbers a token that a rank of tp sends over cp; of heads Ulysses has copies where its ranks are more."""
    heads = model.heads if model.latent else model.query_groups * model.kv_copies(layout.tp)
    return lcm(heads // layout.tp, layout.ulysses) * (model.head_dim + model.value_dim)
