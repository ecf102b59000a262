"""What is printed fits the terminal: prose is wrapped, wide tables go on below, drawings are cut, which is said."""

import os
import re
import shutil
import sys
from itertools import pairwise
from textwrap import wrap
from unicodedata import east_asian_width

UNKNOWN = 80  # columns where nobody says how many there are
RULE = re.compile(r"-+(  -+)+")  # under the heads of a table
COLOUR = re.compile(r"\033\[[\d;]*m")
FILLER = "\0"
CLOSING = "，。；：、）"  # begin no line


def columns() -> int:
    """Of the terminal, or of what COLUMNS says."""
    return shutil.get_terminal_size((UNKNOWN, 24)).columns


def coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def measure(line: str) -> int:
    """Columns that a line takes; a Chinese character takes two."""
    return sum((c != FILLER) + (east_asian_width(c) in "WF") for c in COLOUR.sub("", line))


def stretched(text: str) -> str:
    """With a FILLER behind each Chinese character: then a column of the terminal is a place in the string."""
    return "".join(c + FILLER if east_asian_width(c) in "WF" else c for c in text)


def fit(text: str, width: int | None = None) -> str:
    """`text` with no line wider than `width`, of which the default is the terminal's."""
    width = width or columns()
    lines, made, at = stretched(text).split("\n"), [], 0
    while at < len(lines):
        if measure(lines[at]) <= width:
            made.append(lines[at])
            at += 1
            continue
        first, end = _block(lines, at)
        block = lines[first:end]
        rule = next((i for i, line in enumerate(block) if RULE.fullmatch(line.rstrip())), None)
        if rule is None and "  " not in lines[at].strip() and not {*lines[at]} & {*"│─"}:  # prose
            made += wrapped(lines[at], width)
            at += 1
            continue
        del made[len(made) - (at - first) :]
        framed = block[0].startswith("┌") and len(set(map(len, block))) == 1
        made += _frames(block, width) if framed else _cut(block, width) if rule is None else _parts(block, rule, width)
        at = end
    return "\n".join(made).replace(FILLER, "")


def _block(lines: list[str], at: int) -> tuple[int, int]:
    """The lines around this one up to empty ones: a table or a drawing."""
    first, end = at, at
    while first and lines[first - 1].strip():
        first -= 1
    while end < len(lines) and lines[end].strip():
        end += 1
    return first, end


def wrapped(line: str, width: int) -> list[str]:
    """Words in lines; Chinese between any two characters, because there are no blanks."""
    line = line.replace(FILLER, "")
    if measure(line) == len(line):
        return wrap(line, width)
    made = [""]
    for word in re.findall(rf"(?:[!-~]{{1,{width - 2}}}|.)[{CLOSING}]*", line):
        if measure(made[-1] + word) > width:
            made.append("")
        made[-1] = (made[-1] + word).lstrip() if len(made) > 1 else made[-1] + word
    return made


def _cut(block: list[str], width: int) -> list[str]:
    most = max(map(measure, block))
    note = f"({most - width} columns more on the right: COLUMNS={most} shows all)"
    return [line if measure(line) <= width else _head(line, width) for line in block] + wrap(note, width)


def _head(line: str, width: int) -> str:
    """The start of a line, `width` columns of it; colours do not count."""
    made, used = "", 0
    for part in re.split(f"({COLOUR.pattern})", line):
        if COLOUR.fullmatch(part):
            made += part
            continue
        for c in part:
            used += measure(c)
            made += c if used <= width else ""
    return made


def _frames(block: list[str], width: int) -> list[str]:
    """The same as `_parts` of a table in a frame."""
    borders = [i for i, c in enumerate(block[0]) if c in "┌┬┐"]
    first, *others = pairwise(borders)
    if max(end - start for start, end in others) + first[1] >= width:
        return _cut(block, width)
    made, some = [], []
    for span in [*others, None]:
        if some and (span is None or first[1] + sum(b - a for a, b in [*some, span]) >= width):
            for line in block:
                made.append(line[: first[1]] + "".join(line[a:b] for a, b in some) + line[-1])
            some = []
        some += [span] * (span is not None)
    return made


def _parts(block: list[str], rule: int, width: int) -> list[str]:
    """A table, a few of its columns at a time under one another, each time with the first one; then nothing is lost.

    Lines above and below that are no rows of it, because they have letters between its columns, are wrapped.
    """
    spans = [match.span() for match in re.finditer("-+", block[rule])]

    def is_row(line: str) -> bool:
        return not any(line[end:start].strip() for (_, end), (start, _) in pairwise(spans))

    header = next(i for i in range(rule, -1, -1) if i == 0 or not is_row(block[i - 1]))
    footer = next((i for i in range(rule + 1, len(block)) if not is_row(block[i])), len(block))
    table = block[header:footer]
    above, below = (
        [part for line in some for part in wrapped(line, width)] for some in (block[:header], block[footer:])
    )
    (_, first), *others = spans
    if max(map(measure, table)) <= width:
        return above + table + below
    if any(measure(line) != len(line) for line in table) or max(b - a for a, b in others) + 2 + first > width:
        return above + _cut(table, width) + below
    made, some = [], []
    for span in [*others, None]:
        if some and (span is None or first + sum(2 + b - a for a, b in [*some, span]) > width):
            made += [""] * bool(made)
            made += ["  ".join([line[:first].ljust(first), *(line[a:b].ljust(b - a) for a, b in some)]).rstrip()
                     for line in table]  # fmt: skip
            some = []
        some += [span] * (span is not None)
    return above + made + below
