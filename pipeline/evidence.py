"""What the pipeline lessons measured, show and claim. Everything here reads measurements; nothing makes them up.

p stages, m microbatches, r rank
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tabulate import tabulate
from torch import Tensor

from core.proof.clock import Event
from core.proof.files import write_file
from core.proof.lesson import DTYPES, Run
from pipeline.schedules import Schedule, held, placement, size
from pipeline.timeline import plot, to_trace
from pipeline.validator import Verdict, bubble


@dataclass(frozen=True)
class Measured:
    """What one rank measured."""

    parameter_bytes: int
    in_flight: int  # most microbatches between forward and backward, over all its stages
    by_stage: dict[int, int]  # bytes autograd saved for one microbatch, by stage
    peak_saved: int  # bytes at the peak
    left_for_weights: int  # in the traced step, layers whose weight gradients a W has computed
    events: list[Event]  # of the traced step
    messages: dict[str, tuple[float, float]]  # of a step, by direction F or B: messages and bytes sent
    copies: dict[str, Tensor]  # this rank's copies of what other ranks hold too

    def sent(self) -> tuple[float, float]:
        """Messages and bytes of a step, in both directions."""
        return sum(n for n, _ in self.messages.values()), sum(b for _, b in self.messages.values())


def show(run: Run, measured: list[Measured]) -> None:
    timeline = [m.events for m in measured]
    write_timeline(run, measured)
    rows = [
        (rank, m.parameter_bytes / 1e6, m.in_flight, sum(m.by_stage.values()) / 1e6, m.peak_saved / 1e6,
         sum(e.end[1] - e.start[1] for e in m.events) * 1e3, m.sent()[0])
        for rank, m in enumerate(measured)
    ]  # fmt: skip
    header = ("rank", "parameters MB", "in flight", "saved MB, 1 microbatch", "saved MB, peak", "compute ms a step",
              "messages a step")  # fmt: skip
    run.say("\n" + tabulate(rows, header, floatfmt=".3f"))
    run.say(f"\nloss {run.losses[0]:.4f} at the first step, {run.losses[-1]:.4f} at the last, "
            f"{run.tokens / run.training_seconds:,.0f} tokens a second")  # fmt: skip
    run.say(f"with this machine's own costs the bubble is {bubble(timeline, model=1)[0]:.4f} of wall time: "
            "the last stage also has the head and the loss, so stages are not equal")  # fmt: skip


def messages_by_rule(schedule: Schedule) -> list[int]:
    """Messages that each rank sends: wherever a stage and the one before or after it are on two ranks."""
    rank_of, sent = placement(schedule), [0] * len(schedule)
    for (stage, microbatch), rank in rank_of.items():
        for neighbour in (stage - 1, stage + 1):  # its gradient goes to the one, its activation to the other
            sent[rank] += rank_of.get((neighbour, microbatch), rank) != rank
    return sent


def claim_messages(run: Run, schedule: Schedule, measured: list[Measured]) -> None:
    args, ranks, expected = run.args, range(len(measured)), messages_by_rule(schedule)
    stages, microbatches = size(schedule)
    message = args.batch // microbatches * args.sequence * args.hidden * DTYPES[args.dtype].itemsize
    one_each = all(len(those) == 1 for those in held(schedule))
    run.evidence.each(
        "messages sent per rank and step",
        "m forward but on the last rank, m backward but on the first"
        if one_each
        else f"m = {microbatches} for each end of the {stages} stages with a neighbour on another rank",
        [(f"messages sent a step on rank {r}", expected[r], measured[r].sent()[0]) for r in ranks],
    )
    run.evidence.each(
        "bytes sent per rank and step",
        f"messages x b·s·h elements = messages x {message:,}",
        [(f"bytes sent a step on rank {r}", expected[r] * message, measured[r].sent()[1]) for r in ranks],
    )


def differing_copies(measured: list[Measured]) -> tuple[int, int]:
    """Elements that are not the same on all ranks that hold them, and how many are on several ranks."""
    first: dict[str, Tensor] = {}
    differing = 0
    for name, value in (item for m in measured for item in m.copies.items()):
        differing += (first.setdefault(name, value) != value).sum().item()
    return differing, sum(value.numel() for value in first.values())


def claim_copies(run: Run, measured: list[Measured]) -> None:
    """What several ranks hold, the tied embedding for example, stays one."""
    differing, elements = differing_copies(measured)
    if elements:
        what = "copies on several ranks: tied embedding"
        run.evidence.claim(what, f"differ in 0 of {elements:,} elements", 0, differing)


def differing_actions(measured: list[Measured], planned: Verdict) -> int:
    """Actions that the ranks did not carry out when, by their virtual clocks, the plan has them."""
    executed = [[(e.label, e.start[0], e.end[0]) for e in m.events] for m in measured]
    drawn = [[(e.label, e.start[0], e.end[0]) for e in row] for row in planned.events]
    return sum(a != b for rows in zip(executed, drawn, strict=True) for a, b in zip_longest(*rows))


def claim_timeline(run: Run, measured: list[Measured], planned: Verdict) -> None:
    formula = f"0 of {sum(map(len, planned.events))}, by the ranks' virtual clocks"
    run.evidence.claim("actions executed other than drawn above", formula, 0, differing_actions(measured, planned))


def claim_bubble(run: Run, measured: list[Measured], of_ideal: float, formula: str, formula_of_wall: str) -> None:
    """The bubble over ideal time, and so over wall time, from the timeline of the executed step."""
    wall, ideal = bubble([each.events for each in measured])
    run.evidence.claim("bubble over wall time", formula_of_wall, of_ideal / (1 + of_ideal), wall, 1e-12)
    run.evidence.claim("bubble over ideal time", formula, of_ideal, ideal, 1e-12)


def claim_own_bubble(run: Run, measured: list[Measured], formula: str, expected: float) -> None:
    """The most idle time between the first and last action of a rank; a unit is a forward of 1/p of the model."""
    idle = [m.events[-1].end[0] - m.events[0].start[0] - sum(e.end[0] - e.start[0] for e in m.events) for m in measured]
    run.evidence.claim("bubble within the step, of the rank with most", formula, expected, max(idle), 1e-9)
    wall = max(m.events[-1].end[0] for m in measured)
    busy = sum(e.end[0] - e.start[0] for e in measured[0].events)
    run.say(f"bubble: {max(idle):g} within the step, {wall - busy:g} with the wait for the global norm at its end")


def claim_split(run: Run, schedule: Schedule, measured: list[Measured]) -> None:
    """A W really does what an I has left: every linear layer of the stage, the head too."""
    stages, _ = size(schedule)
    each = 4 * run.args.layers // stages  # a layer has four
    expected = [sum(each + (a.stage == stages - 1) for a in row if a.kind == "W") for row in schedule]
    run.evidence.each(
        "weight gradients computed by a W, not before",
        "4 linear layers of each layer, and the head",
        [(f"left for W on rank {r}", expected[r], m.left_for_weights) for r, m in enumerate(measured)],
    )


def write_timeline(run: Run, measured: list[Measured]) -> None:
    """What `--plot` and `--trace` ask for."""
    timeline = [m.events for m in measured]
    if run.args.plot:
        plot(run.args.plot, {f"{run.args.microbatches} microbatches on {len(measured)} ranks": timeline})
    if run.args.trace:
        write_file(run.args.trace, to_trace(timeline))


def claim_in_flight(run: Run, measured: list[Measured], formula: str, expected: Sequence[int]) -> None:
    """Microbatches in flight on each rank, and the same in bytes that autograd really held."""
    ranks = range(len(measured))
    run.evidence.each(
        "most microbatches in flight per rank",
        formula,
        [(f"in flight on rank {r}", expected[r], measured[r].in_flight) for r in ranks],
    )
    held_bytes = [m.peak_saved / _bytes_in_flight(m) * m.in_flight for m in measured]
    if not any("I" in event.label for event in measured[0].events):
        run.evidence.each(
            "saved activations at the peak, in microbatches",
            formula,
            [(f"saved on rank {r}", expected[r], held_bytes[r]) for r in ranks],
            1e-9,
        )
        return
    run.say("saved activations at the peak, in microbatches: " + " ".join(f"{value:.3g}" for value in held_bytes))
    # An I keeps for its W what arrives at each layer before it gives back what the layer saved.
    layers = run.args.layers / (1 + max(max(m.by_stage) for m in measured))  # of a stage
    run.evidence.each(
        "saved activations at the peak, more than whole microbatches in flight, in layers",
        "0, but for the layer at which an I is at work: at most 1",
        [(f"saved above on rank {r}", 0, max(0.0, held_bytes[r] - expected[r]) * layers) for r in ranks],
        1.0,
    )


def _bytes_in_flight(measured: Measured) -> int:
    """At the peak, if a microbatch is held whole from its forward to the end of its backward."""
    held_now = most = 0
    for event in measured.events:
        stage, kind = re.match(r"(\d+)([A-Z])", event.label).groups()
        held_now += {"F": 1, "I": 0}.get(kind, -1) * measured.by_stage[int(stage)]
        most = max(most, held_now)
    return most


def in_flight_before_backward(measured: Measured) -> int:
    """Forwards executed before the first backward."""
    return next(i for i, event in enumerate(measured.events) if "F" not in event.label)
