"""Put each known bug in, and see the comparison or a claim fail: a check that cannot fail proves nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tests.layouts
from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from core.shards import Shard
from expert_parallel import dispatch, experts, gating, layers, moe, router, train, training
from expert_parallel.gating import Router, Routing, Spread
from expert_parallel.moe import MoEConfig
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool

CONFIG = GPTConfig(sequence=8, hidden=16, layers=1, heads=2)
MOE = MoEConfig(Routing(4, 2, "sigmoid", aux=0.5, z=0.01, bias_rate=0.5), shared=8)
COPIES = Layout(dp=4, ep=2, moe=MOE)  # of each expert two
SEQUENCE = Layout(tp=2, dp=2, ep=2, sequence=True, moe=MOE)
FEATURES = Layout(dp=4, ep=2, etp=2, moe=MOE)
PARTS = Layout(dp=2, ep=2, microbatches=2, moe=MOE)
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


def copies_of_experts_not_summed() -> AbstractContextManager:
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
    sequence = tests.layouts.sequence_parallel.layers
    summing = sequence.sum_whole_gradients

    def wrong(model: GPT, axis: Axis) -> None:
        kept = {p: p.grad for p in model.parameters() if p.shape == (4, 16)}
        for p in kept:
            p.grad = None
        summing(model, axis)
        for p, gradient in kept.items():
            p.grad = gradient

    return patch.object(sequence, "sum_whole_gradients", wrong)


def router_not_summed_over_dp() -> AbstractContextManager:
    return router_not_summed("dp")


def router_not_summed_over_tp() -> AbstractContextManager:
    return router_not_summed("tp")


def load_of_this_rank_alone() -> AbstractContextManager:
    return patch.object(gating, "_over_ranks", lambda counts, spread: counts)


def load_without_tp() -> AbstractContextManager:
    right = gating._over_ranks
    return patch.object(
        gating, "_over_ranks", lambda counts, spread: right(counts, replace(spread, axes=spread.axes[:1]))
    )


def routers_losses_scaled_by_ranks() -> AbstractContextManager:
    return patch.object(Spread, "parts", property(lambda spread: spread.forwards))


def routers_losses_scaled_by_microbatches() -> AbstractContextManager:
    ranks = Spread.parts.fget
    return patch.object(Spread, "parts", property(lambda spread: ranks(replace(spread, forwards=1))))


def load_of_this_microbatch_alone() -> AbstractContextManager:
    right = Router._losses

    def wrong(self: Router, logits: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
        self.share = counts.double() / counts.sum()
        return right(self, logits, scores, counts)

    return patch.object(Router, "_losses", wrong)


def experts_of_the_last_microbatch_alone() -> AbstractContextManager:
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
    right = gating.end_step

    def wrong(model: nn.Module) -> Tensor:
        before = [r.bias.clone() for r in gating.routers(model)]
        loads = right(model)
        for r, old in zip(gating.routers(model), before, strict=True):
            r.bias.data = 2 * old - r.bias
        return loads

    return patch.object(tests.layouts, "end_step", wrong)


def every_rank_has_the_first_experts() -> AbstractContextManager:
    right = Shard.local
    return patch.object(Shard, "local", lambda self, whole: right(replace(self, index=0), whole))


def rows_in_the_order_they_came() -> AbstractContextManager:
    return patch.object(layers, "by_expert", lambda rows, counts: rows)


def rows_back_in_the_order_of_the_experts() -> AbstractContextManager:
    return patch.object(layers, "by_source", lambda rows, counts: rows)


def choices_not_weighted() -> AbstractContextManager:
    right = moe.unpermute
    return patch.object(layers, "unpermute", lambda rows, order, weights: right(rows, order, torch.ones_like(weights)))


def late(when: str) -> AbstractContextManager:
    """What arrives is read before it is there: here, for certain."""
    right = getattr(layers._Finish if when == "forward" else layers._Start, when)

    def wrong(ctx: Any, *arguments: Any) -> Any:
        result = right(ctx, *arguments)
        return torch.zeros_like(result) if when == "forward" else (torch.zeros_like(result[0]), None)

    return patch.object(layers._Finish if when == "forward" else layers._Start, when, staticmethod(wrong))


def rows_read_before_they_are_there() -> AbstractContextManager:
    return late("forward")


def gradients_read_before_they_are_there() -> AbstractContextManager:
    return late("backward")


def second_bias_once_a_rank_of_etp() -> AbstractContextManager:
    right = experts.Experts.forward
    return patch.object(experts.Experts, "forward", lambda self, x, counts, last_bias: right(self, x, counts))


def copies_counted_twice_in_the_norm() -> AbstractContextManager:
    right = layers.counted_once
    return patch.object(layers, "counted_once", lambda model, edp, etp: right(model, replace(edp, index=0), etp))


def second_bias_counted_twice_in_the_norm() -> AbstractContextManager:
    right = layers.counted_once
    return patch.object(layers, "counted_once", lambda model, edp, etp: right(model, edp, replace(etp, index=0)))


def dropped_by_what_this_rank_has() -> AbstractContextManager:
    right = Router.decide

    def wrong(self: Router, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        self.spread = replace(self.spread, sequence=None)
        return right(self, scores)

    return patch.object(Router, "decide", wrong)


CAPACITY = replace(SEQUENCE, moe=MoEConfig(Routing(4, 2, capacity=0.5)))
SEEN: dict[Bug, Layout] = {
    scaled_by_ep: COPIES,
    copies_of_experts_not_summed: COPIES,
    second_bias_not_summed_over_etp: FEATURES,
    router_not_summed_over_dp: COPIES,
    router_not_summed_over_tp: SEQUENCE,
    load_of_this_rank_alone: COPIES,
    load_without_tp: SEQUENCE,
    routers_losses_scaled_by_ranks: SEQUENCE,
    routers_losses_scaled_by_microbatches: PARTS,
    load_of_this_microbatch_alone: PARTS,
    experts_of_the_last_microbatch_alone: PARTS,
    bias_moves_with_the_load: COPIES,
    bias_of_selection_in_the_weights: replace(COPIES, bias=(0.5, 0.0, 0.0, 0.0)),
    every_rank_has_the_first_experts: COPIES,
    rows_in_the_order_they_came: COPIES,
    rows_back_in_the_order_of_the_experts: COPIES,
    choices_not_weighted: COPIES,
    rows_read_before_they_are_there: COPIES,
    gradients_read_before_they_are_there: COPIES,
    second_bias_once_a_rank_of_etp: FEATURES,
    copies_counted_twice_in_the_norm: COPIES,
    second_bias_counted_twice_in_the_norm: FEATURES,
    dropped_by_what_this_rank_has: CAPACITY,
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


@pytest.mark.parametrize("layout", [COPIES, SEQUENCE, FEATURES, PARTS, CAPACITY], ids=range(5))
def test_without_a_bug_all_are_equal(pool: Pool, layout: Layout) -> None:
    equals_one_process(pool, CONFIG, layout)


@pytest.mark.parametrize(("bug", "layout"), SEEN.items(), ids=[bug.__name__ for bug in SEEN])
def test_the_comparison_catches(pool: Pool, bug: Bug, layout: Layout) -> None:
    with pytest.raises(AssertionError):
        equals_one_process(Buggy(pool, bug), CONFIG, layout)


# ---- Bugs that a claim must see


def rows_sent_twice() -> AbstractContextManager:
    right = layers.Exchange.start

    def wrong(self: layers.Exchange, rows: Tensor) -> Tensor:
        comm.all_to_all(rows.detach(), self.axis, self.send, self.receive)
        return right(self, rows)

    return patch.object(layers.Exchange, "start", wrong)


def gradients_sent_twice() -> AbstractContextManager:
    right = layers._Finish.backward

    def wrong(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        comm.all_to_all(gradient, ctx.exchange.axis, ctx.exchange.receive, ctx.exchange.send)
        return right(ctx, gradient)

    return patch.object(layers._Finish, "backward", staticmethod(wrong))


def counts_announced_in_backward_too() -> AbstractContextManager:
    right = layers._Finish.backward

    def wrong(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        axis = ctx.exchange.axis
        equal = [1] * axis.size
        comm.all_to_all_async(torch.zeros(axis.size, 2), axis, equal, equal, "token counts").wait()
        return right(ctx, gradient)

    return patch.object(layers._Finish, "backward", staticmethod(wrong))


def all_experts_on_every_rank() -> AbstractContextManager:
    right = training.parallelize

    def wrong(model: GPT, ep: Axis, *more: Any) -> GPT:
        cut = right(model, ep, *more)
        for module in cut.modules():
            if isinstance(module, experts.Experts):
                module.spare = nn.Parameter(torch.zeros(3 * module.up.weight.numel()))
        return cut

    return patch.object(training, "parallelize", wrong)


def all_gather_brings_half() -> AbstractContextManager:
    right = comm.gather_for

    def wrong(x: Tensor, axis: Axis, dim: int) -> Tensor:
        return right(x, axis, dim) * (torch.arange(axis.size * len(x)) < axis.size * len(x) // 2).unsqueeze(1)

    return patch.object(comm, "gather_for", wrong)


def an_expert_chosen_twice() -> AbstractContextManager:
    right = gating.choose

    def wrong(scores: Tensor, routing: Routing) -> Tensor:
        chosen = right(scores, routing)
        chosen[0, 0, 1] = chosen[0, 0, 0]
        return chosen

    return patch.object(gating, "choose", wrong)


def weights_over_all_experts() -> AbstractContextManager:
    right = Router._weights
    return patch.object(Router, "_weights", lambda self, a, b, e: right(self, a, b, e) * 0.9)


def places_for_one_more() -> AbstractContextManager:
    right = gating.keep

    def wrong(chosen: Tensor, scores: Tensor, routing: Routing) -> Tensor:
        return right(chosen, scores, replace(routing, capacity=2 * routing.capacity))

    return patch.object(gating, "keep", wrong)


def groups_forgotten() -> AbstractContextManager:
    right = gating.choose
    return patch.object(gating, "choose", lambda scores, r: right(scores, replace(r, top_groups=r.groups)))


def balancing_in_the_wrong_direction() -> AbstractContextManager:
    right = gating.end_step

    def wrong(model: nn.Module) -> Tensor:
        for r in gating.routers(model):
            r.bias.data *= -1
        loads = right(model)
        for r in gating.routers(model):
            r.bias.data *= -1
        return loads

    return patch.object(training, "end_step", wrong)


def rows_computed_twice() -> AbstractContextManager:
    right = layers.ExpertParallelMoE._compute

    def wrong(self: layers.ExpertParallelMoE, rows: Tensor, coming: Tensor) -> Tensor:
        right(self, rows, coming)
        return right(self, rows, coming)

    return patch.object(layers.ExpertParallelMoE, "_compute", wrong)


CLAIMS: list[tuple[str, Bug, set[str]]] = [
    ("dispatch", rows_sent_twice, {"elements in the all-to-alls, forward"}),
    ("dispatch", gradients_sent_twice, {"elements in the all-to-alls, backward"}),
    ("dispatch", counts_announced_in_backward_too, {"exchanges of token counts", "their elements"}),
    ("dispatch", all_experts_on_every_rank, {"bytes of weights of experts"}),
    ("dispatch", all_gather_brings_half, {"logits with all-gather"}),
    ("router", an_expert_chosen_twice, {"different experts for each token"}),
    ("router", weights_over_all_experts, {"the weights of a token"}),
    ("router", places_for_one_more, {"tokens that an expert took of a sample"}),
    ("router", groups_forgotten, {"groups of a token"}),
    ("router", balancing_in_the_wrong_direction, {"MaxVio, bias, no loss", "entropy of the load, bias, no loss"}),
    ("train", rows_computed_twice, {"rows computed, balanced", "rows computed, unbalanced"}),
    ("train", balancing_in_the_wrong_direction, {"MaxVio in the second half"}),
]
FLAGS = ["--batch=4", "--sequence=16", "--hidden=16", "--heads=2", "--layers=1", "--feed-forward=16", "--experts=4"]


def failing_claims(lesson: str, bug: Bug | None, steps: int) -> list[str]:
    """Run a lesson inside a worker; the claims that failed, on rank 0."""
    frame = Lesson(f"expert_parallel/{lesson}.py", "CODE 04", "", "", "")
    training.add_flags(frame)
    training.add_parallel_flags(frame)
    frame.parser.set_defaults(aux=0.05, bias_rate=0.01, capacity=1.25 if lesson == "router" else 0.0)
    args = frame.parser.parse_args([*FLAGS, f"--steps={steps}"])
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), torch.float64)
    script = {"dispatch": dispatch, "router": router, "train": train}[lesson]
    with bug() if bug else nullcontext():
        script.lesson(run)
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


@pytest.mark.parametrize(
    ("lesson", "steps"), [("dispatch", 2), ("router", training.ENOUGH), ("train", training.ENOUGH)]
)
def test_without_a_bug_every_claim_holds(pool: Pool, lesson: str, steps: int) -> None:
    assert pool.run(2, failing_claims, lesson, None, steps)[0] == []


@pytest.mark.parametrize(("lesson", "bug", "must_fail"), CLAIMS, ids=[bug.__name__ for _, bug, _ in CLAIMS])
def test_the_claims_catch(pool: Pool, lesson: str, bug: Bug, must_fail: set[str]) -> None:
    steps = training.ENOUGH if bug is balancing_in_the_wrong_direction else 2
    failed = pool.run(2, failing_claims, lesson, bug, steps)[0]
    missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"
