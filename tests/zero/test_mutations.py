"""Put each known bug in, and see which claims of lecture 01 fail: a check that cannot fail proves nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from tests.pool import Pool
from zero import ddp, flat, memory, offload, optimizer, stage, training, zero1, zero2, zero3, zeropp

RANKS = 4
SIZES = {"steps": 2, "batch": 8, "sequence": 8, "hidden": 16, "heads": 2, "layers": 4, "clip": 0.05, "bucket": 2000}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
Bug = Callable[[], AbstractContextManager]


# ---- The bugs


def averaged_over_the_ranks() -> AbstractContextManager:
    right = stage.Stage.clip_and_total

    def wrong(self: stage.Stage, *arguments: Any) -> tuple[float, float]:
        for part in self.own_gradients:
            part /= self.axis.size
        return right(self, *arguments)

    return patch.object(stage.Stage, "clip_and_total", wrong)


def every_microbatch_is_reduced_into_the_sum() -> AbstractContextManager:
    """All-reduce after each microbatch, of a buffer that holds the sum so far: earlier ones count twice and more."""
    right = ddp.DataParallel.backward
    return patch.object(ddp.DataParallel, "backward", lambda self, loss, last=True: right(self, loss, True))


def only_the_last_microbatch_is_reduced() -> AbstractContextManager:
    right = zero2.Zero2.backward

    def wrong(self: zero2.Zero2, loss: Tensor, last: bool = True) -> None:
        self.zero_grad()
        right(self, loss, last)

    return patch.object(zero2.Zero2, "backward", wrong)


def gradients_are_not_zeroed() -> AbstractContextManager:
    return patch.object(zero1.Zero1, "zero_grad", lambda self: None)


def all_reduced_and_a_slice_copied() -> AbstractContextManager:
    """As DeepSpeed's first stages do it: right, for 2Ψ where a reduce-scatter sends Ψ."""

    def wrong(x: Tensor, axis: Axis, dim: int = 0) -> comm.Pending:
        pending = comm.all_reduce_async(x.clone(), axis)
        return replace(pending, finish=lambda whole: whole.chunk(axis.size)[axis.index])

    return patch.object(comm, "reduce_scatter_async", wrong)


def the_bucket_leaves_too_early() -> AbstractContextManager:
    def wrong(self: flat.InOrder, i: int, parameter: nn.Parameter) -> None:
        self._used.add(parameter)
        while self._next < len(self._missing) and self._next <= i:
            self._launch_next()
            for pending in self.launch.__self__._pending:  # lest the bucket is read late enough by chance
                pending.work.wait()

    return patch.object(flat.InOrder, "_complete", wrong)


def clipped_by_the_local_norm() -> AbstractContextManager:
    right = stage.norm_and_totals

    def wrong(counted: list[Tensor], axes: list[Axis], more: Tensor) -> tuple[float, list[float]]:
        local = sum(g.square().sum().item() for g in counted) ** 0.5
        return local, right(counted, axes, more)[1]

    return patch.object(stage, "norm_and_totals", wrong)


def parts_are_shifted() -> AbstractContextManager:
    """Each rank updates the part before its own with its own gradients."""
    right = flat.Bucket.in_part
    return patch.object(flat.Bucket, "in_part", lambda self, index: right(self, (index + 1) % RANKS))


def other_ranks_weights_are_not_brought() -> AbstractContextManager:
    return patch.object(zero1.Zero1, "_publish", stage.Stage._publish)


def one_ranks_part_is_not_updated() -> AbstractContextManager:
    right = optimizer.PartOptimizer.step

    def wrong(self: optimizer.PartOptimizer) -> None:
        if dist.get_rank() == 2:
            for each in self.owned:
                each.piece.grad = None
        right(self)

    return patch.object(optimizer.PartOptimizer, "step", wrong)


def layers_are_read_before_they_arrive() -> AbstractContextManager:
    right = zero3.Unit.wait

    def wrong(self: zero3.Unit) -> None:
        right(self)
        for buffer in self._flat:
            if buffer.untyped_storage().nbytes():
                buffer.zero_()

    return patch.object(zero3.Unit, "wait", wrong)


def every_rank_trains_on_the_same_samples() -> AbstractContextManager:
    right = training.token_loss

    def wrong(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
        return right(logits, targets, tokens) * (dist.get_rank() == 0) * RANKS

    return patch.object(training, "token_loss", wrong)


def the_optimizer_is_not_sharded() -> AbstractContextManager:
    right = optimizer.PartOptimizer.tensors
    return patch.object(optimizer.PartOptimizer, "tensors", lambda self: [t.repeat(RANKS) for t in right(self)])


def whole_gradients_stay() -> AbstractContextManager:
    right, kept = flat.Bucket.take_away_gradients, []

    def wrong(self: flat.Bucket) -> Tensor:
        before = [(m.parameter, m.parameter.grad) for m in self.members]
        whole = right(self)
        for p, gradient in before:
            p.grad = gradient
            kept.append(gradient)
        return whole

    return patch.object(flat.Bucket, "take_away_gradients", wrong)


def no_layer_is_freed_in_forward() -> AbstractContextManager:
    def wrong(self: zero3.Zero3, i: int) -> None:
        self._gather_until(i + 2)
        self._units[i].wait()

    return patch.object(zero3.Zero3, "_forward_reaches", wrong)


def one_microbatch_stays_on_the_device() -> AbstractContextManager:
    right = offload.Offload._land
    return patch.object(offload.Offload, "_land", lambda self, but: right(self, max(but, 1)))


def the_optimizer_stays_on_the_device() -> AbstractContextManager:
    return patch.object(offload.Offload, "host", None)


def nothing_is_kept_in_the_node() -> AbstractContextManager:
    right = zeropp.NodeUnit.free

    def wrong(self: zeropp.NodeUnit) -> None:
        right(self)
        self._second = []

    return patch.object(zeropp.NodeUnit, "free", wrong)


def hops_to_the_wrong_node() -> AbstractContextManager:
    right = zeropp.ZeroPlusPlus._hop

    def wrong(self: zeropp.ZeroPlusPlus, rows: Tensor, axis: Axis) -> Tensor:
        return right(self, rows.flip(0) if axis.name == "across" else rows, axis)

    return patch.object(zeropp.ZeroPlusPlus, "_hop", wrong)


def one_hop_in_full_precision() -> AbstractContextManager:
    right = zeropp.ZeroPlusPlus._hop

    def wrong(self: zeropp.ZeroPlusPlus, rows: Tensor, axis: Axis) -> Tensor:
        bits, self.gradient_bits = self.gradient_bits, 0 if axis.name == "node" else self.gradient_bits
        try:
            return right(self, rows, axis)
        finally:
            self.gradient_bits = bits

    return patch.object(zeropp.ZeroPlusPlus, "_hop", wrong)


def one_scale_for_all_blocks() -> AbstractContextManager:
    right = zeropp.quantise

    def wrong(x: Tensor, bits: int) -> Tensor:
        packed = right(x, bits)
        start = -(-x.shape[1] // zeropp.BLOCK) * zeropp.BLOCK * bits // 8
        packed[:, start:] = packed[:, start : start + 4].repeat(1, (packed.shape[1] - start) // 4)
        return packed

    return patch.object(zeropp, "quantise", wrong)


LOSS, GRADIENT, NORM, PARAMETER = "losses equal", "every gradient equals", "the global gradient norm", "every parameter"
STATE, SENT = "the optimizer's state", "elements sent a step"
MUST_FAIL: dict[tuple[str, Bug], set[str]] = {
    ("zero1", averaged_over_the_ranks): {NORM, STATE},
    ("ddp", every_microbatch_is_reduced_into_the_sum): {GRADIENT, NORM, SENT},
    ("zero2", only_the_last_microbatch_is_reduced): {GRADIENT, NORM},
    ("zero1", gradients_are_not_zeroed): {GRADIENT, NORM, STATE},
    ("zero1", all_reduced_and_a_slice_copied): {SENT},
    ("zero2", all_reduced_and_a_slice_copied): {SENT},
    ("ddp", the_bucket_leaves_too_early): {GRADIENT},
    ("zero2", the_bucket_leaves_too_early): {GRADIENT},
    ("zero2", clipped_by_the_local_norm): {NORM, PARAMETER},
    ("zero1", parts_are_shifted): {GRADIENT},
    ("zero1", other_ranks_weights_are_not_brought): {PARAMETER, LOSS},
    ("zero3", one_ranks_part_is_not_updated): {PARAMETER, STATE},
    ("zero3", layers_are_read_before_they_arrive): {LOSS, GRADIENT},
    ("zero3", every_rank_trains_on_the_same_samples): {LOSS, GRADIENT},
    ("offload", one_microbatch_stays_on_the_device): {GRADIENT, NORM},
    ("offload", the_optimizer_stays_on_the_device): {"bytes on the host"},
    ("zeropp", nothing_is_kept_in_the_node): {"bytes of hpZ", "bytes of qwZ"},
    ("zeropp", hops_to_the_wrong_node): {GRADIENT},
    ("zeropp", one_hop_in_full_precision): {"bytes of qgZ: gradients, inside"},
    ("zeropp", one_scale_for_all_blocks): {"qgZ: relative error"},
    ("memory", the_optimizer_is_not_sharded): {"bytes of model states, ZeRO-1", "bytes of model states, ZeRO-3"},
    ("memory", no_layer_is_freed_in_forward): {"weights at the peak"},
    ("memory", whole_gradients_stay): {"bytes of model states, ZeRO-2", "bytes of model states, ZeRO-3"},
}


# ---- The lesson with a bug in it

LESSONS = {"ddp": ddp, "zero1": zero1, "zero2": zero2, "zero3": zero3, "memory": memory, "offload": offload,
           "zeropp": zeropp}  # fmt: skip


def failing_claims(name: str, bug: Bug | None) -> list[str]:
    """Run a lesson inside a worker; the claims that failed, on rank 0."""
    frame = Lesson(f"zero/{name}.py", "01", "", "", "")
    training.add_flags(frame)
    frame.parser.set_defaults(stage="ZeRO-2", ranks_per_node=0)
    args = frame.parser.parse_args(FLAGS)
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), torch.float64)
    with bug() if bug else nullcontext():
        try:
            LESSONS[name].lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


@pytest.mark.parametrize("name", LESSONS)
def test_without_a_bug_every_claim_holds(pool: Pool, name: str) -> None:
    assert pool.run(RANKS, failing_claims, name, None)[0] == []


@pytest.mark.parametrize(
    ("case", "must_fail"), MUST_FAIL.items(), ids=[f"{name}-{bug.__name__}" for name, bug in MUST_FAIL]
)
def test_the_claims_catch(pool: Pool, case: tuple[str, Bug], must_fail: set[str]) -> None:
    failed = pool.run(RANKS, failing_claims, *case)[0]
    missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"
