"""What of the model tensor parallelism shards over t ranks, and what it replicates; with or without the sequence."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from core.mesh import Axis
from core.model.attention import LatentAttention
from core.model.config import ModelConfig
from core.model.gpt import GPT, Block
from core.proof.rulebook import TENSOR
from core.proof.rules import check
from core.shards import shard


def check_sizes(config: ModelConfig, ranks: int) -> None:
    """Raises ValueError unless each rank gets equally many heads and feed-forward features."""
    names = ("heads", "query_groups", "feed_forward", "latent")
    check(SimpleNamespace(tp=ranks, **{name: getattr(config, name) for name in names}), TENSOR)


def column_parallel(block: Block) -> Iterator[tuple[nn.Module, str, int | None]]:
    """The layers whose rows are of heads or features: where they are, and how many shards they have at most."""
    attention, mlp = block.attention, block.mlp
    if isinstance(attention, LatentAttention):
        pass  # see `shard_latent`
    elif attention.fused:
        yield attention, "qkv", None  # its rows are ordered by head
    else:
        groups = attention.k.out_features // attention.head_size
        yield from ((attention, "q", None), (attention, "k", groups), (attention, "v", groups))
    if mlp.gate is not None:
        yield mlp, "gate", None
    yield mlp, "up", None


def shard_latent(block: Block, axis: Axis, to_heads: Callable[[Tensor], Tensor]) -> None:
    """Latent attention: the products that make each head's queries, keys and values are column-parallel, by head.

    What is before them, with the norms, is of all heads, and replicated: every rank computes it of its tokens. So all
    that the heads read goes through one `to_heads`: the compressed queries, keys and values, and the key of all heads.
    That key too is read by the heads of all ranks, and has their gradients added up, as the others.

    Args:
        block: nothing happens to one with another attention.
        to_heads: f, or of ranks with different tokens the all-gather g: (B, S or S/t, features) to (B, S, features).
    """
    attention = block.attention
    if not isinstance(attention, LatentAttention):
        return
    for up in (attention.q_up, attention.kv_up):
        up.weight = shard(up.weight, 0, axis)

    def together(*compressed: Tensor) -> Sequence[Tensor]:
        return to_heads(torch.cat(compressed, -1)).split([part.shape[-1] for part in compressed], -1)

    attention.to_heads = together


def heads_norms(model: GPT) -> set[nn.Parameter]:
    """Of queries and keys: replicated, and yet a rank has a part of their gradients, that of its own heads."""
    attentions = [a for a in (block.attention for block in model.blocks.values()) if not isinstance(a, LatentAttention)]
    return {norm.weight for each in attentions for norm in (each.q_norm, each.k_norm) if norm is not None}


# ---- Counted ---------------------------------------------------------------------------------------------------------


def parameters_on_a_rank(config: ModelConfig, ranks: int) -> int:
    """By the slide's arithmetic: 1/t of what is sharded, and all of what is replicated."""
    h, f = config.hidden, config.feed_forward // ranks
    rows = config.query_size // ranks + key_value_rows(config, ranks)
    qkv, out = rows * (h + (config.biases or config.qkv_bias)), config.value_size // ranks * h
    up, down = (2 if config.gated else 1) * f * (h + config.biases), f * h
    vocabulary = -(-config.vocabulary // ranks)  # with padding
    ends = vocabulary * ((1 if config.tied else 2) * h + config.head_bias)
    return config.layers * (qkv + out + up + down) + ends + replicated_parameters(config)


def replicated_parameters(config: ModelConfig) -> int:
    """Norms, biases of row-parallel layers, positions."""
    h, norm = config.hidden, (2 if config.norm == "layer" else 1) * config.hidden
    layer = 2 * norm + heads_norm_parameters(config) + (2 * h if config.biases else 0)
    return config.layers * layer + norm + (config.sequence * h if config.learned_positions else 0)


def heads_norm_parameters(config: ModelConfig) -> int:
    """Of one layer's norms of queries and keys."""
    return 2 * config.head_dim if config.qk_norm else 0


def key_value_rows(config: ModelConfig, ranks: int) -> int:
    """Features of the keys and values of one rank."""
    return config.key_value_size // min(ranks, config.query_groups)


def copied_parameters(config: ModelConfig, ranks: int) -> int:
    """Of one layer on a rank, what other ranks hold too: keys' and values' weights, where there are fewer heads."""
    if config.kv_copies(ranks) == 1:
        return 0
    return key_value_rows(config, ranks) * (config.hidden + (config.biases or config.qkv_bias))
