"""The planner's formulas of layers that no run has, against small ones built here from their definition and measured.

`core.model.gpt` has neither SwiGLU nor grouped keys nor latent attention, so no rank's account sees those formulas.
Each layer below is written from its paper and not from the formula: autograd says what it saves, the sizes of its
parameters how many it has.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.planner.activations import attention_saved, layer_kept_for_wgrad, layer_saved, mlp_saved
from cluster.planner.counting import (
    attention_flops,
    attention_matrices,
    expert_parameters,
    layer_flops,
    layer_matrices,
    layer_parameters,
    mlp_matrices,
)
from cluster.planner.layout import Layout
from core.model.config import Latent, ModelConfig
from core.model.norms import RMSNorm
from core.proof.memory import SavedActivations

B, S, H = 2, 24, 20
MODEL = ModelConfig(sequence=S, hidden=H, heads=4, feed_forward=36, biases=False, learned_positions=False)
GATED = replace(MODEL, gated=True)
GROUPED = replace(MODEL, kv_heads=2, head_size=6)
LATENT = replace(MODEL, latent=Latent(q_rank=14, kv_rank=10, rope=4, nope=6, value=8))
ITEM = 8  # bytes, of float64
ONE = Layout(microbatch=B)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)


class SwiGLU(nn.Module):
    """2002.05202: down(silu(gate x) * up x)."""

    def __init__(self, features: int):
        super().__init__()
        self.gate, self.up, self.down = linear(H, features), linear(H, features), linear(features, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GroupedAttention(nn.Module):
    """2305.13245: 4 heads of queries share 2 of keys and values; rotary positions are left out, they save nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = linear(H, 4 * 6), linear(H, 2 * 2 * 6), linear(4 * 6, H)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(B, S, 4, 6).transpose(1, 2)
        k, v = self.kv(x).view(B, S, 2, 2, 6).permute(2, 0, 3, 1, 4)
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(result.transpose(1, 2).reshape(B, S, 4 * 6))


class LatentAttention(nn.Module):
    """2412.19437, section 2.1.1: queries, and keys with values, through a compressed vector and its norm.

    A head's key is its own part and one rotary part that all heads have in common.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.q_norm = linear(H, 14), RMSNorm(14, 1e-6).double()
        self.q_up = linear(14, 4 * (6 + 4))
        self.kv_down, self.kv_norm = linear(H, 10 + 4), RMSNorm(10, 1e-6).double()
        self.kv_up = linear(10, 4 * (6 + 8))
        self.out = linear(4 * 8, H)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_up(self.q_norm(self.q_down(x))).view(B, S, 4, 10).transpose(1, 2)
        compressed, rotary = self.kv_down(x).split([10, 4], -1)
        own, v = self.kv_up(self.kv_norm(compressed)).view(B, S, 4, 14).transpose(1, 2).split([6, 8], -1)
        k = torch.cat([own, rotary.unsqueeze(1).expand(B, 4, S, 4)], -1)
        result = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 2)), is_causal=True)[..., :8]
        return self.out(result.transpose(1, 2).reshape(B, S, 4 * 8))


def saved_by(layer: nn.Module) -> int:
    """Bytes that autograd saves, but for parameters and the input, which is the norm's output and counted there."""
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    saved = SavedActivations([*layer.parameters(), x])
    with saved:
        y = layer(x)
    y.sum().backward()
    return saved.peak


def size(layer: nn.Module, but: Callable[[str], bool] = lambda name: False) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if not but(name))


# ---- Saved for backward


def test_a_gated_mlp_saves_four_tensors() -> None:
    """Bug: three. Gate, up, silu(gate) and their product; without a gate two."""
    assert saved_by(SwiGLU(36)) == B * S * mlp_saved(GATED, ONE, False, ITEM)
    assert saved_by(SwiGLU(36)) == 4 * B * S * 36 * ITEM
    plain = nn.Sequential(linear(H, 36), nn.GELU(), linear(36, H))
    assert saved_by(plain) == B * S * mlp_saved(MODEL, ONE, False, ITEM)


def test_grouped_keys_and_values_are_saved_narrower() -> None:
    """Bug: as many heads of keys as of queries, or a head of hidden / heads."""
    assert saved_by(GroupedAttention()) == B * S * attention_saved(GROUPED, ONE, ITEM, "none")


def test_latent_attention_saves_what_it_compresses() -> None:
    """Bugs: compressed vectors once and not before and after their norms; no joined keys; values narrower than keys,

    for which torch has no kernel on a CPU that does without the matrix of scores.
    """
    assert saved_by(LatentAttention()) == B * S * attention_saved(LATENT, ONE, ITEM, "none")


def test_an_expert_and_the_shared_one_save_four_tensors_too() -> None:
    """Bugs: three; a routed token's row once and not for each of its k experts; the shared one's features left out."""
    model = replace(GATED, experts=4, top_k=2, expert_feed_forward=12, shared_feed_forward=28)
    tokens = B * S
    shared = saved_by(SwiGLU(28))
    routed = 2 * saved_by(SwiGLU(12)) + 2 * 2 * tokens * H * ITEM  # and k rows of the input, and of the output
    # All scores and the softmax of the chosen; of these the weight, and int64: which expert, which row, and back.
    router = tokens * ((4 + 2) * ITEM + 2 * (ITEM + 3 * 8))
    assert tokens * mlp_saved(model, ONE, True, ITEM) == shared + routed + router
    without = replace(model, shared_feed_forward=0)
    assert tokens * (mlp_saved(model, ONE, True, ITEM) - mlp_saved(without, ONE, True, ITEM)) == shared


# ---- Kept between dgrad and wgrad


def inputs_and_gradients(layer: nn.Module) -> int:
    """Bytes of what a deferred wgrad reads of each linear layer: its input, and the gradient of its output."""
    found = 0

    def count(module: nn.Module, arguments: tuple, y: Tensor) -> None:
        nonlocal found
        found += arguments[0].nbytes + y.nbytes

    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    layer(torch.randn(B, S, H, dtype=torch.float64))
    return found


class Fused(nn.Module):
    """Linear layers that read the same input are one."""

    def __init__(self, outputs: int):
        super().__init__()
        self.up, self.down = linear(H, 2 * outputs), linear(outputs, H)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class FusedGrouped(GroupedAttention):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = linear(H, 4 * 6 + 2 * 2 * 6)
        self.q = self.kv = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([24, 12, 12], -1)
        heads = (each.reshape(B, S, -1, 6).transpose(1, 2) for each in (q, k, v))
        result = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.out(result.transpose(1, 2).reshape(B, S, 4 * 6))


def test_a_wgrad_needs_inputs_and_gradients_of_every_matrix() -> None:
    """Bugs: the shared expert left out; experts once and not k times; a gate's half of the gradient left out."""
    grouped = replace(GROUPED, gated=True)
    attention = inputs_and_gradients(FusedGrouped())
    dense = attention + inputs_and_gradients(Fused(36))
    assert layer_kept_for_wgrad(grouped, ONE, False, ITEM) == dense
    moe = replace(grouped, experts=4, top_k=3, expert_feed_forward=12, shared_feed_forward=28)
    routed = 3 * inputs_and_gradients(Fused(12))  # tokens choose evenly: B S k rows, whoever computes them
    scores = 4 * B * S * ITEM  # their gradients; the input the shared expert has, too
    assert layer_kept_for_wgrad(moe, ONE, True, ITEM) == attention + inputs_and_gradients(Fused(28)) + routed + scores
    latent = inputs_and_gradients(LatentAttention()) + inputs_and_gradients(Fused(36))
    assert layer_kept_for_wgrad(replace(LATENT, gated=True), ONE, False, ITEM) == latent


# ---- Parameters and floating-point operations


def test_parameters_are_those_of_the_layers() -> None:
    """Bugs: a gate without weights, keys of all heads, norms of what is compressed left out."""
    norms = 2 * H  # one before attention, one before the MLP; RMSNorms have no biases
    assert layer_parameters(GATED, False) == 4 * H * H + size(SwiGLU(36)) + norms
    assert layer_parameters(GROUPED, False) == size(GroupedAttention()) + 2 * 36 * H + norms
    assert layer_parameters(LATENT, False) == size(LatentAttention()) + 2 * 36 * H + norms
    moe = replace(GATED, experts=4, top_k=2, expert_feed_forward=12, shared_feed_forward=28)
    assert expert_parameters(moe) == size(SwiGLU(12))
    assert layer_parameters(moe, True) == 4 * H * H + size(SwiGLU(28)) + norms + 4 * H


def flops_of(layer: nn.Module) -> int:
    """2 a weight and token, as torch's own counter has it for the matrix products."""
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(B, S, H, dtype=torch.float64))
    return counter.get_total_flops()


def test_floating_point_operations_are_those_that_torch_counts() -> None:
    """Bugs: scores as wide as values; a gate's product left out; one expert for k."""
    for model, attention in ((GROUPED, GroupedAttention()), (LATENT, LatentAttention())):
        matrices = 2 * sum(m.inputs * m.outputs for m in attention_matrices(model))
        assert 2 * B * S * sum(p.numel() for p in attention.parameters() if p.dim() == 2) == B * S * matrices
        scores_and_sum = 2 * S * 4 * (model.head_dim + model.value_dim)  # q k^T, and the weights times v
        assert attention_flops(model) == scores_and_sum
    assert flops_of(SwiGLU(36)) == B * S * 2 * sum(m.inputs * m.outputs for m in mlp_matrices(GATED, 36, False))
    moe = replace(GATED, experts=4, top_k=2, expert_feed_forward=12, shared_feed_forward=28)
    mlp = flops_of(SwiGLU(28)) + 2 * flops_of(SwiGLU(12))
    assert B * S * layer_flops(moe, True) == B * S * (2 * 4 * H * H + attention_flops(moe)) + mlp


# ---- Sharded


@pytest.mark.parametrize("model", [GATED, GROUPED, LATENT], ids=["gated", "grouped", "latent"])
def test_ranks_of_tp_share_what_is_sharded(model: ModelConfig) -> None:
    """Two ranks hold together what one does, and what is replicated again: of latent attention what is compressed."""
    before, after = 14 + 10 + 4 + 2, 14 + 10 + 4  # and the norms' scales; for two ranks put together, with the key
    compressed = before + 2 * after - (14 + 10) if model.latent else 0
    one, two = (B * S * attention_saved(model, replace(ONE, tp=t), ITEM, "none") for t in (1, 2))
    assert 2 * two - one == B * S * compressed * ITEM
    assert 2 * mlp_saved(model, replace(ONE, tp=2), False, ITEM) == mlp_saved(model, ONE, False, ITEM)
    replicated = sum(m.inputs * m.outputs for m in layer_matrices(model, False) if m.sharding == "replicate")
    norms = layer_parameters(model, False) - sum(m.inputs * m.outputs for m in layer_matrices(model, False))
    assert 2 * layer_parameters(model, False, 2) - layer_parameters(model, False) == replicated + norms


def test_recomputed_in_full_a_layer_saves_its_input() -> None:
    for model in (GATED, GROUPED, LATENT):
        assert layer_saved(model, ONE, False, ITEM, "full") == B * S * H * ITEM
