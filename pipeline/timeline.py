"""Draw a timeline: in the terminal, as SVG, and as a trace for Perfetto or chrome://tracing."""

import json
import re
from collections.abc import Mapping, Sequence

from core.proof.clock import Event, VirtualClock
from core.proof.plot import picture
from pipeline.schedules import Schedule, held, part_of_rank, size

Timeline = Sequence[Sequence[Event]]  # one row a rank
_TERMINAL = {"F": "\033[44;97m", "B": "\033[42;30m", "I": "\033[46;30m", "W": "\033[43;30m"}
_PLOT = {"F": "#9ec5f4", "B": "#a8d8a0", "I": "#9fd9d2", "W": "#f2d48f"}


def legend(schedule: Schedule) -> str:
    """What the cells of `draw` mean."""
    split = any(action.kind == "I" for row in schedule for action in row)
    stages = size(schedule)[0]
    parts = ["forward of microbatch 0: 0"]
    parts.append("its backward: [0 ]" if not split else "backward: [0 ], or of the input <0 and of the weights w0")
    if max(map(len, held(schedule))) > 1:
        parts.append("a, b, ... : which of the rank's stages, in order")
    same = f"one forward lasts {_number(len(schedule) / stages)}, one backward twice that"
    return "   ".join([*parts, "idle: .", same])


def _number(value: float) -> str:
    return f"{value:.3g}"


def _parts(event: Event) -> tuple[int, str, str]:
    """Stage, kind and microbatch of an event."""
    stage, kind, microbatch = re.fullmatch(r"(\d+)([A-Z]+)(\d+)", event.label).groups()
    return int(stage), kind, microbatch


def _cells(row: Sequence[Event]) -> list[str]:
    """What is written on each event of a rank."""
    stages = sorted({_parts(event)[0] for event in row})
    marks = {"F": "", "B": "[", "I": "<", "W": "w"}
    return [
        marks[kind] + microbatch + (chr(ord("a") + stages.index(stage)) if len(stages) > 1 else "")
        for stage, kind, microbatch in map(_parts, row)
    ]


def draw(schedule: Schedule, timeline: Timeline, colour: bool = False) -> str:
    """The timeline of a schedule in unit costs as text, one row a rank; see `legend`.

    Args:
        colour: ANSI colours, for a terminal.
    """
    cells = [_cells(row) for row in timeline]
    width = 1 + max(len(cell) for row in cells for cell in row if "[" not in cell)  # columns of a forward
    idle = "." + " " * (width - 1)
    width = round(width / part_of_rank(schedule))  # columns of a unit of time
    columns = round(width * max(row[-1].end[0] for row in timeline))
    lines = []
    for rank, row in enumerate(timeline):
        line, at = f"rank {rank:<3}", 0
        for event, cell in zip(row, cells[rank], strict=True):
            start, end = round(width * event.start[0]), round(width * event.end[0])
            cell = f"{cell:<{end - start}}" if "[" not in cell else f"{cell:<{end - start - 1}}]"
            kind = _parts(event)[1]
            line += (idle * columns)[at:start] + (f"{_TERMINAL[kind]}{cell}\033[0m" if colour else cell)
            at = end
        lines.append(line + (idle * columns)[at:columns])
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
                for event, cell in zip(row, _cells(row), strict=True):
                    start, length = event.start[0], event.end[0] - event.start[0]
                    colour = _PLOT[_parts(event)[1]]
                    axes.barh(at, length, left=start, height=0.9, color=colour, edgecolor="white")
                    axes.text(start + length / 2, at, cell.strip("[<w"), ha="center", va="center", fontsize=7)
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
            for event in row:
                start, end = event.start[model] * scale, event.end[model] * scale
                kind = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradients"}[
                    _parts(event)[1]
                ]
                events.append({"ph": "X", **where, "name": event.label, "cat": kind, "ts": start, "dur": end - start})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
