"""What is trained: published models by name, or a Hugging Face `config.json`. Lecture 03.

A preset is the published model. `core.model.gpt` builds the dense ones in one process; the topics shard one kind only:
GPT-2's, with biases, LayerNorms and learned positions, and as many key and value heads as heads.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.planner.ptdp import SEQUENCE, TABLE, VOCABULARY
from core.model.config import Latent, Llama3Scaling, ModelConfig, YarnScaling

LLAMA = ModelConfig(
    vocabulary=128_256,
    sequence=8192,
    kv_heads=8,
    gated=True,
    biases=False,
    learned_positions=False,
    tied=False,
    norm="rms",
    rope_theta=500_000.0,
)
MIXTRAL_8X7B = replace(
    LLAMA, layers=32, hidden=4096, heads=32, feed_forward=14336, vocabulary=32_000, experts=8, top_k=2, rope_theta=1e6
)
DEEPSEEK_V3 = replace(
    LLAMA,
    layers=61,
    hidden=7168,
    heads=128,
    kv_heads=None,
    feed_forward=18432,
    vocabulary=129_280,
    sequence=4096,
    latent=Latent(q_rank=1536, kv_rank=512, rope=64, nope=128, value=128),
    experts=256,
    top_k=8,
    expert_feed_forward=2048,
    shared_feed_forward=2048,
    dense_layers=3,
    score="sigmoid",
    weight_scale=2.5,
    groups=8,
    top_groups=4,
    norm_eps=1e-6,
    rope_theta=10_000.0,
)


def gpt(layers: int, hidden: int, heads: int) -> ModelConfig:
    """GPT-3's kind, with the vocabulary and the sequence of the published runs."""
    return ModelConfig(VOCABULARY, SEQUENCE, layers=layers, hidden=hidden, heads=heads)


PUBLISHED = {
    "gpt3-175b": gpt(96, 12288, 96),
    "llama3-8b": replace(LLAMA, layers=32, hidden=4096, heads=32, feed_forward=14336),
    "llama3-70b": replace(LLAMA, layers=80, hidden=8192, heads=64, feed_forward=28672),
    "llama3-405b": replace(
        LLAMA, layers=126, hidden=16384, heads=128, feed_forward=53248, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)
    ),
    "mixtral-8x7b": MIXTRAL_8X7B,
    "deepseek-v3": DEEPSEEK_V3,
} | {row.name: gpt(row.layers, row.hidden, row.heads) for row in TABLE}
PRESETS = {name: replace(model, name=name) for name, model in PUBLISHED.items()}

KINDS = ("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2",
         "deepseek_v3")  # fmt: skip
LONGEST = 8192  # tokens in a sample, where nobody says how many


def from_config(path: str, sequence: int | None = None) -> ModelConfig:
    """A model from a Hugging Face `config.json`.

    Args:
        sequence: tokens in a sample, where not the largest number of positions that the file allows, or 8192.

    Raises:
        ValueError: the file cannot be read, or lacks a size, or one makes no sense.
    """
    use = "use the config.json of a decoder-only transformer"
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("holds no names and values")
        name = str(content.get("_name_or_path") or Path(path).parent.name or "config")
        return replace(from_content(content, sequence), name=name)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; use the path of a config.json") from None
    except KeyError as error:
        raise ValueError(f"--config {path}: has no {error}; {use}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config {path}: {error}; {use}") from None


def from_content(content: dict[str, Any], sequence: int | None) -> ModelConfig:
    """Raises KeyError or ValueError where a size is missing or makes no sense."""

    def size(*keys: str) -> int:
        """Of the first key that the file has."""
        key = next((key for key in keys if content.get(key)), keys[-1])
        if type(content[key]) is not int or content[key] < 1:
            raise ValueError(f"{key} is {content[key]!r}, and must be a whole number, 1 or more")
        return content[key]

    def optional(*keys: str) -> int | None:
        return size(*keys) if any(content.get(key) for key in keys) else None

    if (kind := content.get("model_type", "llama")) not in KINDS:
        raise ValueError(f"model_type {kind!r} is not counted here, only {', '.join(KINDS)}")
    if "n_embd" in content:  # GPT-2
        return ModelConfig(
            hidden=size("n_embd"),
            feed_forward=optional("n_inner") or 0,
            layers=size("n_layer"),
            heads=size("n_head"),
            vocabulary=size("vocab_size"),
            sequence=sequence or size("n_positions"),
            tied=content.get("tie_word_embeddings", True),
            norm_eps=float(content.get("layer_norm_epsilon", 1e-5)),
        )
    experts = optional("num_local_experts", "n_routed_experts", "num_experts") or 0
    dense_layers = optional("first_k_dense_replace") or 0
    if dense_layers > size("num_hidden_layers"):
        raise ValueError(f"first_k_dense_replace is {dense_layers}, more than the layers")
    feed_forward, expert_feed_forward = size("intermediate_size"), optional("moe_intermediate_size")
    shared = optional("shared_expert_intermediate_size")
    if shared is None:
        shared = (optional("n_shared_experts") or 0) * (expert_feed_forward or feed_forward)
    latent = None
    if content.get("kv_lora_rank"):
        sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent = Latent(optional("q_lora_rank") or 0, *map(size, sizes))
    theta, scaling = rotary_of(content)
    return ModelConfig(
        layers=size("num_hidden_layers"),
        hidden=size("hidden_size"),
        heads=size("num_attention_heads"),
        feed_forward=feed_forward,
        vocabulary=size("vocab_size"),
        sequence=sequence or min(size("max_position_embeddings"), LONGEST),
        kv_heads=None if latent else optional("num_key_value_heads"),
        head_size=None if latent else optional("head_dim"),  # transformers writes `rope` there
        gated=True,
        biases=False,
        learned_positions=False,
        tied=bool(content.get("tie_word_embeddings", False)),
        latent=latent,
        experts=experts,
        top_k=size("num_experts_per_tok") if experts else 0,
        expert_feed_forward=expert_feed_forward,
        shared_feed_forward=shared,
        dense_layers=dense_layers,
        score=score_of(kind, content),
        weight_scale=float(content.get("routed_scaling_factor") or 1.0),
        groups=optional("n_group") or 1,
        top_groups=optional("topk_group") or 1,
        norm="rms",
        norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        qkv_bias=kind in ("qwen2", "qwen2_moe"),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def score_of(kind: str, content: dict[str, Any]) -> str:
    """Of the router: Mixtral's weights always sum to 1, the others' where the file says so."""
    if kind == "deepseek_v3":
        return "sigmoid"
    return "topk-softmax" if kind == "mixtral" or content.get("norm_topk_prob") else "softmax-topk"


def rotary_of(content: dict[str, Any]) -> tuple[float, Llama3Scaling | YarnScaling | str | None]:
    """The base of the frequencies, and how they are scaled: in one group since transformers 5, in two before."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or content.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    original = rope.get("original_max_position_embeddings") or content["max_position_embeddings"]
    if kind == "llama3":
        return theta, Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind != "yarn":
        return theta, str(kind)
    factor = rope.get("factor") or content["max_position_embeddings"] / original
    attention, of_scores = rope.get("attention_factor"), 1.0
    if attention is None:
        attention = yarn_attention(factor, 1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
            attention = yarn_attention(factor, rope["mscale"]) / yarn_attention(factor, rope["mscale_all_dim"])
    if content.get("kv_lora_rank") and rope.get("mscale_all_dim"):  # with latent attention only
        of_scores = yarn_attention(factor, rope["mscale_all_dim"]) ** 2
    borders = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0, rope.get("truncate", True)
    return theta, YarnScaling(factor, original, attention, *borders, of_scores)


def yarn_attention(factor: float, scale: float) -> float:
    """What cosines and sines are multiplied by. 2309.00071, section 3.4."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
