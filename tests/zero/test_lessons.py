"""The lessons of lecture 01 and CODE 01 as a reader starts them: claims, options, refusals."""

import json
from pathlib import Path

import pytest

from tests.pool import Pool

QUICK = ("--steps", "2", "--sequence", "16", "--hidden", "32", "--layers", "2")
LESSONS = ("ddp", "zero1", "zero2", "zero3", "memory", "offload", "zeropp")


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("lesson", LESSONS)
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int) -> None:
    report = tmp_path / "report.json"
    flags = (*QUICK, "--batch", str(4 * ranks), "--report", str(report))
    outcome = pool.script(ranks, f"zero/{lesson}.py", *flags)
    assert outcome.codes == [0] * ranks, outcome.err + outcome.out
    written = json.loads(report.read_text())
    assert written["mesh"] == {"dp": ranks}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert all(claim["holds"] for claim in written["claims"])
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out


@pytest.mark.parametrize("lesson", ["zero1", "zero3", "offload", "zeropp"])
@pytest.mark.parametrize(
    "flags",
    [("--dtype", "float32"), ("--dtype", "bfloat16"), ("--untied",), ("--microbatches", "4"), ("--bucket", "1"),
     ("--dropout", "0.2", "--attention", "softmax")],
)  # fmt: skip
def test_options(pool: Pool, lesson: str, flags: tuple[str, ...]) -> None:
    outcome = pool.script(4, f"zero/{lesson}.py", *QUICK, *flags)
    assert outcome.codes == [0] * 4, outcome.out


@pytest.mark.parametrize("lesson", LESSONS)
def test_plot(pool: Pool, tmp_path: Path, lesson: str) -> None:
    plot = tmp_path / "plot.svg"
    outcome = pool.script(2, f"zero/{lesson}.py", *QUICK, "--plot", str(plot))
    assert outcome.codes == [0, 0], outcome.err
    assert "<svg" in plot.read_text()


REFUSED = {
    "batch": ("zero1", ("--batch", "12"), "--batch 12: must be a multiple of 8 ranks x --microbatches 2"),
    "no microbatch": ("zero1", ("--microbatches", "0"), "--microbatches 0: must be at least 1; use --microbatches 2"),
    "bucket": ("ddp", ("--bucket", "0"), "--bucket 0: must be at least 1; use --bucket 65536"),
    "node": (
        "zeropp",
        ("--ranks-per-node", "3"),
        "--ranks-per-node 3: the 8 ranks must fill whole nodes; use --ranks-per-node one of 1, 2, 4, 8",
    ),
    "stage": ("memory", ("--stage", "4"), "invalid choice: '4'"),
}


@pytest.mark.parametrize(("lesson", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...], message: str) -> None:
    outcome = pool.script(8, f"zero/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2]
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, "one message, no traceback"
