"""Draw a timeline: in the terminal, as SVG, and as a trace for Perfetto or chrome://tracing."""

import json
import re
from collections.abc import Sequence

from core.ledger import Event, VirtualClock
from core.plot import picture

Timeline = Sequence[Sequence[Event]]  # one row a rank
LEGEND = "forward of microbatch 0: 0   its backward: [0 ]   idle: .   one forward lasts 1, one backward 2"
_TERMINAL = {"F": "\033[44;97m", "B": "\033[42;30m"}
_PLOT = {"F": "#9ec5f4", "B": "#a8d8a0"}


def _parts(event: Event) -> tuple[str, str]:
    """Kind and microbatch of an event."""
    return re.fullmatch(r"\d+([A-Z]+)(\d+)", event.label).groups()


def draw(timeline: Timeline, colour: bool = False) -> str:
    """The timeline in unit costs as text, one row a rank; see LEGEND.

    Args:
        colour: ANSI colours, for a terminal.
    """
    events = [event for row in timeline for event in row]
    width = 1 + max(len(_parts(event)[1]) for event in events)  # columns of a unit of time
    columns = round(width * max(event.end[0] for event in events))
    lines = []
    for rank, row in enumerate(timeline):
        line, at = f"rank {rank:<3}", 0
        for event in row:
            kind, microbatch = _parts(event)
            start, end = round(width * event.start[0]), round(width * event.end[0])
            cell = f"[{microbatch:<{end - start - 2}}]" if kind == "B" else f"{microbatch:<{end - start}}"
            line += (". " * columns)[at:start] + (f"{_TERMINAL[kind]}{cell}\033[0m" if colour else cell)
            at = end
        lines.append(line + (". " * columns)[at:columns])
    return "\n".join(lines)


def plot(path: str, timeline: Timeline, title: str) -> None:
    """Write the timeline in unit costs as an SVG picture."""
    end = max(event.end[0] for row in timeline for event in row)
    with picture(path, min(40, 2 + end / 3), 1 + 0.4 * len(timeline)) as axes:
        for rank, row in enumerate(timeline):
            for event in row:
                kind, microbatch = _parts(event)
                start, length = event.start[0], event.end[0] - event.start[0]
                axes.barh(rank, length, left=start, height=0.9, color=_PLOT[kind], edgecolor="white")
                axes.text(start + length / 2, rank, microbatch, ha="center", va="center", fontsize=7)
        axes.set(title=title, xlabel="virtual time (forward = 1, backward = 2)", ylabel="rank", xlim=(0, end))
        axes.set_yticks(range(len(timeline)))
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
                kind = {"F": "forward", "B": "backward"}[_parts(event)[0]]
                events.append({"ph": "X", **where, "name": event.label, "cat": kind, "ts": start, "dur": end - start})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
