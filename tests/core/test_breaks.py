"""The README's "break something": each line is where it says, and with the break in it the named claims fail."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pool import FOLDERS, ROOT, Pool

# Runs a lesson of this tree, in a process that has imported the right one.
RUN = f"""
import runpy, sys
for name in [name for name in sys.modules if name.split(".")[0] in {FOLDERS}]:
    del sys.modules[name]
tree, script, *flags = sys.argv[1:]
sys.path.insert(0, tree)
sys.argv = [script, *flags]
runpy.run_path(tree + "/" + script, run_name="__main__")
"""
RANKS = 2
FLAGS = ("--steps=2", "--batch=8", "--sequence=8", "--hidden=16", "--heads=4", "--layers=2")


class Break(NamedTuple):
    file: str
    line: int
    there_is: str
    becomes: str
    script: str
    fails: tuple[str, ...]


def breaks(readme: str) -> list[Break]:
    """The rows of its table: what it is in words, and then code."""
    rows = re.findall(r"^ +\| [^`|]+ \| `([\w/.]+):(\d+)` \| `(.+)` \| `(.+)` \| `(.+)` \| (.+) \|$",
                      (ROOT / readme).read_text(), re.MULTILINE)  # fmt: skip
    return [Break(file, int(n), *more, tuple(re.findall("`(.+?)`", fails))) for file, n, *more, fails in rows]


BREAKS = breaks("README.md")


def test_both_readmes_name_the_same_breaks() -> None:
    assert len(BREAKS) == 6
    assert breaks("README.zh-CN.md") == BREAKS


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "run.py").write_text(RUN)
    return tree


@pytest.mark.parametrize("each", BREAKS, ids=[f"{each.file}:{each.line}" for each in BREAKS])
def test_the_named_claims_fail(pool: Pool, tree: Path, tmp_path: Path, each: Break) -> None:
    path, report = tree / each.file, tmp_path / "report.json"
    right = path.read_text()
    lines = right.splitlines(keepends=True)
    assert lines[each.line - 1].strip() == each.there_is, "the README names another line"
    lines[each.line - 1] = lines[each.line - 1].replace(each.there_is, each.becomes)
    path.write_text("".join(lines))
    try:
        outcome = pool.script(RANKS, str(tree / "run.py"), str(tree), each.script, *FLAGS, f"--report={report}")
    finally:
        path.write_text(right)
    assert outcome.codes == [1] * RANKS, outcome.out + outcome.err
    failed = [c["claim"] for c in json.loads(report.read_text())["claims"] if not c["holds"]] if report.exists() else []
    for words in each.fails:
        assert any(claim.startswith(words) for claim in failed) or (not failed and words in outcome.err), failed


def test_without_a_break_every_claim_holds(pool: Pool, tree: Path) -> None:
    outcome = pool.script(RANKS, str(tree / "run.py"), str(tree), "pipeline/1f1b.py", *FLAGS)
    assert outcome.codes == [0] * RANKS, outcome.out + outcome.err
