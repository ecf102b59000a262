"""The names of the published files (Hugging Face) for the parameters of `core.model.gpt`, and back.

Nothing else knows them. Names and values go both ways, so gradients do too. GPT-2's linear layers are saved transposed
(`Conv1D`), with all queries before all keys before all values, where ours go head by head.
"""

import re

from einops import rearrange
from torch import Tensor

from core.model.config import ModelConfig

LLAMA = {  # Mistral, Qwen2 and Qwen3 too
    "embed.token": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GPT2 = {
    "embed.token": "transformer.wte",
    "embed.position": "transformer.wpe",
    "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
    "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


def to_published(name: str, value: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """Of one of our parameters, or its gradient.

    Raises:
        KeyError: the family has no such parameter.
    """
    if config.fused_qkv:
        if ".attention.qkv." in name:
            value = rearrange(value, "(a three d) ... -> (three a d) ...", three=3, d=config.head_dim)
        value = _transposed(name, value)
    return _renamed(name, GPT2 if config.fused_qkv else LLAMA), value


def from_published(name: str, value: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """Our name and value of a published tensor; KeyError as above."""
    table = GPT2 if config.fused_qkv else LLAMA
    name = _renamed(name, {theirs: ours for ours, theirs in table.items()})
    if config.fused_qkv:
        value = _transposed(name, value)
        if ".attention.qkv." in name:
            value = rearrange(value, "(three a d) ... -> (a three d) ...", three=3, d=config.head_dim)
    return name, value


def _renamed(name: str, table: dict[str, str]) -> str:
    """`blocks.3.mlp.up.weight` by the row of `blocks.{}.mlp.up`."""
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", module)
    row = module.replace(layer[0], ".{}.", 1) if layer else module
    return f"{table[row].format(layer and layer[1])}.{leaf}"


def _transposed(name: str, value: Tensor) -> Tensor:
    return value.T if name.startswith("blocks.") and value.dim() == 2 else value
