"""`config.json` of a model that was not read from one, written; `core.model.published` reads it again."""

import math
from typing import Any

from core.model.config import Llama3Scaling, ModelConfig, YarnScaling
from core.model.families import FAMILIES
from core.model.published import ACTIVATIONS, DROPOUTS, from_content


def to_content(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says of a model that was not read from one.

    Raises:
        ValueError: no published family has such models.
    """
    content = _to_gpt2(config) if config.fused_qkv else _to_llama(config)
    try:
        again = from_content(content, config.sequence)
    except (KeyError, ValueError) as error:
        raise ValueError(f"no published family has {config.name}'s kind of model: {error}") from None
    for field in config.__dataclass_fields__:
        if field not in ("name", "dropout", "attention", "positions", "notes") and _differ(config, again, field):
            raise ValueError(f"no published family has {config.name}'s kind of model, with {field} "
                             f"{getattr(config, field)}")  # fmt: skip
    return content


def _differ(one: ModelConfig, other: ModelConfig, field: str) -> bool:
    same = {"kv_heads": "query_groups", "head_size": "head_dim", "expert_feed_forward": "expert_size"}.get(field, field)
    return getattr(one, same) != getattr(other, same)


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": [FAMILIES["gpt2"].architecture],
        "model_type": "gpt2",
        "vocab_size": config.vocabulary,
        "n_positions": config.positions or config.sequence,
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    } | dict.fromkeys(DROPOUTS[:3], config.dropout)


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if config.experts:
        kind = "deepseek_v3" if config.latent else "qwen3_moe" if config.qk_norm else "mixtral"
    content = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.sequence,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.dropout,
        "rope_parameters": {"rope_theta": config.rope_theta} | _to_rope(config.rope_scaling),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.experts:
        content |= {"num_experts_per_tok": config.top_k}
        content |= {"n_routed_experts" if kind == "deepseek_v3" else "num_local_experts": config.experts}
    if kind == "mixtral":
        content |= {"intermediate_size": config.expert_size, "sliding_window": None}
    elif config.experts:
        normalised = config.score != "softmax-topk"
        content |= {"moe_intermediate_size": config.expert_size, "norm_topk_prob": normalised}
    if kind == "deepseek_v3":
        q_rank, kv_rank, rope, nope, value = config.latent
        content |= {
            "head_dim": rope,
            "q_lora_rank": q_rank or None,
            "kv_lora_rank": kv_rank,
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": nope,
            "qk_head_dim": rope + nope,
            "v_head_dim": value,
            "n_shared_experts": config.shared_feed_forward // config.expert_size,
            "first_k_dense_replace": config.dense_layers,
            "routed_scaling_factor": config.weight_scale,
            "n_group": config.groups,
            "topk_group": config.top_groups,
        }
    return content


def _to_rope(scaling: Llama3Scaling | YarnScaling | str | None) -> dict[str, Any]:
    if isinstance(scaling, Llama3Scaling):
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return {"rope_type": "llama3"} | dict(zip(names, scaling, strict=True))
    if isinstance(scaling, YarnScaling):
        names = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
        found = {"rope_type": "yarn"} | dict(zip(names, scaling, strict=False))
        if scaling.score_factor != 1.0:  # DeepSeek's
            found["mscale_all_dim"] = (math.sqrt(scaling.score_factor) - 1) / (0.1 * math.log(scaling.factor))
        return found
    return {"rope_type": scaling or "default"}
