"""The page of a combined run: its pipeline as executed, beside the theory, with this machine's own times."""

from pathlib import Path

import pytest

from core.proof.page.page import numbers_of
from tests.pool import Pool


@pytest.mark.parametrize("flags", ["--pp 2 --dp 2 --schedule 1f1b", "--pp 2 --tp 2 --schedule zb-v --zero 2"])
def test_the_pipeline_as_executed(pool: Pool, tmp_path: Path, flags: str) -> None:
    page = tmp_path / "run.html"
    small = "--layers 4 --microbatches 4 --batch 8 --steps 1 --no-verify"
    outcome = pool.script(4, "cluster/train.py", *flags.split(), *small.split(), "--page", str(page))
    assert outcome.codes == [0] * 4, outcome.err
    assert page.stat().st_size < 1_000_000
    figure = next(f for f in numbers_of(page.read_text("utf-8"))["figures"] if f["kind"] == "timeline")
    executed, theory, measured = figure["timelines"]
    assert executed["rows"] == theory["rows"]  # equal stages: each action when the schedule says, and on what it waited
    assert executed["bubble"] == theory["bubble"]
    assert (executed["unit"], measured["unit"]) == ("", "s")
    assert [[e[:3] for e in row] for row in measured["rows"]] == [[e[:3] for e in row] for row in executed["rows"]]
    assert all(end > start for row in measured["rows"] for *_, start, end, _ in row)
    assert any(waited for row in measured["rows"] for *_, waited in row)
