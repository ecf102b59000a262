"""Experts on several ranks equal one process: losses, norm, every gradient, every updated parameter."""

from dataclasses import replace

import pytest

from core.model.gpt import GPTConfig
from expert_parallel.engine.routing import MoEConfig, Routing
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool

CONFIG = GPTConfig(sequence=8, hidden=16, layers=2, heads=4)
EVERYTHING = Routing(8, 2, aux=0.01, z=0.001, bias_rate=0.01)

ROUTINGS = {
    "softmax-topk": Routing(8, 2, "softmax-topk", aux=0.01),
    "topk-softmax": EVERYTHING,
    "sigmoid": Routing(8, 3, "sigmoid", aux=0.01, bias_rate=0.01),
    "top-1": Routing(8, 1, "softmax-topk", z=0.01),
    "all experts": Routing(8, 8),
    "groups": Routing(8, 2, "sigmoid", groups=4, top_groups=2),
    "capacity by position": Routing(8, 2, capacity=1.0, aux=0.01),
    "capacity by probability": Routing(8, 2, "sigmoid", capacity=1.0, drop="probability"),
    "most dropped": Routing(8, 2, capacity=0.01),
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_every_routing(pool: Pool, routing: Routing) -> None:
    equals_one_process(pool, CONFIG, Layout(dp=4, ep=4, moe=MoEConfig(routing)))


LAYOUTS = {
    "ep 1": Layout(),
    "ep 8": Layout(dp=8, ep=8, samples=8),
    "ep 2, copies": Layout(dp=4, ep=2),
    "ep x tp with sequence": Layout(tp=2, dp=2, ep=4, sequence=True),
    "etp": Layout(dp=2, tp=2, etp=2, ep=1, sequence=True),
    "etp x ep x edp": Layout(dp=4, tp=2, etp=2, ep=2, sequence=True),
    "micro-batches": Layout(dp=2, ep=2, microbatches=2),
    "pipeline": Layout(dp=2, ep=2, pp=2, microbatches=2),
    "zero bubble": Layout(dp=2, ep=2, pp=2, microbatches=2, schedule="zb-h1"),
    "pipeline x tp": Layout(tp=2, ep=2, pp=2, microbatches=4, sequence=True),
    "all-gather": Layout(dp=4, ep=4, dispatch="all-gather"),
    "recomputed": Layout(dp=2, ep=2, recompute="full"),
    "ep over a sharded sequence": Layout(cp=2, dp=2, ep=4),
    "pipeline x tp x cp": Layout(tp=2, cp=2, ep=2, pp=2, microbatches=2, sequence=True),
    "tp without sp": Layout(tp=2, dp=2, ep=4),
    "etp x ep x edp, without sp": Layout(dp=4, tp=2, etp=2, ep=2),
    "shares of 2, 2, 1 and 1 tokens": Layout(tp=4, ep=2, etp=2, length=6, recompute="full"),
    "more ranks than tokens": Layout(tp=4, ep=4, length=3),
    "zero bubble x tp x cp, without sp": Layout(tp=2, cp=2, ep=4, pp=2, microbatches=2, schedule="zb-h1"),
}


ONE_RANK, NONE_HERE = (9.0, 8.0, *[0.0] * 6), (0.0, 0.0, *[9.0] * 6)
EXTREMES = {
    "all tokens to the experts of one rank": Layout(dp=4, ep=4, bias=ONE_RANK),
    "and of one expert": Layout(dp=4, ep=4, bias=ONE_RANK, moe=MoEConfig(Routing(8, 1, "sigmoid", aux=0.01))),
    "no token to the experts of a rank": Layout(dp=4, ep=4, bias=NONE_HERE),
    "dropped, and to one rank": Layout(
        dp=4, ep=4, bias=ONE_RANK, moe=MoEConfig(Routing(8, 2, "sigmoid", capacity=0.01))
    ),
    "all-gather": Layout(dp=4, ep=4, bias=ONE_RANK, dispatch="all-gather"),
    "etp": Layout(dp=4, ep=2, etp=2, bias=ONE_RANK),
}
BY_SCORE = MoEConfig(Routing(8, 2, "sigmoid", aux=0.01, capacity=0.5, drop="probability"), shared=12)
BY_POSITION = MoEConfig(Routing(8, 2, capacity=0.5, aux=0.01, z=0.01))
EXTREMES |= {
    "capacity: sp": Layout(tp=2, ep=2, sequence=True, moe=BY_SCORE),
    "capacity: tp, shares of 2, 2, 1 and 1 tokens": Layout(tp=4, ep=4, length=6, moe=BY_SCORE),
    "capacity: zigzag": Layout(cp=2, dp=2, ep=4, length=12, moe=BY_POSITION),
    "capacity: in order": Layout(cp=4, ep=2, zigzag=False, length=12, moe=BY_SCORE),
    "capacity: ulysses and zigzag": Layout(cp=4, ulysses=2, ep=2, length=16, moe=BY_POSITION),
    "capacity: sp x cp": Layout(tp=2, cp=4, sequence=True, ep=2, length=16, moe=BY_SCORE),
    "capacity: tp x cp, shares of 3 and 2 of two runs": Layout(tp=4, cp=2, ep=4, length=20, moe=BY_POSITION),
}


@pytest.mark.parametrize("layout", EXTREMES.values(), ids=EXTREMES)
def test_extremes(pool: Pool, layout: Layout) -> None:
    """No hang, and nothing is lost."""
    moe = layout.moe or MoEConfig(Routing(8, 2, "sigmoid", aux=0.01))
    equals_one_process(pool, replace(CONFIG, sequence=max(8, layout.length)), replace(layout, moe=moe))


def test_a_stage_without_experts(pool: Pool) -> None:
    layout = Layout(pp=2, microbatches=2, moe=MoEConfig(EVERYTHING))
    equals_one_process(pool, replace(CONFIG, dense_layers=1), layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(pool: Pool, layout: Layout) -> None:
    moe = layout.moe or MoEConfig(EVERYTHING, feed_forward=24, shared=12)
    equals_one_process(pool, CONFIG, replace(layout, moe=moe))
