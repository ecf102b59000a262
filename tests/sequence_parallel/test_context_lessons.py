"""The lessons on long sequences as a reader starts them: claims, options, refusals."""

import json
from pathlib import Path

import pytest

from tests.pool import Pool

QUICK = ("--steps", "2", "--batch", "2", "--sequence", "48", "--hidden", "24", "--heads", "12", "--layers", "2")


@pytest.mark.parametrize(
    ("lesson", "ranks"),
    [("ulysses", 1), ("ulysses", 4), ("ring_attention", 1), ("ring_attention", 8), ("hybrid", 6),
     ("long_context", 6)],
)  # fmt: skip
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    drawn = ("--plot", str(plot)) if ranks > 2 else ()
    outcome = pool.script(ranks, f"sequence_parallel/{lesson}.py", *QUICK, "--report", str(report), *drawn)
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    written = json.loads(report.read_text())
    assert written["mesh"] == {"cp": ranks}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    claims = {claim["claim"]: claim["measured"] for claim in written["claims"]}
    assert len(claims) == len(written["claims"]), "a name for each"
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("Lecture 06") == 1, "only rank 0 speaks"
    if lesson == "ring_attention":
        assert claims["contiguous / zigzag"] == pytest.approx(2 - 1 / ranks)
    if drawn:
        assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("lesson", "flags"),
    [("ulysses", ("--dtype", "bfloat16", "--untied", "--feed-forward", "40")),
     ("ring_attention", ("--dtype", "float32", "--placement", "contiguous")),
     ("ring_attention", ("--dtype", "bfloat16", "--heads", "1")), ("hybrid", ("--ulysses", "4")),
     ("hybrid", ("--placement", "contiguous", "--sequence", "36")),
     ("hybrid", ("--placement", "contiguous", "--sequence", "4", "--hidden", "192")),  # one token a rank
     ("long_context", ("--dtype", "float32", "--heads", "3"))],
)  # fmt: skip
def test_options(pool: Pool, lesson: str, flags: tuple[str, ...]) -> None:
    outcome = pool.script(4, f"sequence_parallel/{lesson}.py", *QUICK, *flags)
    assert outcome.codes == [0] * 4, outcome.out + outcome.err


REFUSED = {
    "heads": ("ulysses", ("--heads", "4"), "--heads 4: heads must divide --hidden and be a multiple of the 8 ranks"),
    "sequence": ("ulysses", ("--sequence", "60"), "use --sequence 56"),
    "zigzag": ("ring_attention", ("--sequence", "40"), "must be a multiple of 16, so that each rank gets"),
    "degree": ("hybrid", ("--ulysses", "3"), "use --ulysses one of 1, 2, 4, 8"),
    "degree and heads": ("hybrid", ("--ulysses", "3", "--heads", "2"), "use --ulysses one of 1, 2\n"),
    "nothing": ("ring_attention", ("--sequence", "0"), "use --sequence 16"),
    "both": ("hybrid", ("--ulysses", "4", "--heads", "2", "--sequence", "60"), "use --heads 4 --sequence 56"),
    "softmax": ("ring_attention", ("--attention", "softmax"), "use --attention sdpa --dropout 0"),
    "dropout": ("hybrid", ("--attention", "softmax", "--dropout", "0.1"), "use --attention sdpa --dropout 0"),
    "feed-forward": ("long_context", ("--feed-forward", "100"), "use --feed-forward 0"),
    "all ways": ("long_context", ("--sequence", "72"), "use --sequence 64"),
}  # fmt: skip


@pytest.mark.parametrize(("lesson", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...], message: str) -> None:
    outcome = pool.script(8, f"sequence_parallel/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2]
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, "one message, no traceback"
