"""What the pipeline lessons measure, show and claim. Everything here reads measurements; nothing makes them up.

p stages, m micro-batches, r rank
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tabulate import tabulate
from torch import Tensor

from core.proof.arguments import configuration
from core.proof.clock import Event
from core.proof.files import write_file
from core.proof.lesson import Run
from pipeline.engine.actions import Action, Schedule, most_in_flight, placement, size, stages_of_ranks
from pipeline.engine.validator import Timeline, Verdict, bubble, bubbles_within
from pipeline.evidence.timeline import plot, to_trace
from pipeline.split import layers_by_stage


@dataclass(frozen=True)
class Measured:
    """What one rank measured: of the engine, or of each runtime by its name."""

    parameter_bytes: int
    in_flight: int  # most micro-batches between forward and backward, over all its stages
    by_stage: dict[int, int]  # bytes autograd saved for one micro-batch, by stage
    saved_peak: dict[str, int]  # bytes at the peak; the plain runtime's leave out what a pending W reads
    deferred_layers: int  # in the traced step, layers whose weight gradients a W has computed
    events: list[Event]  # of the traced step; their labels are the actions
    sent: dict[str, tuple[float, float]]  # messages and bytes of a step, in both directions
    copies: dict[str, dict[str, Tensor]]  # this rank's copies of what other ranks have too

    @property
    def actions(self) -> list[Action]:
        """Those executed, in order."""
        return [event.label for event in self.events]

    def peak_in_microbatches(self, runtime: str) -> float:
        """Bytes saved at the peak, where 1 is a micro-batch saved in full from its forward to its backward's end."""
        in_full = most_in_flight(self.actions, self.by_stage)
        if in_full == self.saved_peak[runtime] == 0:  # of a rotary model's embedding nothing is saved
            return self.in_flight
        return self.saved_peak[runtime] / in_full * self.in_flight


def timeline_of(measured: list[Measured]) -> Timeline:
    return [each.events for each in measured]


def show(run: Run, measured: list[Measured]) -> None:
    write_timeline(run, measured)
    rows = []
    for rank, m in enumerate(measured):
        seconds = sum(e.end[1] - e.start[1] for e in m.events)
        saved, peak = sum(m.by_stage.values()) / 1e6, m.saved_peak["engine"] / 1e6
        rows.append((rank, m.parameter_bytes / 1e6, m.in_flight, saved, peak, seconds * 1e3, m.sent["engine"][0]))
    header = ("rank", "parameters\nMB", "in flight", "saved MB,\n1 microbatch", "saved MB,\npeak", "compute ms\na step",
              "messages\na step")  # fmt: skip
    run.say("\n" + tabulate(rows, header, floatfmt=".3f"))
    run.say(f"\nloss {run.losses[0]:.4f} at the first step, {run.losses[-1]:.4f} at the last, "
            f"{run.tokens / run.training_seconds:,.0f} tokens a second")  # fmt: skip
    run.say(f"with this machine's own costs the bubble is {bubble(timeline_of(measured), model=1)[0]:.4f} of wall time:"
            "\nthe last stage also has the head and the loss, so stages are not equal")  # fmt: skip


def write_timeline(run: Run, measured: list[Measured]) -> None:
    """What `--plot` and `--trace` ask for."""
    timeline = timeline_of(measured)
    if run.args.plot:
        plot(run.args.plot, {f"{run.args.microbatches} microbatches on {len(measured)} ranks": timeline})
    if run.args.trace:
        write_file(run.args.trace, to_trace(timeline))


# ---- What every schedule must hold -----------------------------------------------------------------------------------


def messages_by_rule(schedule: Schedule) -> list[int]:
    """Messages that each rank sends: wherever a stage and the one before or after it are on two ranks."""
    rank_of, sent = placement(schedule), [0] * len(schedule)
    for (stage, microbatch), rank in rank_of.items():
        for neighbour in (stage - 1, stage + 1):  # its gradient goes to the one, its activation to the other
            if rank_of.get((neighbour, microbatch), rank) != rank:
                sent[rank] += 1
    return sent


def claim_messages(run: Run, schedule: Schedule, measured: list[Measured]) -> None:
    args, expected = run.args, messages_by_rule(schedule)
    stages, microbatches = size(schedule)
    of_one = args.batch // microbatches * args.sequence * args.hidden * run.dtype.itemsize
    rule = "m forward but on the last rank, m backward but on the first"
    if any(len(stages_here) > 1 for stages_here in stages_of_ranks(schedule)):
        rule = f"m = {microbatches} for each end of the {stages} stages with a neighbour on another rank"
    messages, message_bytes = [], []
    for name in measured[0].sent:
        note = "" if name == "engine" else f" ({name})"
        for rank, m in enumerate(measured):
            number, sent_bytes = m.sent[name]
            messages.append((f"messages sent a step on rank {rank}{note}", expected[rank], number))
            message_bytes.append((f"bytes sent a step on rank {rank}{note}", expected[rank] * of_one, sent_bytes))
    run.evidence.each(f"messages sent per rank and step{_by(measured[0].sent)}", rule, messages)
    rule = f"messages x b·s·h elements = messages x {of_one:,}; counted"
    run.evidence.each(f"bytes sent per rank and step{_by(measured[0].sent)}", rule, message_bytes)


def _by(runtimes: dict[str, object]) -> str:
    return f": {', then '.join(runtimes)}" if len(runtimes) > 1 else ""


def differing_copies(measured: list[Measured]) -> tuple[int, int]:
    """Elements that are not the same on all ranks that have them, and how many are on several ranks."""
    first: dict[tuple[str, str], Tensor] = {}
    differing = 0
    for m in measured:
        for runtime, copies in m.copies.items():
            for name, value in copies.items():
                differing += (first.setdefault((runtime, name), value) != value).sum().item()
    return differing, sum(value.numel() for value in first.values())


def claim_copies(run: Run, measured: list[Measured]) -> None:
    """What several ranks have, the tied embedding for example, stays equal."""
    differing, elements = differing_copies(measured)
    if elements:
        what = "copies on several ranks: tied embedding"
        run.evidence.claim(what, f"differ in 0 of {elements:,} elements", 0, differing, correctness=True)


def differing_actions(measured: list[Measured], planned: Verdict) -> int:
    """Actions that the ranks did not carry out when, by their virtual clocks, the plan has them."""
    differing = 0
    for m, plan in zip(measured, planned.events, strict=True):
        executed = [(e.label, e.start[0], e.end[0]) for e in m.events]
        drawn = [(e.label, e.start[0], e.end[0]) for e in plan]
        differing += sum(a != b for a, b in zip_longest(executed, drawn))
    return differing


def claim_timeline(run: Run, measured: list[Measured], planned: Verdict) -> None:
    formula = f"0 of {sum(map(len, planned.events))}, by the ranks' virtual clocks"
    run.evidence.claim("actions executed other than drawn above", formula, 0, differing_actions(measured, planned))


def claim_split(run: Run, schedule: Schedule, measured: list[Measured]) -> None:
    """A W really does what an I has left: every linear layer of the stage, the head too."""
    stages, _ = size(schedule)
    config, cases = configuration(run.args), []
    of_stages = layers_by_stage(run.args.layers, stages, run.args.split or "")
    each = (1 if config.fused_qkv else 3) + 1 + (3 if config.gated else 2)  # linear layers of a layer
    for rank, (row, m) in enumerate(zip(schedule, measured, strict=True)):
        of_layers = [each * of_stages[action.stage] for action in row if action.kind == "W"]
        of_head = [1 for action in row if action.kind == "W" and action.stage == stages - 1]
        cases.append((f"left for W on rank {rank}", sum(of_layers) + sum(of_head), m.deferred_layers))
    run.evidence.each(
        "weight gradients computed by a W, not before", f"{each} linear layers of each layer, and the head", cases
    )


# ---- What the slide of a schedule says -------------------------------------------------------------------------------


def claim_bubble(run: Run, measured: list[Measured], of_ideal: float, formula: str, formula_of_wall: str) -> None:
    """The bubble over ideal time, and so over wall time, from the timeline of the executed step."""
    wall, ideal = bubble(timeline_of(measured))
    formula, formula_of_wall = f"{formula}, in virtual time", f"{formula_of_wall}, in virtual time"
    run.evidence.claim("bubble over wall time", formula_of_wall, of_ideal / (1 + of_ideal), wall, 1e-12)
    run.evidence.claim("bubble over ideal time", formula, of_ideal, ideal, 1e-12)


def claim_own_bubble(run: Run, measured: list[Measured], formula: str, expected: float) -> None:
    """The most idle time between the first and last action of a rank; a unit is a forward of 1/p of the model."""
    most = max(bubbles_within(timeline_of(measured)))
    formula = f"{formula}, in virtual time"
    run.evidence.claim("bubble within the step, of the rank with most", formula, expected, most, 1e-9)
    wall = max(m.events[-1].end[0] for m in measured)
    busy = sum(e.end[0] - e.start[0] for e in measured[0].events)
    run.say(f"bubble: {most:g} within the step, {wall - busy:g} with the wait for the global norm at its end")


def claim_in_flight(run: Run, measured: list[Measured], formula: str, expected: Sequence[int]) -> None:
    """Micro-batches in flight on each rank, and the same in bytes that autograd really saved."""
    cases = [(f"in flight on rank {r}", expected[r], m.in_flight) for r, m in enumerate(measured)]
    run.evidence.each("most microbatches in flight per rank", formula, cases)
    if any(action.kind == "I" for action in measured[0].actions):
        _claim_in_flight_of_split(run, measured, expected)
        return
    cases = []
    for name in measured[0].saved_peak:
        note = "" if name == "engine" else f" ({name})"
        for r, m in enumerate(measured):
            cases.append((f"saved on rank {r}{note}", expected[r], m.peak_in_microbatches(name)))
    what = f"saved activations at the peak, in microbatches{_by(measured[0].saved_peak)}"
    run.evidence.each(what, formula, cases, 1e-9)


def _claim_in_flight_of_split(run: Run, measured: list[Measured], expected: Sequence[int]) -> None:
    """An I keeps for its W what arrives at each layer before it gives back what the layer saved."""
    peaks = [m.peak_in_microbatches("engine") for m in measured]
    run.say("saved activations at the peak, in microbatches: " + " ".join(f"{value:.3g}" for value in peaks))
    stages = 1 + max(max(m.by_stage) for m in measured)
    of_stages = layers_by_stage(run.args.layers, stages, run.args.split or "")
    layers = [max(1, *(of_stages[stage] for stage in m.by_stage)) for m in measured]  # of a stage
    cases = [(f"saved above on rank {r}", 0, max(0.0, peaks[r] - expected[r]) * layers[r]) for r in range(len(peaks))]
    run.evidence.each(
        "saved activations at the peak, more than full microbatches in flight, in layers",
        "0, but for the layer at which an I is at work: at most 1",
        cases,
        1.0,
    )


def forwards_before_backward(measured: Measured) -> int:
    """Forwards executed before the first backward."""
    return next(i for i, action in enumerate(measured.actions) if action.kind != "F")
