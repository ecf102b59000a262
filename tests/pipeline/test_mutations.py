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

from core import comm, p2p
from core.mesh import Axis
from core.model import gpt, linear
from core.model.precision import POLICIES
from core.model.seeded import SampleMasks
from core.proof import clock
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from pipeline import stages, zero_bubble
from pipeline.engine import runtime
from pipeline.engine.actions import Action
from pipeline.engine.runtime import Pipeline
from pipeline.evidence import training
from pipeline.runtime import PlainPipeline
from tests.pool import Pool, WorkerError

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
        for p in self.model.parameters():
            p.grad *= MICROBATCHES

    return patch.object(stages.Copies, "sum_gradients", wrong)


def only_the_last_microbatch() -> AbstractContextManager:
    right = Pipeline._backward

    def wrong(self: Pipeline, action: Action) -> None:
        for p in self.stages[action.stage].parameters():
            p.grad = None
        right(self, action)

    return patch.object(Pipeline, "_backward", wrong)


def all_but_the_last_microbatch() -> AbstractContextManager:
    right = Pipeline._backward

    def wrong(self: Pipeline, action: Action) -> None:
        parameters = list(self.stages[action.stage].parameters())
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        right(self, action)
        if action.microbatch == self.microbatches - 1:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient

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
    return patch.object(gpt.GPT, "full_name", lambda self, name: name)


def weights_seeded_by_rank() -> AbstractContextManager:
    right = gpt.initial_value

    def wrong(name: str, shape: torch.Size, config: gpt.GPTConfig, seed: int) -> Tensor:
        return right(name, shape, config, seed + dist.get_rank())

    return patch.object(gpt, "initial_value", wrong)


def dropout_equal_in_all_microbatches() -> AbstractContextManager:
    class Stuck(SampleMasks):
        def at(self, offset: int) -> None:
            pass

    return patch.object(training, "SampleMasks", Stuck)


def a_buffer_is_read_too_early() -> AbstractContextManager:
    right = p2p.PointToPoint.receive

    def wrong(self: p2p.PointToPoint, into: Tensor, *where: object) -> Callable[[], Tensor]:
        arrive = right(self, into.zero_(), *where)

        def early() -> Tensor:
            read = into.clone()
            arrive()
            return read

        return early

    return patch.object(p2p.PointToPoint, "receive", wrong)


def one_rank_skips_its_optimizer() -> AbstractContextManager:
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW) -> None:
        if dist.get_rank() != 2:
            right(self)

    return patch.object(torch.optim.AdamW, "step", wrong)


def a_parameter_is_lost() -> AbstractContextManager:
    right = training.partition

    def wrong(model: gpt.GPT, mine: list[int], *stages: object) -> gpt.GPT:
        model = right(model, mine, *stages)
        for block in model.blocks.values():
            block.mlp.up.register_parameter("bias", None)
        return model

    return patch.object(training, "partition", wrong)


def gpipes_order() -> AbstractContextManager:
    from pipeline.gpipe import schedule

    return patch.object(importlib.import_module("pipeline.1f1b"), "schedule", schedule)


def activations_are_kept_after_backward() -> AbstractContextManager:
    leak, right = [], Pipeline._backward

    def wrong(self: Pipeline, action: Action) -> None:
        leak.append(self._kept[action.stage, action.microbatch])
        with patch.object(torch.autograd, "backward", partial(torch.autograd.backward, retain_graph=True)):
            right(self, action)

    return patch.object(Pipeline, "_backward", wrong)


def the_clock_ignores_messages() -> AbstractContextManager:
    return patch.object(clock.VirtualClock, "receive", lambda self, stamp: None)


def the_runtime_swaps_two_backwards() -> AbstractContextManager:
    right = runtime.with_communication

    def wrong(schedule: list) -> list:
        last = schedule[-1]
        first, second = (i for i, a in enumerate(last) if a.kind == "B" and a.microbatch in (0, 1))
        moved = [*last[:first], *last[first + 1 : second], last[second], last[first], *last[second + 1 :]]
        return right([*schedule[:-1], moved])

    return patch.object(runtime, "with_communication", wrong)


def every_activation_is_counted_twice() -> AbstractContextManager:
    right = p2p.PointToPoint.send

    def wrong(self: p2p.PointToPoint, x: Tensor, to: int, kind: str, tag: int) -> None:
        right(self, x, to, kind, tag)
        if kind == "F":
            self.axis.ledger.record("send F", self.axis.name, x.numel(), x.element_size())

    return patch.object(p2p.PointToPoint, "send", wrong)


def messages_have_no_tags() -> AbstractContextManager:
    """With two ranks forward and backward messages come from one peer, not in the order in which they are asked for."""
    return patch.object(Pipeline, "_tag", lambda self, receive, clock=False: 0)


def chunks_are_placed_side_by_side() -> AbstractContextManager:
    """Stage k of rank r is rv+k, not kp+r: complete, but no longer interleaved."""
    module = importlib.import_module("pipeline.interleaved")
    right = module.schedule

    def wrong(ranks: int, microbatches: int, chunks: int) -> list:
        rows = right(ranks, microbatches, chunks)
        return [[a._replace(stage=a.stage % ranks * chunks + a.stage // ranks) for a in row] for row in rows]

    return patch.object(module, "schedule", wrong)


def weights_gradients_are_forgotten_once() -> AbstractContextManager:
    right = Pipeline._backward_weights

    def wrong(self: Pipeline, action: Action) -> None:
        if action.microbatch == 3:
            self._pending.pop((action.stage, action.microbatch))
        else:
            right(self, action)

    return patch.object(Pipeline, "_backward_weights", wrong)


def weights_gradients_come_at_once_and_later() -> AbstractContextManager:
    """As where a backward is run twice, once for each half, and the first does the whole."""
    right = linear.Deferred.put

    def wrong(self: linear.Deferred, parameters: tuple, compute: Callable, reads: tuple) -> tuple:
        right(self, parameters, compute, reads)
        return tuple(each.value() if isinstance(each, linear.Product) else each for each in compute())

    return patch.object(linear.Deferred, "put", wrong)


def an_input_gradient_does_all() -> AbstractContextManager:
    """No split: an I does all, and a W nothing."""
    return patch.object(linear, "deferring", lambda weight: None)


def what_a_weight_gradient_reads_is_kept() -> AbstractContextManager:
    leak, right = [], linear.Deferred.take

    def wrong(self: linear.Deferred) -> list:
        taken = right(self)
        leak.extend(taken)
        return taken

    return patch.object(linear.Deferred, "take", wrong)


def dualpipes_copies_are_not_summed() -> AbstractContextManager:
    return patch.object(stages.Copies, "sum_gradients", lambda self: None)


def dualpipes_copies_count_twice() -> AbstractContextManager:
    return patch.object(stages.Copies, "counted_here", lambda self, parameter: True)


def dualpipes_copies_take_all_microbatches() -> AbstractContextManager:
    """The sum of the copies twice, as if each had seen the whole batch and they were averaged wrongly."""
    right = stages.Copies.sum_gradients

    def wrong(self: stages.Copies) -> None:
        right(self)
        right(self)

    return patch.object(stages.Copies, "sum_gradients", wrong)


def one_direction_only() -> AbstractContextManager:
    """DualPipe's name, another schedule: its ranks hold one stage."""
    module = importlib.import_module("pipeline.dualpipe")
    right = importlib.import_module("pipeline.1f1b").schedule
    return patch.dict(module.SCHEDULES, dualpipe=right)


# ---- Bugs of the plain runtime


def plain_sends_a_gradient_for_another_microbatch() -> AbstractContextManager:
    right = PlainPipeline.send

    def wrong(self: PlainPipeline, x: Tensor, kind: str, to: int, m: int) -> None:
        right(self, x, kind, to, 1 - m if kind == "B" and m < 2 else m)

    return patch.object(PlainPipeline, "send", wrong)


def plain_goes_backward_through_another_microbatch() -> AbstractContextManager:
    """On the first rank, where several are in flight."""
    right = PlainPipeline.backward

    def wrong(self: PlainPipeline, stage: int, m: int) -> None:
        if (stage, m) == (0, 0):
            self.kept[0, 0], self.kept[0, 1] = self.kept[0, 1], self.kept[0, 0]
        right(self, stage, m)

    return patch.object(PlainPipeline, "backward", wrong)


def plain_keeps_activations_after_backward() -> AbstractContextManager:
    leak, right = [], PlainPipeline.backward

    def wrong(self: PlainPipeline, stage: int, m: int) -> None:
        leak.append(self.kept[stage, m])
        with patch.object(torch.autograd, "backward", partial(torch.autograd.backward, retain_graph=True)):
            right(self, stage, m)

    return patch.object(PlainPipeline, "backward", wrong)


def plain_sends_every_activation_twice() -> AbstractContextManager:
    right = PlainPipeline.send

    def wrong(self: PlainPipeline, x: Tensor, kind: str, to: int, m: int) -> None:
        right(self, x, kind, to, m)
        if kind == "F":
            self.messages.axis.ledger.record("send F", self.messages.axis.name, x.numel(), x.element_size())

    return patch.object(PlainPipeline, "send", wrong)


def plain_forgets_a_message() -> AbstractContextManager:
    right = PlainPipeline.send

    def wrong(self: PlainPipeline, x: Tensor, kind: str, to: int, m: int) -> None:
        if (kind, to, m) != ("F", 2, 3):
            right(self, x, kind, to, m)

    return patch.object(PlainPipeline, "send", wrong)


def plain_forgets_weight_gradients_once() -> AbstractContextManager:
    right = PlainPipeline.add_weight_gradients

    def wrong(self: PlainPipeline, stage: int, m: int) -> None:
        if m == 3:
            self.pending.pop((stage, m))
        else:
            right(self, stage, m)

    return patch.object(PlainPipeline, "add_weight_gradients", wrong)


def plain_weight_gradients_replace_each_other() -> AbstractContextManager:
    def wrong(parameter: torch.nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient

    return patch.object(zero_bubble, "add", wrong)


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
    plain_sends_a_gradient_for_another_microbatch: {f"{GRADIENT} one process, all steps (plain)"},
    plain_goes_backward_through_another_microbatch: {f"{GRADIENT} one process, all steps (plain)"},
    plain_keeps_activations_after_backward: {"saved on rank 0 (plain)", "saved on rank 3 (plain)"},
    plain_sends_every_activation_twice: {
        "messages sent a step on rank 0 (plain)",
        "bytes sent a step on rank 2 (plain",
    },
}


OF_LESSON = {
    ("zb-v", messages_have_no_tags): {LOSS},  # interleaved asks in the order in which its peers send
    ("interleaved", chunks_are_placed_side_by_side): {"stopped: this schedule cannot run"},
    ("zb-h1", weights_gradients_are_forgotten_once): {GRADIENT, NORM, PARAMETER},
    ("zb-h1", weights_gradients_come_at_once_and_later): {GRADIENT, NORM},
    ("zb-h1", an_input_gradient_does_all): {"left for W on rank 0"},
    ("zb-h2", what_a_weight_gradient_reads_is_kept): {"saved above on rank 0"},
    ("zb-h1", plain_forgets_weight_gradients_once): {f"{GRADIENT} one process, all steps (plain)"},
    ("zb-v", plain_weight_gradients_replace_each_other): {f"{GRADIENT} one process, all steps (plain)"},
    ("zb-v", tied_gradient_summed_on_one_copy): set(),  # one rank has both ends: nothing is exchanged
    ("dualpipe", dualpipes_copies_are_not_summed): {GRADIENT, NORM, COPIES},
    ("dualpipe", dualpipes_copies_count_twice): {NORM},
    ("dualpipe", dualpipes_copies_take_all_microbatches): {GRADIENT, NORM},
    ("dualpipe", one_direction_only): {"parameters on all ranks", "in flight on rank 0", "bubble within"},
}


# ---- The lesson with a bug in it

MODULES = {"dualpipev": "dualpipe", "zb-h1": "zero_bubble", "zb-h2": "zero_bubble", "zb-v": "zero_bubble"}


def failing_claims(
    bug: Callable[[], AbstractContextManager] | None, name: str = "1f1b", timeout: float = 30.0
) -> list[str]:
    """Run a lesson inside a worker; the claims that failed, on rank 0."""
    module = MODULES.get(name, name)
    frame = Lesson(f"pipeline/{module}.py", "08", "", "", "")
    training.add_flags(frame)
    frame.parser.set_defaults(schedule=name, chunks=2)
    dropout = ["--dropout=0.2"] if bug is dropout_equal_in_all_microbatches else []
    more = [] if name == "1f1b" else ["--layers=8", "--timeout=10"]
    args = frame.parser.parse_args(FLAGS + dropout + more)
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", timeout)
    run = Run(args, job, POLICIES["float64"])
    with bug() if bug else nullcontext():
        try:
            importlib.import_module(f"pipeline.{module}").lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe", "dualpipev"])
def test_without_a_bug_every_claim_holds(pool: Pool, name: str) -> None:
    assert pool.run(RANKS, failing_claims, None, name)[0] == []


@pytest.mark.parametrize("bug", MUST_FAIL, ids=lambda bug: bug.__name__)
def test_the_claims_catch(pool: Pool, bug: Callable) -> None:
    failed = pool.run(RANKS, failing_claims, bug)[0]
    missed = {claim for claim in MUST_FAIL[bug] if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"


def test_a_forgotten_message_ends_the_wait_and_says_what_was_waited_for(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"receive \([FB]\) from rank \d failed"):
        pool.run(RANKS, failing_claims, plain_forgets_a_message, "1f1b", 2.0)


@pytest.mark.parametrize(("case", "must_fail"), OF_LESSON.items(), ids=[f"{n}-{b.__name__}" for n, b in OF_LESSON])
def test_the_claims_of_other_schedules_catch(pool: Pool, case: tuple[str, Callable], must_fail: set[str]) -> None:
    name, bug = case
    ranks = 2 if bug is messages_have_no_tags else RANKS
    failed = pool.run(ranks, failing_claims, bug, name)[0]
    missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"
