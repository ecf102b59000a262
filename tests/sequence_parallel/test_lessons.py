"""The lessons of lecture 06 as a reader starts them: claims, options, refusals."""

import json
from pathlib import Path

import pytest

from tests.pool import Pool

QUICK = ("--steps", "2", "--batch", "4", "--sequence", "16", "--hidden", "32", "--layers", "2")


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("lesson", ["megatron_sp", "activations"])
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int) -> None:
    report = tmp_path / "report.json"
    outcome = pool.script(ranks, f"sequence_parallel/{lesson}.py", *QUICK, "--report", str(report))
    assert outcome.codes == [0] * ranks, outcome.err
    written = json.loads(report.read_text())
    assert written["mesh"] == {"tp": ranks}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert all(claim["holds"] for claim in written["claims"])
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("Lecture 06") == 1, "only rank 0 speaks"


DROPOUT = ("--dropout", "0.2", "--attention", "softmax")


@pytest.mark.parametrize(
    ("lesson", "flags"),
    [("megatron_sp", flags) for flags in [("--dtype", "float32"), ("--dtype", "bfloat16"), ("--untied",), DROPOUT,
                                          ("--feed-forward", "40"), ("--batch", "1", "--sequence", "4")]]
    + [("activations", flags) for flags in [("--recompute", "none"), ("--recompute", "selective"),
                                            ("--dtype", "bfloat16"), ("--batch", "1", "--hidden", "8")]],
)  # fmt: skip
def test_options(pool: Pool, lesson: str, flags: tuple[str, ...]) -> None:
    outcome = pool.script(4, f"sequence_parallel/{lesson}.py", *QUICK, *flags)
    assert outcome.codes == [0] * 4, outcome.out


@pytest.mark.parametrize("lesson", ["megatron_sp", "activations"])
def test_plot(pool: Pool, tmp_path: Path, lesson: str) -> None:
    plot = tmp_path / "plot.svg"
    outcome = pool.script(2, f"sequence_parallel/{lesson}.py", *QUICK, "--plot", str(plot))
    assert outcome.codes == [0, 0], outcome.err
    assert "<svg" in plot.read_text()


def test_the_surplus_is_within_one_percent(pool: Pool, tmp_path: Path) -> None:
    """With the lesson's own sizes: the paper's formulas but for the LayerNorms' statistics."""
    report = tmp_path / "report.json"
    outcome = pool.script(8, "sequence_parallel/activations.py", "--steps", "1", "--report", str(report))
    assert outcome.codes == [0] * 8, outcome.out
    claims = {c["claim"]: c["measured"] for c in json.loads(report.read_text())["claims"]}
    a, s, h, t = 8, 64, 128, 8
    core = 5 * a * s / h
    paper = {"one process": 34 + core, "TP": 10 + 24 / t + core / t, "TP + SP": (34 + core) / t, "TP, full": 2,
             "TP, selective": 10 + 24 / t, "TP + SP, selective": 34 / t}  # fmt: skip
    for name, figure in paper.items():
        for rank in range(8):
            assert figure <= claims[f"bytes saved / sbh, {name}, rank {rank}"] <= 1.01 * figure


REFUSED = {
    "sequence": ("megatron_sp", ("--sequence", "60"), "use --sequence 64, or --nproc_per_node one of 2, 4"),
    "heads": ("megatron_sp", ("--heads", "4"), "use --heads 8"),
    "feed-forward": ("megatron_sp", ("--feed-forward", "100"), "use --feed-forward 96"),
    "no dropout": ("activations", ("--dropout", "0"), "use --attention softmax --dropout 0.1"),
    "another feed-forward": ("activations", ("--feed-forward", "64"), "use --feed-forward 0"),
    "recompute": ("activations", ("--recompute", "some"), "invalid choice: 'some'"),
}


@pytest.mark.parametrize(("lesson", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...], message: str) -> None:
    outcome = pool.script(8, f"sequence_parallel/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2]
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, "one message, no traceback"


@pytest.mark.parametrize("torchrun", [True, False])
def test_sequence_without_tensor_parallelism_is_refused(pool: Pool, torchrun: bool) -> None:
    outcome = pool.script(1, "sequence_parallel/megatron_sp.py", torchrun=torchrun)
    assert outcome.codes == [2]
    assert "--nproc_per_node" in outcome.err
