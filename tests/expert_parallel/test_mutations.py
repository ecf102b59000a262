"""Put each known bug in, and see a claim of a lesson fail: a check that cannot fail proves nothing."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from expert_parallel import dispatch, moe, train
from expert_parallel import router as plain
from expert_parallel.engine import experts, layers, router
from expert_parallel.engine.layers import Exchange
from expert_parallel.engine.router import Choice, Router
from expert_parallel.engine.routing import Routing
from expert_parallel.evidence import flags, training
from expert_parallel.evidence import router as evidence
from tests.pool import Pool

Bug = Callable[[], AbstractContextManager]
BALANCE = [f"--steps={training.ENOUGH}"]

# ---- Bugs that a claim must see


def rows_sent_twice() -> AbstractContextManager:
    right = Exchange.begin

    def wrong(self: Exchange, rows: Tensor) -> Tensor:
        comm.all_to_all(rows.detach(), self.axis, self.send, self.receive)
        return right(self, rows)

    return patch.object(Exchange, "begin", wrong)


def in_backward(more: Callable[[Exchange, Tensor], Any]) -> AbstractContextManager:
    """`more`, of the exchange and the gradient, before the gradient is sent."""

    def end(self: Exchange, ticket: Tensor) -> Tensor:
        def backward(gradient: Tensor) -> Tensor:
            more(self, gradient)
            return self._post(gradient, self.receive, self.send)

        return comm.conjugate(ticket, self._wait, backward)

    return patch.object(Exchange, "end", end)


def gradients_sent_twice() -> AbstractContextManager:
    return in_backward(lambda exchange, g: comm.all_to_all(g, exchange.axis, exchange.receive, exchange.send))


def counts_announced_in_backward_too() -> AbstractContextManager:
    def more(exchange: Exchange, _: Tensor) -> None:
        axis = exchange.axis
        comm.all_to_all(torch.zeros(axis.size, 2), axis.labelled("counts"), [1] * axis.size, [1] * axis.size)

    return in_backward(more)


def all_experts_on_every_rank() -> AbstractContextManager:
    right = training.parallelize

    def wrong(model: GPT, ep: Axis, *more: Any) -> GPT:
        sharded = right(model, ep, *more)
        for module in sharded.modules():
            if isinstance(module, experts.Experts):
                module.spare = nn.Parameter(torch.zeros(3 * module.up.weight.numel()))
        return sharded

    return patch.object(training, "parallelize", wrong)


def all_gather_brings_half() -> AbstractContextManager:
    right = comm.gather_for

    def wrong(x: Tensor, axis: Axis, dim: int) -> Tensor:
        return right(x, axis, dim) * (torch.arange(axis.size * len(x)) < axis.size * len(x) // 2).unsqueeze(1)

    return patch.object(comm, "gather_for", wrong)


def an_expert_chosen_twice() -> AbstractContextManager:
    right = router.choose

    def wrong(scores: Tensor, routing: Routing) -> Tensor:
        chosen = right(scores, routing)
        chosen[0, 0, 1] = chosen[0, 0, 0]
        return chosen

    return patch.object(router, "choose", wrong)


def weights_over_all_experts() -> AbstractContextManager:
    right = Router._weights
    return patch.object(Router, "_weights", lambda self, a, b, e: right(self, a, b, e) * 0.9)


def capacity_for_one_more() -> AbstractContextManager:
    right = router.keep

    def wrong(chosen: Tensor, scores: Tensor, routing: Routing) -> Tensor:
        return right(chosen, scores, replace(routing, capacity=2 * routing.capacity))

    return patch.object(router, "keep", wrong)


def groups_forgotten() -> AbstractContextManager:
    right = router.choose
    return patch.object(router, "choose", lambda scores, r: right(scores, replace(r, top_groups=r.groups)))


def balancing_in_the_wrong_direction() -> AbstractContextManager:
    right = router.end_step

    def wrong(model: nn.Module) -> Tensor:
        biased = [r for r in router.routers(model) if r.bias is not None]
        for r in biased:
            r.bias.data *= -1
        loads = right(model)
        for r in biased:
            r.bias.data *= -1
        return loads

    return patch.object(training, "end_step", wrong)


def rows_computed_twice() -> AbstractContextManager:
    right = layers.ExpertParallelMoE._compute

    def wrong(self: layers.ExpertParallelMoE, rows: Tensor, received: Tensor) -> Tensor:
        right(self, rows, received)
        return right(self, rows, received)

    return patch.object(layers.ExpertParallelMoE, "_compute", wrong)


# ---- Bugs in the plain version


def plain_router(change: Callable[[plain.Router, Choice], Choice]) -> AbstractContextManager:
    right = plain.Router.forward
    return patch.object(plain.Router, "forward", lambda self, x: change(self, right(self, x)))


def combined_without_the_routers_weight() -> AbstractContextManager:
    return plain_router(lambda _, choice: choice._replace(weights=torch.ones_like(choice.weights)))


def plain_losses_scaled_by_ranks() -> AbstractContextManager:
    def change(self: plain.Router, choice: Choice) -> Choice:
        self.loss = self.loss * self.dp.size
        return choice

    return plain_router(change)


def plain_load_of_this_rank_alone() -> AbstractContextManager:
    def change(self: plain.Router, choice: Choice) -> Choice:
        self.load = choice.experts.flatten().bincount(minlength=self.routing.experts)
        return choice

    return plain_router(change)


def plain_choices_beyond_capacity_kept() -> AbstractContextManager:
    right = Routing.expert_capacity
    wide = patch.object(Routing, "expert_capacity", lambda self, tokens: 2 * right(self, tokens))
    forward = plain.Router.forward

    def wrong(self: plain.Router, x: Tensor) -> Choice:
        with wide:
            return forward(self, x)

    return patch.object(plain.Router, "forward", wrong)


def tokens_returned_in_another_order() -> AbstractContextManager:
    right, calls = dispatch.all_to_all, itertools.count()

    def wrong(*arguments: Any) -> Tensor:
        rows = right(*arguments)
        return rows.flip(0) if next(calls) % 2 else rows  # each second one is the combine

    return patch.object(dispatch, "all_to_all", wrong)


def counts_of_the_wrong_peer() -> AbstractContextManager:
    """As many rows from each peer as it sends, but by the other's experts: more would be a broken message."""
    right = comm.all_to_all

    def wrong(x: Tensor, axis: Axis, *more: Any) -> Tensor:
        counts = right(x, axis, *more)
        if axis.name != "ep counts":
            return counts
        totals, others = counts.sum(1), counts.flip(0)
        others = (others * totals.unsqueeze(1)) // others.sum(1, keepdim=True).clamp_min(1)
        others[:, -1] += totals - others.sum(1)
        return others

    return patch.object(comm, "all_to_all", wrong)


def gradients_not_sent_back() -> AbstractContextManager:
    """The all-to-all of rows without its backward: each rank keeps the gradients of what it received."""

    def wrong(rows: Tensor, ep: Axis, send: list[int], receive: list[int]) -> Tensor:
        def back(gradient: Tensor) -> Tensor:
            sent = comm.all_to_all(gradient, ep, receive, send)
            return torch.zeros_like(sent)

        return comm.conjugate(rows, lambda x: comm.all_to_all(x, ep, send, receive), back)

    return patch.object(dispatch, "all_to_all", wrong)


def plain_replicas_not_summed() -> AbstractContextManager:
    right = train.sum_gradients
    return patch.object(train, "sum_gradients", lambda ps, axis: None if axis.name == "edp" else right(ps, axis))


def plain_experts_scaled_by_ep() -> AbstractContextManager:
    right = train.sum_gradients

    def wrong(parameters: list[nn.Parameter], axis: Axis) -> None:
        right(parameters, axis)
        for p in parameters if axis.name == "edp" else ():
            p.grad /= 2

    return patch.object(train, "sum_gradients", wrong)


def plain_replicas_counted_twice_in_the_norm() -> AbstractContextManager:
    right = train.clip_and_total

    def wrong(parameters: Any, counted: list[Tensor], axes: list[Axis], *more: Any) -> tuple[float, float]:
        parameters = list(parameters)
        return right(parameters, [p.grad for p in parameters if p.grad is not None], axes, *more)

    return patch.object(train, "clip_and_total", wrong)


def shared_expert_forgotten() -> AbstractContextManager:
    right = moe.MoE.forward

    def wrong(self: moe.MoE, x: Tensor) -> Tensor:
        with patch.object(self, "shared", None):
            return right(self, x)

    return patch.object(moe.MoE, "forward", wrong)


LOSSES, GRADIENTS = "losses equal one process, all steps", "every gradient equals one process, all steps"
PLAIN = {f"{LOSSES} (plain)", f"{GRADIENTS} (plain)"}
CLAIMS: list[tuple[str, Bug, set[str], list[str]]] = [
    ("dispatch", rows_sent_twice, {"elements in the all-to-alls, forward (engine)"}, []),
    ("dispatch", gradients_sent_twice, {"elements in the all-to-alls, backward (engine)"}, []),
    ("dispatch", counts_announced_in_backward_too, {"exchanges of token counts, a layer (engine)",
                                                    "their elements (engine)"}, []),
    ("dispatch", all_experts_on_every_rank, {"bytes of weights of experts (engine)"}, []),
    ("dispatch", all_gather_brings_half, {"logits with all-gather"}, []),
    ("router", an_expert_chosen_twice, {"different experts for each token"}, []),
    ("router", weights_over_all_experts, {"the weights of a token"}, []),
    ("router", capacity_for_one_more, {"tokens that an expert took of a sample"}, []),
    ("router", groups_forgotten, {"groups of a token"}, []),
    ("router", balancing_in_the_wrong_direction, {"MaxVio, bias, no loss", "entropy of the load, bias, no loss"},
     BALANCE),
    ("train", rows_computed_twice, {"rows computed, balanced", "rows computed, unbalanced"}, []),
    ("train", balancing_in_the_wrong_direction, {"MaxVio in the second half"}, BALANCE),
    ("dispatch", combined_without_the_routers_weight, PLAIN, []),
    ("dispatch", tokens_returned_in_another_order, PLAIN, []),
    ("dispatch", counts_of_the_wrong_peer, PLAIN, []),
    ("dispatch", gradients_not_sent_back, {f"{GRADIENTS} (plain)"}, []),
    ("router", plain_losses_scaled_by_ranks, {f"{GRADIENTS} (plain)"}, []),
    ("router", plain_choices_beyond_capacity_kept, {"tokens that an expert took of a sample (plain)", *PLAIN}, []),
    ("router", plain_load_of_this_rank_alone, {"every parameter after every step (plain)"}, []),
    ("moe", shared_expert_forgotten, PLAIN, ["--shared=8"]),
    ("train", plain_replicas_not_summed, {f"{GRADIENTS} (plain)"}, ["--ep=1"]),
    ("train", plain_experts_scaled_by_ep, {f"{GRADIENTS} (plain)"}, []),
    ("train", plain_replicas_counted_twice_in_the_norm, {"the global gradient norm (plain)"}, []),
]  # fmt: skip
FLAGS = ["--batch=4", "--sequence=16", "--hidden=16", "--heads=2", "--layers=1", "--feed-forward=16", "--experts=4"]
LESSONS = {"dispatch": dispatch, "router": plain, "train": train, "moe": moe}


@contextmanager
def both(one: Bug, other: Bug) -> Iterator[None]:
    with one(), other():
        yield


def failing_claims(lesson: str, bug: Bug | None, more: list[str]) -> list[str]:
    """Run a lesson inside a worker; the claims that failed, on rank 0."""
    frame = Lesson(f"expert_parallel/{lesson}.py", "CODE 04", "", "", "")
    flags.add_flags(frame)
    flags.add_parallel_flags(frame)
    frame.parser.set_defaults(steps=2, aux=0.05, bias_rate=0.01, capacity=1.25 if lesson == "router" else 0.0)
    args = frame.parser.parse_args([*FLAGS, *more])
    only = {"left alone", "auxiliary loss", "bias, no loss"}  # of the ways of the router, where it trains for long
    if bug is balancing_in_the_wrong_direction:
        ways = {name: way for name, way in evidence.ways(args).items() if name in only}
        bug = partial(both, bug, partial(patch.object, evidence, "ways", lambda _: ways))
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), POLICIES["float64"])
    with bug() if bug else nullcontext():
        LESSONS[lesson].lesson(run)
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


@pytest.mark.parametrize(("lesson", "flags"), [("dispatch", []), ("moe", []), ("router", BALANCE), ("train", BALANCE)])
def test_without_a_bug_every_claim_holds(pool: Pool, lesson: str, flags: list[str]) -> None:
    assert pool.run(2, failing_claims, lesson, None, flags)[0] == []


@pytest.mark.parametrize(("lesson", "bug", "must_fail", "flags"), CLAIMS, ids=[bug.__name__ for _, bug, *_ in CLAIMS])
def test_the_claims_catch(pool: Pool, lesson: str, bug: Bug, must_fail: set[str], flags: list[str]) -> None:
    failed = pool.run(2, failing_claims, lesson, bug, flags)[0]
    missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"
