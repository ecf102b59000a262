"""Draw a timeline: in the terminal, as SVG, and as a trace for Perfetto or chrome://tracing."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from textwrap import fill

from core.proof.clock import Event, VirtualClock
from core.proof.plot import picture
from pipeline.engine.actions import Action, Schedule, size, stage_share, stages_of_ranks
from pipeline.engine.validator import Timeline

KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradients"}
_TERMINAL = {"F": "\033[44;97m", "B": "\033[42;30m", "I": "\033[46;30m", "W": "\033[43;30m"}
_PLOT = {"F": "#9ec5f4", "B": "#a8d8a0", "I": "#9fd9d2", "W": "#f2d48f"}
NUMBER = "rank {:<3}"  # at the start of a line


def show_schedule(schedule: Schedule, timeline: Timeline) -> str:
    """Legend and drawing in unit costs, no wider than the terminal.

    Where the numbers of the micro-batches do not fit, the kinds of the actions are drawn alone, and where that does not
    fit either, the start of it.
    """
    width = shutil.get_terminal_size((120, 24)).columns
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = [_cells(row) for row in timeline]
    digits = 1 + max(len(_numbered(*cell, 0)) for row in rows for cell in row if cell[0].kind != "B")
    share, end = stage_share(schedule), max(row[-1].end[0] for row in timeline)
    columns = round(digits / share)  # of a unit of time
    needed = len(NUMBER.format(0)) + round(columns * end)
    if needed <= width:
        return fill(_legend(schedule), width) + "\n" + _draw(rows, timeline, columns, digits, colour, width)
    columns = round(1 / share)
    note = f"One letter for 1/{columns} of a unit of time" if columns > 1 else "One letter for a unit of time"
    note += f": F forward, B backward, I and W its two parts, . idle. With micro-batches it takes {needed} columns, "
    note += f"here are {width}."
    if len(NUMBER.format(0)) + round(columns * end) > width:
        note += f" Only the start is drawn, of {end:g} units; all with --plot or --csv."
    return fill(note, width) + "\n" + _draw(rows, timeline, columns, 0, colour, width)


def _legend(schedule: Schedule) -> str:
    """What the numbered cells mean."""
    split = any(action.kind == "I" for row in schedule for action in row)
    parts = ["forward of microbatch 0: 0"]
    parts.append("backward: [0 ], or of the input (I) <0 and of the weights (W) w0" if split else "its backward: [0 ]")
    if max(map(len, stages_of_ranks(schedule))) > 1:
        parts.append("a, b, ... : which of the rank's stages, in order")
    same = f"one forward lasts {len(schedule) / size(schedule)[0]:.3g}, one backward twice that"
    return "   ".join([*parts, "idle: .", same])


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


def plot(path: str, timelines: Mapping[str, Timeline]) -> None:
    """Write timelines in unit costs as an SVG picture, under one another, each with its title."""
    end = max(event.end[0] for timeline in timelines.values() for row in timeline for event in row)
    rows = sum(map(len, timelines.values()))
    with picture(path, min(40, 2 + end / 3), len(timelines) + 0.4 * rows) as axes:
        ticks, at = {}, 0
        for title, timeline in timelines.items():
            axes.text(0, at - 0.7, title, ha="left", va="bottom", fontsize=9)
            for rank, row in enumerate(timeline):
                ticks[at] = rank
                for event, (action, letter) in zip(row, _cells(row), strict=True):
                    start, length = event.start[0], event.end[0] - event.start[0]
                    axes.barh(at, length, left=start, height=0.9, color=_PLOT[action.kind], edgecolor="white")
                    text = f"{action.microbatch}{letter}"
                    axes.text(start + length / 2, at, text, ha="center", va="center", fontsize=7)
                at += 1
            at += 1.5
        axes.set(xlabel="virtual time (a forward of 1/p of the model = 1)", ylabel="rank", xlim=(0, end))
        axes.set_yticks([*ticks], [*ticks.values()])
        axes.invert_yaxis()


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
