"""Lecture 05 and CODE 02 as a reader starts them: claims, options, refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.ledger import Ledger
from core.mesh import Axis
from core.model.precision import POLICIES
from core.model.sharding import parameters_on_a_rank
from core.proof.arguments import add_model_flags
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from megatron_tp import tensor_parallel, train
from megatron_tp.evidence.memory import COURSE, COURSE_PARAMETERS, parameters
from tests.pool import Pool

QUICK = ("--steps", "2", "--batch", "4", "--sequence", "16", "--hidden", "32", "--layers", "2")
LLAMA = ("--model", "llama", "--kv-heads", "2")  # each on two of four ranks
COURSE_QUICK = (*QUICK, "--feed-forward", "32", "--vocabulary", "300", "--positions", "20")


@pytest.mark.parametrize(
    ("lesson", "flags", "ranks"),
    [
        ("tensor_parallel", QUICK, 1),
        ("tensor_parallel", QUICK, 4),
        ("train", COURSE_QUICK, 1),
        ("train", COURSE_QUICK, 4),
        ("tensor_parallel", (*QUICK, *LLAMA), 4),
        ("train", (*COURSE_QUICK, *LLAMA), 4),
    ],
)
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, flags: tuple[str, ...], ranks: int) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    outcome = pool.script(ranks, f"megatron_tp/{lesson}.py", *flags, "--report", str(report), "--plot", str(plot))
    assert outcome.codes == [0] * ranks, outcome.err
    written = json.loads(report.read_text())
    assert written["mesh"] == {"tp": ranks}
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert len(written["losses"]) == 2
    assert all(claim["holds"] for claim in written["claims"])
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("TP " if lesson == "tensor_parallel" else "CODE 02") == 1, "only rank 0 speaks"
    assert "<svg" in plot.read_text()
    if flags == COURSE_QUICK:  # what the course prints, what is computed
        for course, right in (("26,793,984", "26,793,984"), ("7,110,912", "7,110,912"), ("564.16 MB", "428.70 MB")):
            assert re.search(rf"{course} +{right} ", outcome.out)


OPTIONS = (
    ("--dtype", "float32"), ("--dtype", "bfloat16"), ("--untied", "--feed-forward", "40"), ("--clip", "1e9"),
    ("--dropout", "0.2", "--attention", "softmax"), ("--heads", "32"), ("--batch", "1", "--sequence", "1"),
    (*LLAMA, "--dtype", "bfloat16"), (*LLAMA[:2], "--kv-heads", "1"), (*LLAMA[:2], "--kv-heads", "8"),
)  # fmt: skip


def failing_claims() -> list[list[str]]:
    """For each of the options the claims that fail on rank 0; inside a worker, to start no processes."""
    frame = Lesson("megatron_tp/tensor_parallel.py", "05", "", "", "")
    add_model_flags(frame, heads=8)
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    failed = []
    for flags in OPTIONS:
        args = frame.parser.parse_args([*QUICK, *flags])
        run = Run(args, job, POLICIES[args.dtype])
        tensor_parallel.lesson(run)
        failed.append([claim.claim for claim in run.evidence.claims if not claim.holds])
    return failed


def test_options(pool: Pool) -> None:
    failed = pool.run(4, failing_claims)[0]
    assert not any(failed), dict(zip(OPTIONS, failed, strict=True))


def test_the_courses_own_model() -> None:
    """On the meta device: the course's figures, and the slide's arithmetic for every number of ranks."""
    for t in (1, 2, 4, 8):
        for rank in range(t):
            axis = Axis("tp", (*range(t),), rank, None, Ledger(), None)
            elements = parameters(COURSE, axis)
            assert elements == parameters_on_a_rank(COURSE, t)
            assert elements == COURSE_PARAMETERS.get(t, elements)


def test_the_lesson_trains_the_courses_model_by_default() -> None:
    frame = Lesson("megatron_tp/train.py", "CODE 02", "", "", "")
    train.add_flags(frame)
    assert train.course_model(frame.parser.parse_args([])) == COURSE


REFUSED = {
    "heads": ("tensor_parallel", ("--heads", "4"), "use --heads 8, or --nproc_per_node one of 2, 4"),
    "heads and hidden": ("tensor_parallel", ("--hidden", "60"), "use --heads 16 --hidden 64"),
    "feed-forward": ("tensor_parallel", ("--feed-forward", "100"), "use --feed-forward 96, or"),
    "negative feed-forward": ("tensor_parallel", ("--feed-forward", "-8"), "use --feed-forward 0"),
    "batch": ("tensor_parallel", ("--batch", "0"), "--batch 0: must be at least 1; use --batch 8"),
    "vocabulary": ("train", ("--vocabulary", "100"), "--vocabulary 100: the text is bytes, 256 different ones"),
    "positions": ("train", ("--positions", "8"), "--positions 8: a sample has --sequence 32 tokens"),
    "key heads": (
        "tensor_parallel", (*LLAMA[:3], "3", "--heads", "24", "--hidden", "96"),
        "--kv-heads 3: heads of keys and values must be a multiple of the 8 ranks or divide them, so that each has "
        "whole heads, or as many have the same one; use --kv-heads 2, or --nproc_per_node one of 3, 6, 12, 24",
    ),
    "key heads of no group": (
        "tensor_parallel", (*LLAMA[:3], "5"), "--kv-heads 5: heads of keys and values must be a multiple of the 8 ranks"
    ),
    "key heads of a GPT": ("tensor_parallel", LLAMA[2:], "use --kv-heads 0, or --model llama"),
    "heads of the course": ("train", ("--heads", "4"), "use --heads 8"),
}  # fmt: skip


@pytest.mark.parametrize(("lesson", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...], message: str) -> None:
    outcome = pool.script(8, f"megatron_tp/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2]
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, "one message, no traceback"
