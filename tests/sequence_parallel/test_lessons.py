"""The lessons of lecture 06 as a reader starts them: claims, options, refusals."""

import json
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sequence_parallel.failing import LESSONS, run_lesson

QUICK = ("--steps", "2", "--batch", "2", "--sequence", "48", "--hidden", "24", "--heads", "12", "--layers", "1")
OWN_SIZES = ("--steps", "1", "--batch", "1", "--layers", "1")


@pytest.mark.parametrize(
    ("lesson", "ranks", "flags"),
    [("megatron_sp", 4, QUICK), ("activations", 4, OWN_SIZES), ("ulysses", 4, QUICK), ("ring_attention", 4, QUICK),
     ("all_gather", 4, QUICK), ("hybrid", 6, QUICK), ("long_context", 6, QUICK)],
)  # fmt: skip
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int, flags: tuple[str, ...]) -> None:
    report = tmp_path / "report.json"
    outcome = pool.script(ranks, f"sequence_parallel/{lesson}.py", *flags, "--report", str(report))
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    written = json.loads(report.read_text())
    assert written["mesh"] == {"tp" if lesson in ("megatron_sp", "activations") else "cp": ranks}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert all(claim["holds"] for claim in written["claims"])
    claims = {claim["claim"]: claim["measured"] for claim in written["claims"]}
    assert len(claims) == len(written["claims"]), "a name for each"
    assert f"{len(claims)} of {len(claims)} claims held" in outcome.out
    assert outcome.out.count("Lecture 06") == 1, "only rank 0 speaks"
    if lesson == "ring_attention":
        assert claims["contiguous / zigzag"] == pytest.approx(2 - 1 / ranks)
    if lesson == "activations":
        as_in_the_paper(claims, ranks)


def as_in_the_paper(claims: dict[str, float], t: int) -> None:
    """With the lesson's own sizes: the paper's formulas but for the LayerNorms' statistics."""
    a, s, h = 16, 48, 80
    core, statistics = 5 * a * s / h, 2 * 2 * 4 / h  # mean and deviation of a token in two LayerNorms, in float32
    paper = {"one process": 34 + core, "TP": 10 + 24 / t + core / t, "TP + SP": (34 + core) / t, "TP, full": 2,
             "TP, selective": 10 + 24 / t, "TP + SP, selective": 34 / t,
             "TP + SP, pointwise": (22 + core) / t}  # fmt: skip
    for name, figure in paper.items():
        for rank in range(t):
            assert 0 <= claims[f"bytes saved / sbh, {name}, rank {rank}"] - figure <= statistics + 1e-9


DROPOUT = ("--dropout=0.2", "--attention=softmax")
LLAMA = ("--model=llama", "--kv-heads=4")
OPTIONS = {
    1: [("ulysses", ()), ("ring_attention", ()), ("all_gather", ())],
    2: [("megatron_sp", ()), ("activations", DROPOUT), ("megatron_sp", (*LLAMA, "--kv-heads=1"))],
    4: [
        *(("megatron_sp", flags) for flags in [("--dtype=float32",), ("--dtype=bfloat16",), ("--untied",), DROPOUT,
                                               ("--feed-forward=40",), ("--batch=1", "--sequence=4"), LLAMA,
                                               (*LLAMA, "--kv-heads=2", "--dtype=bfloat16"),
                                               (*LLAMA, "--kv-heads=1", *DROPOUT), (*LLAMA, "--kv-heads=12")]),
        *(("activations", (*DROPOUT, *flags)) for flags in [("--recompute=none",), ("--recompute=selective",),
                                                            ("--recompute=pointwise",),
                                                            (*LLAMA, "--recompute=operators"),
                                                            ("--dtype=bfloat16",), ("--batch=1", "--hidden=12"), LLAMA,
                                                            (*LLAMA, "--kv-heads=2", "--feed-forward=40")]),
        ("ulysses", ("--dtype=bfloat16", "--untied", "--feed-forward=40")),
        ("ring_attention", ("--dtype=float32", "--placement=contiguous")),
        ("ring_attention", ("--dtype=bfloat16", "--heads=1")),
        ("all_gather", ("--dtype=float32", "--placement=contiguous")),
        ("all_gather", ("--dtype=bfloat16", "--heads=1")),
        ("all_gather", (*LLAMA, "--kv-heads=2")),
        ("hybrid", ("--ulysses=4",)),
        ("hybrid", ("--placement=contiguous", "--sequence=36")),
        ("hybrid", ("--placement=contiguous", "--sequence=4", "--hidden=192")),  # one token a rank
        ("long_context", ("--dtype=float32", "--heads=3")),
        ("long_context", LLAMA),
    ],
    8: [("ring_attention", ())],
}  # fmt: skip


def failed(lessons: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...], list[str]]]:
    """What failed in each of the lessons, on rank 0."""
    runs = [(lesson, flags, run_lesson(lesson, [*QUICK, *flags])) for lesson, flags in lessons]
    claims = [(lesson, flags, [c.claim for c in run.evidence.claims if not c.holds]) for lesson, flags, run in runs]
    return [each for each in claims if each[2]]


@pytest.mark.parametrize("ranks", OPTIONS)
def test_options(pool: Pool, ranks: int) -> None:
    assert pool.run(ranks, failed, OPTIONS[ranks], timeout=110)[0] == []


def test_plots(pool: Pool, tmp_path: Path) -> None:
    plots = {lesson: tmp_path / f"{lesson}.svg" for lesson in LESSONS}
    lessons = [
        (lesson, (f"--plot={path}", *(DROPOUT if lesson == "activations" else ()))) for lesson, path in plots.items()
    ]
    assert pool.run(4, failed, lessons, timeout=110)[0] == []
    for path in plots.values():
        assert "<svg" in path.read_text()


REFUSED = [
    ("megatron_sp", ("--sequence", "60"), "use --sequence 64, or --nproc_per_node one of 2, 4"),
    ("megatron_sp", ("--heads", "4"), "use --heads 8"),
    ("megatron_sp", ("--feed-forward", "100"), "use --feed-forward 96"),
    ("megatron_sp", ("--model", "llama", "--heads", "24", "--hidden", "96", "--kv-heads", "3"), "use --kv-heads 2, or"),
    ("activations", ("--dropout", "0"), "use --attention softmax --dropout 0.1"),
    ("activations", ("--feed-forward", "64"), "use --feed-forward 0"),
    ("activations", ("--recompute", "some"), "invalid choice: 'some'"),
    ("ulysses", ("--heads", "4"), "--heads 4: heads must divide --hidden and be a multiple of the 8 ranks"),
    ("ulysses", ("--sequence", "60"), "use --sequence 56"),
    ("all_gather", ("--sequence", "40"), "must be a multiple of 16, so that each rank gets"),
    ("ring_attention", ("--sequence", "40"), "must be a multiple of 16, so that each rank gets"),
    ("hybrid", ("--ulysses", "3"), "use --ulysses one of 1, 2, 4, 8"),
    ("hybrid", ("--ulysses", "3", "--heads", "2"), "use --ulysses one of 1, 2\n"),
    ("ring_attention", ("--sequence", "0"), "use --sequence 16"),
    ("hybrid", ("--ulysses", "4", "--heads", "2", "--sequence", "60"), "use --heads 4 --sequence 56"),
    ("ring_attention", ("--attention", "softmax"), "use --attention sdpa --dropout 0"),
    ("hybrid", ("--attention", "softmax", "--dropout", "0.1"), "use --attention sdpa --dropout 0"),
    ("long_context", ("--feed-forward", "100"), "use --feed-forward 0"),
    ("long_context", ("--sequence", "72"), "use --sequence 64"),
]


def test_refusals(pool: Pool) -> None:
    running = [pool.start(8, f"sequence_parallel/{lesson}.py", *flags, started=1) for lesson, flags, _ in REFUSED]
    for each, (lesson, flags, message) in zip(running, REFUSED, strict=True):
        outcome = each.end()
        assert outcome.codes == [2], (lesson, flags)
        assert message in outcome.err
        assert outcome.err.count("\n") == 1, "one message, no traceback"


@pytest.mark.parametrize("torchrun", [True, False])
def test_sequence_without_tensor_parallelism_is_refused(pool: Pool, torchrun: bool) -> None:
    outcome = pool.script(1, "sequence_parallel/megatron_sp.py", torchrun=torchrun)
    assert outcome.codes == [2]
    assert "--nproc_per_node" in outcome.err
