"""Lecture 05 and CODE 02 as a reader starts them: claims, options, refusals."""

import json
from pathlib import Path

import pytest

from megatron_tp.train import COURSE_PARAMETERS
from tests.pool import Pool

QUICK = ("--steps", "2", "--batch", "4", "--sequence", "16", "--hidden", "32", "--layers", "2")
COURSE_QUICK = (*QUICK, "--feed-forward", "32", "--vocabulary", "300", "--positions", "20")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("lesson", "flags"), [("tensor_parallel", QUICK), ("train", COURSE_QUICK)])
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, flags: tuple[str, ...], ranks: int) -> None:
    report = tmp_path / "report.json"
    outcome = pool.script(ranks, f"megatron_tp/{lesson}.py", *flags, "--report", str(report))
    assert outcome.codes == [0] * ranks, outcome.err
    written = json.loads(report.read_text())
    assert written["mesh"] == {"tp": ranks}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert len(written["losses"]) == 2
    assert all(claim["holds"] for claim in written["claims"])
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("TP " if lesson == "tensor_parallel" else "CODE 02") == 1, "only rank 0 speaks"


@pytest.mark.parametrize(
    "flags",
    [("--dtype", "float32"), ("--dtype", "bfloat16"), ("--untied",), ("--clip", "1e9"), ("--feed-forward", "40"),
     ("--dropout", "0.2", "--attention", "softmax"), ("--heads", "32"), ("--batch", "1", "--sequence", "1")],
)  # fmt: skip
def test_options(pool: Pool, flags: tuple[str, ...]) -> None:
    outcome = pool.script(4, "megatron_tp/tensor_parallel.py", *QUICK, *flags)
    assert outcome.codes == [0] * 4, outcome.out


@pytest.mark.parametrize("lesson", ["principle", "tensor_parallel", "train"])
def test_plot(pool: Pool, tmp_path: Path, lesson: str) -> None:
    plot = tmp_path / "plot.svg"
    flags = QUICK[:-2] if lesson == "principle" else COURSE_QUICK if lesson == "train" else QUICK
    outcome = pool.script(2, f"megatron_tp/{lesson}.py", *flags, "--plot", str(plot))
    assert outcome.codes == [0, 0], outcome.err
    assert "<svg" in plot.read_text()


def test_the_courses_own_model(pool: Pool, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    outcome = pool.script(4, "megatron_tp/train.py", "--steps", "1", "--batch", "1", "--report", str(report))
    assert outcome.codes == [0] * 4, outcome.out
    claims = {claim["claim"]: claim for claim in json.loads(report.read_text())["claims"]}
    for ranks, parameters in COURSE_PARAMETERS.items():
        claim = claims[f"parameters at tp {ranks}, rank 0"]
        assert (claim["measured"], claim["tolerance"]) == (parameters, 0)
    assert outcome.out.count("the course's figure") == 3


REFUSED = {
    "heads": ("tensor_parallel", ("--heads", "4"), "use --heads 8, or --nproc_per_node one of 2, 4"),
    "heads and hidden": ("tensor_parallel", ("--hidden", "60"), "use --heads 8 --hidden 64"),
    "feed-forward": ("tensor_parallel", ("--feed-forward", "100"), "use --feed-forward 96, or"),
    "negative feed-forward": ("tensor_parallel", ("--feed-forward", "-8"), "use --feed-forward 0"),
    "batch": ("tensor_parallel", ("--batch", "0"), "--batch 0: must be at least 1; use --batch 8"),
    "vocabulary": ("train", ("--vocabulary", "100"), "--vocabulary 100: the text is bytes, 256 different ones"),
    "positions": ("train", ("--positions", "8"), "--positions 8: a sample has --sequence 32 tokens"),
    "heads of the course": ("train", ("--heads", "4"), "use --heads 8"),
}


@pytest.mark.parametrize(("lesson", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...], message: str) -> None:
    outcome = pool.script(8, f"megatron_tp/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2]
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, "one message, no traceback"
