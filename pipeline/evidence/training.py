"""What the pipeline lessons share: train a model with a schedule, in the plain runtime and in the engine, compare both
with one process, measure, and claim.

The schedule, and what is special about it, stand in each lesson's own file.
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, materialize, token_loss, use_masks
from core.model.precision import MasterOptimizer
from core.model.rotary import Rotary
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.clock import VirtualClock
from core.proof.comparison import Comparison, claim_equal
from core.proof.flight import FLIGHT
from core.proof.launch import Stop
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations, live_bytes
from core.proof.oracle import Oracle
from core.proof.rules import Rule
from core.proof.rules import check as check_rules
from core.proof.trainable import Replica
from core.proof.training import train
from pipeline.engine.actions import Schedule, ScheduleError, size, stages_of_ranks
from pipeline.engine.runtime import Pipeline
from pipeline.engine.step import Trace
from pipeline.engine.validator import Verdict, validate
from pipeline.evidence import claims, pictures
from pipeline.evidence.claims import Measured
from pipeline.evidence.rules import LESSON
from pipeline.evidence.timeline import show_schedule
from pipeline.runtime import PlainPipeline
from pipeline.split import sizes_of, stages_of
from pipeline.stages import Copies, each_stage, partition

Wgrads = list[Callable[[], None]]
DeferWgrads = Callable[[nn.Module], Wgrads]  # makes a model's linear layers leave their weight gradients on a list


def add_flags(lesson: Lesson, microbatches: int = 8, trace: bool = True, split: bool = True) -> None:
    """The flags of a pipeline lesson; to write a trace where there is one timeline, to split where stages are known."""
    add_model_flags(lesson, hidden=40, heads=4, sequence=24)
    lesson.parser.set_defaults(steps=4, split=None)
    flag = lesson.parser.add_argument
    if split:
        flag("--stages", dest="split", default="", metavar="E,t*3|t*4|t,L",
             help="layers of each stage, see split.py (default: as many in each)")  # fmt: skip
    flag("--microbatches", type=int, default=microbatches, help="microbatches in a step (default %(default)s)")
    if trace:
        flag("--trace", metavar="FILE.json", help="write the timeline for Perfetto or chrome://tracing")


def check(args: argparse.Namespace, ranks: int, per_rank: int = 1, rules: tuple[Rule, ...] = ()) -> None:
    """Raises ValueError when the arguments cannot make a pipeline of so many ranks and stages a rank.

    Args:
        rules: more, which come first.
    """
    stages_here = partial(stages_of, getattr(args, "schedule", "interleaved"), ranks, per_rank)
    split = sizes_of(getattr(args, "split", None), map(stages_here, range(ranks)))
    case = argparse.Namespace(**vars(args) | split | {"pp": ranks, "stages": ranks * per_rank, "twice": 2 * ranks})
    check_rules(case, rules)
    check_model(args)
    check_rules(case, LESSON)


class Stages(Replica):
    """This rank's stages of the model, trained with a schedule. The runtime is the subclass's.

    Args:
        axis: the ranks of the pipeline; what it sends enters its ledger.
    """

    def __init__(self, run: Run, schedule: Schedule, axis: Axis):
        args, job = run.args, run.job
        of_ranks, (stages, microbatches) = stages_of_ranks(schedule), size(schedule)
        mine = of_ranks[axis.index]
        split = args.split or ""
        model = partition(GPT(configuration(args)), mine, stages, split)
        model = materialize(model, args.seed, job.device, run.precision)
        adamw = partial(torch.optim.AdamW, lr=args.lr)
        optimizer = MasterOptimizer(model.parameters(), adamw, run.precision.master)
        super().__init__(model, optimizer, self._forward_backward, self._clip)
        self.axis, self.microbatches, self.last_step = axis, microbatches, args.steps - 1
        self.masks = use_masks(model, SampleMasks(args.seed))
        self.copies = Copies(model, axis, of_ranks, split)
        self.saved: SavedActivations | None = None  # counts in the last step
        self.by_number = each_stage(model, mine, stages, split)
        self.loss = partial(token_loss, tokens=args.batch * args.sequence)
        self.shape = (args.batch // microbatches, args.sequence, args.hidden)
        self.dtype, self.device = run.dtype, job.device

    def run_schedule(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """A step on (M, B, S) tokens; this rank's share of the loss."""
        raise NotImplementedError

    def _forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        self.masks.seek(step)
        if step == self.last_step:
            self.saved = SavedActivations([*self.model.parameters(), inputs, targets, *self._cosines()])
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=self.microbatches) for t in (inputs, targets))
        share = self.run_schedule(inputs, targets)
        self.copies.sum_gradients()
        return share

    def _cosines(self) -> list[Tensor]:
        """And sines of rotary positions, which all micro-batches share."""
        x = torch.empty(1, 1, self.shape[1], self.model.config.rotary_dim, device=self.device)
        turning = [each for each in self.model.modules() if isinstance(each, Rotary)]
        for each in turning:
            each(x, x)
        return [each.last[1] for each in turning]

    def _clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(self.model.parameters(), self.copies.counted_once(), [self.axis], largest, share)

    def sent(self, steps: int) -> tuple[float, float]:
        """Messages and bytes of a step, in both directions."""
        found = [self.axis.ledger.traffic[f"send {kind}", self.axis.name] for kind in ("F", "B")]
        return sum(each.messages for each in found) / steps, sum(each.bytes for each in found) / steps

    def copies_by_name(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu() for copies in self.copies.shared.values() for name, p in copies}


class Engine(Stages):
    """Trained by `engine/runtime.py`; the last step is traced."""

    def __init__(self, run: Run, schedule: Schedule, axis: Axis):
        super().__init__(run, schedule, axis)
        self.trace: Trace | None = None
        self.runtime = Pipeline(
            self.by_number, self.loss, schedule, axis, self.shape, self.dtype, self.device, self.masks
        )  # fmt: skip

    def run_schedule(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.saved:
            self.trace = Trace(VirtualClock(self.device), self.saved)
        return self.runtime.step(inputs, targets, self.trace)


class Plain(Stages):
    """Trained by `runtime.py`; what autograd saves is counted around each stage, not in it."""

    def __init__(self, run: Run, schedule: Schedule, axis: Axis, defer_wgrads: DeferWgrads | None):
        super().__init__(run, schedule, axis.labelled("plain"))
        wgrads = defer_wgrads(self.model) if defer_wgrads else None
        stages = {number: self._counted(stage) for number, stage in self.by_number.items()}
        self.runtime = PlainPipeline(
            stages, self._counted(self.loss), schedule, self.axis, self.shape, self.dtype, self.device, self.masks,
            wgrads,
        )  # fmt: skip
        for name, phase in (("forward", "forward"), ("backward", "backward"), ("add_weight_gradients", "wgrad")):
            setattr(self.runtime, name, _placed(phase, getattr(self.runtime, name)))

    def _counted(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*inputs: Tensor) -> Tensor:
            with self.saved or nullcontext():
                return function(*inputs)

        return counted

    def run_schedule(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.runtime.step(inputs, targets)


def _placed(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The plain runtime's work, which says where it is."""

    def placed(stage: int, m: int, *more: Any) -> Any:
        FLIGHT.at(phase, m, stage)
        return work(stage, m, *more)

    return placed


def show_plan(run: Run, schedule: Schedule) -> Verdict:
    """Draw a schedule as devices of their own would carry it out.

    Raises:
        Stop: it cannot run.
    """
    try:
        planned = validate(schedule)
    except ScheduleError as error:
        raise Stop(f"this schedule cannot run: {error}") from error
    if run.job.rank == 0:
        run.say(f"{show_schedule(schedule, planned.events)}\n")
    return planned


def pipeline_axis(run: Run) -> Axis:
    """All ranks as one pipeline."""
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, pp=run.job.world_size)["pp"]
    run.mesh = {"pp": axis.size}
    return axis


Compared = dict[str, Comparison]  # by the name of the runtime, or of the schedule


def train_beside_one_process(run: Run, trained: Mapping[str, Stages]) -> Compared:
    """Train in each way, and compare with one process; on rank 0 the differences."""
    args, job, oracle = run.args, run.job, None
    if job.rank == 0:
        optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
        oracle = Oracle(configuration(args), args.seed, job.device, optimizer_of, args.clip)
    compared = train(run, trained, oracle)
    for each in trained.values():
        each.runtime.close()
    return compared


def measure(run: Run, engine: Engine, plain: Plain | None = None) -> list[Measured]:
    """Every rank's measurements, on rank 0; an empty list elsewhere."""
    trained: dict[str, Stages] = {"plain": plain, "engine": engine} if plain else {"engine": engine}
    mine = Measured(
        live_bytes(engine.model.parameters()),
        engine.runtime.in_flight_peak,
        engine.trace.by_stage,
        {name: each.saved.peak for name, each in trained.items()},
        engine.trace.deferred_layers,
        engine.trace.clock.events,
        {name: each.sent(run.args.steps) for name, each in trained.items()},
        {name: each.copies_by_name() for name, each in trained.items()},
    )
    return run.job.gather(mine)


def teach(
    run: Run, schedule: Schedule, defer_wgrads: DeferWgrads | None = None, with_plain: bool = True
) -> list[Measured]:
    """Draw the schedule, train with it in both runtimes, and claim what every schedule must hold.

    Args:
        with_plain: whether in the plain runtime too.
        defer_wgrads: what splits the backward of the plain version, where the schedule has I and W.

    Returns:
        every rank's measurements, on rank 0; an empty list elsewhere.
    """
    planned, axis = show_plan(run, schedule), pipeline_axis(run)
    plain = Plain(run, schedule, axis, defer_wgrads) if with_plain else None
    engine = Engine(run, schedule, axis)
    compared = train_beside_one_process(run, {"plain": plain, "engine": engine} if plain else {"engine": engine})
    measured = measure(run, engine, plain)
    if measured:
        claims.show(run, measured)
        claim_equal(run, compared, ", copies once")
        claims.claim_copies(run, measured)
        claims.claim_messages(run, schedule, measured)
        claims.claim_timeline(run, measured, planned)
        if any(action.kind == "W" for row in schedule for action in row):
            claims.claim_split(run, schedule, measured)
        if run.page:
            pictures.draw(run, schedule, planned, measured)
    return measured
