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

from core.gpt import GPT, materialize, token_loss
from core.launch import Stop
from core.ledger import Ledger, SavedActivations, VirtualClock, live_bytes
from core.lesson import Lesson, Run
from core.mesh import Mesh
from core.oracle import Oracle
from core.seeded import Draw
from core.training import Layout, add_model_flags, check_model, clip_and_total, configuration, train
from pipeline import evidence
from pipeline.evidence import Measured
from pipeline.runtime import Pipeline, Trace
from pipeline.schedules import Schedule, ScheduleError
from pipeline.stages import check_layers, counted_once, cut, sum_tied_gradients, tied_weight
from pipeline.timeline import LEGEND, draw
from pipeline.validator import validate


def add_flags(lesson: Lesson, microbatches: int = 8) -> None:
    """The flags of a pipeline lesson."""
    add_model_flags(lesson)
    flag = lesson.parser.add_argument
    flag("--microbatches", type=int, default=microbatches, help="microbatches in a step (default %(default)s)")
    flag("--trace", metavar="FILE.json", help="write the timeline for Perfetto or chrome://tracing")


def check(args: argparse.Namespace, stages: int) -> None:
    """Raises ValueError when the arguments cannot make a pipeline of this many stages."""
    config = check_model(args)
    check_layers(config.layers, stages)
    if args.microbatches < 1:
        raise ValueError(f"--microbatches {args.microbatches}: must be at least 1; use --microbatches 8")
    if args.batch % args.microbatches:
        raise ValueError(
            f"--batch {args.batch}: must be a multiple of --microbatches {args.microbatches}, so that all are equal; "
            f"use --batch {max(1, round(args.batch / args.microbatches)) * args.microbatches}"
        )


def teach(run: Run, schedule: Schedule) -> list[Measured]:
    """Draw the schedule, train with it, and claim what every schedule must: it equals one process, and its messages.

    Returns:
        every rank's measurements, on rank 0; an empty list elsewhere.
    """
    try:
        planned = validate(schedule)
    except ScheduleError as error:
        raise Stop(f"this schedule cannot run: {error}") from error
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    run.say(f"{LEGEND}\n{draw(planned.events, colour)}\n")

    args, job, ledger = run.args, run.job, Ledger()
    config = configuration(args)
    axis = Mesh(job.device.type, ledger, job.timeout, pp=job.world_size)["pp"]
    run.mesh = {"pp": axis.size}

    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    stage = materialize(cut(GPT(config), axis.index, axis.size), args.seed, job.device, run.dtype)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None
    split = partial(rearrange, pattern="(m b) s -> m b s", m=args.microbatches)
    micro_shape = (args.batch // args.microbatches, args.sequence, args.hidden)
    loss = partial(token_loss, tokens=args.batch * args.sequence)
    pipeline = Pipeline(stage, loss, schedule, axis, micro_shape, run.dtype, job.device)
    trace: Trace | None = None

    def forward_backward(step: int, inputs: Tensor, targets: Tensor, draw: Draw) -> Tensor:
        nonlocal trace
        if step == args.steps - 1:
            held_anyway = [*stage.parameters(), inputs, targets]
            trace = Trace(VirtualClock(job.device), SavedActivations(held_anyway))
        share = pipeline.step(split(inputs), split(targets), draw, trace)
        sum_tied_gradients(stage, axis)
        return share

    def clip(share: Tensor) -> tuple[float, float]:
        return clip_and_total(stage.parameters(), counted_once(stage, axis), [axis], args.clip, share)

    worst = train(run, Layout(stage, optimizer_of(stage.parameters())), oracle, forward_backward, clip)
    pipeline.close()

    sent = {kind: ledger.traffic[f"send {kind}", "pp"] for kind in ("F", "B")}
    tied = tied_weight(stage, axis)
    measured = job.gather(
        Measured(
            live_bytes(stage.parameters()),
            pipeline.in_flight_peak,
            trace.saved.first,
            trace.saved.peak,
            trace.clock.events,
            {kind: (traffic.messages, traffic.bytes) for kind, traffic in sent.items()},
            None if tied is None else tied.detach().cpu(),
        )
    )
    if oracle:
        evidence.show(run, measured)
        worst.claim(run, ", tied weight once")
        evidence.claim_copies(run, measured)
        evidence.claim_messages(run, measured, micro_shape)
        evidence.claim_timeline(run, measured, planned)
    return measured
