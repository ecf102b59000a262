"""For the notebooks: show a technique as it stands in its file, and start real ranks with one call."""

import html
import inspect
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LONGEST = 300.0  # seconds of a run
HIGH = 900  # pixels of a page in the notebook


@dataclass(frozen=True)
class Source:
    """The code of a class or function, for people."""

    file: str
    line: int
    code: str

    def _repr_html_(self) -> str:
        return f"<p><code>{self.file}:{self.line}</code></p><pre>{html.escape(self.code)}</pre>"


def show(what: Any) -> Source:
    """A class or function as it stands in its file, which one may change and run again."""
    code, line = inspect.getsourcelines(what)
    return Source(str(Path(inspect.getsourcefile(what) or "").relative_to(ROOT)), line, "".join(code))


@dataclass(frozen=True)
class Result:
    """What a run has said: its report, its page, and what it has printed."""

    report: dict[str, Any]
    page: str
    printed: str

    def claims(self, words: str) -> list[tuple[str, float, float]]:
        """Those that begin so: (claim, expected, measured)."""
        return [
            (c["claim"], c["expected"], c["measured"]) for c in self.report["claims"] if c["claim"].startswith(words)
        ]

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.page)}" style="width:100%;height:{HIGH}px;border:0"></iframe>'


def run(script: str, *flags: str, ranks: int = 4) -> Result:
    """Start a lesson on so many processes of this machine, as torchrun does, and wait for it.

    Raises:
        RuntimeError: it failed; with what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, page = Path(folder, "report.json"), Path(folder, "page.html")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", script]
        outcome = subprocess.run(
            [*command, *flags, "--report", str(report), "--page", str(page)],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=LONGEST,
        )  # fmt: skip
        if not report.exists() or not page.exists():
            raise RuntimeError(f"{script} failed:\n{outcome.stderr[-2000:]}")
        return Result(json.loads(report.read_text("utf-8")), page.read_text("utf-8"), outcome.stdout)
