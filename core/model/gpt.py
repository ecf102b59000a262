"""The reference model: a decoder in one process. Every topic parallelises it from outside; there is no second one.

GPT-2's kind unless the configuration says otherwise; with RMSNorm, rotary positions, grouped keys and values and a
gated MLP it is Llama's, Mistral's or Qwen's. What it has of each is in its configuration, and nowhere else.

B batch, S sequence, H hidden, A heads, K key and value heads (a divisor of A), D head size (H/A if nothing else is
said), F feed-forward, V vocabulary
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.model.config import ModelConfig
from core.model.documents import Documents, restarted, visible
from core.model.linear import Linear, products
from core.model.norms import LayerNorm, RMSNorm, norm_of
from core.model.precision import Precision, policy_of, wide
from core.model.rotary import Rotary
from core.model.seeded import SampleMasks, generator
from core.model.streams import RandomTracker
from core.proof.rulebook import DECODER
from core.proof.rules import check
from core.shards import shard_of

GPTConfig = ModelConfig


class Dropout(nn.Module):
    """Dropout whose masks come from where `use_masks` says: it is lecture 05's and 06's subject which that is."""

    def __init__(self, drop: float, name: str):
        super().__init__()
        self.drop, self.name = drop, name
        self.split: tuple[int, int, int] | None = None  # (dimension, index, count) where ranks hold shards of x
        self.masks: SampleMasks | RandomTracker | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop):
            return x
        assert self.masks is not None, "use_masks first"
        return x * self.masks.keep_mask(x.shape, self.drop, self.name, self.split, x.device) / (1.0 - self.drop)


class Embedding(nn.Module):
    """Token and, unless positions are rotary, learned position embedding: (B, S) int64 to (B, S, H)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.hidden)
        self.position = nn.Embedding(config.sequence, config.hidden) if config.learned_positions else None
        self.dropout = Dropout(config.dropout, "embed")
        self.documents: Documents | None = None

    def positions(self, length: int) -> Tensor:
        """Which tokens of the sample these are, int64 (S). Whoever shards the sequence puts another in its place."""
        return torch.arange(length)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        if self.position is not None:
            here = self.positions(tokens.shape[1]).to(tokens.device)
            starts = self.documents and self.documents.of(len(tokens), tokens.device)
            x = x + self.position(here if starts is None else restarted(here, starts))
        return self.dropout(x)


class Attention(nn.Module):
    """Causal self-attention, (B, S, H) to (B, S, H).

    The rows of the fused weight are ordered (head, q|k|v, D): a contiguous block of rows is a set of whole heads,
    so tensor parallelism can cut it anywhere between heads. Of three weights too the rows are ordered by head. Query
    head i reads key and value head i K/A, rounded down: a contiguous block of the ones reads a contiguous block of the
    others.
    """

    def __init__(self, config: GPTConfig, name: str):
        super().__init__()
        self.head_size = config.head_dim
        self.explicit = config.attention == "softmax"
        bias = config.biases or config.qkv_bias
        self.fused = config.fused_qkv
        if self.fused:
            self.qkv = Linear(config.hidden, 3 * config.query_size, bias)
        else:
            self.q = Linear(config.hidden, config.query_size, bias)
            self.k = Linear(config.hidden, config.key_value_size // 2, bias)
            self.v = Linear(config.hidden, config.key_value_size // 2, bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.rotary = None if config.learned_positions else Rotary(config)
        self.out = Linear(config.value_size, config.hidden, config.biases)
        self.dropout = Dropout(config.dropout, f"{name}.scores")
        self.documents: Documents | None = None

    def forward(self, x: Tensor) -> Tensor:
        starts = self.documents and self.documents.of(len(x), x.device)
        q, k, v = self.heads_of(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, starts)
        attended = self.core(q, k, v) if starts is None else self.core(q, k, v, starts=starts)
        return self.out(rearrange(attended, "b a s d -> b s (a d)"))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) to queries (B, A, S, D), keys and values (B, K, S, D)."""
        if self.fused:
            return rearrange(self.qkv(x), "b s (a three d) -> three b a s d", three=3, d=self.head_size).unbind()
        parts = products(x, self.q, self.k, self.v)
        return tuple(rearrange(part, "b s (a d) -> b a s d", d=self.head_size) for part in parts)

    def core(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None) -> Tensor:
        """softmax(scale QK^T) V, (B, A, S, D of v): the part that selective recomputation repeats.

        Args:
            q: (B, A, S, D).
            k, v: (B, K, S, D) each; v may have another D.
            scale: None: 1 / sqrt(D).
            starts: (B, S) of `core.model.documents`, where samples have several.
        """
        groups = q.shape[1] // k.shape[1]  # query heads of one key and value head
        if not self.explicit:
            return dense_attention(q, k, v, scale, starts)
        if groups > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / (math.sqrt(q.shape[-1]) if scale is None else 1.0 / scale)
        future = torch.full(scores.shape[-2:], float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        if starts is not None:
            tokens = torch.arange(q.shape[2])
            future = torch.zeros_like(future).masked_fill(~visible(starts, tokens, tokens), float("-inf"))
        return self.dropout((scores + future).softmax(-1)) @ v  # an addition saves nothing for backward


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
) -> Tensor:
    """`Attention.core` by torch's own; with documents by a mask (B, 1, S, S), which it keeps for backward."""
    grouped = q.shape[1] != k.shape[1]
    if starts is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped, scale=scale)
    tokens = torch.arange(q.shape[2])
    seen = visible(starts, tokens, tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped, scale=scale)


class MLP(nn.Module):
    """(B, S, H) to (B, S, F), GELU, and back; gated: SwiGLU (2002.05202), silu of one product times another."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(config.hidden, config.feed_forward, config.biases) if config.gated else None
        self.up = Linear(config.hidden, config.feed_forward, config.biases)
        self.down = Linear(config.feed_forward, config.hidden, config.biases)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        gate, up = products(x, self.gate, self.up)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One transformer layer, a norm before attention and before the MLP (pre-LN)."""

    def __init__(self, config: GPTConfig, name: str):
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, f"{name}.attention")
        self.attention_dropout = Dropout(config.dropout, f"{name}.attention")
        self.mlp_norm = norm_of(config)
        self.mlp = MLP(config)
        self.mlp_dropout = Dropout(config.dropout, f"{name}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """(B, S) int64 tokens to (B, S, V) logits.

    Built on the meta device, without memory; `materialize` gives it its numbers. A pipeline stage is this same class
    with the parts that other ranks hold set to None or left out of `blocks`; the rest keep their full names.

    Raises:
        ValueError: the configuration is of a kind that is not built here.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if missing := config.unbuilt():
            raise ValueError(f"{config.name}: core.model.gpt has no {missing}; use a configuration of GPT-2's kind")
        check(config, DECODER)
        self.config = config
        with torch.device("meta"):
            self.embed: Embedding | None = Embedding(config)
            self.blocks = nn.ModuleDict({str(i): Block(config, f"blocks.{i}") for i in range(config.layers)})
            self.norm: LayerNorm | RMSNorm | None = norm_of(config)
            self.head: Linear | None = Linear(config.hidden, config.vocabulary, config.head_bias)
        if config.tied:
            self.head.weight = self.embed.token.weight
        for block in self.blocks.values():  # all turn by the same table
            block.attention.rotary = self.blocks["0"].attention.rotary

    def forward(self, x: Tensor, end: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Tensor:
        """Logits; or what `end` makes of the head and its input (B, S, H), in their place (`core.model.loss`)."""
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        if self.head is None:
            return x
        x = self.norm(x)
        return self.head(x) if end is None else end(self.head, x)

    def full_name(self, name: str) -> str:
        """The name that a parameter has in the one-process model, where the tied head is the token embedding."""
        return "embed.token.weight" if self.config.tied and name == "head.weight" else name


def use_masks(model: nn.Module, masks: SampleMasks | RandomTracker) -> SampleMasks | RandomTracker:
    """Let all dropouts of a model, or of what is sharded of it, take their masks from `masks`; returns it."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.masks = masks
    return masks


def token_loss(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Cross entropy summed over these targets and divided by `tokens`, the number of targets in the *global* batch.

    So the losses, and the gradients, of the parts of a batch add up to those of the whole in every layout.
    """
    return F.cross_entropy(wide(logits.flatten(0, 1)), targets.flatten(), reduction="sum") / tokens


def initial_value(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """The float64 start value of the whole parameter `name`: GPT-2's scheme, from a generator of its own.

    Biases and norms are drawn too, not 0 and 1: a bias added twice must show in the first loss.
    """
    std = 0.02
    if name.endswith(("attention.out.weight", "down.weight")):
        std /= math.sqrt(2 * config.layers)
    value = torch.empty(shape, dtype=torch.float64).normal_(0.0, std, generator=generator(seed, name))
    return value + 1.0 if name.endswith("norm.weight") else value


def materialize(model: GPT, seed: int, device: torch.device, precision: Precision | torch.dtype) -> GPT:
    """Replace the meta parameters of `model`, or of what is sharded of it, by their start values. Ties stay ties.

    A parameter that has its numbers already keeps them, and its data type.

    Args:
        precision: a policy, or the data type of parameters for the usual one. Autograd adds up gradients in its type.
    """
    precision = policy_of(precision)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, meta in list(module.named_parameters(recurse=False)):
            if not meta.is_meta:
                meta.data = meta.data.to(device)
                continue
            if meta not in made:
                name = model.full_name(f"{prefix}.{leaf}")
                mark = shard_of(meta)  # the whole is drawn, then cut: every layout starts from the same numbers
                value = initial_value(name, mark.full_shape(meta.shape) if mark else meta.shape, model.config, seed)
                value = (mark.local(value) if mark else value).to(device, precision.parameters)
                made[meta] = nn.Parameter(value, meta.requires_grad)
                made[meta].grad_dtype = precision.gradients
                made[meta].shard = mark
            setattr(module, leaf, made[meta])
    return model
