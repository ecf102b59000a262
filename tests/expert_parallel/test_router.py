"""Who goes where: properties that hold for any scores."""

import math
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize
from expert_parallel import router as plain
from expert_parallel.engine import routing as decisions
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import Router, Spread, count_ahead, end_step
from expert_parallel.engine.routing import MoEConfig, Routing, choose, first_of_the_largest, keep
from expert_parallel.evidence.training import balance

CPU = torch.device("cpu")
ALONE = Axis("dp", (0,), 0, None, Ledger(), timedelta(0))


@st.composite
def routed(draw: st.DrawFn) -> tuple[Routing, Tensor]:
    """Any routing, and scores (B, S, E) for it, with ties among them."""
    groups, within = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts = groups * within
    top_groups = draw(st.integers(1, groups))
    k = draw(st.integers(1, top_groups * within))
    routing = Routing(experts, k, "softmax-topk", groups, top_groups, draw(st.sampled_from([0.01, 0.5, 1.0, 4.0])),
                      draw(st.sampled_from(["position", "probability"])))  # fmt: skip
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 9)), experts)
    numbers = draw(st.lists(st.integers(0, 9), min_size=math.prod(shape), max_size=math.prod(shape)))
    return routing, torch.tensor(numbers, dtype=torch.float64).view(shape) / 9


@settings(max_examples=150, deadline=None)
@given(routed())
def test_choices(case: tuple[Routing, Tensor]) -> None:
    """K different experts, the best there are, in no more groups than allowed."""
    routing, scores = case
    experts = choose(scores, routing)
    assert experts.shape == (*scores.shape[:2], routing.top_k)
    within = routing.experts // routing.groups
    for chosen, row in zip(experts.flatten(0, 1).tolist(), scores.flatten(0, 1).tolist(), strict=True):
        assert len(set(chosen)) == routing.top_k
        groups = {e // within for e in chosen}
        assert len(groups) <= routing.top_groups
        values = [row[e] for e in chosen]
        assert values == sorted(values, reverse=True)
        if routing.top_groups == routing.groups:
            assert values == sorted(row, reverse=True)[: routing.top_k]
        else:  # the best of the groups it is in
            assert min(values) >= max([row[e] for e in range(len(row)) if e // within in groups and e not in chosen],
                                      default=0.0)  # fmt: skip


def first_by_definition(row: list[float], routing: Routing) -> list[int]:
    """A token's experts: Python's sort is stable."""
    within, some = routing.experts // routing.groups, max(1, routing.top_k // routing.top_groups)
    best = [sum(sorted(row[g * within : (g + 1) * within])[-some:]) for g in range(routing.groups)]
    groups = sorted(range(routing.groups), key=lambda g: -best[g])[: routing.top_groups]
    return sorted((e for e in range(len(row)) if e // within in groups), key=lambda e: -row[e])[: routing.top_k]


EQUAL = [Routing(e, k, "softmax-topk") for e in (2, 3, 4, 5, 8, 16, 17, 64, 128, 256) for k in (1, 2, 8) if k <= e]
TIES = [*EQUAL, Routing(8, 2, "sigmoid", 4, 2), Routing(12, 4, "sigmoid", 4, 2), Routing(64, 8, "sigmoid", 8, 4)]


def ties_decided_otherwise() -> list[str]:
    """Where a choice among equal scores is not the first of them, or depends on what else is in the tensor."""
    wrong = []
    for routing in TIES:
        values = torch.randint(0, 3, (2, 9, routing.experts), generator=torch.Generator().manual_seed(0)).double() / 4
        for name, scores in (("equal", torch.full_like(values, 0.5)), ("ties", values)):
            found, case = choose(scores, routing), f"{name}, {routing.experts} experts, {routing.top_k} of them"
            rows = scores.flatten(0, 1).tolist()
            if found.flatten(0, 1).tolist() != [first_by_definition(row, routing) for row in rows]:
                wrong.append(f"{case}: not the first")
            layouts = {
                "micro-batches": torch.cat([choose(x, routing) for x in scores.split(1)]),
                "tokens": torch.cat([choose(x, routing) for x in scores.split([1, 3, 5], 1)], 1),
                "in memory": choose(scores.transpose(0, 2).contiguous().transpose(0, 2), routing),
            }
            if routing.groups == 1:  # experts that none may choose, in rows of another length
                padded = torch.nn.functional.pad(scores, (0, 5), value=-1.0)
                layouts["padded"] = choose(padded, replace(routing, experts=routing.experts + 5))
            wrong += [f"{case}: {what}" for what, other in layouts.items() if not torch.equal(other, found)]
    return wrong


def test_among_equal_scores_the_first_whatever_the_layout() -> None:
    assert ties_decided_otherwise() == []


def test_torchs_topk_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "first_of_the_largest", lambda scores, k: scores.topk(k).indices)
    wrong = ties_decided_otherwise()
    assert {"not the first", "padded"} <= {case.split(": ")[1] for case in wrong}


def test_numbers_that_are_not_finite_are_experts_too() -> None:
    """A loss that is no number must be seen as one, and not as an index out of bounds."""
    assert first_of_the_largest(torch.tensor([[math.nan] * 4]), 2).tolist() == [[0, 1]]
    assert first_of_the_largest(torch.tensor([[0.0, -math.inf, math.inf, 1.0]]), 3).tolist() == [[2, 3, 0]]


@settings(max_examples=150, deadline=None)
@given(routed())
def test_capacity(case: tuple[Routing, Tensor]) -> None:
    """An expert is full or nothing is dropped from it; what is dropped came later, or has no higher score."""
    routing, scores = case
    experts = choose(scores, routing)
    kept = keep(experts, scores, routing)
    capacity = math.ceil(routing.capacity * routing.top_k * scores.shape[1] / routing.experts)
    for b in range(len(scores)):
        for e in range(routing.experts):
            wanted = [(s, bool(kept[b, s, k])) for s, k in (experts[b] == e).nonzero().tolist()]
            took = [s for s, stays in wanted if stays]
            assert len(took) == min(capacity, len(wanted))
            for s in (s for s, stays in wanted if not stays):
                if routing.drop == "position":
                    assert s > max(took)
                else:
                    assert scores[b, s, e] <= scores[b, took, e].min()


def test_capacity_by_the_decimal() -> None:
    assert Routing(5, 2, capacity=0.55).expert_capacity(50) == 11
    assert Routing(5, 2, capacity=0.56).expert_capacity(50) == 12
    assert Routing(8, 2, capacity=1e300).expert_capacity(7) == 7


@settings(max_examples=100, deadline=None)
@given(routed(), st.sampled_from(["softmax-topk", "topk-softmax", "sigmoid"]))
def test_the_plain_router_and_the_engines(case: tuple[Routing, Tensor], score: str) -> None:
    """The same experts, weights, drops and losses; the logits are the numbers of the case, with ties among them."""
    routing, logits = case
    if routing.top_k == 1 and score == "topk-softmax":
        score = "sigmoid"
    routing = replace(routing, score=score, aux=0.5, z=0.25)
    made = []
    for layer in (Router(routing.experts, routing), plain.Router(routing.experts, routing, ALONE)):
        layer.weight = torch.nn.Parameter(torch.eye(routing.experts, dtype=torch.float64))
        layer.bias = torch.nn.Parameter(torch.linspace(0, 0.1, routing.experts), requires_grad=False)
        x = logits.clone().requires_grad_()
        choice = layer(x)
        loss = layer.loss if layer.loss.requires_grad else 0.0  # the plain router's is still to be added
        (gradient,) = torch.autograd.grad(choice.weights.square().sum() + loss, x)
        kept = torch.ones_like(choice.experts, dtype=torch.bool) if choice.kept is None else choice.kept
        made.append((choice.experts, kept, choice.weights, layer.loss.detach(), gradient))
    for mine, other in zip(*made, strict=True):
        torch.testing.assert_close(mine, other)


def router(routing: Routing, kind: str = "engine") -> Router | plain.Router:
    made = Router(6, routing) if kind == "engine" else plain.Router(6, routing, ALONE)
    made.weight = torch.nn.Parameter(torch.randn(routing.experts, 6, dtype=torch.float64))
    return made


@pytest.mark.parametrize("kind", ["engine", "plain"])
def test_weights_by_the_definition(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    for score in ("softmax-topk", "topk-softmax", "sigmoid"):
        layer = router(Routing(8, 3, score), kind)
        chosen, weights, kept = layer(x)
        assert kept is None or kept.all()
        assert bool(((weights.sum(-1) - 1).abs() < 1e-12).all()) == layer.routing.sums_to_one
        logits = (x @ layer.weight.T).flatten(0, 1)
        for t in range(10):
            picked = logits[t][chosen[t]]
            expected = {
                "softmax-topk": picked.exp() / logits[t].exp().sum(),
                "topk-softmax": picked.exp() / picked.exp().sum(),
                "sigmoid": picked.sigmoid() / picked.sigmoid().sum(),
            }[score]
            torch.testing.assert_close(weights[t], expected)
            assert picked.min() >= logits[t][[e for e in range(8) if e not in chosen[t]]].max()


@pytest.mark.parametrize("kind", ["engine", "plain"])
def test_the_losses_by_the_definition(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = router(Routing(4, 2, "softmax-topk", aux=0.5, z=0.25), kind)
    chosen, weights, _ = layer(x)
    logits = (x @ layer.weight.T).flatten(0, 1)
    share = torch.tensor([(chosen == e).sum() / 20 for e in range(4)], dtype=torch.float64)
    expected = 0.5 * 4 * (share * logits.softmax(-1).mean(0)).sum() + 0.25 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(layer.loss.detach(), expected.detach())
    total = weights.sum() + (layer.loss if kind == "plain" else 0.0)
    (with_loss,) = torch.autograd.grad((total,), layer.weight, retain_graph=True)
    (alone,) = torch.autograd.grad(logits.softmax(-1).gather(-1, chosen).sum(), layer.weight, retain_graph=True)
    (of_loss,) = torch.autograd.grad(expected, layer.weight)
    torch.testing.assert_close(with_loss, alone + of_loss)


def test_the_auxiliary_loss_is_least_when_all_are_equal() -> None:
    layer = router(Routing(4, 1, "softmax-topk", aux=1.0))
    layer.weight.data = torch.eye(4, 6, dtype=torch.float64)
    layer(torch.eye(4, 6, dtype=torch.float64).unsqueeze(0))  # each token to an expert of its own
    assert layer.loss.item() == pytest.approx(1.0)
    layer.loss = 0.0
    layer(torch.eye(4, 6, dtype=torch.float64)[:1].expand(1, 4, 6))
    assert layer.loss.item() > 1.3


@pytest.mark.parametrize("kind", ["engine", "plain"])
def test_the_bias_moves_against_the_load_and_is_not_in_the_weights(kind: str) -> None:
    layer = router(Routing(3, 1, "sigmoid", bias_rate=0.25), kind)
    layer.weight.data.zero_()
    layer.bias.data[1] = 0.5
    chosen, weights, _ = layer(torch.randn(1, 4, 6, dtype=torch.float64))
    assert chosen.flatten().tolist() == [1] * 4
    assert weights.flatten().tolist() == [0.5] * 4, "the raw score"
    if kind == "plain":
        layer.end_step()
    else:
        assert end_step(layer).tolist() == [[0, 4, 0]]
    assert layer.bias.tolist() == [0.25, 0.25, 0.25]


def test_micro_batches_cannot_forget_to_count() -> None:
    layer = router(Routing(4, 2, aux=0.1))
    layer.spread = Spread(forwards=2)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with pytest.raises(AssertionError, match="count_ahead"):
        layer(x)
    layer = router(Routing(4, 2, aux=0.1))
    full = layer(x)
    expected, load = layer.loss.item(), layer.load
    layer.load, layer.loss, layer.spread = None, 0.0, Spread(forwards=2)
    with torch.no_grad():
        layer(x[:1]), layer(x[1:])
    count_ahead(layer)
    layer(x[:1]), layer(x[1:])
    assert layer.loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(end_step(layer)[0], load)
    assert full.experts.shape == (6, 2)


def test_balance() -> None:
    assert balance(torch.tensor([5, 5, 5, 5])) == pytest.approx((math.log(4), 0.0))
    assert balance(torch.tensor([[20, 0, 0, 0], [5, 5, 5, 5]])) == pytest.approx((math.log(4) / 2, 1.5))


def test_the_biases_start_at_zero_and_stay_in_float32() -> None:
    moe = MoEConfig(Routing(bias_rate=0.01))
    model = materialize(to_moe(GPT(GPTConfig(layers=1)), moe), 0, CPU, torch.bfloat16)
    bias = model.blocks["0"].mlp.router.bias
    assert bias.dtype == torch.float32
    assert not bias.requires_grad
    assert bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": 0}, "--experts 0: must be at least 1"),
        ({"top_k": 9}, "use --top-k 8"),
        ({"top_k": 1}, "use --score softmax-topk"),
        ({"capacity": -1.0}, "--capacity -1.0"),
        ({"capacity": float("nan")}, "--capacity nan"),
        ({"aux": -0.1}, "--aux -0.1"),
        ({"bias_rate": float("inf")}, "--bias-rate inf"),
        ({"score": "relu"}, "--score relu"),
        ({"drop": "last"}, "--drop last"),
        ({"groups": 3}, "use --groups 2"),
        ({"groups": 4, "top_groups": 5}, "use --top-groups 4"),
        ({"groups": 4, "top_k": 4, "top_groups": 1}, "use --top-groups 4"),
    ],
)
def test_refusals(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Routing(**wrong)
