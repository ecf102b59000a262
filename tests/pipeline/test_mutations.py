"""Put each known bug in, and see which claims of the lesson fail: a check that cannot fail proves nothing."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import core.training
from core import comm, gpt, ledger, p2p
from core.launch import Job, Stop
from core.lesson import Lesson, Run
from core.mesh import Axis
from core.seeded import Draw
from pipeline import runtime, stages, training
from pipeline.runtime import Pipeline
from tests.pool import Pool

SIZES = {"steps": 2, "batch": 8, "microbatches": 8, "sequence": 16, "hidden": 16, "layers": 4, "clip": 0.05}
FLAGS = ["--attention=softmax", *(f"--{name}={value}" for name, value in SIZES.items())]
RANKS, MICROBATCHES = 4, 8


# ---- The bugs


def loss_is_the_mean_of_each_microbatch() -> AbstractContextManager:
    def wrong(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
        return gpt.token_loss(logits, targets, targets.numel())

    return patch.object(training, "token_loss", wrong)


def gradients_times_microbatches() -> AbstractContextManager:
    right = stages.Copies.sum_gradients

    def wrong(self: stages.Copies) -> None:
        right(self)
        for p in self.part.parameters():
            p.grad *= MICROBATCHES

    return patch.object(stages.Copies, "sum_gradients", wrong)


def only_the_last_microbatch() -> AbstractContextManager:
    right = Pipeline._backward

    def wrong(self: Pipeline, action: object) -> Tensor | None:
        for p in self.stages[action.stage].parameters():
            p.grad = None
        return right(self, action)

    return patch.object(Pipeline, "_backward", wrong)


def all_but_the_last_microbatch() -> AbstractContextManager:
    right = Pipeline._backward

    def wrong(self: Pipeline, action: object) -> Tensor | None:
        parameters = list(self.stages[action.stage].parameters())
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        result = right(self, action)
        if action.microbatch == self.microbatches - 1:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient
        return result

    return patch.object(Pipeline, "_backward", wrong)


def tied_gradients_not_summed() -> AbstractContextManager:
    return patch.object(stages.Copies, "sum_gradients", lambda self: None)


def tied_gradient_summed_on_one_copy() -> AbstractContextManager:
    right = p2p.exchange

    def wrong(x: Tensor, axis: Axis, peer: int) -> Tensor:
        return right(x, axis, peer) * (axis.index == 0)

    return patch.object(p2p, "exchange", wrong)


def tied_weight_twice_in_the_norm() -> AbstractContextManager:
    return patch.object(stages.Copies, "counted_here", lambda self, parameter: True)


def clipped_by_the_local_norm() -> AbstractContextManager:
    right = comm.all_reduce

    def wrong(x: Tensor, axis: Axis) -> Tensor:
        mine = x[0].clone()
        right(x, axis)
        x[0] = mine
        return x

    return patch.object(comm, "all_reduce", wrong)


def copies_start_different() -> AbstractContextManager:
    return patch.object(gpt.GPT, "whole_name", lambda self, name: name)


def weights_seeded_by_rank() -> AbstractContextManager:
    right = gpt.initial_value

    def wrong(name: str, shape: torch.Size, config: gpt.GPTConfig, seed: int) -> Tensor:
        return right(name, shape, config, seed + dist.get_rank())

    return patch.object(gpt, "initial_value", wrong)


def dropout_equal_in_all_microbatches() -> AbstractContextManager:
    class Stuck(Draw):
        def _replace(self, **_: int) -> Draw:
            return self

    return patch.object(core.training, "Draw", Stuck)


def a_buffer_is_read_too_early() -> AbstractContextManager:
    right = p2p.Mail.receive

    def wrong(self: p2p.Mail, into: Tensor, *where: object) -> Callable[[], Tensor]:
        arrive = right(self, into.zero_(), *where)

        def early() -> Tensor:
            read = into.clone()
            arrive()
            return read

        return early

    return patch.object(p2p.Mail, "receive", wrong)


def one_rank_skips_its_optimizer() -> AbstractContextManager:
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW) -> None:
        if dist.get_rank() != 2:
            right(self)

    return patch.object(torch.optim.AdamW, "step", wrong)


def a_parameter_is_lost() -> AbstractContextManager:
    right = training.cut

    def wrong(model: gpt.GPT, held: list[int], of: int) -> gpt.GPT:
        model = right(model, held, of)
        for block in model.blocks.values():
            block.mlp.up.register_parameter("bias", None)
        return model

    return patch.object(training, "cut", wrong)


def gpipes_order() -> AbstractContextManager:
    from pipeline.gpipe import schedule

    return patch.object(importlib.import_module("pipeline.1f1b"), "schedule", schedule)


def activations_are_kept_after_backward() -> AbstractContextManager:
    leak, right = [], Pipeline._backward

    def wrong(self: Pipeline, action: object) -> Tensor | None:
        leak.append(self._kept[action.stage, action.microbatch])
        with patch.object(torch.autograd, "backward", partial(torch.autograd.backward, retain_graph=True)):
            return right(self, action)

    return patch.object(Pipeline, "_backward", wrong)


def the_clock_ignores_messages() -> AbstractContextManager:
    return patch.object(ledger.VirtualClock, "hear", lambda self, stamp: None)


def the_runtime_swaps_two_backwards() -> AbstractContextManager:
    right = runtime.with_communication

    def wrong(schedule: list) -> list:
        last = schedule[-1]
        first, second = (i for i, a in enumerate(last) if a.kind == "B" and a.microbatch in (0, 1))
        moved = [*last[:first], *last[first + 1 : second], last[second], last[first], *last[second + 1 :]]
        return right([*schedule[:-1], moved])

    return patch.object(runtime, "with_communication", wrong)


def every_activation_is_counted_twice() -> AbstractContextManager:
    right = p2p.Mail.send

    def wrong(self: p2p.Mail, x: Tensor, to: int, kind: str, tag: int) -> None:
        right(self, x, to, kind, tag)
        if kind == "F":
            self.axis.ledger.record("send F", self.axis.name, x.numel(), x.element_size())

    return patch.object(p2p.Mail, "send", wrong)


LOSS, GRADIENT, NORM = "losses equal", "every gradient equals", "the global gradient norm"
PARAMETER, COPIES = "every parameter after every step", "copies on several ranks"
MUST_FAIL = {
    loss_is_the_mean_of_each_microbatch: {LOSS, GRADIENT, NORM},
    gradients_times_microbatches: {GRADIENT, NORM},
    only_the_last_microbatch: {GRADIENT, NORM},
    all_but_the_last_microbatch: {GRADIENT, NORM},
    tied_gradients_not_summed: {GRADIENT, PARAMETER, COPIES},
    tied_gradient_summed_on_one_copy: {GRADIENT, COPIES},
    tied_weight_twice_in_the_norm: {NORM, PARAMETER},
    clipped_by_the_local_norm: {NORM, PARAMETER},
    copies_start_different: {LOSS, GRADIENT, PARAMETER},
    weights_seeded_by_rank: {LOSS, GRADIENT, PARAMETER},
    dropout_equal_in_all_microbatches: {LOSS, GRADIENT},
    a_buffer_is_read_too_early: {LOSS, GRADIENT},
    one_rank_skips_its_optimizer: {PARAMETER},
    a_parameter_is_lost: {GRADIENT, PARAMETER},
    gpipes_order: {"warm-up forwards on rank 3", "in flight on rank 3", "saved on rank 3"},
    activations_are_kept_after_backward: {"saved on rank 0", "saved on rank 3"},
    the_clock_ignores_messages: {"bubble over wall time", "bubble over ideal time", "actions executed"},
    the_runtime_swaps_two_backwards: {"actions executed"},
    every_activation_is_counted_twice: {"messages sent a step on rank 0", "bytes sent a step on rank 2"},
}


# ---- The lesson with a bug in it


def failing_claims(bug: Callable[[], AbstractContextManager] | None) -> list[str]:
    """Run 1f1b.py's lesson inside a worker; the claims that failed, on rank 0."""
    frame = Lesson("pipeline/1f1b.py", "08", "", "", "")
    training.add_flags(frame)
    dropout = ["--dropout=0.2"] if bug is dropout_equal_in_all_microbatches else []
    args = frame.parser.parse_args(FLAGS + dropout)
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), torch.float64)
    with bug() if bug else nullcontext():
        try:
            importlib.import_module("pipeline.1f1b").lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


def test_without_a_bug_every_claim_holds(pool: Pool) -> None:
    assert pool.run(RANKS, failing_claims, None)[0] == []


@pytest.mark.parametrize("bug", MUST_FAIL, ids=lambda bug: bug.__name__)
def test_the_claims_catch(pool: Pool, bug: Callable) -> None:
    failed = pool.run(RANKS, failing_claims, bug)[0]
    missed = {claim for claim in MUST_FAIL[bug] if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"
