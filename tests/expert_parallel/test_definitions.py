"""Routers and grouped products against definitions written out here: what ranks and oracle share, no oracle can see."""

import itertools
import math
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.ledger import Ledger
from core.mesh import Axis
from expert_parallel import router as plain
from expert_parallel.engine.experts import GroupedLinear, grouped
from expert_parallel.engine.router import Router
from expert_parallel.engine.routing import Routing

ALONE = Axis("dp", (0,), 0, None, Ledger(), timedelta(0))
B, S, H, E = 2, 12, 6, 8


# ---- Routers


def softmax(numbers: list[float]) -> list[float]:
    exponentials = [math.exp(n - max(numbers)) for n in numbers]
    return [e / sum(exponentials) for e in exponentials]


def scores_of(logits: list[float], score: str) -> list[float]:
    """Of all experts: 1701.06538, equation 3; DeepSeek-V3 (2412.19437), equation 15, for sigmoids."""
    return [1 / (1 + math.exp(-n)) for n in logits] if score == "sigmoid" else softmax(logits)


def chosen_of(selection: list[float], k: int, groups: int, top_groups: int) -> list[int]:
    """The best k; of the best groups alone: by the sum of the best k / top_groups of each (2412.19437, 2.1.2)."""
    size, each = len(selection) // groups, max(1, k // top_groups)
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    best = sorted(members, key=lambda group: -sum(sorted((selection[e] for e in group), reverse=True)[:each]))
    allowed = [e for group in best[:top_groups] for e in group]
    return sorted(allowed, key=lambda e: -selection[e])[:k]


def weights_of(logits: list[float], scores: list[float], chosen: list[int], score: str) -> list[float]:
    """Of the chosen, by their scores, in which no bias is (2408.15664, equation 3)."""
    if score == "topk-softmax":  # 1701.06538: softmax(KeepTopK(H(x), k))
        return softmax([logits[e] for e in chosen])
    if score == "sigmoid" and len(chosen) > 1:  # 2412.19437, equation 13
        return [scores[e] / sum(scores[c] for c in chosen) for e in chosen]
    return [scores[e] for e in chosen]


def by_definition(logits: Tensor, bias: list[float], r: Routing) -> tuple[list, list, list]:
    """Experts, weights and what is kept, (T, k) each, token by token, for logits (B, S, E)."""
    all_chosen, all_weights, all_kept = [], [], []
    for sample in logits.tolist():
        scores = [scores_of(row, r.score) for row in sample]
        chosen = [
            chosen_of([s + b for s, b in zip(row, bias, strict=True)], r.top_k, r.groups, r.top_groups)
            for row in scores
        ]
        capacity = math.ceil(Fraction(str(r.capacity)) * r.top_k * len(sample) / r.experts) or len(sample)
        takes = set()
        for e in range(r.experts):
            wanting = [t for t in range(len(sample)) if e in chosen[t]]
            if r.drop == "probability":
                wanting.sort(key=lambda t: -scores[t][e])
            takes |= {(t, e) for t in wanting[:capacity]}
        for t, row in enumerate(sample):
            weights = weights_of(row, scores[t], chosen[t], r.score)
            kept = [(t, e) in takes for e in chosen[t]]
            all_chosen.append(chosen[t])
            all_weights.append([w * stays for w, stays in zip(weights, kept, strict=True)])
            all_kept.append(kept)
    return all_chosen, all_weights, all_kept


def made(
    kind: str, routing: Routing, bias: list[float], dtype: torch.dtype = torch.float64, hidden: int = H
) -> nn.Module:
    layer = Router(hidden, routing) if kind == "engine" else plain.Router(hidden, routing, ALONE)
    seeded = torch.Generator().manual_seed(1)
    weight = torch.randn(routing.experts, hidden, generator=seeded, dtype=torch.float64) / math.sqrt(hidden)
    layer.weight = nn.Parameter(weight.to(dtype))
    layer.bias = nn.Parameter(torch.tensor(bias), requires_grad=False)
    return layer


BIASES = {"no bias": [0.0] * E, "bias": [0.0, 0.5, -0.25, 0.0, 0.25, -0.5, 0.125, 0.0]}
ROUTINGS = [
    Routing(E, k, score, groups, top_groups, capacity, drop)
    for score, k in itertools.product(("softmax-topk", "topk-softmax", "sigmoid"), (1, 2, 3, 4))
    for groups, top_groups in ((1, 1), (4, 2), (2, 1), (4, 3))
    for capacity, drop in ((0.0, "position"), (0.75, "position"), (0.75, "probability"))
    if not (score == "topk-softmax" and k == 1) and k <= top_groups * (E // groups)
]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["engine", "plain"])
def test_every_routing_is_its_definition(kind: str, bias: str) -> None:
    """The bug: weights are the k largest scores, not those of the chosen experts. Only a bias or groups tell."""
    x = torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for routing in ROUTINGS:
        layer = made(kind, routing, BIASES[bias])
        experts, weights, kept = layer(x)
        expected = by_definition(x @ layer.weight.detach().T, BIASES[bias], routing)
        assert experts.tolist() == expected[0], routing
        torch.testing.assert_close(weights.detach(), torch.tensor(expected[1], dtype=torch.float64), msg=str(routing))
        kept = torch.ones_like(experts, dtype=torch.bool) if kept is None else kept
        assert kept.tolist() == expected[2], routing
        assert routing.capacity == 0 or not kept.all(), "something is dropped, so it is seen which"


@pytest.mark.parametrize("score", ["softmax-topk", "topk-softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["engine", "plain"])
def test_the_gradient_is_that_of_the_chosen_experts_scores(kind: str, score: str) -> None:
    """With a bias and groups, through the weights: by finite differences of the definition, whose choices stay."""
    x = torch.randn(1, 3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing, bias = Routing(E, 3, score, 4, 2), BIASES["bias"]
    layer = made(kind, routing, bias)
    upstream = torch.linspace(-1, 2, 9, dtype=torch.float64).view(3, 3)
    (found,) = torch.autograd.grad((layer(x).weights * upstream).sum(), layer.weight)

    def defined(weight: Tensor) -> float:
        weights = by_definition(x @ weight.T, bias, routing)[1]
        return (torch.tensor(weights, dtype=torch.float64) * upstream).sum().item()

    weight, step = layer.weight.detach(), 1e-6
    for e, h in itertools.product(range(E), range(H)):
        moved = torch.zeros_like(weight)
        moved[e, h] = step
        assert found[e, h].item() == pytest.approx(
            (defined(weight + moved) - defined(weight - moved)) / (2 * step), abs=1e-5
        )


@pytest.mark.parametrize("kind", ["engine", "plain"])
@pytest.mark.parametrize("score", ["softmax-topk", "topk-softmax", "sigmoid"])
def test_sixteen_bits_choose_what_float64_chooses(kind: str, score: str) -> None:
    """The bug: logits in bfloat16. Then experts whose logits are within 1/256 of each other are chosen by rounding."""
    x = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = [0.0] * 16
    layer = made(kind, Routing(16, 4, score), bias, torch.bfloat16, 32)
    experts, weights, _ = layer(x)
    expected, exact, _ = by_definition(x.double() @ layer.weight.detach().double().T, bias, layer.routing)
    assert experts.tolist() == expected
    assert weights.dtype == torch.bfloat16
    rounding = (weights.double() / torch.tensor(exact, dtype=torch.float64) - 1).abs().max().item()
    assert rounding < 1.01 * 2**-8, "rounded once, at the end"


@pytest.mark.parametrize("kind", ["engine", "plain"])
def test_the_losses_of_sixteen_bits_are_those_of_float64(kind: str) -> None:
    """The z-loss of logits in bfloat16 would be off by some thousandths; so would the gradient of both."""
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = made(kind, Routing(16, 4, "sigmoid", aux=0.5, z=0.25), [0.0] * 16, torch.bfloat16, 32)
    experts, _, _ = layer(x)
    logits = (x.double() @ layer.weight.detach().double().T).flatten(0, 1)
    share = torch.bincount(experts.flatten(), minlength=16).double() / experts.numel()
    probability = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = 0.5 * 16 * (share * probability.mean(0)).sum() + 0.25 * logits.logsumexp(-1).square().mean()
    loss = layer.loss.item()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# ---- Grouped products

COUNTS = [[3, 0, 2, 1], [0, 0, 6, 0], [0, 0, 0, 0], [40, 1, 0, 23]]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def loop(x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None) -> Tensor:
    """One expert after the other: its rows times W_e^T, plus b_e."""
    rows = enumerate(x.split(counts))
    return torch.cat([F.linear(own, weight[e], None if bias is None else bias[e]) for e, own in rows])


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / (exact.norm() or 1.0)).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(16, 8), (6, 8), (16, 2)])  # those that torch's grouped_mm takes, and others
def test_grouped_products_in_every_type(dtype: torch.dtype, bias: bool, sizes: tuple[int, int]) -> None:
    """The bug: in bfloat16, where torch's own grouped product is used, the bias is left out."""
    torch.manual_seed(0)
    layer = GroupedLinear(4, sizes[1], sizes[0]).to_empty(device="cpu").to(dtype)
    for p in layer.parameters():
        p.data.normal_()
    for counts in COUNTS:
        x = torch.randn(sum(counts), sizes[1]).to(dtype)
        direct = grouped(x, layer.weight.detach().mT, counts, layer.bias.detach() if bias else None)
        leaves = [x.requires_grad_(), layer.weight, layer.bias][: 3 if bias else 2]
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        upstream = torch.randn(sum(counts), sizes[0]).to(dtype)
        y = layer(x, counts, bias)
        exact = loop(wide[0], wide[1], counts, wide[2] if bias else None)
        assert y.dtype == dtype
        assert max(off(y.detach(), exact), off(direct, exact)) < ROUNDING[dtype]
        found = torch.autograd.grad(y, leaves, upstream)
        right = torch.autograd.grad(exact, wide, upstream.double(), allow_unused=True, materialize_grads=True)
        for mine, other in zip(found, right, strict=True):
            assert mine.shape == other.shape
            assert off(mine, other) < ROUNDING[dtype]


def test_grouped_products_round_as_one_linear_layer_does() -> None:
    """In bfloat16, with many rows and features: no sum is made in 16 bits."""
    torch.manual_seed(0)
    layer = GroupedLinear(1, 1024, 64).to_empty(device="cpu").bfloat16()
    for p in layer.parameters():
        p.data.normal_()
    x, upstream = torch.randn(2048, 1024).bfloat16().requires_grad_(), torch.randn(2048, 64).bfloat16()
    leaves = [x, layer.weight, layer.bias]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.linear(wide[0], wide[1][0], wide[2][0])
    right = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    usual = F.linear(x, layer.weight[0], layer.bias[0])
    one_layers = [usual, *torch.autograd.grad(usual, leaves, upstream)]
    ours = layer(x, [2048])
    ours = [ours, *torch.autograd.grad(ours, leaves, upstream)]
    for mine, other, true in zip(ours, one_layers, right, strict=True):
        assert off(mine.detach(), true) <= 1.5 * off(other.detach(), true)
