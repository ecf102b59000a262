"""The four practices as notebooks: clean as committed, and with the marker `notebook` executed on real ranks."""

import ast
import json
import re
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("zero/Code01ZeRO", "megatron_tp/Code02Megatron", "pipeline/Code03Pipeline", "expert_parallel/Code04Expert")
CHINESE = re.compile("[\u4e00-\u9fff]")


def cells(name: str) -> list[dict]:
    return json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))["cells"]


def test_there_are_no_others() -> None:
    assert {str(p.relative_to(ROOT).with_suffix("")) for p in ROOT.glob("*/*.ipynb")} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_and_in_both_languages(name: str) -> None:
    code = ["".join(c["source"]) for c in cells(name) if c["cell_type"] == "code"]
    texts = ["".join(c["source"]) for c in cells(name) if c["cell_type"] == "markdown"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells(name) if c["cell_type"] == "code")
    for text in texts:
        assert CHINESE.search(text), text
        assert len(re.findall("[A-Za-z]{2,}", text)) > 2, text
    assert sum("<details>" in text for text in texts) >= 2, "questions with their answers folded away"
    assert sum(call.startswith("show(") for call in code) >= 2, "the technique is shown, not copied"
    for each in code:
        ast.parse(each)
        for script in re.findall(r'run\("([^"]+)"', each):
            assert (ROOT / script).exists()


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    signal.alarm(600)  # of all other tests the longest may take 120 s
    began = time.monotonic()
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    print(f"{name}: {time.monotonic() - began:.0f} s")
    pages = [o["data"]["text/html"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs
             if "text/html" in o.get("data", {}) and "<iframe" in o["data"]["text/html"]]  # fmt: skip
    assert len(pages) == sum('= run("' in c.source for c in notebook.cells)
    for page in pages:
        assert "claims held" in page
        assert "claims FAILED" not in page
