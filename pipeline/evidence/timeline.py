"""Draw a timeline: in the terminal, as SVG, and as a trace for Perfetto or chrome://tracing."""

import json
from collections.abc import Mapping, Sequence

from core.proof import terminal
from core.proof.clock import Event, VirtualClock
from core.proof.figures import ACTIONS
from core.proof.plot import picture
from pipeline.engine.actions import Action, Schedule, size, stage_share, stages_of_ranks
from pipeline.engine.validator import Timeline, bubble

KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradients"}
_TERMINAL = {"F": "\033[44;97m", "B": "\033[42;30m", "I": "\033[46;30m", "W": "\033[43;30m"}
NUMBER = "rank {:<3}"  # at the start of a line


def show_schedule(schedule: Schedule, timeline: Timeline) -> str:
    """Legend, in one line, and drawing in unit costs, which is no wider than the terminal.

    Where the numbers of the micro-batches do not fit, the kinds of the actions are drawn alone, and where that does not
    fit either, the start of it.
    """
    width, colour = terminal.columns(), terminal.coloured()
    rows = [_cells(row) for row in timeline]
    digits = 1 + max(len(_numbered(*cell, 0)) for row in rows for cell in row if cell[0].kind != "B")
    share, end = stage_share(schedule), max(row[-1].end[0] for row in timeline)
    columns = round(digits / share)  # of a unit of time
    needed = len(NUMBER.format(0)) + round(columns * end)
    if needed <= width:
        return _legend(schedule) + "\n" + _draw(rows, timeline, columns, digits, colour, width)
    columns = round(1 / share)
    note = f"One letter for 1/{columns} of a unit of time" if columns > 1 else "One letter for a unit of time"
    note += f": F forward, B backward, I and W its two parts, . idle. With micro-batches it takes {needed} columns, "
    note += f"here are {width}."
    if len(NUMBER.format(0)) + round(columns * end) > width:
        note += f" Only the start is drawn, of {end:g} units; all with --plot or --csv."
    return note + "\n" + _draw(rows, timeline, columns, 0, colour, width)


def _legend(schedule: Schedule) -> str:
    """What the numbered cells mean."""
    split = any(action.kind == "I" for row in schedule for action in row)
    parts = ["forward of microbatch 0: 0"]
    parts.append("backward: [0 ], or of the input (I) <0 and of the weights (W) w0" if split else "its backward: [0 ]")
    if max(map(len, stages_of_ranks(schedule))) > 1:
        parts.append("a, b, ... : which of the rank's stages, in order")
    same = f"one forward lasts {len(schedule) / size(schedule)[0]:.3g}, one backward twice that"
    return "; ".join([*parts, "idle: .", same])


Cell = tuple[Action, str]  # an action, and which of the rank's stages it is on: a letter, or nothing if it has one


def _cells(row: Sequence[Event]) -> list[Cell]:
    stages = sorted({event.label.stage for event in row})
    letters = {stage: chr(ord("a") + i) if len(stages) > 1 else "" for i, stage in enumerate(stages)}
    return [(event.label, letters[event.label.stage]) for event in row]


def _numbered(action: Action, letter: str, length: int) -> str:
    """The cell of an action, `length` columns wide or as wide as it must be."""
    text = {"F": "", "B": "[", "I": "<", "W": "w"}[action.kind] + f"{action.microbatch}{letter}"
    return f"{text:<{length - 1}}]" if action.kind == "B" else f"{text:<{length}}"


def _draw(rows: list[list[Cell]], timeline: Timeline, columns: int, digits: int, colour: bool, width: int) -> str:
    """One line a rank, cropped to `width`.

    Args:
        columns: of a unit of time.
        digits: columns of a numbered forward; 0 draws letters.
    """
    lines, last = [], round(columns * max(row[-1].end[0] for row in timeline))
    idle = ("." + " " * (digits - 1) if digits else ".") * last
    for rank, cells in enumerate(rows):
        line, used, at = NUMBER.format(rank), len(NUMBER.format(rank)), 0
        pieces: list[tuple[str, str]] = []  # kind or "", and what is written
        for event, (action, letter) in zip(timeline[rank], cells, strict=True):
            start, end = round(columns * event.start[0]), round(columns * event.end[0])
            text = _numbered(action, letter, end - start) if digits else action.kind * (end - start)
            pieces += [("", idle[at:start]), (action.kind, text)]
            at = end
        for kind, text in [*pieces, ("", idle[at:last])]:
            text = text[: max(0, width - used)]
            used += len(text)
            line += f"{_TERMINAL[kind]}{text}\033[0m" if colour and kind and text else text
        lines.append(line)
    return "\n".join(lines)


INCHES = 0.085  # of a character of a label
WIDEST = 100.0  # inches of a picture


def plot(path: str, timelines: Mapping[str, Timeline]) -> None:
    """Write timelines in unit costs as an SVG picture, under one another, each with its title and its bubble.

    As wide as the numbers in the shortest actions need, but for WIDEST: then those that do not fit are left out.
    """
    events = [event for timeline in timelines.values() for row in timeline for event in row]
    end, shortest = max(e.end[0] for e in events), min(e.end[0] - e.start[0] for e in events)
    rows = sum(map(len, timelines.values()))
    labels = {id(row): _cells(row) for timeline in timelines.values() for row in timeline}
    longest = max(len(f"{action.microbatch}{letter}") for cells in labels.values() for action, letter in cells)
    unit = max(1 / 3, INCHES * (longest + 0.5) / shortest)  # inches of a unit of time
    width = min(WIDEST, max(7.0, end * unit))
    with picture(path, 2 + width, 1 + 0.6 * len(timelines) + 0.4 * rows) as axes:
        ticks, at = {}, 0.0
        for title, timeline in timelines.items():
            of_wall, of_ideal = bubble(timeline)
            title = f"{title}: bubble {of_wall:.4g} of wall time, {of_ideal:.4g} of ideal time"
            axes.text(0, at - 0.7, title, ha="left", va="bottom", fontsize=9)
            for rank, row in enumerate(timeline):
                ticks[at] = rank
                axes.barh(at, max(r[-1].end[0] for r in timeline), height=0.9, color="#eef0f3")  # what is not covered
                spans = [(event.start[0], event.end[0] - event.start[0]) for event in row]
                colours = [ACTIONS[event.label.kind] for event in row]
                axes.broken_barh(spans, (at - 0.45, 0.9), facecolors=colours, edgecolor="white")
                for (start, length), (action, letter) in zip(spans, labels[id(row)], strict=True):
                    text = f"{action.microbatch}{letter}"
                    if len(text) * INCHES <= length * width / end:
                        axes.text(start + length / 2, at, text, ha="center", va="center", fontsize=7)
                at += 1
            at += 1.5
        kinds = [kind for kind in KINDS if any(event.label.kind == kind for event in events)]
        handles = [axes.barh(0, 0, color=ACTIONS[kind], label=f"{kind} {KINDS[kind]}") for kind in kinds]
        handles.append(axes.barh(0, 0, color="#eef0f3", label="bubble"))
        if any(letter for cells in labels.values() for _, letter in cells):
            handles.append(axes.barh(0, 0, alpha=0, label="a, b, …: which of the rank's stages"))
        axes.set(xlabel="virtual time (a forward of 1/p of the model = 1)", ylabel="rank", xlim=(0, end))
        axes.set_ylim(at - 1.5, -1.6)
        axes.set_yticks([*ticks], [*ticks.values()])
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def to_trace(timeline: Timeline) -> str:
    """The timeline under every cost model of the clock, in the trace event format; a unit of time is 1 ms there."""
    events = []
    for model, name in enumerate(VirtualClock.COSTS):
        events.append({"ph": "M", "pid": model, "name": "process_name", "args": {"name": f"{name} costs"}})
        scale = 1e3 if name == "unit" else 1e6  # to microseconds
        for rank, row in enumerate(timeline):
            where = {"pid": model, "tid": rank}
            events.append({"ph": "M", **where, "name": "thread_name", "args": {"name": f"rank {rank}"}})
            for action, start, end in row:
                begin, length = start[model] * scale, (end[model] - start[model]) * scale
                what = {"name": str(action), "cat": KINDS[action.kind]}
                events.append({"ph": "X", **where, **what, "ts": begin, "dur": length})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
