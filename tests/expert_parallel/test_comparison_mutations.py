"""Bugs of expert parallelism that the comparison with one process must see; those of lessons: `test_mutations.py`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import tests.layouts
from cluster.run import build
from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig
from core.shards import Shard
from expert_parallel.engine import capacity, experts, layers, router, shares
from expert_parallel.engine.capacity import Holders
from expert_parallel.engine.layers import Exchange
from expert_parallel.engine.moe import unpermute
from expert_parallel.engine.router import Router, Spread
from expert_parallel.engine.routing import MoEConfig, Routing
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool, WorkerError

CONFIG = GPTConfig(sequence=8, hidden=16, layers=1, heads=2)
MOE = MoEConfig(Routing(4, 2, "sigmoid", aux=0.5, z=0.01, bias_rate=0.5), shared=8)
REPLICAS = Layout(dp=4, ep=2, moe=MOE)  # of each expert two
SEQUENCE = Layout(tp=2, dp=2, ep=2, sequence=True, moe=MOE)
FEATURES = Layout(dp=4, ep=2, etp=2, moe=MOE)
MICRO = Layout(dp=2, ep=2, microbatches=2, moe=MOE)
Bug = Callable[[], AbstractContextManager]

# ---- Bugs that the comparison with one process must see


def gradients_of_experts(change: Callable[[nn.Module, Axis, Axis], None]) -> AbstractContextManager:
    return patch.object(layers, "sum_expert_gradients", change)


def scaled_by_ep() -> AbstractContextManager:
    right = layers.sum_expert_gradients

    def wrong(model: nn.Module, edp: Axis, etp: Axis) -> None:
        right(model, edp, etp)
        for p in layers.expert_parameters(model):
            p.grad /= 2

    return gradients_of_experts(wrong)


def replicas_of_experts_not_summed() -> AbstractContextManager:
    return gradients_of_experts(lambda model, edp, etp: None)


def second_bias_not_summed_over_etp() -> AbstractContextManager:
    def wrong(model: nn.Module, edp: Axis, etp: Axis) -> None:
        layers.sum_gradients(layers.expert_parameters(model), edp)

    return gradients_of_experts(wrong)


def router_not_summed(topic: str) -> AbstractContextManager:
    """Over dp, or over tp, whose ranks have other tokens under sequence parallelism."""

    def without(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return [p for p in parameters if p.shape != (4, 16)]

    if topic == "dp":
        right = tests.layouts.sum_gradients
        return patch.object(tests.layouts, "sum_gradients", lambda parameters, axis: right(without(parameters), axis))
    sequence = tests.layouts.sequence_parallel.engine.layers
    summing = sequence.sum_replicated_gradients

    def wrong(model: GPT, *axes: Axis) -> None:
        kept = {p: p.grad for p in model.parameters() if p.shape == (4, 16)}
        for p in kept:
            p.grad = None
        summing(model, *axes)
        for p, gradient in kept.items():
            p.grad = gradient

    return patch.object(sequence, "sum_replicated_gradients", wrong)


def router_not_summed_over_dp() -> AbstractContextManager:
    return router_not_summed("dp")


def router_not_summed_over_tp() -> AbstractContextManager:
    return router_not_summed("tp")


def load_of_this_rank_alone() -> AbstractContextManager:
    return patch.object(router, "_over_ranks", lambda counts, spread: counts)


def load_without_tp() -> AbstractContextManager:
    right = router._over_ranks
    return patch.object(
        router, "_over_ranks", lambda counts, spread: right(counts, replace(spread, axes=spread.axes[:1]))
    )


def routers_losses_scaled_by_ranks() -> AbstractContextManager:
    return patch.object(Spread, "parts", property(lambda spread: spread.forwards))


def routers_losses_scaled_by_micro_batches() -> AbstractContextManager:
    ranks = Spread.parts.fget
    return patch.object(Spread, "parts", property(lambda spread: ranks(replace(spread, forwards=1))))


def load_of_this_micro_batch_alone() -> AbstractContextManager:
    right = Router._losses

    def wrong(self: Router, logits: Tensor, scores: Tensor, counts: Tensor, alike: int | None) -> Tensor:
        self.share = counts.double() / counts.sum()
        return right(self, logits, scores, counts, alike)

    return patch.object(Router, "_losses", wrong)


def experts_of_the_last_micro_batch_alone() -> AbstractContextManager:
    right = tests.layouts.Pipeline._backward

    def wrong(self: Any, action: Any) -> Any:
        if action.microbatch == self.microbatches - 1:
            for p in (p for stage in self.stages.values() for p in layers.expert_parameters(stage)):
                p.grad = None
        return right(self, action)

    return patch.object(tests.layouts.Pipeline, "_backward", wrong)


def bias_of_selection_in_the_weights() -> AbstractContextManager:
    right = Router._weights
    return patch.object(Router, "_weights", lambda self, a, scores, e: right(self, a, scores + self.bias, e))


def bias_moves_with_the_load() -> AbstractContextManager:
    right = router.end_step

    def wrong(model: nn.Module) -> Tensor:
        before = [r.bias.clone() for r in router.routers(model)]
        loads = right(model)
        for r, old in zip(router.routers(model), before, strict=True):
            r.bias.data = 2 * old - r.bias
        return loads

    return patch.object(tests.layouts, "end_step", wrong)


def every_rank_has_the_first_experts() -> AbstractContextManager:
    right = Shard.local
    return patch.object(Shard, "local", lambda self, full: right(replace(self, index=0), full))


def rows_in_the_order_they_came() -> AbstractContextManager:
    return patch.object(layers, "by_expert", lambda rows, counts: rows)


def rows_back_in_the_order_of_the_experts() -> AbstractContextManager:
    return patch.object(layers, "by_source", lambda rows, counts: rows)


def choices_not_weighted() -> AbstractContextManager:
    return patch.object(layers, "unpermute", lambda rows, order, w: unpermute(rows, order, torch.ones_like(w)))


def rows_read_before_they_are_there() -> AbstractContextManager:
    def end(self: Exchange, ticket: Tensor) -> Tensor:
        backward = partial(self._post, send=self.receive, receive=self.send)
        return comm.conjugate(ticket, lambda t: torch.zeros_like(self._wait(t)), backward)

    return patch.object(Exchange, "end", end)


def gradients_read_before_they_are_there() -> AbstractContextManager:
    def begin(self: Exchange, rows: Tensor) -> Tensor:
        forward = partial(self._post, send=self.send, receive=self.receive)
        return comm.conjugate(rows, forward, lambda g: torch.zeros_like(self._wait(g)))

    return patch.object(Exchange, "begin", begin)


def second_bias_once_a_rank_of_etp() -> AbstractContextManager:
    right = experts.Experts.forward
    return patch.object(experts.Experts, "forward", lambda self, x, counts, last_bias: right(self, x, counts))


def replicas_counted_twice_in_the_norm() -> AbstractContextManager:
    right = layers.counted_once
    return patch.object(layers, "counted_once", lambda model, edp, etp: right(model, replace(edp, index=0), etp))


def second_bias_counted_twice_in_the_norm() -> AbstractContextManager:
    right = layers.counted_once
    return patch.object(layers, "counted_once", lambda model, edp, etp: right(model, edp, replace(etp, index=0)))


def dropped_by_what_this_rank_has() -> AbstractContextManager:
    right = Router.decide

    def wrong(self: Router, scores: Tensor, alike: int | None) -> tuple[Tensor, Tensor | None]:
        self.spread = replace(self.spread, holders=None)
        return right(self, scores, alike)

    return patch.object(Router, "decide", wrong)


def runs_of_a_zigzag_taken_for_one() -> AbstractContextManager:
    """As if a rank's tokens were neighbours."""
    return patch.object(capacity, "runs", lambda positions: [(int(positions[0]), len(positions))])


def runs_in_the_order_of_the_ranks() -> AbstractContextManager:
    right = build.positions_of_ranks

    def wrong(*sizes: Any) -> list[Tensor]:
        every = right(*sizes)
        return list(torch.arange(sum(map(len, every))).split([*map(len, every)]))

    return patch.object(build, "positions_of_ranks", wrong)


def routers_of_shares_not_summed_over_tp() -> AbstractContextManager:
    return patch.object(layers, "parameters_of_shares", lambda model: [])


def tokens_of_all_ranks_of_tp_sent() -> AbstractContextManager:
    right = build.Spread

    def wrong(
        axes: tuple, holders: Holders, forwards: int, alike: Axis | None, twin: tuple[Axis, int] | None
    ) -> Spread:
        return right(axes[:2], holders, forwards, None, twin)

    return patch.object(build, "Spread", wrong)


def shares_of_results_not_joined_in_order() -> AbstractContextManager:
    right = shares._joined
    return patch.object(shares, "_joined", lambda x, axis, tokens: right(x, axis, tokens).flip(1))


CAPACITY = replace(SEQUENCE, moe=MoEConfig(Routing(4, 2, capacity=0.5)))
SHARES = replace(SEQUENCE, sequence=False, length=7)
ZIGZAG = Layout(cp=2, dp=2, ep=4, samples=2, moe=MoEConfig(Routing(4, 2, capacity=0.5)))
SEEN: dict[Bug, Layout] = {
    scaled_by_ep: REPLICAS,
    replicas_of_experts_not_summed: REPLICAS,
    second_bias_not_summed_over_etp: FEATURES,
    router_not_summed_over_dp: REPLICAS,
    router_not_summed_over_tp: SEQUENCE,
    load_of_this_rank_alone: REPLICAS,
    load_without_tp: SEQUENCE,
    routers_losses_scaled_by_ranks: SEQUENCE,
    routers_losses_scaled_by_micro_batches: MICRO,
    load_of_this_micro_batch_alone: MICRO,
    experts_of_the_last_micro_batch_alone: MICRO,
    bias_moves_with_the_load: REPLICAS,
    bias_of_selection_in_the_weights: replace(REPLICAS, bias=(0.5, 0.0, 0.0, 0.0)),
    every_rank_has_the_first_experts: REPLICAS,
    rows_in_the_order_they_came: REPLICAS,
    rows_back_in_the_order_of_the_experts: REPLICAS,
    choices_not_weighted: REPLICAS,
    rows_read_before_they_are_there: REPLICAS,
    gradients_read_before_they_are_there: REPLICAS,
    second_bias_once_a_rank_of_etp: FEATURES,
    replicas_counted_twice_in_the_norm: REPLICAS,
    second_bias_counted_twice_in_the_norm: FEATURES,
    dropped_by_what_this_rank_has: CAPACITY,
    runs_of_a_zigzag_taken_for_one: ZIGZAG,
    runs_in_the_order_of_the_ranks: ZIGZAG,
    routers_of_shares_not_summed_over_tp: SHARES,
    tokens_of_all_ranks_of_tp_sent: SHARES,
    shares_of_results_not_joined_in_order: SHARES,
}


def with_bug(bug: Bug, function: Callable, *args: Any) -> Any:
    with bug():
        return function(*args)


class Buggy:
    """A pool whose workers have the bug."""

    def __init__(self, pool: Pool, bug: Bug):
        self.pool, self.bug = pool, bug

    def run(self, ranks: int, function: Callable, *args: Any) -> list[Any]:
        return self.pool.run(ranks, with_bug, self.bug, function, *args)


@pytest.mark.parametrize("layout", [REPLICAS, SEQUENCE, FEATURES, MICRO, CAPACITY, SHARES, ZIGZAG], ids=range(7))
def test_without_a_bug_all_are_equal(pool: Pool, layout: Layout) -> None:
    equals_one_process(pool, CONFIG, layout)


@pytest.mark.parametrize(("bug", "layout"), SEEN.items(), ids=[bug.__name__ for bug in SEEN])
def test_the_comparison_catches(pool: Pool, bug: Bug, layout: Layout) -> None:
    with pytest.raises(AssertionError) as caught:
        equals_one_process(Buggy(pool, bug), CONFIG, layout)
    assert not isinstance(caught.value, WorkerError), "a difference, not a bug that no longer fits the code"
