"""Put each known bug in, and see which claims of lecture 06 fail: a check that cannot fail proves nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import core.proof.arguments
from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, Dropout
from core.model.seeded import SampleMasks
from core.model.streams import RandomTracker
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from core.shards import Shard, shard_of
from sequence_parallel import activations, layers, loss, megatron_sp, recompute, training
from tests.pool import Pool

RANKS = 4
SIZES = {"steps": 2, "batch": 4, "sequence": 8, "hidden": 16, "heads": 4, "layers": 2, "clip": 0.05}
FLAGS = ["--attention=softmax", "--dropout=0.2", *(f"--{name}={value}" for name, value in SIZES.items())]


# ---- The bugs


def sum_only(chosen: Callable[[str], bool], factor: float = 1.0) -> AbstractContextManager:
    """Sum over the ranks only those gradients whose name is chosen."""

    def wrong(model: GPT, axis: Axis) -> None:
        for name, p in model.named_parameters():
            if shard_of(p) is None and chosen(name):
                comm.all_reduce(p.grad, axis.labelled("whole gradients"))
                p.grad *= factor

    return patch.object(training, "sum_whole_gradients", wrong)


def nothing_is_summed() -> AbstractContextManager:
    return sum_only(lambda name: False)


def layernorms_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: "norm" not in name)


def row_biases_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: not name.endswith(("out.bias", "down.bias")))


def positions_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: "position" not in name)


def averaged_instead_of_summed() -> AbstractContextManager:
    return sum_only(lambda name: True, 1 / RANKS)


def cut_gradients_are_summed_too() -> AbstractContextManager:
    right = layers.sum_whole_gradients

    def wrong(model: GPT, axis: Axis) -> None:
        right(model, axis)
        comm.all_reduce(model.blocks["0"].mlp.up.bias.grad, axis)

    return patch.object(training, "sum_whole_gradients", wrong)


def every_rank_has_the_first_shard() -> AbstractContextManager:
    right = Shard.local
    return patch.object(Shard, "local", lambda self, whole: right(replace(self, index=0), whole))


def every_rank_has_the_first_positions() -> AbstractContextManager:
    right = layers.PositionPart.__init__
    return patch.object(layers.PositionPart, "__init__", lambda self, table, a: right(self, table, replace(a, index=0)))


def row_bias_once_a_rank() -> AbstractContextManager:
    def wrong(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
        return comm.scatter_from(F.linear(x, self.weight, self.bias), self.axis, 1)

    return patch.object(layers.RowParallelLinear, "forward", wrong)


def dropped_alike(dim: int) -> AbstractContextManager:
    right = SampleMasks.keep_mask

    def wrong(self: SampleMasks, shape: torch.Size, drop: float, name: str, split: Any, device: torch.device) -> Tensor:
        if split and len(shape) == dim:
            split = (split[0], 0, split[2])
        return right(self, shape, drop, name, split, device)

    return patch.object(SampleMasks, "keep_mask", wrong)


def residual_stream_dropped_alike_on_all_ranks() -> AbstractContextManager:
    return dropped_alike(3)


def scores_dropped_alike_on_all_ranks() -> AbstractContextManager:
    return dropped_alike(4)


def gathered_again_too_late() -> AbstractContextManager:
    right = comm.all_gather_async

    def wrong(x: Tensor, axis: Axis, dim: int = 0, label: str = "all-gather") -> comm.Pending:
        pending = right(x, axis, dim, label)
        return replace(pending, finish=lambda r: pending.finish(r).zero_()) if "again" in label else pending

    return patch.object(comm, "all_gather_async", wrong)


def gradient_scattered_too_early() -> AbstractContextManager:
    right = comm.reduce_scatter_async

    def wrong(x: Tensor, axis: Axis, dim: int = 0) -> comm.Pending:
        early = x.chunk(axis.size, dim)[axis.index].clone()
        pending = right(x, axis, dim)
        return (
            replace(pending, finish=lambda _: early) if x.requires_grad is False and axis.name == "tp head" else pending
        )

    return patch.object(comm, "reduce_scatter_async", wrong)


def g_takes_its_part_in_backward() -> AbstractContextManager:
    """All-gather forward, but backward only this rank's part, as if all ranks used the result alike."""

    def wrong(self: layers.ColumnParallelLinear, x: Tensor) -> Tensor:
        return F.linear(comm.gather_from(x, self.axis, 1), self.weight, self.bias)

    return patch.object(layers.ColumnParallelLinear, "forward", wrong)


def the_gathered_input_is_saved() -> AbstractContextManager:
    right = layers.ColumnParallelLinear.forward

    def wrong(self: layers.ColumnParallelLinear, x: Tensor) -> Tensor:
        if not self.sequence:
            return right(self, x)
        return F.linear(comm.gather_for(x, self.axis, 1), self.weight, self.bias)

    return patch.object(layers.ColumnParallelLinear, "forward", wrong)


def all_reduced_instead_of_scattered() -> AbstractContextManager:
    def wrong(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
        y = comm.reduce_from(F.linear(x, self.weight), self.axis)
        return comm.split_to(y, self.axis, 1) + self.bias

    return patch.object(layers.RowParallelLinear, "forward", wrong)


def tokens_of_the_loss_out_of_order() -> AbstractContextManager:
    right = loss.rearrange

    def wrong(x: Tensor, pattern: str, **sizes: int) -> Tensor:
        return right(x, pattern.replace("(t s)", "(s t)"), **sizes)

    return patch.object(loss, "rearrange", wrong)


def the_loss_gathers_its_numbers() -> AbstractContextManager:
    right = comm.all_to_all

    def wrong(x: Tensor, axis: Axis, *splits: Any) -> Tensor:
        if axis.name != "tp loss":
            return right(x, axis, *splits)
        return comm.all_gather(x[None].contiguous(), axis)[:, axis.index]

    return patch.object(comm, "all_to_all", wrong)


def one_ranks_layernorm_drifts() -> AbstractContextManager:
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW) -> None:
        right(self)
        if dist.get_rank() == 2:
            self.param_groups[0]["params"][-1].data *= 1 + 1e-15

    return patch.object(torch.optim.AdamW, "step", wrong)


def whole_parameters_counted_by_every_rank() -> AbstractContextManager:
    return patch.object(training, "counted_once", lambda parameters, axis: [p.grad for p in parameters])


def nothing_is_forgotten() -> AbstractContextManager:
    stack = ExitStack()
    for module in (recompute, activations):
        stack.enter_context(patch.object(module, "recompute_block", lambda block, kind: block))
    return stack


def masks_of_two_bytes() -> AbstractContextManager:
    right = SampleMasks.keep_mask
    return patch.object(SampleMasks, "keep_mask", lambda self, *a: right(self, *a).to(torch.bfloat16))


def random_numbers_are_not_restored() -> AbstractContextManager:
    return patch.object(RandomTracker, "contexts", lambda self: (nullcontext(), nullcontext()))


def the_training_does_not_recompute() -> AbstractContextManager:
    return patch.object(training, "recompute", lambda model, kind: model)


def a_mask_less() -> AbstractContextManager:
    right = Dropout.forward
    return patch.object(Dropout, "forward", lambda self, x: x if "mlp" in self.name else right(self, x))


LOSS, GRADIENT, NORM = "losses equal", "every gradient equals", "the global gradient norm"
PARAMETER, WHOLE = "every parameter after every step", "replicated parameters stay equal on all ranks"
SP: dict[Callable, set[str]] = {
    nothing_is_summed: {GRADIENT, PARAMETER, WHOLE, "elements of whole"},
    layernorms_are_not_summed: {GRADIENT, PARAMETER, WHOLE},
    row_biases_are_not_summed: {GRADIENT, PARAMETER, WHOLE},
    positions_are_not_summed: {GRADIENT, PARAMETER, WHOLE},
    averaged_instead_of_summed: {GRADIENT, NORM},
    cut_gradients_are_summed_too: {GRADIENT, NORM},
    every_rank_has_the_first_shard: {LOSS, GRADIENT, PARAMETER},
    every_rank_has_the_first_positions: {LOSS, GRADIENT},
    row_bias_once_a_rank: {LOSS, GRADIENT},
    residual_stream_dropped_alike_on_all_ranks: {LOSS, GRADIENT},
    scores_dropped_alike_on_all_ranks: {LOSS, GRADIENT},
    gathered_again_too_late: {GRADIENT},
    gradient_scattered_too_early: {GRADIENT},
    g_takes_its_part_in_backward: {GRADIENT, "reduce-scatters, backward"},
    the_gathered_input_is_saved: {"and to gather again"},
    all_reduced_instead_of_scattered: {"reduce-scatters, forward", "all-reduces of a layer", "elements a layer"},
    tokens_of_the_loss_out_of_order: {LOSS, GRADIENT},
    the_loss_gathers_its_numbers: {"elements the loss sends"},
    one_ranks_layernorm_drifts: {WHOLE},
    whole_parameters_counted_by_every_rank: {NORM, PARAMETER},
}
ACTIVATIONS: dict[Callable, set[str]] = {
    the_gathered_input_is_saved: {
        "bytes saved / sbh, TP + SP, rank 0",
        "bytes saved / sbh, TP + SP, selective, rank 3",
    },
    nothing_is_forgotten: {
        "attention computed, full",
        "bytes saved / sbh, TP, selective",
        "bytes saved / sbh, TP + SP, selective",
        "bytes saved / sbh, TP, full",
    },
    masks_of_two_bytes: {"bytes saved / sbh, one process", "bytes saved / sbh, TP", "bytes saved / sbh, TP + SP"},
    random_numbers_are_not_restored: {"gradients that full", "gradients that selective"},
    the_training_does_not_recompute: {"times each attention core", "times each layer"},
    a_mask_less: {"bytes saved / sbh, one process", "bytes saved / sbh, TP + SP, selective"},
    residual_stream_dropped_alike_on_all_ranks: {LOSS, GRADIENT},
}


# ---- The lessons with a bug in them


def failing_claims(lesson: str, bug: Callable[[], AbstractContextManager] | None) -> list[str]:
    """Run a lesson inside a worker; the claims that failed, on rank 0."""
    script: ModuleType = {"megatron_sp": megatron_sp, "activations": activations}[lesson]
    frame = Lesson(f"sequence_parallel/{lesson}.py", "06", "", "", "")
    core.proof.arguments.add_model_flags(frame)
    frame.parser.set_defaults(recompute="full")
    args = frame.parser.parse_args(FLAGS)
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), torch.float64)
    with bug() if bug else nullcontext():
        try:
            script.lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


@pytest.mark.parametrize("lesson", ["megatron_sp", "activations"])
def test_without_a_bug_every_claim_holds(pool: Pool, lesson: str) -> None:
    assert pool.run(RANKS, failing_claims, lesson, None)[0] == []


CASES = [("megatron_sp", bug, must) for bug, must in SP.items()]
CASES += [("activations", bug, must) for bug, must in ACTIVATIONS.items()]


@pytest.mark.parametrize(("lesson", "bug", "must_fail"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES])
def test_the_claims_catch(pool: Pool, lesson: str, bug: Callable, must_fail: set[str]) -> None:
    failed = pool.run(RANKS, failing_claims, lesson, bug)[0]
    missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
    assert not missed, f"only these failed: {failed}"
