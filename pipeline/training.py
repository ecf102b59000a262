"""What the pipeline lessons share: train the GPT with a schedule, compare with one process, measure, and claim.

The schedule, and what is special about it, stand in each lesson's own file.
"""

import argparse
import math
import os
import sys
import time
from functools import partial
from itertools import chain

import torch
from einops import rearrange
from torch import Tensor

from core.gpt import GPT, GPTConfig, materialize, token_loss
from core.launch import Stop
from core.ledger import Ledger, SavedActivations, VirtualClock, live_bytes
from core.lesson import Lesson, Run
from core.mesh import Mesh
from core.oracle import Oracle, relative_difference, worst_difference
from core.seeded import Draw
from core.text import VOCABULARY, Text
from pipeline import evidence
from pipeline.evidence import Measured
from pipeline.runtime import Pipeline, Trace
from pipeline.schedules import Schedule, ScheduleError
from pipeline.stages import check_layers, clip_and_total, cut, sum_tied_gradients, tied_weight
from pipeline.timeline import LEGEND, draw
from pipeline.validator import validate


def add_flags(lesson: Lesson, microbatches: int = 8) -> None:
    """The flags of a pipeline lesson."""
    flag = lesson.parser.add_argument
    flag("--microbatches", type=int, default=microbatches, help="microbatches in a step (default %(default)s)")
    flag("--batch", type=int, default=16, help="samples in a step, over all microbatches (default %(default)s)")
    flag("--layers", type=int, default=8, help="layers of the whole model (default %(default)s)")
    flag("--hidden", type=int, default=64, help="default %(default)s")
    flag("--heads", type=int, default=4, help="default %(default)s")
    flag("--sequence", type=int, default=64, help="tokens in a sample (default %(default)s)")
    flag("--attention", choices=("sdpa", "softmax"), default="sdpa", help="default %(default)s")
    flag("--dropout", type=float, default=0.0, help="needs --attention softmax (default %(default)s)")
    flag("--untied", action="store_true", help="give the head a weight of its own")
    flag("--lr", type=float, default=1e-3, help="learning rate of AdamW (default %(default)s)")
    flag("--clip", type=float, default=1.0, help="largest global gradient norm (default %(default)s)")
    flag("--trace", metavar="FILE.json", help="write the timeline for Perfetto or chrome://tracing")


def configuration(args: argparse.Namespace) -> GPTConfig:
    return GPTConfig(
        vocabulary=VOCABULARY,
        sequence=args.sequence,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        dropout=args.dropout,
        attention=args.attention,
        tied=not args.untied,
    )


def check(args: argparse.Namespace, stages: int) -> None:
    """Raises ValueError when the arguments cannot make a pipeline of this many stages."""
    configuration(args)
    check_layers(args.layers, stages)
    for name in ("batch", "microbatches"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1; use --{name} 8")
    if args.batch % args.microbatches:
        raise ValueError(
            f"--batch {args.batch}: must be a multiple of --microbatches {args.microbatches}, so that all are equal; "
            f"use --batch {max(1, round(args.batch / args.microbatches)) * args.microbatches}"
        )
    for name, usual in (("lr", 1e-3), ("clip", 1.0)):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive and finite; use --{name} {usual}")
    Text(args.data, args.sequence)


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
    config, text = configuration(args), Text(args.data, args.sequence)
    axis = Mesh(job.device.type, ledger, job.timeout, pp=job.world_size)["pp"]
    run.mesh = {"pp": axis.size}

    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    stage = materialize(cut(GPT(config), axis.index, axis.size), args.seed, job.device, run.dtype)
    optimizer = optimizer_of(stage.parameters())
    tokens = args.batch * args.sequence
    split = partial(rearrange, pattern="(m b) s -> m b s", m=args.microbatches)
    micro_shape = (args.batch // args.microbatches, args.sequence, args.hidden)
    loss = partial(token_loss, tokens=tokens)
    pipeline = Pipeline(stage, loss, schedule, axis, micro_shape, run.dtype, job.device)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None

    trace: Trace | None = None
    worst_gradient = worst_norm = worst_parameter = 0.0
    exact = run.dtype == torch.float64  # then the oracle trains on its own from first to last; see Oracle.adopt
    bar = run.steps()
    for step in bar:
        inputs, targets = (t.to(job.device) for t in text.batch(args.seed, step, args.batch))
        samples = Draw(args.seed, step, 0)
        if step == args.steps - 1:
            held_anyway = [*stage.parameters(), inputs, targets]
            trace = Trace(VirtualClock(job.device), SavedActivations(held_anyway))

        began = time.perf_counter()
        optimizer.zero_grad()
        share = pipeline.step(split(inputs), split(targets), samples, trace)
        sum_tied_gradients(stage, axis)
        gradients = [(stage.whole_name(n), p.grad.clone()) for n, p in stage.named_parameters() if p.requires_grad]
        norm, step_loss = clip_and_total(stage, axis, args.clip, share)
        stop_unless_finite(run, step, norm + step_loss, gradients)
        optimizer.step()
        run.training_seconds += time.perf_counter() - began
        run.tokens += tokens
        run.losses.append(step_loss)
        bar.set_postfix(loss=f"{step_loss:.4f}", refresh=False)

        # Gradients as they were before clipping: a wrong scale must show. All from the CPU: rank 0 has no part in the
        # GPUs of other ranks.
        pieces = job.gather([(name, gradient.cpu()) for name, gradient in gradients])
        weights = job.gather([(stage.whole_name(n), p.detach().cpu()) for n, p in stage.named_parameters()])
        states = [] if exact else job.gather(_states(stage, optimizer))
        if oracle:
            run.reference_losses.append(oracle.step(inputs, targets, samples))
            worst_gradient = max(worst_gradient, worst_difference(chain(*pieces), oracle.gradients))
            worst_norm = max(worst_norm, relative_difference(norm, oracle.norm))
            worst_parameter = max(worst_parameter, worst_difference(chain(*weights), oracle.parameters()))
            if not exact:
                oracle.adopt(chain(*weights), chain(*states))
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
        evidence.claim_equal(run, worst_gradient, worst_norm, worst_parameter, measured)
        evidence.claim_messages(run, measured, micro_shape)
        evidence.claim_timeline(run, measured, planned)
    return measured


def _states(stage: GPT, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Tensor]]]:
    """The optimizer's state of each parameter on this rank, by full name."""
    named = [(stage.whole_name(n), optimizer.state[p]) for n, p in stage.named_parameters()]
    return [(name, {key: value.cpu() for key, value in state.items()}) for name, state in named]


def stop_unless_finite(run: Run, step: int, total: float, gradients: list[tuple[str, Tensor]]) -> None:
    """Stop all ranks together, saying where, when the loss or a gradient is NaN or infinite.

    Args:
        total: the loss plus the global norm, known to all ranks: not finite when anything is not.
    """
    if math.isfinite(total):
        return
    bad = [name for name, gradient in gradients if not gradient.isfinite().all()]
    found = [f"{name} on rank {rank}" for rank, names in enumerate(run.job.gather(bad)) for name in names]
    shown = ", ".join(found[-3:]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    where = f"the gradient of {shown}" if found else "the loss or the gradients' global norm"
    raise Stop(f"NaN or Inf at step {step} in {where}; try a smaller --lr than {run.args.lr}")
