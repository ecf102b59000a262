"""Put each known bug into the combined run, and see which of its claims fail: a check that cannot fail proves nothing.

Tiny runs on 4 ranks, all in one call: with experts and sequence parallelism, without, and with a pipeline.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from cluster import train
from cluster.planner import stages as planned_stages
from cluster.planner import traffic
from cluster.run import build, recipe, worker
from cluster.run.arguments import add_all_flags
from cluster.run.worker import Worker
from core.model.loss import _Head
from core.model.precision import POLICIES
from core.model.seeded import SampleMasks
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from expert_parallel.engine import router
from expert_parallel.engine.layers import Exchange
from expert_parallel.engine.router import routers
from pipeline import stages
from pipeline.engine.runtime import Pipeline
from pipeline.engine.turns import Turns
from pipeline.stages import Copies
from tests.pool import Pool
from zero.engine.buckets import Bucket, InOrder
from zero.engine.engine import Engine
from zero.engine.gathered import GatheredWeights
from zero.engine.gradients import DeviceShards, FullGradients, ShardedGradients

SIZES = {"steps": 2, "batch": 8, "sequence": 8, "hidden": 16, "heads": 4, "layers": 2, "sample": 0, "clip": 0.05,
         "warmup": 3, "lr": 0.01, "dropout": 0.2, "attention": "softmax", "dtype": "float64"}  # fmt: skip
LAYOUTS = {
    "experts": "--tp 2 --dp 2 --sp --zero 1 --microbatches 2 --experts 4 --ep 4 --bias-rate 0.01 --beta1 0.8",
    "dense": "--tp 2 --dp 2 --zero 1 --microbatches 2",
    "pipeline": "--pp 2 --dp 2 --zero 1 --microbatches 2",
    # Documents end with an "e"; the loss is computed of 7 tokens at a time.
    "recipe": "--tp 2 --dp 2 --zero 2 --eos 101 --pack --loss-chunk 7 --weight-decay 0.5 --beta1 0.8",
    "zero 2": "--pp 2 --dp 2 --zero 2 --microbatches 2 --schedule zb-h1",
    "zero 3": "--pp 2 --dp 2 --zero 3 --microbatches 4 --schedule zb-v --layers 4",
    "kept": "--pp 2 --dp 2 --zero 3 --microbatches 2 --reduce step --reshard step",
    "turns": "--pp 2 --dp 2 --zero 1 --microbatches 4 --experts 4 --ep 2 --schedule dualpipe --aux 0.1 --bias-rate .01",
    "turns, recomputed": "--pp 2 --dp 2 --zero 3 --microbatches 4 --experts 4 --ep 2 --schedule dualpipev --chunks 2 "
    "--layers 4 --recompute full",
    "stages": "--pp 4 --microbatches 2 --zero 1 --layers 5 --stages E|t|t*4|L",
    "experts zero 3": "--pp 2 --dp 2 --zero 3 --microbatches 2 --experts 4 --ep 2 --bias-rate 0.01",
}
LOSS, NORM, GRADIENT, PARAMETER, SENT = (
    "losses",
    "the global gradient norm",
    "every gradient",
    "every param",
    "elements",
)


def instead(owner: Any, name: str, wrong: Callable) -> AbstractContextManager:
    """`wrong` is called with what was there, and the arguments."""
    right = getattr(owner, name)
    return patch.object(owner, name, lambda *arguments, **named: wrong(right, *arguments, **named))


def twice(right: Callable, *arguments: Any) -> None:
    right(*arguments)
    right(*arguments)


def nothing(*_: Any, **__: Any) -> None:
    pass


def samples_of_the_first(right: Callable, self: Worker, batch: Any) -> Any:
    half = [t[: len(t) // self.mesh["dp"].size].repeat(self.mesh["dp"].size, 1) for t in batch]
    return right(self, half)


def targets_of_the_next(right: Callable, self: Worker, batch: Any) -> Any:
    inputs, targets = batch
    return right(self, (inputs, targets.roll(1, 1)))


def usual_betas(right: Callable, *arguments: Any) -> Any:
    """Of the experts' engine."""
    dense, experts = right(*arguments)
    for optimizer, _ in experts.named_optimizers():
        for group in optimizer.param_groups:
            group["betas"] = 0.9, 0.999
    return dense, experts


def last_chunk_lost(right: Callable, self: Any, x: Any, *rows: Any) -> Any:
    found = right(self, x, *rows)
    found[:, len(x) // self.chunk * self.chunk :] = 0.0
    return found


def and_stay(right: Callable, self: Bucket, axis: Any = None) -> torch.Tensor:
    """As gradients that are sent and not forgotten."""
    before = [member.parameter.grad for member in self.members]
    flat = right(self, axis)
    for member, gradient in zip(self.members, before, strict=True):
        member.parameter.grad = gradient
    return flat


def of_the_other_stage(right: Callable, self: GatheredWeights, way: Any, part: int, then: Any) -> None:
    other = {stage: 3 - stage for stage in self.walks}
    right(self, way, part, [action._replace(stage=other[action.stage]) for action in then])


def moved_twice(right: Callable, model: Any) -> Any:
    before = [each.bias.clone() for each in routers(model)]
    loads = right(model)
    for each, was in zip(routers(model), before, strict=True):
        each.bias.data += each.bias - was
    return loads


def waited_for_at_once(right: Callable, self: Exchange, *arguments: Any) -> Any:
    ticket = right(self, *arguments)
    self._pending.wait()
    return ticket


def the_other_directions_rows() -> AbstractContextManager:
    """Of what is posted the last is taken, whose it ever is."""
    latest: list[Any] = []

    def post(right: Callable, self: Exchange, *arguments: Any) -> Any:
        ticket = right(self, *arguments)
        latest[:] = [self._pending]
        return ticket

    def wait(right: Callable, self: Exchange, ticket: torch.Tensor) -> torch.Tensor:
        rows = right(self, ticket)
        return latest[0].wait() if latest[0].buffer.shape == rows.shape else rows

    both = ExitStack()
    both.enter_context(instead(Exchange, "_post", post))
    both.enter_context(instead(Exchange, "_wait", wait))
    return both


Bug = tuple[str, Callable[[], AbstractContextManager], str]
BUGS: dict[str, Bug] = {  # layout, bug, the claim that fails
    "the norm misses the experts": ("experts", lambda: instead(worker, "hypot", lambda _, a, b: a), NORM),
    "replicated gradients are not summed under sp": (
        "experts", lambda: instead(Worker, "_sum_over_tp", nothing), GRADIENT,
    ),
    "experts' gradients over the wrong axis": (
        "experts", lambda: instead(build, "expert_parameters", lambda *_: []), GRADIENT,
    ),
    "masks of the first micro-batch in all": (
        "dense", lambda: instead(SampleMasks, "at", lambda right, self, _: right(self, 0)), LOSS,
    ),
    "the loss of every rank of tp": ("dense", lambda: instead(Worker, "_once_over_tp", lambda _, __, x: x), LOSS),
    "the norm counts what is replicated twice": ("dense", lambda: instead(Worker, "_counted", lambda *_: True), NORM),
    "the learning rate of the step before": (
        "dense", lambda: instead(Worker, "set_lr", lambda right, self, lr: right(self, lr - 0.01 / 3)), PARAMETER,
    ),
    "gradients are not zeroed": ("dense", lambda: instead(Engine, "zero_grad", nothing), GRADIENT),
    "clipped by half of the norm": (
        "dense", lambda: instead(Engine, "clip_by", lambda right, self, c, norm: right(self, c, norm / 2)), PARAMETER,
    ),
    "every rank of dp takes the first samples": (
        "dense", lambda: instead(Worker, "split", samples_of_the_first), LOSS,
    ),
    "the planner reduces gradients twice": (
        "dense", lambda: instead(traffic, "gradients_reduced", lambda right, *x: 2 * right(*x)), SENT,
    ),
    "tied copies are summed twice": ("pipeline", lambda: instead(Copies, "add_up", twice), GRADIENT),
    "tied copies are not summed": ("pipeline", lambda: instead(Copies, "add_up", nothing), GRADIENT),
    "shards of tied copies are not summed": ("zero 2", lambda: instead(Copies, "add_up", nothing), GRADIENT),
    "gradients are reduced before the last micro-batch": (
        "pipeline", lambda: instead(FullGradients, "due", lambda *_: True), SENT,
    ),
    "a micro-batch's gradient replaces the one before": (
        "zero 2", lambda: instead(DeviceShards, "add", lambda _, self, i, gradient: self.own[i].copy_(gradient)),
        GRADIENT,
    ),
    "what is reduced is not freed, and reduced again": (
        "zero 3", lambda: instead(Bucket, "take_gradients", and_stay), GRADIENT,
    ),
    "what a W adds is not in the shard": ("zero 2", lambda: instead(InOrder, "reduce", nothing), GRADIENT),
    "nor in that of ZeRO-3": ("zero 3", lambda: instead(GatheredWeights, "reduce", nothing), GRADIENT),
    "weights of the step before": ("kept", lambda: instead(GatheredWeights, "release", nothing), LOSS),
    "the wrong stage is gathered ahead": (
        "zero 3", lambda: instead(GatheredWeights, "_enter", of_the_other_stage), SENT,
    ),
    "nothing is gathered ahead": (
        "zero 3", lambda: instead(GatheredWeights, "_enter", lambda right, self, *to: right(self, *to[:2], ())),
        "actions whose weights are there",
    ),
    "nothing is kept for the next action": (
        "zero 3", lambda: instead(GatheredWeights, "_leave", lambda _, self, __, units: self._free(units)), SENT,
    ),
    "added up, and reduced in every micro-batch": (
        "kept", lambda: instead(ShardedGradients, "due", lambda *_: True), SENT,
    ),
    "experts learn with the usual betas": (
        "experts", lambda: instead(worker, "shard_optimizer", usual_betas), PARAMETER,
    ),
    "norms decay under ZeRO": (
        "recipe", lambda: instead(recipe, "decays", lambda _, name: not name.endswith("bias")), PARAMETER,
    ),
    "biases and embeddings decay": ("recipe", lambda: instead(recipe, "decays", lambda *_: True), PARAMETER),
    "nothing decays": ("recipe", lambda: instead(recipe, "decays", lambda *_: False), PARAMETER),
    "the load of one copy of a layer": ("turns", lambda: instead(build, "twin", nothing), GRADIENT),
    "the load of this copy twice": (
        "turns", lambda: instead(router, "_over_ranks", lambda right, load, over: right(load, over) + load), GRADIENT,
    ),
    "a bias that moves once for each copy": ("turns", lambda: instead(worker, "end_step", moved_twice), PARAMETER),
    "copies of experts are not known": ("turns", lambda: instead(stages, "_of_block", lambda _, name: name), GRADIENT),
    "the norm counts both copies of experts": ("turns", lambda: instead(Copies, "counted_here", lambda *_: True), NORM),
    "rows are waited for at once": (
        "turns", lambda: instead(Exchange, "_post", waited_for_at_once), "all-to-alls of F&B",
    ),
    "no turn is given": ("turns", lambda: instead(Turns, "give", nothing), "all-to-alls of F&B"),
    "and takes its time": ("turns", lambda: instead(Turns, "give", nothing), "virtual time of a step, F&B by turns"),
    "the rows of the other direction": ("turns", the_other_directions_rows, GRADIENT),
    "masks of the other direction": ("turns, recomputed", lambda: instead(Pipeline, "_return_to", nothing), GRADIENT),
    "documents are not kept apart": (
        "recipe", lambda: instead(worker, "documents_of", lambda _, x, eos: torch.zeros_like(x)), LOSS,
    ),
    "the end of a document begins the next": (
        "recipe", lambda: instead(worker, "documents_of", lambda right, x, eos: (x == eos).cumsum(-1)), LOSS,
    ),
    "targets one token further": ("recipe", lambda: instead(Worker, "split", targets_of_the_next), LOSS),
    "the last chunk of the loss is lost": ("recipe", lambda: instead(_Head, "statistics", last_chunk_lost), LOSS),
    "a chunk's gradient is written over the others'": (
        "recipe", lambda: instead(torch.Tensor, "addmm_", lambda right, *args: right(*args, beta=0)), GRADIENT,
    ),
    "layers are numbered one too far": (
        "stages", lambda: instead(stages, "layers_in", lambda right, *x: [layer + 1 for layer in right(*x)]), LOSS,
    ),
    "a stage loses its last layer": (
        "stages", lambda: instead(stages, "layers_in", lambda right, *x: right(*x)[: 3 if len(right(*x)) > 1 else 1]),
        LOSS,
    ),
    "the planner's stages are equal": (
        "stages",
        lambda: instead(planned_stages, "_layers_of", lambda right, layers, kinds, n, split: right(8, kinds, n, "")),
        "parameters, rank",
    ),
    "the tied embedding of ends alone is not summed": (
        "stages", lambda: instead(Copies, "add_up", nothing), GRADIENT,
    ),
    "the norm counts both tied copies": ("pipeline", lambda: instead(Copies, "counted_here", lambda *_: True), NORM),
}  # fmt: skip


RESUMED: dict[str, tuple[Callable[[], AbstractContextManager], str]] = {  # bugs where a run goes on, and what fails
    "it goes on one step too early": (
        lambda: instead(train, "resume", lambda right, *arguments: right(*arguments) - 1), LOSS,
    ),
    "and one too late": (lambda: instead(train, "resume", lambda right, *arguments: right(*arguments) + 1), LOSS),
    "weights are not published": (lambda: instead(Engine, "publish", nothing), LOSS),
}  # fmt: skip


def resumed_with_every_bug(folder: str) -> dict[str, list[str]]:
    """One step, saved; then on to the third, with and without each bug."""
    found = {}
    for name, bug in {"": nullcontext, **{name: bug for name, (bug, _) in RESUMED.items()}}.items():
        save = ["--save", f"{folder}/{name}", "--save-every", "1"]
        first = failing_claims("dense", nullcontext, *save, "--steps", "1")
        found[name] = first + failing_claims("dense", bug, *save, "--steps", "3")
    return found


def test_the_claims_of_a_run_that_goes_on(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(4, resumed_with_every_bug, str(tmp_path))[0]
    assert found[""] == []
    for name, (_, claim) in RESUMED.items():
        assert any(failed.startswith(claim) for failed in found[name]), (name, found[name])


def failing_claims(layout: str, bug: Callable[[], AbstractContextManager], *more: str) -> list[str]:
    frame = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(frame)
    args = frame.parser.parse_args(
        [*(f"--{name}={value}" for name, value in SIZES.items()), *LAYOUTS[layout].split(), *more]
    )
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    run = Run(args, job, POLICIES["float64"])
    with bug():
        try:
            train.lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


def with_every_bug() -> dict[str, list[str]]:
    found = {layout: failing_claims(layout, nullcontext) for layout in LAYOUTS}
    return found | {name: failing_claims(layout, bug) for name, (layout, bug, _) in BUGS.items()}


@pytest.fixture(scope="module")
def failed(pool: Pool) -> dict[str, list[str]]:
    return pool.run(4, with_every_bug, timeout=150)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_bug_every_claim_holds(failed: dict[str, list[str]], layout: str) -> None:
    assert failed[layout] == []


@pytest.mark.parametrize("name", BUGS)
def test_the_claims_catch(failed: dict[str, list[str]], name: str) -> None:
    assert any(claim.startswith(BUGS[name][2]) for claim in failed[name]), failed[name]
