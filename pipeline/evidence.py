"""What the pipeline lessons measured, show and claim. Everything here reads measurements; nothing makes them up.

p stages, m microbatches, r rank
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from tabulate import tabulate
from torch import Tensor

from core.ledger import Event
from core.lesson import DTYPES, Run, write_file
from pipeline.timeline import plot, to_trace
from pipeline.validator import Verdict, bubble


@dataclass(frozen=True)
class Measured:
    """What one rank measured."""

    parameter_bytes: int
    in_flight: int  # most microbatches between forward and backward
    first_saved: int  # bytes autograd saved for one microbatch
    peak_saved: int  # bytes at the peak
    events: list[Event]  # of the traced step
    messages: dict[str, tuple[int, float]]  # of all steps, by direction F or B: messages and bytes sent
    copies: Tensor | None  # this rank's copy of the tied embedding


def show(run: Run, measured: list[Measured]) -> None:
    timeline = [m.events for m in measured]
    if run.args.plot:
        plot(run.args.plot, timeline, f"{run.args.microbatches} microbatches on {len(measured)} stages")
    if run.args.trace:
        write_file(run.args.trace, to_trace(timeline))
    rows = [
        (rank, m.parameter_bytes / 1e6, m.in_flight, m.first_saved / 1e6, m.peak_saved / 1e6,
         sum(e.end[1] - e.start[1] for e in m.events) * 1e3, sum(n for n, _ in m.messages.values()) // run.args.steps)
        for rank, m in enumerate(measured)
    ]  # fmt: skip
    header = ("rank", "parameters MB", "in flight", "saved MB, 1 microbatch", "saved MB, peak", "compute ms a step",
              "messages a step")  # fmt: skip
    run.say("\n" + tabulate(rows, header, floatfmt=".3f"))
    run.say(f"\nloss {run.losses[0]:.4f} at the first step, {run.losses[-1]:.4f} at the last, "
            f"{run.tokens / run.training_seconds:,.0f} tokens a second")  # fmt: skip
    run.say(f"with this machine's own costs the bubble is {bubble(timeline, model=1)[0]:.4f} of wall time: "
            "the last stage also has the head and the loss, so stages are not equal")  # fmt: skip


def claim_copies(run: Run, measured: list[Measured]) -> None:
    """The tied embedding, on first and last stage, stays one."""
    copies = [m.copies for m in measured if m.copies is not None]
    if copies:
        differing = (copies[0] != copies[-1]).sum().item()
        run.evidence.claim("the two copies of the tied embedding", "differ in 0 elements", 0, differing)


def claim_messages(run: Run, measured: list[Measured], micro_shape: tuple[int, ...]) -> None:
    stages, microbatches, steps = len(measured), run.args.microbatches, run.args.steps
    message = torch.Size(micro_shape).numel() * DTYPES[run.args.dtype].itemsize
    ends = range(stages)
    counts = [sum(n for n, _ in m.messages.values()) / steps for m in measured]
    volumes = [sum(b for _, b in m.messages.values()) / steps for m in measured]
    expected = [microbatches * ((r < stages - 1) + (r > 0)) for r in ends]
    run.evidence.each(
        "messages sent per rank and step",
        "m forward but on the last rank, m backward but on the first",
        [(f"messages sent a step on rank {r}", expected[r], counts[r]) for r in ends],
    )
    run.evidence.each(
        "bytes sent per rank and step",
        f"messages x b·s·h elements = messages x {message:,}",
        [(f"bytes sent a step on rank {r}", expected[r] * message, volumes[r]) for r in ends],
    )


def claim_timeline(run: Run, measured: list[Measured], planned: Verdict) -> None:
    executed = [[(e.label, e.start[0], e.end[0]) for e in m.events] for m in measured]
    drawn = [[(e.label, e.start[0], e.end[0]) for e in row] for row in planned.events]
    actions = sum(map(len, drawn))
    different = sum(a != b for rows in zip(executed, drawn, strict=True) for a, b in zip_longest(*rows))
    run.evidence.claim(
        "actions executed other than drawn above", f"0 of {actions}, by the ranks' virtual clocks", 0, different
    )


def claim_bubble(run: Run, measured: list[Measured]) -> None:
    """The bubble that GPipe and 1F1B share, from the timeline of the executed step."""
    p, m = len(measured), run.args.microbatches
    of_wall, of_ideal = bubble([each.events for each in measured])
    run.evidence.claim(
        "bubble over wall time", f"(p-1)/(m+p-1) = {p - 1}/{m + p - 1}", (p - 1) / (m + p - 1), of_wall, 1e-12
    )
    run.evidence.claim("bubble over ideal time", f"(p-1)/m = {p - 1}/{m}", (p - 1) / m, of_ideal, 1e-12)


def claim_in_flight(run: Run, measured: list[Measured], formula: str, expected: Callable[[int], int]) -> None:
    """Microbatches in flight on each rank, and the same in bytes that autograd really held."""
    ranks = range(len(measured))
    run.evidence.each(
        "most microbatches in flight per rank",
        formula,
        [(f"in flight on rank {r}", expected(r), measured[r].in_flight) for r in ranks],
    )
    run.evidence.each(
        "saved activations at the peak, in microbatches",
        formula,
        [(f"saved on rank {r}", expected(r), measured[r].peak_saved / measured[r].first_saved) for r in ranks],
        1e-9,
    )
