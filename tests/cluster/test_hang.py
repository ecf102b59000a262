"""Lecture 03, hangs: each fault is named on real ranks, whoever makes it; and a wrong diagnosis fails the lesson."""

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.evidence import hang as evidence
from cluster.evidence.hang import FAULTS, TABLE, WRONG, Heard
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Run
from tests.pool import Pool

SCRIPT = "cluster/hang.py"


def test_every_fault_is_named(pool: Pool, tmp_path: Path) -> None:
    """On three ranks and on two, whether the last rank makes it or the first, which holds the store."""
    cases = {"last": (3,), "first": (3, "--rank", "0"), "two": (2,)}
    jobs = {}
    for name, (ranks, *flags) in cases.items():
        jobs[name] = pool.start(ranks, SCRIPT, *flags, "--report", str(tmp_path / name), "--page",
                                str(tmp_path / f"{name}.html"))  # fmt: skip
    for name, job in jobs.items():
        outcome = job.end()
        assert outcome.codes == [0] * cases[name][0], outcome.out + outcome.err
        assert "no fault: nothing is said" in outcome.out
        assert outcome.out.count(WRONG) == len(FAULTS)
        claims = json.loads((tmp_path / name).read_text())["claims"]
        assert {claim["claim"] for claim in claims} >= {f"--fault {fault}: named" for fault in FAULTS}
        assert (tmp_path / f"{name}.html").read_text().count("torchfrtrace") == 2


def test_one_fault_alone(pool: Pool) -> None:
    outcome = pool.script(2, SCRIPT, "--fault", "shape")
    assert outcome.codes == [0, 0], outcome.out + outcome.err
    assert outcome.out.count(WRONG) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rank", "2"), "--rank 2: must be one of the 2 ranks; use --rank 1"),
        (("--wait", "0.1"), "--wait 0.1: must be in"),
        (("--wait", "9", "--timeout", "10"), "--wait 9.0: must be in [1, half of --timeout, 5]"),
        (("--fault", "other"), "invalid choice"),
    ],
)
def test_refused(flags: tuple[str, ...], message: str, pool: Pool) -> None:
    outcome = pool.script(2, SCRIPT, *flags)
    assert outcome.codes == [2, 2]
    assert message in outcome.err


# ---- What the claims notice ------------------------------------------------------------------------------------------

LINES = {  # as rank 2 of 4 is named
    "skip": "rank 2 is in all-gather 4 over dp while its three peers are in all-reduce 4 over dp (gradients, step 2)",
    "gather": "ranks 0-3 wait for each other: rank 0 in gather 0 over reports, ranks 1-3 in all-reduce 6 over dp",
    "shape": "rank 2 is in all-reduce 4 over dp with (128,) float32 while its three peers are in all-reduce 4 over dp "
    "with (192,) float32 (gradients, step 2)",
    "dead": "rank 2 died; it was last outside a step; ranks 0, 1 and 3 wait for it in all-reduce 4 over dp",
    "slow": "rank 2 is slow: it has not reached all-reduce 4 over dp, but moves on: it is in forward of micro-batch 1",
    "send": "rank 2 waits in send 0 to rank 3, which has not posted its receive: it waits in all-reduce 4 over dp",
    "data": "rank 2 has ended while its three peers are in all-reduce 4 over dp (gradients, step 2)",
}  # fmt: skip
LINES["order"] = LINES["skip"]


def heard(line: str) -> Heard:
    return Heard((1,) * 4, 0, f"\n{TABLE}\n\nrank\n\n{WRONG}{line}\n\nrank 0: failed\n", 1.0)


def verdict(found: dict[str, Heard]) -> str:
    job = Job(0, 4, torch.device("cpu"), "gloo", 10.0)
    run = Run(Namespace(plot=None), job, POLICIES["float64"])
    evidence.claim(run, 4, 2, {"none": Heard((0,) * 4, 0, "", 1.0)} | found)
    return run.evidence.failed()


def test_the_right_lines_hold() -> None:
    assert set(LINES) == set(FAULTS)
    assert verdict({fault: heard(line) for fault, line in LINES.items()}) == ""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("bug", ["another rank", "another operation", "another number", "nothing", "another fault"])
def test_a_wrong_line_fails(fault: str, bug: str) -> None:
    line = LINES[fault]
    if bug == "another rank":
        line = re.sub(r"rank (0|2) ", "rank 1 ", line)
    elif bug == "another operation":
        line = line.replace("all-reduce", "broadcast")
    elif bug == "another number":
        line = line.replace("all-reduce 4", "all-reduce 5", 1) if fault in ("skip", "order", "shape") else ""
    elif bug == "nothing":
        line = "no rank waits for another"
    else:
        line = LINES["dead" if fault == "slow" else "slow"]
    assert f"FAILED: --fault {fault}: named" in verdict({fault: heard(line)})


def test_a_second_table_a_rank_that_stays_and_one_that_is_content_fail() -> None:
    good = heard(LINES["skip"])
    assert "--fault skip: tables" in verdict({"skip": replace(good, said=good.said * 2)})
    assert "skip: ended from outside" in verdict({"skip": replace(good, killed=1)})
    assert "skip: exit code 0" in verdict({"skip": replace(good, codes=(1, 0, 1, 1))})
    job = {"none": replace(good, codes=(0,) * 4)}
    assert "without a fault: characters that are printed" in verdict(job)
    assert "without a fault: ranks that end well" in verdict({"none": Heard((0, 0, 1, 0), 0, "", 1.0)})
