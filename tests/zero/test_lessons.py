"""The lessons of lecture 01 and CODE 01: claims, options, refusals; as a reader starts them, and in the pool."""

import json
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.zero.lessons import LESSONS, play_all

QUICK = ("--steps=2", "--sequence=8", "--hidden=16", "--layers=2")


@pytest.mark.parametrize("lesson", LESSONS)
def test_as_a_reader_starts_it(pool: Pool, tmp_path: Path, lesson: str) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    flags = (*QUICK, "--batch", "12", "--report", str(report), "--plot", str(plot))
    outcome = pool.script(3, f"zero/{lesson}.py", *flags)
    assert outcome.codes == [0] * 3, outcome.err + outcome.out
    written = json.loads(report.read_text())
    assert written["mesh"] == {"dp": 3}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert all(claim["holds"] for claim in written["claims"])
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize("ranks", [1, 5])
def test_every_claim_holds(pool: Pool, ranks: int) -> None:
    flags = (*QUICK, "--batch", str(2 * ranks))
    outcomes = pool.run(ranks, play_all, [(lesson, flags, None) for lesson in LESSONS], timeout=100.0)[0]
    for lesson, outcome in zip(LESSONS, outcomes, strict=True):
        assert outcome.claims, lesson
        assert not outcome.failed, lesson
        assert outcome.mesh == {"dp": ranks}
        assert outcome.losses == pytest.approx(outcome.reference_losses, rel=1e-10)


OPTIONS = [("--dtype=float32",), ("--dtype=bfloat16",), ("--untied",), ("--microbatches=4",), ("--bucket=1",),
           ("--dropout=0.2", "--attention=softmax")]  # fmt: skip


@pytest.mark.parametrize("lesson", ["zero1", "zero3", "offload", "zeropp", "muon"])
def test_options(pool: Pool, lesson: str) -> None:
    ranks = 4 if lesson == "zeropp" else 2  # two nodes
    outcomes = pool.run(ranks, play_all, [(lesson, (*QUICK, *flags), None) for flags in OPTIONS])[0]
    for flags, outcome in zip(OPTIONS, outcomes, strict=True):
        assert outcome.claims, flags
        assert not outcome.failed, flags


REFUSED = {
    "batch": ("zero1", ("--batch", "12"), "--batch 12: must be a multiple of 8 ranks x --microbatches 2"),
    "no microbatch": ("zero1", ("--microbatches", "0"), "--microbatches 0: must be at least 1; use --microbatches 2"),
    "bucket": ("ddp", ("--bucket", "0"), "--bucket 0: must be at least 1; use --bucket 65536"),
    "node": (
        "zeropp",
        ("--ranks-per-node", "3"),
        "--ranks-per-node 3: the 8 ranks must divide evenly into nodes; use --ranks-per-node one of 1, 2, 4, 8",
    ),
    "momentum": ("muon", ("--momentum", "1"), "--momentum 1.0: is the share of the momentum that a step keeps"),
    "no Newton-Schulz": ("muon", ("--ns-steps", "0"), "--ns-steps 0: must be at least 1; use --ns-steps 5"),
    "coefficients": ("muon", ("--ns-coefficients", "1", "nan", "2"), "must be finite; use --ns-coefficients 3.4445"),
    "stage": ("memory", ("--stage", "4"), "invalid choice: '4'"),
}


@pytest.mark.parametrize(("lesson", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...], message: str) -> None:
    outcome = pool.script(8, f"zero/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2]
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, "one message, no traceback"
