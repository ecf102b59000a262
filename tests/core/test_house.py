"""The rules of the house that a look at the tree can see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from cluster.run.arguments import add_all_flags
from core.proof.lesson import Lesson

ROOT = Path(__file__).parents[2]
TOPICS = {"zero", "megatron_tp", "sequence_parallel", "pipeline", "expert_parallel"}
HOUSE = {"core", "cluster", "tests"} | TOPICS
FILES = [p for folder in sorted(HOUSE) for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names & HOUSE


def imports_evidence(text: str, topic: str) -> bool:
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return any(f"{name}.".startswith(f"{topic}.evidence.") for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_house(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = {"core": {"core"}, "cluster": HOUSE - {"tests"}, "tests": HOUSE}.get(folder, {"core", folder})
    assert imports(path) <= allowed


@pytest.mark.parametrize("topic", sorted(TOPICS))
def test_no_engine_imports_the_evidence(topic: str) -> None:
    """The evidence is about the engine, which must do without it."""
    modules = [path for path in FILES if path.is_relative_to(ROOT / topic / "engine")]
    assert modules
    assert not [str(path) for path in modules if imports_evidence(path.read_text(), topic)]


def test_an_import_of_the_evidence_is_seen() -> None:
    for line in ("from zero.evidence.rules import R", "from zero import evidence", "import zero.evidence.rules as r"):
        assert imports_evidence(line, "zero")
        assert imports_evidence(f"def late():\n    {line}", "zero")
    assert not imports_evidence("from zero import flat\nfrom core.proof import evidence", "zero")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_path_tricks_and_no_long_files(path: Path) -> None:
    text = path.read_text()
    if path.relative_to(ROOT).parts[0] != "tests":
        assert "sys.path" not in text
        assert len(text.splitlines()) <= 320


def test_ruff_is_content() -> None:
    for command in (["check"], ["format", "--check"]):
        outcome = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, check=False, timeout=60
        )
        assert outcome.returncode == 0, outcome.stdout


def test_a_rank_does_not_import_what_few_flags_need() -> None:
    """Eight ranks on two cores wait for it: with any of these `import cluster.train` takes half as long again."""
    heavy = ["sympy", "torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.fsdp",
             "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes", "triton", "tokenizers",
             "transformers", "matplotlib", "jinja2"]  # fmt: skip
    program = f"import sys, cluster.train; print(*(name for name in {heavy} if name in sys.modules))"
    outcome = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
    )
    assert outcome.stdout.split() == []


def test_run_all_and_both_readmes_name_every_lesson() -> None:
    lessons = {
        str(p.relative_to(ROOT))
        for topic in (*TOPICS, "cluster")
        for p in (ROOT / topic).glob("*.py")
        if 'if __name__ == "__main__"' in p.read_text() and "Lesson(" in p.read_text()
    }
    assert lessons >= {"pipeline/naive.py", "pipeline/gpipe.py", "pipeline/1f1b.py"}
    assert set(re.findall(r'^  "?(\w+/\w+\.py)[\w -]*"?$', (ROOT / "run_all.sh").read_text(), re.MULTILINE)) == lessons
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text()
        assert {lesson for lesson in lessons if f"`{lesson}`" in text} == lessons, readme


def test_ci_runs_the_readmes_test_command() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.endswith("&& pytest")]
    assert len(commands) == 1
    for readme in ("README.md", "README.zh-CN.md"):
        assert commands[0] in (ROOT / readme).read_text(), readme


@pytest.mark.parametrize("nproc", ["0", "many"])
def test_run_all_refuses(nproc: str) -> None:
    outcome = subprocess.run(
        [str(ROOT / "run_all.sh")], env={"NPROC": nproc, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        check=False, timeout=30,
    )  # fmt: skip
    assert outcome.returncode == 2
    assert f"NPROC={nproc}" in outcome.stderr


def test_torchrun_leaves_every_flag_to_the_script() -> None:
    """It looks at a script's flags too, and refuses one with which two of its own begin."""
    scripts = [p for p in FILES if "tests" not in p.parts]
    flags = {flag for p in scripts for flag in re.findall(r'"(--[a-z][a-z-]*)"', p.read_text())}
    frame = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(frame)
    flags |= set(frame.parser._option_string_actions)
    assert {"--report", "--chunks", "--layers"} <= flags
    for flag in flags:
        assert get_args_parser().parse_args(["script.py", flag, "1"]).training_script_args == [flag, "1"]
