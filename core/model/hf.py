"""The names of the published files (Hugging Face) for the parameters of `core.model.gpt`, and back.

Nothing else knows them. Names and values go both ways, so gradients do too. GPT-2's linear layers are saved transposed
(`Conv1D`), with all queries before all keys before all values, where ours go head by head. In all other families a
value is saved as it is. Experts are one by one in the files, and one stacked parameter (E, ...) here: a published
tensor is the row `expert` of it, so that a rank reads the tensors of its experts only, and of each its slice.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from einops import rearrange
from torch import Tensor

from core.model.config import ModelConfig

LLAMA = {  # Mistral, Qwen2 and Qwen3 too; and what is no mixture of those below
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
MIXTRAL = LLAMA | {
    "blocks.{}.mlp.router": "model.layers.{}.block_sparse_moe.gate",
    "blocks.{}.mlp.experts.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blocks.{}.mlp.experts.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "blocks.{}.mlp.experts.down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
QWEN_MOE = LLAMA | {  # Qwen3-MoE
    "blocks.{}.mlp.router": "model.layers.{}.mlp.gate",
    "blocks.{}.mlp.experts.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blocks.{}.mlp.experts.up": "model.layers.{}.mlp.experts.{}.up_proj",
    "blocks.{}.mlp.experts.down": "model.layers.{}.mlp.experts.{}.down_proj",
}
DEEPSEEK = QWEN_MOE | {
    "blocks.{}.mlp.router.bias": "model.layers.{}.mlp.gate.e_score_correction_bias",
    "blocks.{}.mlp.shared.gate": "model.layers.{}.mlp.shared_experts.gate_proj",
    "blocks.{}.mlp.shared.up": "model.layers.{}.mlp.shared_experts.up_proj",
    "blocks.{}.mlp.shared.down": "model.layers.{}.mlp.shared_experts.down_proj",
    "blocks.{}.attention.q_down": "model.layers.{}.self_attn.q_a_proj",
    "blocks.{}.attention.q_down_norm": "model.layers.{}.self_attn.q_a_layernorm",
    "blocks.{}.attention.q_up": "model.layers.{}.self_attn.q_b_proj",
    "blocks.{}.attention.kv_down": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "blocks.{}.attention.kv_down_norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "blocks.{}.attention.kv_up": "model.layers.{}.self_attn.kv_b_proj",
}
DEEPSEEK_PLAIN_QUERIES = DEEPSEEK | {"blocks.{}.attention.q_up": "model.layers.{}.self_attn.q_proj"}
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


class Ours(NamedTuple):
    """A published tensor here: the parameter, or of a stacked one the row `expert`, is `value`."""

    name: str
    expert: int | None
    value: Tensor


def to_published(name: str, value: Tensor, config: ModelConfig, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The published tensors of one of our parameters, or of its gradient: one, or of stacked experts one each.

    Of a value on the meta device they are the published names and shapes. Where values are saved as they are, `value`
    may be a shard of the parameter along any dimension: the tensors are the same shards.

    Args:
        first: the expert that `value` begins with, where it has some of the experts only.

    Raises:
        KeyError: the family has no such parameter.
    """
    if config.fused_qkv:
        if ".attention.qkv." in name:
            value = rearrange(value, "(a three d) ... -> (three a d) ...", three=3, d=config.head_dim)
        value = _transposed(name, value)
    if ".experts." not in name:
        yield _renamed(name, table_of(config)), value
        return
    for expert, one in enumerate(value.unbind(), first):
        yield _renamed(name, table_of(config), expert), one


def from_published(name: str, value: Tensor, config: ModelConfig) -> Ours:
    """What a published tensor, or where values are saved as they are a slice of one, is here; KeyError as above.

    The name and the expert depend on the name only: an empty value will do to ask for them.
    """
    expert = re.search(r"\.experts\.(\d+)\.", name)
    name = _renamed(name, {theirs: ours for ours, theirs in table_of(config).items()})
    if config.fused_qkv:
        value = _transposed(name, value)
        if ".attention.qkv." in name:
            value = rearrange(value, "(three a d) ... -> (a three d) ...", three=3, d=config.head_dim)
    return Ours(name, int(expert[1]) if expert else None, value)


def table_of(config: ModelConfig) -> dict[str, str]:
    """Our names and the published ones, of the family that has such models."""
    if config.fused_qkv:
        return GPT2
    if config.latent:
        return DEEPSEEK if config.latent.q_rank else DEEPSEEK_PLAIN_QUERIES
    if not config.experts:
        return LLAMA
    return QWEN_MOE if config.qk_norm else MIXTRAL


def _renamed(name: str, table: dict[str, str], *more: int) -> str:
    """`blocks.3.mlp.up.weight` by the row of `blocks.{}.mlp.up`, or by one of its own.

    Args:
        more: numbers that are in the new name besides the layer's.
    """
    numbers, row = re.findall(r"\.(\d+)(?=\.)", name), re.sub(r"\.\d+(?=\.)", ".{}", name)
    if row in table:
        return table[row].format(*numbers, *more)
    module, _, leaf = row.rpartition(".")
    return f"{table[module].format(*numbers, *more)}.{leaf}"


def _transposed(name: str, value: Tensor) -> Tensor:
    return value.T if name.startswith("blocks.") and value.dim() == 2 else value
