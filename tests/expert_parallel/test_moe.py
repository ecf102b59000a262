"""The layer of one process: rows and back, grouped experts."""

from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize
from core.model.linear import Deferred
from expert_parallel import moe as plain
from expert_parallel.engine.experts import Experts, grouped
from expert_parallel.engine.layers import by_expert, by_source
from expert_parallel.engine.moe import MoE, order_of, permute, to_moe, unpermute
from expert_parallel.engine.router import Choice
from expert_parallel.engine.routing import MoEConfig, Routing

CPU = torch.device("cpu")
ALONE = Axis("dp", (0,), 0, None, Ledger(), timedelta(0))


@st.composite
def choices(draw: st.DrawFn) -> tuple[int, Choice]:
    """Any choice of any experts, a part of it dropped."""
    tokens, experts = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    chosen = torch.tensor([draw(st.permutations(range(experts)))[:k] for _ in range(tokens)])
    kept = draw(st.none() | st.lists(st.booleans(), min_size=tokens * k, max_size=tokens * k))
    weights = torch.rand(tokens, k, dtype=torch.float64)
    return experts, Choice(chosen, weights, None if kept is None else torch.tensor(kept).view(tokens, k))


@settings(max_examples=200, deadline=None)
@given(choices())
def test_permute_and_unpermute(case: tuple[int, Choice]) -> None:
    """Every kept choice has one row, experts in order; with experts that do nothing, tokens come back weighted."""
    experts, choice = case
    tokens, k = choice.experts.shape
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = choice.weights.requires_grad_()
    kept = torch.ones(tokens, k, dtype=torch.bool) if choice.kept is None else choice.kept
    order, counts = order_of(choice, experts)
    assert sorted(order.tolist()) == kept.flatten().nonzero().flatten().tolist()
    owners = choice.experts.flatten()[order]
    assert owners.tolist() == sorted(owners.tolist())
    assert counts.tolist() == torch.bincount(owners, minlength=experts).tolist()
    assert all(a < b for a, b, same in zip(order, order[1:], owners[1:] == owners[:-1], strict=False) if same)

    rows = permute(x, order, k)
    assert torch.equal(rows, x[order // k])
    y = unpermute(rows, order, weights)
    expected = (x.unsqueeze(1) * (weights * kept).unsqueeze(2)).sum(1)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for got, right in zip(torch.autograd.grad(y, (x, weights), upstream),
                          torch.autograd.grad(expected, (x, weights), upstream), strict=True):  # fmt: skip
        torch.testing.assert_close(got, right)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_sources_and_experts(sources: int, experts: int, data: st.DataObject) -> None:
    counts = [data.draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts)) for _ in range(sources)]
    labels = [(e, s, i) for s, row in enumerate(counts) for e, n in enumerate(row) for i in range(n)]
    rows = torch.tensor(labels, dtype=torch.float64).view(-1, 3)
    sorted_ = by_expert(rows, counts)
    assert [tuple(map(int, row)) for row in sorted_.tolist()] == sorted(labels)
    assert torch.equal(by_source(sorted_, counts), rows)


COUNTS = [[3, 0, 2, 1], [0, 0, 6, 0], [0, 0, 0, 0]]


PLAIN_MLP = GPTConfig(hidden=8)
SWIGLU = replace(PLAIN_MLP, gated=True)
WITHOUT_BIASES = replace(SWIGLU, biases=False, norm="rms")


def real(config: GPTConfig, experts: int, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(0)
    made = Experts(config, experts, 16).to_empty(device="cpu")
    for p in made.parameters():
        p.data.normal_()
    return made.to(dtype)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("config", [PLAIN_MLP, SWIGLU, WITHOUT_BIASES], ids=["mlp", "swiglu", "without biases"])
def test_grouped_experts(config: GPTConfig, counts: list[int], deferred: bool) -> None:
    """Each expert by itself, all gradients; also with the weights' gradients left for later, and with no rows."""
    experts = real(config, 4)
    later = Deferred(experts.parameters()) if deferred else None
    x = torch.randn(sum(counts), 8, dtype=torch.float64, requires_grad=True)
    y = experts(x, counts)
    upstream = torch.randn_like(y)
    if later:
        with later:
            y.backward(upstream)
        assert experts.up.weight.grad is None
        taken = later.take()
        assert len(taken) == 2 + config.gated
        for each in taken:
            each.add()
    else:
        y.backward(upstream)
    got = [x.grad, *(p.grad for p in experts.parameters())]
    parts = [mlp(experts, e, rows) for e, rows in enumerate(x.split(counts))]
    torch.testing.assert_close(y, torch.cat(parts))
    right = torch.autograd.grad(torch.cat(parts), (x, *experts.parameters()), upstream)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def mlp(experts: nn.Module, e: int, rows: Tensor) -> Tensor:
    """The definition of one expert."""

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        return x @ layer.weight[e].T + (0.0 if layer.bias is None else layer.bias[e])

    inner = linear(experts.up, rows)
    inner = F.gelu(inner) if experts.gate is None else F.silu(linear(experts.gate, rows)) * inner
    return linear(experts.down, inner)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("sizes", [(16, 8), (6, 8), (16, 2)])
def test_grouped_in_bfloat16(counts: list[int], sizes: tuple[int, int]) -> None:
    """Also where torch's own does not take the sizes."""
    weight = torch.randn(4, *sizes, dtype=torch.bfloat16)
    x = torch.randn(sum(counts), sizes[1], dtype=torch.bfloat16)
    one = grouped(x, weight.transpose(1, 2), counts)
    other = torch.cat([rows @ weight[e].T for e, rows in enumerate(x.split(counts))])
    torch.testing.assert_close(one, other)


def layer(kind: str, moe: MoEConfig, config: GPTConfig = PLAIN_MLP) -> nn.Module:
    model = GPT(replace(config, heads=2, layers=1))
    model = plain.with_experts(model, moe, ALONE) if kind == "plain" else to_moe(model, moe)
    return materialize(model, 0, CPU, torch.float64).blocks["0"].mlp


def token_by_token(layer: nn.Module, x: Tensor) -> Tensor:
    """The definition: each token by itself through each of its experts."""
    experts, weights, kept = layer.router(x)
    results = []
    for t, token in enumerate(x.flatten(0, 1)):
        y = layer.shared(token)
        for k, e in enumerate(experts[t].tolist()):
            if kept is None or kept[t, k]:
                y = y + weights[t, k] * mlp(layer.experts, e, token)
        results.append(y)
    return torch.stack(results).view_as(x)


@pytest.mark.parametrize("bias", [[0.0] * 4, [9.0, 8.0, 0.0, 0.0]], ids=["any", "all to two"])
@pytest.mark.parametrize("capacity", [0.0, 0.75, 0.01])
@pytest.mark.parametrize("kind", ["plain", "engine"])
@pytest.mark.parametrize("config", [PLAIN_MLP, WITHOUT_BIASES], ids=["mlp", "swiglu"])
def test_the_layer_is_its_definition(config: GPTConfig, kind: str, bias: list[float], capacity: float) -> None:
    made = layer(kind, MoEConfig(Routing(4, 2, "sigmoid", capacity=capacity, weight_scale=2.5), shared=6), config)
    made.router.bias.data = torch.tensor(bias)
    results: list[list[Tensor]] = []
    for compute in (made, partial(token_by_token, made)):
        made.zero_grad()
        x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = compute(x)
        y.square().sum().backward()
        # A token by itself leaves an expert without a gradient that nobody chose; all experts together give zeros.
        results.append([y, x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in made.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_first_layers_stay_dense() -> None:
    model = to_moe(GPT(GPTConfig(layers=5, dense_layers=2)), MoEConfig(feed_forward=12))
    assert [isinstance(block.mlp, MoE) for block in model.blocks.values()] == [False, False, True, True, True]
    assert model.config == MoEConfig(feed_forward=12).described(GPTConfig(layers=5, dense_layers=2))
    assert (model.config.experts, model.config.top_k, model.config.expert_size) == (8, 2, 12)


MIXTURE = GPTConfig(layers=3, experts=6, top_k=2, expert_feed_forward=24, shared_feed_forward=8, dense_layers=1,
                    score="sigmoid", weight_scale=2.5, groups=3, top_groups=2)  # fmt: skip


def test_a_models_configuration_says_what_its_mixtures_are() -> None:
    moe = MoEConfig.of(MIXTURE, aux=0.5, capacity=2.0)
    assert moe == MoEConfig(Routing(6, 2, "sigmoid", 3, 2, 2.0, aux=0.5, weight_scale=2.5), 24, 8)
    for made in (to_moe(GPT(MIXTURE)), to_moe(GPT(MIXTURE), moe), plain.with_experts(GPT(MIXTURE), moe, ALONE)):
        assert made.config == MIXTURE
    with pytest.raises(ValueError, match="other experts than these; use MoEConfig.of its configuration"):
        to_moe(GPT(MIXTURE), MoEConfig(Routing(6, 2)))


def test_a_model_without_the_experts_of_its_configuration_gets_no_numbers() -> None:
    with pytest.raises(ValueError, match="layers 1, 2 have an MLP where the model has 6 experts; use .*to_moe"):
        materialize(GPT(MIXTURE), 0, CPU, torch.float64)
    materialize(to_moe(GPT(MIXTURE)), 0, CPU, torch.float64)
