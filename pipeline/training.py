"""What the pipeline lessons share: train the GPT with a schedule, compare with one process, measure, and claim.

The schedule, and what is special about it, stand in each lesson's own file.
"""

import argparse
import os
import sys
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.clock import VirtualClock
from core.proof.launch import Stop
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations, live_bytes
from core.proof.oracle import Oracle
from core.proof.training import Comparison, Replica, train
from pipeline import evidence
from pipeline.evidence import Measured
from pipeline.runtime import Pipeline, Trace
from pipeline.schedules import Schedule, ScheduleError, held, size
from pipeline.stages import Copies, check_layers, cut, each_stage
from pipeline.timeline import draw, legend
from pipeline.validator import Verdict, validate


def add_flags(lesson: Lesson, microbatches: int = 8, trace: bool = True) -> None:
    """The flags of a pipeline lesson, that to write a trace where there is one timeline to write."""
    add_model_flags(lesson)
    lesson.parser.set_defaults(steps=10)
    flag = lesson.parser.add_argument
    flag("--microbatches", type=int, default=microbatches, help="microbatches in a step (default %(default)s)")
    if trace:
        flag("--trace", metavar="FILE.json", help="write the timeline for Perfetto or chrome://tracing")


def check(args: argparse.Namespace, stages: int, per_rank: int = 1) -> None:
    """Raises ValueError when the arguments cannot make a pipeline of this many stages."""
    config = check_model(args)
    check_layers(config.layers, stages, per_rank)
    if args.microbatches < 1:
        raise ValueError(f"--microbatches {args.microbatches}: must be at least 1; use --microbatches 8")
    if args.batch % args.microbatches:
        raise ValueError(
            f"--batch {args.batch}: must be a multiple of --microbatches {args.microbatches}, so that all are equal; "
            f"use --batch {max(1, round(args.batch / args.microbatches)) * args.microbatches}"
        )


def show_plan(run: Run, schedule: Schedule) -> Verdict:
    """Draw a schedule as devices of their own would carry it out.

    Raises:
        Stop: it cannot run.
    """
    try:
        planned = validate(schedule)
    except ScheduleError as error:
        raise Stop(f"this schedule cannot run: {error}") from error
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    run.say(f"{legend(schedule)}\n{draw(schedule, planned.events, colour)}\n")
    return planned


def train_with(run: Run, schedule: Schedule) -> tuple[list[Measured], Comparison]:
    """Train with the schedule beside one process; every rank's measurements, on rank 0, and the differences."""
    args, job, ledger = run.args, run.job, Ledger()
    run.losses.clear()  # of an earlier schedule: the report has the last one's
    run.reference_losses.clear()
    run.training_seconds, run.tokens = 0.0, 0
    config = configuration(args)
    axis = Mesh(job.device.type, ledger, job.timeout, pp=job.world_size)["pp"]
    run.mesh = {"pp": axis.size}

    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    mine, stages = held(schedule)[axis.index], size(schedule)[0]
    part = materialize(cut(GPT(config), mine, stages), args.seed, job.device, run.dtype)
    masks = use_masks(part, SampleMasks(args.seed))
    copies = Copies(part, axis, held(schedule))
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None
    microbatches = size(schedule)[1]
    split = partial(rearrange, pattern="(m b) s -> m b s", m=microbatches)
    micro_shape = (args.batch // microbatches, args.sequence, args.hidden)
    loss = partial(token_loss, tokens=args.batch * args.sequence)
    pipeline = Pipeline(each_stage(part, mine, stages), loss, schedule, axis, micro_shape, run.dtype, job.device, masks)
    trace: Trace | None = None

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal trace
        masks.seek(step)
        if step == args.steps - 1:
            excluded = [*part.parameters(), inputs, targets]
            trace = Trace(VirtualClock(job.device), SavedActivations(excluded))
        share = pipeline.step(split(inputs), split(targets), trace)
        copies.sum_gradients()
        return share

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(part.parameters(), copies.counted_once(), [axis], largest, share)

    worst = train(run, {"": Replica(part, optimizer_of(part.parameters()), forward_backward, clip)}, oracle)[""]
    pipeline.close()

    sent = {kind: ledger.traffic[f"send {kind}", "pp"] for kind in ("F", "B")}
    measured = job.gather(
        Measured(
            live_bytes(part.parameters()),
            pipeline.in_flight_peak,
            trace.by_stage,
            trace.saved.peak,
            trace.left_for_weights,
            trace.clock.events,
            {kind: (traffic.messages / args.steps, traffic.bytes / args.steps) for kind, traffic in sent.items()},
            {name: p.detach().cpu() for copies_ in copies.shared.values() for name, p in copies_},
        )
    )
    return measured, worst


def teach(run: Run, schedule: Schedule) -> list[Measured]:
    """Draw the schedule, train with it, and claim what every schedule must: it equals one process, and its messages.

    Returns:
        every rank's measurements, on rank 0; an empty list elsewhere.
    """
    planned = show_plan(run, schedule)
    measured, worst = train_with(run, schedule)
    if measured:
        evidence.show(run, measured)
        claim_all(run, schedule, planned, measured, worst)
    return measured


def claim_all(run: Run, schedule: Schedule, planned: Verdict, measured: list[Measured], worst: Comparison) -> None:
    """What every schedule must hold."""
    worst.claim(run, ", copies once")
    evidence.claim_copies(run, measured)
    evidence.claim_messages(run, schedule, measured)
    evidence.claim_timeline(run, measured, planned)
    if any(action.kind == "W" for row in schedule for action in row):
        evidence.claim_split(run, schedule, measured)
