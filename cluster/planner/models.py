"""What is trained: the sizes of a transformer, its matrices, parameters and floating-point operations. Lecture 03.

A preset by name, a Hugging Face `config.json`, or sizes by flags. A preset is the published model; `core.model.gpt` is
one of its kinds only: GPT-2's, with biases, LayerNorms and learned positions, and as many key and value heads as heads.

h hidden, f feed-forward, V vocabulary, s sequence, L layers
"""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from cluster.planner.ptdp import SEQUENCE, TABLE, VOCABULARY
from core.model.gpt import GPTConfig


class Matrix(NamedTuple):
    """A linear layer: how tensor parallelism cuts it, "column" or "row", or "whole" where every rank has all of it."""

    name: str
    inputs: int
    outputs: int
    cut: str
    bias: bool

    def shape(self, t: int) -> tuple[int, int]:
        """(inputs, outputs) of a rank's part."""
        return self.inputs // (t if self.cut == "row" else 1), self.outputs // (t if self.cut == "column" else 1)

    def parameters(self, t: int = 1) -> int:
        """On one rank. A row-parallel layer's bias is whole."""
        return prod(self.shape(t)) + self.bias * self.shape(t)[1]


class Latent(NamedTuple):
    """Multi-head latent attention (2412.19437, section 2.1.1): ranks of the compressed q and kv, and head sizes."""

    q_rank: int
    kv_rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class Model:
    """Sizes; 0 where another says it."""

    name: str
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int
    sequence: int
    kv_heads: int = 0  # 0: heads
    head_size: int = 0  # 0: hidden / heads
    gated: bool = False  # SwiGLU: the first matrix of the MLP has 2f columns
    biases: bool = True  # of linear layers and norms
    learned_positions: bool = True
    tied: bool = True
    latent: Latent | None = None
    experts: int = 0
    top_k: int = 0
    expert_feed_forward: int = 0
    shared_experts: int = 0
    shared_feed_forward: int = 0  # of the shared experts together; 0: as many features as they are experts
    dense_layers: int = 0  # the first ones, which have no experts
    attention: str = "sdpa"  # or "softmax", as in `core.model.gpt`: the scores are kept for backward
    dropout: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_size", self.head_size or self.hidden // self.heads)
        object.__setattr__(self, "expert_feed_forward", self.expert_feed_forward or self.feed_forward)
        shared = self.shared_feed_forward or self.shared_experts * self.expert_feed_forward
        object.__setattr__(self, "shared_feed_forward", shared)

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def value_size(self) -> int:
        """Of all heads' outputs."""
        return self.heads * (self.latent.value if self.latent else self.head_size)

    @property
    def query_size(self) -> int:
        """Of all heads' queries."""
        return self.heads * (self.latent.nope + self.latent.rope if self.latent else self.head_size)

    @property
    def key_value_size(self) -> int:
        """Of all heads' keys and values."""
        if self.latent:
            return self.heads * (self.latent.nope + self.latent.rope + self.latent.value)
        return 2 * self.kv_heads * self.head_size

    def attention_matrices(self) -> list[Matrix]:
        h, a, bias = self.hidden, self.heads, self.biases
        out = Matrix("out", self.value_size, h, "row", bias)
        if self.latent is None:
            return [Matrix("qkv", h, (a + 2 * self.kv_heads) * self.head_size, "column", bias), out]
        q, kv, rope, nope, value = self.latent
        return [
            Matrix("q down", h, q, "whole", bias),
            Matrix("q up", q, a * (nope + rope), "column", bias),
            Matrix("kv down", h, kv + rope, "whole", bias),
            Matrix("kv up", kv, a * (nope + value), "column", bias),
            out,
        ]

    def mlp_matrices(self, f: int) -> list[Matrix]:
        up = Matrix("up", self.hidden, (1 + self.gated) * f, "column", self.biases)
        return [up, Matrix("down", f, self.hidden, "row", self.biases)]

    def norm_parameters(self) -> int:
        """Of one layer's norms."""
        latent = self.latent.q_rank + self.latent.kv_rank if self.latent else 0
        return (1 + self.biases) * (2 * self.hidden + latent)

    def dense_parameters(self, moe: bool, t: int = 1) -> int:
        """Of one layer on a rank, but for its routed experts; `moe`: a layer that has them."""
        matrices = self.attention_matrices()
        if not moe:
            matrices += self.mlp_matrices(self.feed_forward)
        elif self.shared_feed_forward:
            matrices += self.mlp_matrices(self.shared_feed_forward)
        router = self.experts * self.hidden if moe else 0
        return sum(m.parameters(t) for m in matrices) + self.norm_parameters() + router

    def expert_parameters(self, etp: int = 1) -> int:
        """Of one expert of one layer on a rank."""
        return sum(m.parameters(etp) for m in self.mlp_matrices(self.expert_feed_forward))

    def parameters(self) -> int:
        """Of the whole model."""
        moe, ends = self.moe_layers, self.vocabulary * self.hidden * (1 if self.tied else 2)
        layers = (self.layers - moe) * self.dense_parameters(False) + moe * self.dense_parameters(True)
        positions = self.sequence * self.hidden if self.learned_positions else 0
        return (
            layers + moe * self.experts * self.expert_parameters() + ends + positions + (1 + self.biases) * self.hidden
        )

    def layer_flops(self, moe: bool) -> float:
        """Of one layer's forward for one token: 2 a weight, and 4 s a value of attention, not halved for causality."""
        matrices = self.attention_matrices()
        if moe:
            matrices += self.top_k * self.mlp_matrices(self.expert_feed_forward)
            matrices += self.mlp_matrices(self.shared_feed_forward)
        else:
            matrices += self.mlp_matrices(self.feed_forward)
        keys = self.heads * (self.latent.nope + self.latent.rope if self.latent else self.head_size)
        return 2 * sum(m.inputs * m.outputs for m in matrices) + 2 * self.sequence * (keys + self.value_size)

    def flops(self, batch: int, forwards: int = 1) -> float:
        """Of a step, matrix products only (2104.04473, equation 3): backward twice a forward, and `forwards` of it.

        With full recomputation there are two forwards of every layer, but one of the head.
        """
        moe = self.moe_layers
        layers = (self.layers - moe) * self.layer_flops(False) + moe * self.layer_flops(True)
        return batch * self.sequence * ((2 + forwards) * layers + 3 * 2 * self.hidden * self.vocabulary)


def of_gpt(config: GPTConfig) -> Model:
    """The model of the lessons."""
    return Model(
        "gpt", config.layers, config.hidden, config.heads, config.feed_forward, config.vocabulary, config.sequence,
        tied=config.tied, attention=config.attention, dropout=config.dropout > 0,
    )  # fmt: skip


def _llama(name: str, layers: int, hidden: int, heads: int, f: int, vocabulary: int, **more: Any) -> Model:
    usual = {"kv_heads": 8, "gated": True, "biases": False, "learned_positions": False, "tied": False}
    return Model(name, layers, hidden, heads, f, vocabulary, 8192, **(usual | more))


PRESETS = {
    model.name: model
    for model in (
        Model("gpt3-175b", 96, 12288, 96, 4 * 12288, VOCABULARY, SEQUENCE),
        _llama("llama3-8b", 32, 4096, 32, 14336, 128_256),
        _llama("llama3-70b", 80, 8192, 64, 28672, 128_256),
        _llama("llama3-405b", 126, 16384, 128, 53248, 128_256),
        _llama("mixtral-8x7b", 32, 4096, 32, 14336, 32_000, experts=8, top_k=2),
        replace(
            _llama("deepseek-v3", 61, 7168, 128, 18432, 129_280, kv_heads=128, experts=256, top_k=8, dense_layers=3,
                   expert_feed_forward=2048, shared_experts=1, latent=Latent(1536, 512, 64, 128, 128)),
            sequence=4096,
        ),
        *(Model(r.name, r.layers, r.hidden, r.heads, 4 * r.hidden, VOCABULARY, SEQUENCE) for r in TABLE),
    )
}  # fmt: skip


KINDS = (
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)


def from_config(path: str, sequence: int | None = None) -> Model:
    """A model from a Hugging Face `config.json`.

    Args:
        sequence: tokens in a sample, where not the largest number of positions that the file allows, or 8192.

    Raises:
        ValueError: the file cannot be read, or lacks a size, or one makes no sense.
    """
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("holds no names and values")
        return _from_config(Path(path).parent.name or "config", content, sequence)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; use the path of a config.json") from None
    except KeyError as error:
        raise ValueError(
            f"--config {path}: has no {error}; use the config.json of a decoder-only transformer"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config {path}: {error}; use the config.json of a decoder-only transformer") from None


def _from_config(folder: str, c: dict[str, Any], sequence: int | None) -> Model:
    def size(*keys: str) -> int:
        """Of the first key that the file has."""
        key = next((key for key in keys if c.get(key)), keys[-1])
        if type(c[key]) is not int or c[key] < 1:
            raise ValueError(f"{key} is {c[key]!r}, and must be a whole number, 1 or more")
        return c[key]

    def optional(*keys: str) -> int:
        return size(*keys) if any(c.get(key) for key in keys) else 0

    if (kind := c.get("model_type", "llama")) not in KINDS:
        raise ValueError(f"model_type {kind!r} is not counted here, only {', '.join(KINDS)}")
    name = str(c.get("_name_or_path") or folder)
    if "n_embd" in c:  # GPT-2
        h = size("n_embd")
        f = optional("n_inner") or 4 * h
        return Model(name, size("n_layer"), h, size("n_head"), f, size("vocab_size"), sequence or size("n_positions"))
    experts = optional("num_local_experts", "n_routed_experts", "num_experts")
    dense = optional("first_k_dense_replace")
    if dense > size("num_hidden_layers"):
        raise ValueError(f"first_k_dense_replace is {dense}, more than the layers")
    latent = None
    if c.get("kv_lora_rank"):
        parts = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent = Latent(*map(size, parts))
    return Model(
        name, size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads"), size("intermediate_size"),
        size("vocab_size"), sequence or min(size("max_position_embeddings"), 8192),
        kv_heads=optional("num_key_value_heads"), head_size=optional("head_dim"), gated=True, biases=False,
        learned_positions=False, tied=bool(c.get("tie_word_embeddings", False)), latent=latent, experts=experts,
        top_k=size("num_experts_per_tok") if experts else 0, expert_feed_forward=optional("moe_intermediate_size"),
        shared_experts=optional("n_shared_experts"), dense_layers=dense,
        shared_feed_forward=optional("shared_expert_intermediate_size"),
    )  # fmt: skip
