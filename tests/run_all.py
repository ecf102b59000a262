"""What `run_all.sh` does once it has checked its input: every lesson on forked ranks, and one summary table.

python -m tests.run_all RANKS LESSON...      a lesson may have flags: "cluster/train.py --dp 8"

With PAGES=FOLDER in the environment each lesson writes its page there, and an index leads to them all.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from textwrap import fill

from tabulate import tabulate

from cluster import explore as memory
from core.proof.files import write_file
from core.proof.language import catalogue
from core.proof.page.page import entry, index
from core.proof.terminal import columns, measure
from pipeline import explore as schedules
from tests.pool import Outcome, Pool, Running

STEPS = "2"
MORE = (
    ("schedules.html", ("Explorer of pipeline schedules", "流水线调度探索器")),
    ("memory.html", ("Explorer of memory", "显存探索器")),
)
BY_THE_CLOCK = "cluster/topology.py"  # claims what it measures in seconds: runs alone. The others run two at a time


os.environ["COLUMNS"] = str(columns())  # the ranks write to files


def show(lesson: str, ranks: int, outcome: Outcome, report: Path) -> tuple[str, str, str, str]:
    """Print what it said; its row of the summary."""
    print(outcome.out, flush=True)
    claims = json.loads(report.read_text())["claims"] if report.exists() else []
    held = sum(claim["holds"] for claim in claims)
    chinese = catalogue("zh")
    lacking = {claim[part] for claim in claims for part in ("claim", "formula") if chinese.missing(claim[part])}
    widest = max(map(measure, outcome.out.splitlines()), default=0)
    fits = widest <= columns()
    good = outcome.codes == [0] * ranks and held == len(claims) > 0 and fits and not lacking
    if not good:
        print(f"exit codes {outcome.codes}\n{outcome.err}", flush=True)
    if not fits:
        print(f"a line of {widest} columns, where the terminal has {columns()}", flush=True)
    for text in sorted(lacking):
        print(f"no Chinese, in {lesson.split('/')[0]}/texts/zh.po, for: {text}", flush=True)
    shown = f"{held} of {len(claims)}" if claims else "no report"
    return lesson, shown, f"{outcome.seconds:.0f}", "ok" if good else "FAILED"


def pages_of(lessons: list[str]) -> list[str]:
    """A file name for the page of each lesson: `pipeline-1f1b.html`, with a number where one runs more than once."""
    names: list[str] = []
    for lesson in lessons:
        name = lesson.split()[0].removesuffix(".py").replace("/", "-")
        again = sum(other.split()[0] == lesson.split()[0] for other in lessons[: len(names)])
        names.append(f"{name}-{again + 1}.html" if again else f"{name}.html")
    return names


def main(ranks: int, lessons: list[str], folder_of_pages: str = "") -> int:
    pool, rows = Pool(), []
    running: list[tuple[str, Running, Path]] = []
    pages = pages_of(lessons)

    def end_first() -> None:
        lesson, job, report = running.pop(0)
        print(f"\n======== torchrun --nproc_per_node={ranks} {lesson} --steps {STEPS}", flush=True)
        try:
            rows.append(show(lesson, ranks, job.end(), report))
        except AssertionError as hung:
            print(hung, flush=True)
            rows.append((lesson, "hung", "300", "FAILED"))

    with tempfile.TemporaryDirectory() as folder:
        for i, lesson in enumerate(lessons):
            alone = lesson.startswith(BY_THE_CLOCK)
            while len(running) > (0 if alone or any(name.startswith(BY_THE_CLOCK) for name, *_ in running) else 1):
                end_first()
            report = Path(folder, f"{i}.json")
            script, *flags = lesson.split()
            flags += ["--page", str(Path(folder_of_pages, pages[i]))] if folder_of_pages else []
            job = pool.start(ranks, script, *flags, "--steps", STEPS, "--report", str(report), timeout=300)
            running.append((lesson, job, report))
        while running:
            end_first()
    pool.close()
    if folder_of_pages:
        there = Path(folder_of_pages)
        entries = [entry(lesson, there / page) for lesson, page in zip(lessons, pages, strict=True)]
        write_file(str(there / "schedules.html"), schedules.page())
        write_file(str(there / "memory.html"), memory.page())
        write_file(str(there / "index.html"), index(entries, MORE))
    rows = [(fill(lesson, max(30, columns() - 33)), *others) for lesson, *others in rows]
    print("\n" + tabulate(rows, ("lesson", "claims held", "seconds", "")))
    return int(any(row[-1] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:], os.environ.get("PAGES", "")))
