"""Put together one self-contained page: templates, styles, scripts and the numbers, in one file."""

import argparse
import html
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from core.ledger import Traffic
from core.proof.evidence import Row, number
from core.proof.figures import ACTIONS, SERIES, Figure, Words, bars, grid, lines
from core.proof.files import check_writable, write_file
from core.proof.language import catalogue

STATIC = files("core.proof.page") / "static"
CHARTS = ("bars", "lines", "scatter")
SCRIPTS = ("common.js", "figures.js", "timeline.js")


def both(words: Words) -> Markup:
    """A text in both languages, of which the page shows one."""
    if isinstance(words, str):
        return Markup(html.escape(words))
    english, chinese = map(html.escape, words)
    return Markup(f'<span lang="en">{english}</span><span lang="zh">{chinese}</span>')


def known(text: str) -> Markup:
    """A text of a report or a claim in both languages."""
    return both((text, catalogue("zh").gettext(text)))


def texts_of(figures: Any) -> Iterator[str]:
    """All strings of figures that are not pairs of English and Chinese."""
    if isinstance(figures, str):
        yield figures
    elif isinstance(figures, Mapping):
        for key, value in figures.items():  # of a figure only values are shown, of its series names, too
            yield from texts_of(value)
            if "kind" not in figures:
                yield key
    elif isinstance(figures, list):
        yield from (text for each in figures for text in texts_of(each))


def chinese(texts: Iterable[str]) -> dict[str, str]:
    """What is known of these."""
    made = {text: catalogue("zh").gettext(text) for text in set(texts)}
    return {text: words for text, words in sorted(made.items()) if words != text}


def assemble(template: str, data: Any, scripts: Sequence[str], package: str = "core.proof.page", **values: Any) -> str:
    """The page that `template` of `package` makes, self-contained.

    Args:
        data: JSON that the scripts find in the page; the texts of its "figures", and its "names", in Chinese, too.
        scripts: more of them than SCRIPTS, as text.
        values: of the template.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined  # a tenth of a second, on every rank

    loader = ChoiceLoader([PackageLoader(each) for each in dict.fromkeys((package, "core.proof.page"))])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"T": lambda *words: both(words), "both": both, "known": known, "number": number}
    colours = "".join(f"--{kind}:{value};" for kind, value in ACTIONS.items())
    colours += "".join(f"--s{i}:{value};" for i, value in enumerate(SERIES))
    style = f":root{{{colours}}}\n{(STATIC / 'page.css').read_text('utf-8')}"
    code = "\n".join([*((STATIC / name).read_text("utf-8") for name in SCRIPTS), *scripts])
    data = {**data, "words": chinese([*texts_of(data["figures"]), *data.get("names", ())])}
    inline = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return environment.get_template(template).render(
        style=Markup(style), code=Markup(code), data=Markup(inline), **values
    )


def write_page(module: str, what: str, page: Callable[[], str]) -> int:
    """The command line of a tool that writes one page to `--out`; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=what)
    parser.add_argument("--out", metavar="FILE.html", required=True)
    args = parser.parse_args()
    try:
        check_writable("--out", args.out)
    except ValueError as error:
        parser.error(str(error))
    write_file(args.out, page())
    return 0


# ---- The page of a lesson --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A row of an evidence table, and where in the report its cases are."""

    row: Row
    first: int


def render(frame: Any, run: Any, report: Mapping[str, Any], sent: Mapping[str, Sequence[Any]]) -> str:
    """The page of a run.

    Args:
        frame, run: the `Lesson` and its `Run`, from `core.proof.lesson`, which imports this file.
        report: as `--report` writes it; the page has it, and its tables show its numbers.
        sent: what every rank has sent, by version.
    """
    tables: dict[bool, list[Shown]] = {False: [], True: []}
    at = 0
    for row in run.evidence.rows:
        tables[row.correctness].append(Shown(row, at))
        at += len(row.cases)
    for rows in tables.values():
        rows.sort(key=lambda shown: shown.row.holds)  # a failed one first; else in their order
    sections = {
        "technique": sorted(run.figures, key=lambda figure: figure["kind"] in CHARTS),  # pictures before them
        "memory": memory(run),
        "bytes": traffic(run, sent),
        "loss": losses(run),
    }
    figures = [figure for some in sections.values() for figure in some]
    numbers = {name: [figures.index(f) for f in some] for name, some in sections.items()}
    failed = sum(not claim.holds for claim in run.evidence.claims)
    return assemble(
        "lesson.html", {"report": report, "figures": figures}, (),
        frame=frame, report=report, idea=idea(frame.path), numbers=numbers, tables=tables, failed=failed,
        command=command(frame, run),
    )  # fmt: skip


WRITTEN = ("--page", "--report", "--plot", "--trace", "--json")  # flags that name a file to write


def command(frame: Any, run: Any) -> str:
    """What starts this run again, but for the files that it has written."""
    flags, given = [], iter(sys.argv[1:])
    for word in given:
        if word in WRITTEN:
            next(given, None)
        elif word.split("=")[0] not in WRITTEN:
            flags.append(word)
    return shlex.join(["torchrun", f"--nproc_per_node={run.job.world_size}", frame.script, *flags])


def idea(script: Path) -> tuple[str, str] | None:
    """The lesson in a few lines, English and Chinese: the two paragraphs of its file in `texts/`."""
    file = script.parent / "texts" / f"{script.stem}.txt"
    if not file.exists():
        return None
    english, chinese = (" ".join(part.split("\n")) for part in file.read_text("utf-8").strip().split("\n\n"))
    return english, chinese


def named(title: tuple[str, str], version: str) -> tuple[str, str]:
    """A title, and of which version it is."""
    english, words = title
    return (f"{english}, {version}", f"{words}，{catalogue('zh').gettext(version)}") if version else title


def memory(run: Any) -> list[Figure]:
    """Bytes that each rank holds, of the last version trained: the fast one, for which the formula is, if there is one.

    Of the plain one too, where there is no formula.
    """
    shown = list(run.held.items())[-1:] if run.formula else list(run.held.items())
    found = []
    for name, ranks in shown:
        if not ranks:
            continue
        kinds = list(dict.fromkeys(kind for rank in ranks for kind in rank))
        series = {kind: [rank.get(kind, 0) / 1e6 for rank in ranks] for kind in kinds}
        formula, expected = run.formula or ("", None)
        title = named(("What each rank holds at the end, MB", "结束时各 rank 持有的字节，MB"), name)
        groups = [f"rank {rank}" for rank in range(len(ranks))]
        mb = [value / 1e6 for value in expected] if expected else None
        found.append(bars(title, "MB", groups, series, stacked=True, expected=mb, formula=formula))
    return found


def traffic(run: Any, sent: Mapping[str, Sequence[Mapping[tuple[str, str], Traffic]]]) -> list[Figure]:
    """Bytes that each rank has sent, by axis and operation."""
    found = []
    for name, ranks in sent.items():
        kinds = sorted({kind for rank in ranks for kind in rank if rank[kind].bytes}, key=lambda kind: kind[::-1])
        if not kinds:
            continue
        most = max(each.bytes for rank in ranks for each in rank.values())
        rows = []
        for operation, axis in kinds:
            values = [rank[operation, axis].bytes if (operation, axis) in rank else 0 for rank in ranks]
            rows.append((f"{axis}: {operation}", [(number(round(value)), value / most) for value in values]))
        title = named(("Bytes sent by each rank in all of the run", "整个运行中各 rank 发送的字节"), name)
        note = ("Counted where it is sent: a ring's share of what the rank hands over.", "在发送处计数：按环算法折算。")
        columns = [f"rank {rank}" for rank in range(len(ranks))]
        found.append(grid(title, ("axis: operation", "轴：操作"), columns, rows, note=note))
    return found


def losses(run: Any) -> list[Figure]:
    if not run.losses:
        return []
    series = {"on the ranks": run.losses}
    note: Words = ""
    if run.reference_losses and len(run.reference_losses) == len(run.losses):
        series["one process"] = run.reference_losses
        apart = max(abs(a - b) for a, b in zip(run.losses, run.reference_losses, strict=True))
        note = f"largest difference {apart:.2g}", f"最大差异 {apart:.2g}"
    return [lines(("Loss, beside one process", "损失，与单进程对照"), ("step", "步"), ("loss", "损失"), series, note)]


# ---- The index of a folder of pages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A lesson in the index; without a page it has written none."""

    lesson: str
    lecture: str
    title: tuple[str, str]
    held: int
    claims: int
    seconds: float
    page: str | None


def entry(lesson: str, page: Path) -> Entry:
    """Of a lesson that has written this page, by what stands in it."""
    if not page.exists():
        return Entry(lesson, "", (lesson, lesson), 0, 0, 0.0, None)
    text = page.read_text("utf-8")
    report = numbers_of(text)["report"]
    english, chinese = html.unescape(text.split("<title>")[1].split("</title>")[0]).split(" · ", 1)
    held = sum(claim["holds"] for claim in report["claims"])
    return Entry(
        lesson, report["lecture"], (english, chinese), held, len(report["claims"]), report["seconds"], page.name
    )


def numbers_of(page: str) -> Any:
    """The JSON that a page has."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def index(entries: Sequence[Entry], more: Sequence[tuple[str, Words]] = ()) -> str:
    """The page that leads to all others. `more`: others than lessons, file and title."""
    return assemble("index.html", {"figures": []}, (), rows=entries, more=more)
