"""An artificially slow rank is named by the report, with its phase; the others, which wait for it, are not."""

import json
import time
from pathlib import Path

import pytest

from tests.pool import Pool

SLOW = """
import sys, time, runpy
from core.model import gpt
from core.proof import trainable, training

real = {phase}
def slow(*args, **more):
    time.sleep(0.4)
    return real(*args, **more)
import os
if os.environ["RANK"] == "2":
    {phase} = slow
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "where", "phase", "flags"),
    [
        ("cluster/train.py", "gpt.Block.forward", "forward", ("--dp", "3", "--pp", "1", "--batch", "6")),
        ("zero/zero1.py", "gpt.Block.forward", "forward", ("--batch", "6")),
    ],
)
def test_the_slow_rank_is_named(
    script: str, where: str, phase: str, flags: tuple[str, ...], pool: Pool, tmp_path: Path
) -> None:
    path = tmp_path / "slow.py"
    path.write_text(SLOW.format(phase=where, script=str(ROOT / script)))
    report = tmp_path / "report.json"
    began = time.monotonic()
    outcome = pool.script(3, str(path), *flags, "--steps", "2", "--report", str(report))
    assert outcome.codes == [0, 0, 0], outcome.out + outcome.err
    assert time.monotonic() - began < 80
    found = json.loads(report.read_text())
    for version, ranks in found["phases"].items():
        slowest = found["slowest"][version]
        assert (slowest["rank"], slowest["phase"]) == (2, phase), version
        assert ranks[2][phase] - slowest["phase_median"] >= 0.8 * 0.4 * 2  # two steps
        waits = [sum(some for name, some in rank.items() if name.startswith("waiting")) for rank in ranks]
        assert min(waits[:2]) > waits[2]
    assert "the slowest rank is 2: " in outcome.out
