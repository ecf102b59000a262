"""The frame of a lesson: arguments, title, progress bar, evidence table, report and exit code.

Exit codes: 0 every claim held; 1 a claim failed, or the run stopped; 2 the configuration or the input was refused.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from core.ledger import TOTAL, Ledger, Traffic
from core.model.precision import POLICIES, Precision
from core.proof.evidence import Claim, Evidence
from core.proof.figures import Figure
from core.proof.files import Unwritable, check_writable, write_file
from core.proof.language import ENGLISH, LANGUAGES, Catalogue, catalogue, laid_out, language_of
from core.proof.launch import (
    SHORTEST_TIMEOUT,
    Job,
    ProcessInfo,
    choose_device,
    launch,
    process_info,
    speaks_for_machine,
)
from core.proof.page.page import render
from core.proof.plot import plot
from core.proof.stragglers import Phases, slowest_of
from core.proof.terminal import columns, fit, wrapped

DTYPES = ("float64", "float32", "bfloat16")  # each with its usual policy


@dataclass
class Run:
    """What a lesson works with while it runs."""

    args: argparse.Namespace
    job: Job
    precision: Precision
    known: Catalogue = ENGLISH  # of what is printed
    evidence: Evidence = field(default_factory=Evidence)
    mesh: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    training_seconds: float = 0.0
    tokens: int = 0
    figures: list[Figure] = field(default_factory=list)  # of the page, on rank 0
    held: dict[str, list[dict[str, int]]] = field(default_factory=dict)  # by version: bytes of each rank, on rank 0
    formula: tuple[str, list[float]] | None = None  # of those bytes, of all kinds together, on each rank
    sent: dict[str, Ledger] = field(default_factory=dict)  # by version: this rank's in all steps; else all it has sent
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # by version: this rank's seconds in each phase

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return self.precision.parameters

    def say(self, text: str = "", known: bool = False) -> None:
        """Print on rank 0, no wider than the terminal, in the reader's language, which `known` text has already."""
        if self.job.rank == 0:
            try:
                print(fit(text if known else self.known.printed(text)), flush=True)
            except BrokenPipeError:  # of `| head`: nobody reads on, and the run goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @property
    def page(self) -> bool:
        """Whether a page is to be written."""
        return getattr(self.args, "page", None) is not None

    def spent(self, version: str, seconds: dict[str, float]) -> None:
        """Enter the seconds of this rank in each phase of a step."""
        total = self.phases.setdefault(version, {})
        for phase, some in seconds.items():
            total[phase] = total.get(phase, 0.0) + some

    def draw(self, figure: Figure, chart: bool = False) -> None:
        """Put a figure on the page; call it on rank 0. A `chart` is what `--plot` writes, too."""
        self.figures.append(figure)
        if chart and self.args.plot:
            plot(self.args.plot, figure)

    def say_course(self, rows: Iterable[tuple[str, str, str, str]]) -> None:
        """What the course's practice prints, what is right, and why they differ: (of what, printed, right, why)."""
        header, room = ["", "the course prints", "right", "why"], min(columns(), 110) - 6
        widths = (room * 16 // 104, room * 24 // 104, room * 20 // 104, room * 44 // 104)
        said = [map(self.known.gettext, row) for row in rows]
        cells = [["\n".join(wrapped(text, room)) for text, room in zip(row, widths, strict=True)] for row in said]
        self.say("\n" + "\n".join(laid_out([*map(self.known.gettext, header)], cells)), known=True)

    def steps(self, what: str = "training") -> tqdm:
        """The steps as a progress bar, on rank 0."""
        words = [*map(self.known.gettext, (what, "step"))]
        return tqdm(range(self.args.steps), desc=words[0], unit=words[1], disable=self.job.rank != 0, file=sys.stderr)


class Lesson:
    """One script beside one slide.

    Args:
        path: the script's `__file__`.
        lecture: number of the lecture, as in "08", or of the practice, as in "CODE 02".
        title: English title.
        title_zh: Chinese title, as the course gives it.
        summary: one or two sentences for `--help`.
        smallest: fewest ranks that make sense.
        example: ranks in the command that a hint shows.
        fewest_steps: that make sense.
    """

    def __init__(
        self, path: str, lecture: str, title: str, title_zh: str, summary: str, smallest: int = 1, example: int = 8,
        fewest_steps: int = 1,
    ):  # fmt: skip
        self.script, self.path = "/".join(Path(path).parts[-2:]), Path(path)
        self.lecture, self.title, self.title_zh = lecture, title, title_zh
        self.smallest, self.example, self.fewest_steps = smallest, example, fewest_steps
        self.heading = lecture if lecture.startswith("CODE") else f"Lecture {lecture}"
        self.parser = _Parser(prog=self.script, description=f"{self.heading}: {title} ({title_zh}). {summary}")
        flag = self.parser.add_argument
        flag("--steps", type=int, default=20, help="training steps (default %(default)s)")
        flag("--seed", type=int, default=0, help="seed of weights, batches and dropout (default %(default)s)")
        flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are enough")
        flag("--share-gpu", action="store_true", help="several ranks on one GPU, with --device cuda")
        flag("--dtype", choices=DTYPES, default="float64", help="default %(default)s, which proves most")
        flag("--data", metavar="FILE", help="text to train on (default: CPython's help text)")
        flag("--report", metavar="FILE.json", help="write the evidence as JSON")
        flag("--plot", metavar="FILE.svg", help="draw the lesson's diagram; needs the extra 'plot'")
        flag("--page", metavar="FILE.html", help="write what one sees of the run as a page, English and Chinese")
        flag("--lang", choices=LANGUAGES, help="of what is printed (default: what LANG says)")
        flag("--timeout", type=float, default=60.0, help="seconds any wait may take (default %(default)s)")
        what = "compare shape and type between ranks before each collective and message"
        flag("--check-messages", action="store_true", help=what)

    def main(self, check: Callable[[argparse.Namespace, int], None], teach: Callable[[Run], None]) -> int:
        """Run the lesson; the exit code.

        Args:
            check: refuses arguments that do not fit each other or the number of ranks, by ValueError, before any
                process group exists.
            teach: the lesson itself, on every rank.
        """
        here, known = process_info(), catalogue(language_of(sys.argv[1:]))
        sys.stdout.reconfigure(errors="replace")  # a terminal without Chinese must not end the lesson
        sys.stderr.reconfigure(errors="replace")
        try:
            args = self.parser.parse_args()
            self._check_common(args, here)
            check(args, here.world_size)
            device, why = choose_device(args.device, here, args.share_gpu)
        except ValueError as error:
            return self._refuse(known.gettext(str(error)), here)
        except SystemExit:  # --help, which rank 0 has printed
            return 0
        began = time.perf_counter()
        with launch(device, args.timeout, args.check_messages, known, share=args.share_gpu) as job:
            run = Run(args, job, POLICIES[args.dtype], known)
            run.say(f"{self.heading}: {self.title} · {self.title_zh}")
            ranks = f"{here.world_size} rank" + "s" * (here.world_size > 1)
            run.say(f"{self.script} on {ranks}, {job.backend} on {device.type} ({why}), {args.dtype}\n")
            teach(run)
            sent = gather_sent(run) if run.page else {}
            phases, failed = gather_phases(run), None
            if job.rank == 0:
                lost = self._conclude(run, time.perf_counter() - began, sent, phases)
                failed = "\n".join(filter(None, (run.evidence.failed(known), *map(known.gettext, lost))))
            if failed:
                say_last(failed)
            failed = job.share(failed)
        return 1 if failed else 0

    def _check_common(self, args: argparse.Namespace, here: ProcessInfo) -> None:
        if here.world_size < self.smallest:
            command = f"torchrun --nproc_per_node={self.example} {self.script}"
            if not here.by_torchrun:
                raise ValueError(f"this lesson needs several ranks, start it with: {command}")
            raise ValueError(f"--nproc_per_node {here.world_size}: at least {self.smallest} ranks; use {command}")
        if args.steps < self.fewest_steps:
            raise ValueError(f"--steps {args.steps}: at least {self.fewest_steps or 'no'} step; use --steps 20")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed {args.seed}: must be in [0, 2^63); use --seed 0")
        if not SHORTEST_TIMEOUT <= args.timeout <= 86400:  # also refuses NaN
            raise ValueError(f"--timeout {args.timeout}: must be in [{SHORTEST_TIMEOUT:.0f}, 86400]; use --timeout 60")
        if args.plot and find_spec("matplotlib") is None:
            raise ValueError(f"--plot {args.plot}: needs matplotlib; pip install -e '.[plot]', or leave --plot out")
        if here.node == 0:  # where rank 0 is, which writes
            taken: dict[str, str] = {}
            for name in ("report", "plot", "page", "trace", "export"):
                path = getattr(args, name, None)
                if path is not None and (name != "export" or Path(path).suffix == ".safetensors"):
                    check_writable(f"--{name}", path)
                    if (first := taken.setdefault(os.path.realpath(path), name)) != name:
                        raise ValueError(f"--{name} {path}: --{first} writes that file; use another name")

    def _refuse(self, message: str, here: ProcessInfo) -> int:
        # torchrun ends all ranks as soon as one exits: the one that speaks must not be ended before it has.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if speaks_for_machine(here):
            print(f"{self.script}: {message}", file=sys.stderr, flush=True)
        return 2

    def _conclude(self, run: Run, seconds: float, sent: "Sent", phases: Phases) -> list[str]:
        """Show and write the evidence; what could not be written, and why."""
        claims = run.evidence.claims
        held = sum(claim.holds for claim in claims)
        run.say(f"\n{run.evidence.tables(columns(), run.known)}\n", known=True)
        slowest = {name: slowest_of(ranks) for name, ranks in phases.items()}
        for name, found in slowest.items():
            if found and found.notable:
                run.say(f"{name + ': ' if name else ''}{found}")
        run.say(f"{held} of {len(claims)} claims held · {seconds:.1f} s")
        if not run.args.report and not run.page:
            return []
        report = {
            "script": self.script,
            "lecture": self.lecture,
            "world_size": run.job.world_size,
            "backend": run.job.backend,
            "device": run.job.device.type,
            "dtype": run.args.dtype,
            "mesh": run.mesh,
            "config": vars(run.args),
            "losses": run.losses,
            "reference_losses": run.reference_losses,
            "claims": [_in_report(claim) for claim in claims],
            "seconds": seconds,
            "tokens_per_second": run.tokens / run.training_seconds if run.training_seconds else 0.0,
            "phases": phases,
            "slowest": {name: found and found._asdict() for name, found in slowest.items()},
        }
        report, lost = _finite(report), []
        contents = {
            "report": lambda: json.dumps(report, indent=1, allow_nan=False),
            "page": lambda: render(self, run, report, sent),
        }
        for name, content in contents.items():
            if path := getattr(run.args, name, None):
                try:
                    write_file(path, content())
                except Unwritable as error:
                    lost.append(f"--{name} {error}")
        return lost


Sent = dict[str, list[dict[tuple[str, str], Traffic]]]  # by version, of each rank: by operation and axis


def gather_sent(run: Run) -> Sent:
    """What every rank has sent, by version, on rank 0."""
    mine = {name: dict(ledger.traffic) for name, ledger in run.sent.items()} or {"": dict(TOTAL.traffic)}
    everyone = run.job.gather(mine)
    return {name: [of_rank[name] for of_rank in everyone] for name in mine}


def gather_phases(run: Run) -> Phases:
    """Seconds of every rank in each phase, by version, on rank 0."""
    everyone = run.job.gather(run.phases)
    return {name: [of_rank[name] for of_rank in everyone] for name in run.phases} if everyone else {}


def say_last(what: str) -> None:
    """Say why a run fails, as the last thing on the screen; on the rank that knows, before another one ends.

    torchrun's own report ends with the rank that failed first, and with what that has written to a file.
    """
    print(what, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": f"\n{what}", "timestamp": int(time.time()) - 1}))


def _in_report(claim: Claim) -> dict[str, Any]:
    fields = asdict(claim) | {"holds": claim.holds}
    del fields["where"]
    return fields


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a ValueError, so that rank 0 alone prints it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help shows what works")

    def print_help(self, file: Any = None) -> None:
        if process_info().rank == 0:
            super().print_help(file)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
