"""The one description of a model: the decoder of `core.model.gpt` is built from it, and the planner counts with it.

H hidden, A heads, D head size, F feed-forward, V vocabulary, S sequence
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from core.proof.rulebook import MODEL
from core.proof.rules import check


class Latent(NamedTuple):
    """Multi-head latent attention (2412.19437, section 2.1.1): ranks of the compressed q and kv, and head sizes."""

    q_rank: int  # 0: queries are not compressed
    kv_rank: int
    rope: int
    nope: int
    value: int


class Llama3Scaling(NamedTuple):
    """Of rotary frequencies, to sequences that are longer than the `original` (2407.21783; Llama 3.1's code)."""

    factor: float  # that the slow ones are divided by
    low: float  # turns in the original sequence: with fewer a pair is slow,
    high: float  # with more it stays as it is
    original: int  # tokens


class YarnScaling(NamedTuple):
    """The same by YaRN (2309.00071)."""

    factor: float
    original: int
    attention_factor: float  # of cosines and sines, so its square multiplies the scores
    fast: float = 32.0  # turns in the original sequence: with more a pair stays as it is,
    slow: float = 1.0  # with fewer it is slow
    truncate: bool = True  # the border pairs to whole numbers
    score_factor: float = 1.0  # multiplies the scores besides; DeepSeek's mscale_all_dim asks for it


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and kinds of a decoder-only transformer.

    What is None follows from other sizes, also after `dataclasses.replace`; the properties below say it.

    Raises:
        ValueError: a size is not positive, hidden is not divisible by heads, or dropout does not fit the attention.
    """

    vocabulary: int = 256
    sequence: int = 64
    hidden: int = 64
    layers: int = 8
    heads: int = 4
    feed_forward: int = 0  # 0: four times hidden
    dropout: float = 0.0
    attention: str = "sdpa"  # or "softmax": every intermediate in sight, as the activation formula counts them
    tied: bool = True  # the head is the token embedding
    head_bias: bool = False
    name: str = "gpt"
    # Other kinds than GPT-2's. Of their combinations `unbuilt` names those that are counted only.
    kv_heads: int | None = None  # grouped-query attention; None: as many as heads
    head_size: int | None = None  # None: hidden / heads
    gated: bool = False  # SwiGLU: the MLP has two matrices to F features, gate and up
    biases: bool = True  # of linear layers and LayerNorms
    learned_positions: bool = True  # else rotary ones, without parameters
    latent: Latent | None = None
    experts: int = 0  # routed, of each layer that has them; `expert_parallel` puts them in the place of the MLPs
    top_k: int = 0
    expert_feed_forward: int | None = None  # None: as feed_forward
    shared_feed_forward: int = 0  # of the shared experts together
    dense_layers: int = 0  # the first ones, which have no experts
    score: str = "topk-softmax"  # of the router: softmax over the chosen; or "softmax-topk", over all; or "sigmoid"
    weight_scale: float = 1.0  # of the weights of the chosen experts
    groups: int = 1  # the experts are in so many equal groups,
    top_groups: int = 1  # and a token's must be in so many of them
    norm: str = "layer"  # or "rms": RMSNorm, which has no bias
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # q, k and v have biases, whatever `biases` says of the others
    qk_norm: bool = False  # RMSNorm of each head's query and key
    rope_theta: float = 10_000.0  # the base of rotary frequencies
    rope_scaling: Llama3Scaling | YarnScaling | str | None = None  # str: the name of a kind that is not built
    activation: str = "gelu"  # of an MLP without a gate; or "gelu_tanh", GPT-2's approximation of it
    positions: int = 0  # rows of the table of learned positions; 0: as many as a sample has tokens
    # Counted only.
    shared_gate: bool = False  # the shared experts' result is weighted by the sigmoid of one product
    out_bias: bool = False  # the product after attention has biases, whatever `biases` says of the others; so these:
    mlp_bias: bool = False  # of MLPs
    expert_bias: bool = False  # of routed experts
    norm_bias: bool = False  # of LayerNorms
    router_bias: bool = False  # of the router's scores, and trained
    norms: int = 2  # of a layer, with parameters and over hidden
    outer_norms: int = 1  # before and after all layers
    qk_norm_all: bool = False  # `qk_norm` has a parameter of each feature of all heads
    sinks: bool = False  # each head has a score of its own, for no key
    sparse_step: int = 1  # of the layers that are not `dense_layers` only each so-many-th of the model has experts,
    dense_also: tuple[int, ...] = ()  # and these have none either
    window: int = 0  # the last tokens that a query sees in some layers; 0: all
    windowed: float = 1.0  # the share of these layers
    untrained: str = ""  # what else of the model is not built, in words
    notes: str = ""  # what a file says besides

    def __post_init__(self) -> None:
        for name, kinds in {"latent": (Latent,), "rope_scaling": (Llama3Scaling, YarnScaling)}.items():
            if isinstance(value := getattr(self, name), list):  # JSON's, which has no named tuples
                kind = next(kind for kind in kinds if len(kind._fields) == len(value))
                object.__setattr__(self, name, kind(*value))
        object.__setattr__(self, "dense_also", tuple(self.dense_also))
        check(self, MODEL)
        if not self.feed_forward:
            object.__setattr__(self, "feed_forward", 4 * self.hidden)

    @property
    def query_groups(self) -> int:
        """Heads of keys and values: so many groups of query heads share one."""
        return self.kv_heads or self.heads

    def kv_copies(self, ranks: int) -> int:
        """Neighbouring ranks of tensor parallelism that hold the same head of keys and values."""
        return max(1, ranks // self.query_groups)

    @property
    def head_dim(self) -> int:
        """D: of a query or a key."""
        if self.latent:
            return self.latent.nope + self.latent.rope
        return self.head_size or self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        """Features of a head that rotary positions rotate."""
        return self.latent.rope if self.latent else self.head_dim

    @property
    def score_scale(self) -> float:
        """What queries times keys are multiplied by: 1/sqrt(D) if nothing else is said."""
        scaling = self.rope_scaling
        return (scaling.score_factor if isinstance(scaling, YarnScaling) else 1.0) / math.sqrt(self.head_dim)

    @property
    def value_dim(self) -> int:
        """Of a head's value."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def query_size(self) -> int:
        """Of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Of all heads' outputs."""
        return self.heads * self.value_dim

    @property
    def key_value_size(self) -> int:
        """Of all keys and values."""
        groups = self.heads if self.latent else self.query_groups
        return groups * (self.head_dim + self.value_dim)

    @property
    def expert_size(self) -> int:
        """F of one routed expert."""
        return self.expert_feed_forward or self.feed_forward

    def has_experts(self, layer: int) -> bool:
        return (
            self.experts > 0
            and layer >= self.dense_layers
            and (layer + 1) % self.sparse_step == 0
            and layer not in self.dense_also
        )

    @property
    def in_order(self) -> bool:
        """Whether all layers with experts come after all without."""
        return self.sparse_step == 1 and not self.dense_also

    def mixtures_in(self, layers: range) -> int:
        """How many of these layers have experts."""
        if not self.experts:
            return 0
        if self.in_order:
            return len(range(max(layers.start, self.dense_layers), layers.stop))
        return sum(map(self.has_experts, layers))

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.mixtures_in(range(self.layers))

    @property
    def keys(self) -> float:
        """That a query meets in a layer, on average, times 2 for causality: as many as tokens where all are seen."""
        seen = min(self.window or self.sequence, self.sequence)
        return self.sequence + self.windowed * (seen * (2 - seen / self.sequence) - self.sequence)

    @property
    def table(self) -> int:
        """Rows of the table of learned positions."""
        return max(self.positions, self.sequence) if self.learned_positions else 0

    @property
    def fused_qkv(self) -> bool:
        """One matrix for q, k and v, head by head: GPT's. Else three, which can be sharded in different ways."""
        return self.learned_positions and self.query_groups == self.heads

    def unbuilt(self) -> str:
        """What of this model `core.model.gpt` has not got, in words; "" where it can build it."""
        scaling = self.rope_scaling
        missing = {
            "LayerNorm without biases": self.norm == "layer" and not (self.biases or self.norm_bias),
            "LayerNorm with biases beside products without": self.norm_bias and not self.biases,
            f"rotary positions scaled by {scaling}": not isinstance(scaling, Llama3Scaling | YarnScaling | type(None)),
            "latent attention with learned positions": self.latent is not None and self.learned_positions,
            "latent attention with norms of heads": self.latent is not None and self.qk_norm,
            "latent attention with biases": self.latent is not None and self.qkv_bias,
            "biases after attention": self.out_bias,
            "biases of MLPs": self.mlp_bias,
            "biases of experts": self.expert_bias,
            "a bias of the router": self.router_bias,
            f"{self.norms} norms in a layer": self.norms != 2,
            f"{self.outer_norms} norms outside the layers": self.outer_norms != 1,
            "norms of all heads together": self.qk_norm_all,
            "sinks of attention": self.sinks,
            "layers with and without experts in turn": self.experts > 0 and not self.in_order,
            "a gate of the shared expert": self.shared_gate,
            f"a window of {self.window} tokens": 0 < self.window < self.sequence,
        }
        return self.untrained or _those(missing)


def _those(kinds: dict[str, bool]) -> str:
    return ", ".join(kind for kind, has in kinds.items() if has)
