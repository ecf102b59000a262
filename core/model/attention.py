"""Causal self-attention, whose heads have keys and values of their own (MHA), of a group (GQA), or compressed (MLA).

B batch, S sequence, H hidden, A heads, K key and value heads (a divisor of A), D head size
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.model.config import ModelConfig
from core.model.documents import Documents, visible
from core.model.linear import Linear, products
from core.model.norms import RMSNorm
from core.model.rotary import Rotary
from core.model.seeded import SampleMasks
from core.model.streams import RandomTracker


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


class Attention(nn.Module):
    """Causal self-attention, (B, S, H) to (B, S, H).

    The rows of the fused weight are ordered (head, q|k|v, D): a contiguous block of rows is a set of whole heads,
    so tensor parallelism can shard it anywhere between heads. Of three weights too the rows are ordered by head. Query
    head i reads key and value head i K/A, rounded down: a contiguous block of the ones reads a contiguous block of the
    others.
    """

    def __init__(self, config: ModelConfig, name: str):
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
        q, k = self.placed(q, k, starts)
        attended = self.core(q, k, v) if starts is None else self.core(q, k, v, starts=starts)
        return self.out(rearrange(attended, "b a s d -> b s (a d)"))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) to queries (B, A, S, D), keys and values (B, K, S, D)."""
        if self.fused:
            return rearrange(self.qkv(x), "b s (a three d) -> three b a s d", three=3, d=self.head_size).unbind()
        parts = products(x, self.q, self.k, self.v)
        return tuple(rearrange(part, "b s (a d) -> b a s d", d=self.head_size) for part in parts)

    def placed(self, q: Tensor, k: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys, normalised by head and rotated to their positions, where the model does."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (q, k) if self.rotary is None else self.rotary(q, k, starts)

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
    if v.shape[-1] < q.shape[-1]:  # torch's kernels that do without the matrix of scores want one size
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        return dense_attention(q, k, padded, scale, starts)[..., : v.shape[-1]]
    grouped = q.shape[1] != k.shape[1]
    if starts is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped, scale=scale)
    tokens = torch.arange(q.shape[2])
    seen = visible(starts, tokens, tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped, scale=scale)


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, 2.1; 2412.19437, 2.1.1), (B, S, H) to (B, S, H).

    The keys and values of all heads are made (`kv_up`: W^UK, W^UV) from c^KV, kv_rank features of a token, which
    `kv_down` (W^DKV, W^KR) makes together with k^R: `rope` features of a key that all heads share. Only these and as
    many of each head's query are rotated; the `nope` others have no position. The queries may come from c^Q (q_rank).
    Rows of `q_up` are ordered (head, nope|rope), of `kv_up` (head, nope|value), of `kv_down` (c^KV, k^R).
    """

    NORM_EPS = 1e-6  # of the compressed features, whatever the configuration says of the layers' norms

    def __init__(self, config: ModelConfig, name: str):
        nn.Module.__init__(self)
        self.q_norm = self.k_norm = None
        self.latent = latent = config.latent
        self.scale, self.explicit = config.score_scale, config.attention == "softmax"
        if latent.q_rank:
            self.q_down = Linear(config.hidden, latent.q_rank, config.biases)
            self.q_down_norm = RMSNorm(latent.q_rank, self.NORM_EPS)
        self.q_up = Linear(latent.q_rank or config.hidden, config.query_size, False)
        self.kv_down = Linear(config.hidden, latent.kv_rank + latent.rope, config.biases)
        self.kv_down_norm = RMSNorm(latent.kv_rank, self.NORM_EPS)
        self.kv_up = Linear(latent.kv_rank, config.heads * (latent.nope + latent.value), False)
        self.rotary = Rotary(config)
        self.out = Linear(config.value_size, config.hidden, config.biases)
        self.dropout = Dropout(config.dropout, f"{name}.scores")
        self.documents: Documents | None = None

    def forward(self, x: Tensor) -> Tensor:
        starts = self.documents and self.documents.of(len(x), x.device)
        q, k, v = self.expand(*self.to_heads(*self.compress(x)), starts)
        return self.out(rearrange(self.core(q, k, v, self.scale, starts), "b a s d -> b s (a d)"))

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) to c^Q (B, S, q_rank), or x where q_rank is 0; c^KV (B, S, kv_rank); and k^R (B, S, rope)."""
        q = self.q_down_norm(self.q_down(x)) if self.latent.q_rank else x
        kv, key = self.kv_down(x).split((self.latent.kv_rank, self.latent.rope), -1)
        return q, self.kv_down_norm(kv), key

    def to_heads(self, *compressed: Tensor) -> Sequence[Tensor]:
        """What `expand` reads of what `compress` returns. Whoever shards the heads puts messages in its place."""
        return compressed

    def expand(self, q: Tensor, kv: Tensor, key: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """These to the queries and keys (B, A, S, nope + rope) and values (B, A, S, value) of all heads here."""
        _, _, rope, nope, value = self.latent
        q, q_rope = rearrange(self.q_up(q), "b s (a d) -> b a s d", d=nope + rope).split((nope, rope), -1)
        k, v = rearrange(self.kv_up(kv), "b s (a d) -> b a s d", d=nope + value).split((nope, value), -1)
        # Its pairs are neighbours (2i, 2i + 1): put in the order of halves, of queries and keys alike, products stay.
        halves = (rearrange(t, "... (i two) -> ... (two i)", two=2) for t in (q_rope, key.unsqueeze(1)))
        q_rope, key = self.rotary(*halves, starts)
        return torch.cat((q, q_rope), -1), torch.cat((k, key.expand(-1, k.shape[1], -1, -1)), -1), v
