"""What a lesson draws, as plain data: the page shows it (`page/`), and charts are what `--plot` writes (`plot.py`).

A text that is read is a pair, English and Chinese; names from the code, the papers' letters and numbers are one string.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Words = tuple[str, str] | str
Figure = dict[str, Any]  # JSON; its "kind" says which function below has made it

# The same in the terminal's pictures, in `--plot` and on the page: of the actions of a pipeline, and of anything else.
ACTIONS = {"F": "#8fbdf2", "B": "#9ad39a", "I": "#7fd1c7", "W": "#f0cd7a"}
SERIES = ("#5b8fd6", "#e0913f", "#57a86b", "#c76a8b", "#8a78c9", "#b3a03a", "#4fa9b8", "#a0775a")


def bars(
    title: Words,
    unit: Words,
    groups: Sequence[Words],
    series: Mapping[str, Sequence[float]],
    *,
    stacked: bool = False,
    expected: Sequence[float] | None = None,
    formula: Words = "",
    note: Words = "",
) -> Figure:
    """For each group a bar of each series, or one bar of all of them.

    Args:
        expected: what the formula says of each group's bar, where it is one; a mark across it.
    """
    return {
        "kind": "bars", "title": title, "unit": unit, "groups": [*groups], "stacked": stacked, "note": note,
        "series": {name: [float(v) for v in values] for name, values in series.items()},
        "expected": None if expected is None else [float(v) for v in expected], "formula": formula,
    }  # fmt: skip


def lines(title: Words, x: Words, y: Words, series: Mapping[str, Sequence[float]], note: Words = "") -> Figure:
    """A line for each series, its first value at 0."""
    values = {name: [float(v) for v in each] for name, each in series.items()}
    return {"kind": "lines", "title": title, "x": x, "y": y, "series": values, "note": note}


def scatter(
    title: Words, x: Words, y: Words, points: Sequence[tuple[str, float, float, str]], note: Words = "",
    diagonal: bool = False,
) -> Figure:  # fmt: skip
    """Points (label, x, y, series); with `diagonal` the line where x is y, too."""
    return {"kind": "scatter", "title": title, "x": x, "y": y, "points": [[*p] for p in points], "note": note,
            "diagonal": diagonal}  # fmt: skip


def grid(
    title: Words,
    corner: Words,
    columns: Sequence[Words],
    rows: Sequence[tuple[Words, Sequence[tuple[Words, float | str | None]]]],
    legend: Mapping[str, Words] | None = None,
    note: Words = "",
) -> Figure:
    """A table with coloured cells.

    Args:
        corner: what rows and columns are.
        rows: name and cells; a cell is its text and its colour: a number is a shade, the larger the stronger; a string
            is one of SERIES, "0" to "7"; None is no colour.
        legend: what a colour means.
    """
    cells = [[name, [[*cell] for cell in row]] for name, row in rows]
    return {"kind": "grid", "title": title, "corner": corner, "columns": [*columns], "rows": cells,
            "legend": dict(legend or {}), "note": note}  # fmt: skip


def shards(title: Words, tensors: Sequence[tuple[str, Sequence[int], int | None, Words]], ranks: int, note: Words = ""
           ) -> Figure:  # fmt: skip
    """How tensors are cut.

    Args:
        tensors: name; shape of the full one; the dimension that is cut in `ranks` bands, rank 0's first, or None where
            every rank has all of it; and in words how.
    """
    return {"kind": "shards", "title": title, "tensors": [[n, [*s], d, how] for n, s, d, how in tensors],
            "ranks": ranks, "note": note}  # fmt: skip


def owners(title: Words, parts: Sequence[Words], ranks: Sequence[Sequence[Sequence[tuple[float, float]]]], size: int,
           note: Words = "") -> Figure:  # fmt: skip
    """Which elements each rank has, of several things that are `size` elements each.

    Args:
        parts: names of the things.
        ranks: of each rank, for each part: runs of elements, from and to.
    """
    return {"kind": "owners", "title": title, "parts": [*parts], "size": size, "note": note,
            "ranks": [[[[a, b] for a, b in part] for part in rank] for rank in ranks]}  # fmt: skip


def path(title: Words, stops: Sequence[tuple[Words, Words, str]], note: Words = "") -> Figure:
    """What happens to one thing: (where, what, its shape or numbers), in order."""
    return {"kind": "path", "title": title, "stops": [[*stop] for stop in stops], "note": note}


def together(title: Words, world: int, kinds: Mapping[str, tuple[Words, Sequence[Sequence[int]]]], note: Words = ""
           ) -> Figure:  # fmt: skip
    """Which ranks work together on what, for a rank that is chosen on the page."""
    return {"kind": "groups", "title": title, "world": world, "note": note,
            "kinds": {name: [what, [[*g] for g in found]] for name, (what, found) in kinds.items()}}  # fmt: skip
