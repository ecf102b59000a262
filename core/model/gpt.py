"""The reference model: a decoder in one process. Every topic parallelises it from outside; there is no second one.

GPT-2's kind unless the configuration says otherwise; with RMSNorm, rotary positions, grouped keys and values and a
gated MLP it is Llama's, Mistral's or Qwen's, with latent attention DeepSeek's. What it has of each is in its
configuration, and nowhere else. Where that has experts, `expert_parallel` puts them in the place of the MLPs.

B batch, S sequence, H hidden, A heads, K key and value heads (a divisor of A), D head size (H/A if nothing else is
said), F feed-forward, V vocabulary
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.model.attention import Attention, Dropout, LatentAttention
from core.model.config import ModelConfig
from core.model.documents import Documents, restarted
from core.model.linear import Linear, products
from core.model.norms import LayerNorm, RMSNorm, norm_of
from core.model.precision import Precision, policy_of, wide
from core.model.seeded import SampleMasks, generator
from core.model.streams import RandomTracker
from core.proof.places import follow_layers
from core.proof.rulebook import DECODER
from core.proof.rules import check
from core.shards import shard_of

GPTConfig = ModelConfig


class Embedding(nn.Module):
    """Token and, unless positions are rotary, learned position embedding: (B, S) int64 to (B, S, H)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.hidden)
        self.position = nn.Embedding(config.table, config.hidden) if config.table else None
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


class MLP(nn.Module):
    """(B, S, H) to (B, S, F), GELU, and back; gated: SwiGLU (2002.05202), silu of one product times another."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(config.hidden, config.feed_forward, config.biases) if config.gated else None
        self.up = Linear(config.hidden, config.feed_forward, config.biases)
        self.down = Linear(config.feed_forward, config.hidden, config.biases)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.up] if self.gate is None else [self.gate, self.up]
        return self.down(self.activation(*products(x, *layers)))

    def activation(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """GELU of x; or silu of it, where it is the gate, times up."""
        return F.gelu(x, approximate=self.approximate) if up is None else F.silu(x) * up


class Block(nn.Module):
    """One transformer layer, a norm before attention and before the MLP (pre-LN)."""

    def __init__(self, config: GPTConfig, name: str):
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = (LatentAttention if config.latent else Attention)(config, f"{name}.attention")
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
            raise ValueError(f"{config.name}: core.model.gpt has no {missing}; use a family of core.model.published")
        check(config, DECODER)
        self.config = config
        with torch.device("meta"):
            self.embed: Embedding | None = Embedding(config)
            self.blocks = nn.ModuleDict({str(i): Block(config, f"blocks.{i}") for i in range(config.layers)})
            self.norm: LayerNorm | RMSNorm | None = norm_of(config)
            self.head: Linear | None = Linear(config.hidden, config.vocabulary, config.head_bias)
        if config.tied:
            self.head.weight = self.embed.token.weight
        for block in self.blocks.values():  # all rotate by the same table
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


def materialize(model: GPT, seed: int | None, device: torch.device, precision: Precision | torch.dtype) -> GPT:
    """Replace the meta parameters of `model`, or of what is sharded of it, by their start values. Ties stay ties.

    A parameter that has its numbers already keeps them, and its data type.

    Args:
        seed: of the start values; None: zeros, where weights are to be read, so that no parameter is drawn as a whole.
        precision: a policy, or the data type of parameters for the usual one. Autograd adds up gradients in its type.

    Raises:
        ValueError: a layer has an MLP where the configuration says experts.
    """
    lacking = [name for name, block in model.blocks.items() if not _has_its_experts(name, block, model.config)]
    if lacking:
        raise ValueError(
            f"{model.config.name}: layers {', '.join(lacking)} have an MLP where the model has "
            f"{model.config.experts} experts; use expert_parallel.engine.moe.to_moe before materialize"
        )
    precision = policy_of(precision)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, meta in list(module.named_parameters(recurse=False)):
            if not meta.is_meta:
                meta.data = meta.data.to(device)
                continue
            if meta not in made:
                name = model.full_name(f"{prefix}.{leaf}")
                mark = shard_of(meta)  # the whole is drawn, then sharded: every layout starts from the same numbers
                if seed is None:
                    value = torch.zeros(meta.shape, device=device, dtype=precision.parameters)
                else:
                    value = initial_value(name, mark.full_shape(meta.shape) if mark else meta.shape, model.config, seed)
                    value = (mark.local(value) if mark else value).to(device, precision.parameters)
                made[meta] = nn.Parameter(value, meta.requires_grad)
                made[meta].grad_dtype = precision.gradients
                made[meta].shard = mark
            setattr(module, leaf, made[meta])
    follow_layers(model.blocks)
    return model


def _has_its_experts(name: str, block: nn.Module, config: GPTConfig) -> bool:
    return not config.experts or int(name) < config.dense_layers or hasattr(block.mlp, "router")
