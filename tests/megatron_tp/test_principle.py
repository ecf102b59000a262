"""Lecture 04: its claims on several numbers of ranks, what it prints and refuses, and which claims each bug breaks."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm
from core.mesh import Axis
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from megatron_tp import principle
from megatron_tp.evidence import dense
from megatron_tp.evidence import principle as evidence
from tests.pool import Pool

SCRIPT = "megatron_tp/principle.py"
SIZES = {"batch": 2, "sequence": 8, "hidden": 16, "heads": 8}
QUICK = ("--steps=2", *(f"--{name}={value}" for name, value in SIZES.items()))


# ---- The script


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_claim_holds(pool: Pool, tmp_path: Path, ranks: int) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    outcome = pool.script(ranks, SCRIPT, *QUICK, "--report", str(report), "--plot", str(plot))
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    written = json.loads(report.read_text())
    assert (written["lecture"], written["world_size"], written["mesh"]) == ("04", ranks, {"tp": ranks})
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert len(written["losses"]) == 2
    assert written["tokens_per_second"] > 0
    assert len(written["claims"]) == 12 + 12 * ranks, "differences from dense, and counts on each rank"
    assert all(claim["holds"] for claim in written["claims"])
    assert "Megatron-LM TP 原理" in outcome.out
    assert outcome.out.count("Lecture") == 1, "only rank 0 speaks"
    assert "<svg" in plot.read_text()
    if ranks == 4:
        shows_the_shards(outcome.out)


def shows_the_shards(out: str) -> None:
    drawn = [" ".join(line.split()) for line in out.splitlines() if "| B_" in line]
    assert drawn == [
        "0 | A_0 | . | . | . | | B_0 |",
        "1 | . | A_1 | . | . | | B_1 |",
        "2 | . | . | A_2 | . | | B_2 |",
        "3 | . | . | . | A_3 | | B_3 |",
    ], "a rank has its own bands and no other's"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["column", "X", "2 x 8 x 16", "replicated", "2 x 8 x 16", "0", "1"] in cells
    assert ["Y_i = f(X) A_i", "A", "16 x 64", "columns", "16 x 16", "", ""] in cells
    assert ["row", "X", "2 x 8 x 16", "columns", "2 x 8 x 4", "1", "0"] in cells
    assert ["Y = g(X_i A_i)", "A", "16 x 64", "rows", "4 x 64", "", ""] in cells
    assert ["", "B", "64 x 16", "rows", "16 x 16", "", ""] in cells
    assert ["", "O", "16 x 16", "rows", "4 x 16", "", ""] in cells
    assert [row[5:] for row in cells if row[0] in ("mlp", "attention")] == [["1", "1"], ["1", "1"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_claim_holds_with_fewer_bits(pool: Pool, dtype: str) -> None:
    assert pool.run(2, failing_claims, [nullcontext], ["--dtype", dtype])[0] == [[]]


def test_three_ranks(pool: Pool) -> None:
    flags = ["--heads", "3", "--hidden", "15", "--seed", "7"]
    assert pool.run(3, failing_claims, [nullcontext], flags)[0] == [[]]


REFUSED = {
    "heads and ranks": (("--heads", "2"), "must be a multiple of the 4 ranks, so that each gets as much; "
                        "use --heads 4, or --nproc_per_node one of 2"),
    "heads and hidden": (("--heads", "12"), "heads must divide --hidden, "),
    "hidden and ranks": (("--hidden", "6", "--heads", "3"), "use --heads 4 --hidden 8, or --nproc_per_node one of 3"),
    "no heads": (("--heads", "0"), "--heads 0: must be at least 1; use --heads 8"),
    "batch": (("--batch", "0"), "use --batch 8"),
    "sequence": (("--sequence", "-1"), "use --sequence 32"),
    "learning rate": (("--lr", "nan"), "use --lr 0.1"),
    "short text": (("--sequence", "1000000"), "is too short"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(pool: Pool, case: str) -> None:
    flags, hint = REFUSED[case]
    outcome = pool.script(4, SCRIPT, *flags, started=1)  # alone: a process group would wait for the others
    assert outcome.codes == [2], outcome.err
    assert hint in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.out == ""


def test_divergence_stops_all_ranks_and_says_where(pool: Pool) -> None:
    outcome = pool.script(2, SCRIPT, *QUICK, "--lr", "1e300")
    assert outcome.codes == [1, 1]
    assert "NaN or Inf at step 1 in " in outcome.err
    assert "Traceback" not in outcome.err


# ---- The bugs


def no_all_reduce_in_the_backward_of_f() -> AbstractContextManager:
    return patch.object(comm, "copy_to", lambda x, axis: x)


def no_all_reduce_in_the_forward_of_g() -> AbstractContextManager:
    return patch.object(comm, "reduce_from", lambda x, axis: x)


def all_reduce_in_the_backward_of_g_too() -> AbstractContextManager:
    right = comm.reduce_from
    return patch.object(comm, "reduce_from", lambda x, axis: comm.copy_to(right(x, axis), axis))


def bias_added_once_a_rank() -> AbstractContextManager:
    """As g(y B + bias) does: t times the bias forward, the right gradient backward."""
    mlp, attention, t = principle.mlp, principle.attention, dist.get_world_size()

    def with_more(layer: Callable, name: str) -> Callable:
        return lambda x, w, *more, **d: layer(x, w, *more, **d) + (t - 1) * w[name].detach()

    return patch.multiple(principle, mlp=with_more(mlp, "B bias"), attention=with_more(attention, "O bias"))


def bias_of_the_column_sharding_is_lost() -> AbstractContextManager:
    right = evidence.local_tensor

    def wrong(run: Run, name: str, dim: int | None, axis: Axis) -> Tensor:
        return right(run, name, dim, axis) * (name != "A bias")

    return patch.object(evidence, "local_tensor", wrong)


def identical_shards_on_all_ranks() -> AbstractContextManager:
    right = evidence.local_tensor

    def wrong(run: Run, name: str, dim: int | None, axis: Axis) -> Tensor:
        is_weight = name in principle.MLP | principle.ATTENTION
        return right(run, name, dim, replace(axis, index=0) if is_weight else axis)

    return patch.object(evidence, "local_tensor", wrong)


def qkv_sharded_straight_through() -> AbstractContextManager:
    """The columns of q|k|v are sharded as one matrix: rank 0 gets much of Q, and calls it Q, K and V."""
    right = evidence.local_tensor

    def wrong(run: Run, name: str, dim: int | None, axis: Axis) -> Tensor:
        if name not in ("Q", "K", "V"):
            return right(run, name, dim, axis)
        fused = torch.cat([dense.full_tensor(run, n) for n in "QKV"], -1)
        return fused.chunk(axis.size, -1)[axis.index].chunk(3, -1)["QKV".index(name)].contiguous()

    return patch.object(evidence, "local_tensor", wrong)


def gathered_instead_of_reduced() -> AbstractContextManager:
    def wrong(x: Tensor, axis: Axis) -> Tensor:
        return comm.gather_from(x.unsqueeze(0), axis, 0).sum(0)

    return patch.object(comm, "reduce_from", wrong)


ALL = ("column", "row", "mlp", "attention")
RESULT = {name: f"{name}: result" for name in ALL}
GRADIENTS = {name: f"{name}: all gradients" for name in ALL}
FORWARD = {name: f"{name}: all-reduces forward" for name in ALL}
BACKWARD = {name: f"{name}: all-reduces backward" for name in ALL}
SENT = {f"{name}: elements" for name in ("mlp", "attention")} | {"training: elements"}
TRAINING = {"losses equal", "every gradient equals", "the global gradient norm", "every parameter after"}
OTHERS = "messages other"


def of(claims: dict[str, str], *names: str) -> set[str]:
    return {claims[name] for name in names}


LAYER = ("mlp", "attention")
WITH_F, WITH_G = ("column", *LAYER), ("row", *LAYER)
MUST_FAIL = {  # exactly these, and no others
    no_all_reduce_in_the_backward_of_f: {*of(GRADIENTS, *WITH_F), *of(BACKWARD, *WITH_F), *SENT, *TRAINING},
    no_all_reduce_in_the_forward_of_g: {
        *of(RESULT, *WITH_G), *of(FORWARD, *WITH_G), *SENT, *TRAINING
    },
    all_reduce_in_the_backward_of_g_too: {
        *of(GRADIENTS, *WITH_G), *of(BACKWARD, *WITH_G), *SENT, *TRAINING
    },
    bias_added_once_a_rank: {*of(RESULT, *LAYER), *TRAINING},
    bias_of_the_column_sharding_is_lost: {RESULT["mlp"], GRADIENTS["mlp"], *TRAINING},
    identical_shards_on_all_ranks: {*of(RESULT, *ALL), *of(GRADIENTS, *ALL), *TRAINING},
    qkv_sharded_straight_through: {RESULT["attention"], GRADIENTS["attention"], *TRAINING},
    gathered_instead_of_reduced: {*of(FORWARD, *WITH_G), *SENT, OTHERS},
}  # fmt: skip


def failing_claims(bugs: list[Callable[[], AbstractContextManager]], flags: list[str]) -> list[list[str]]:
    """Run the lesson inside a worker with each bug; the claims that failed, on rank 0."""
    frame = Lesson(SCRIPT, "04", "", "", "")
    principle.add_flags(frame)
    args = frame.parser.parse_args([*QUICK, *flags])
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    failed = []
    for bug in bugs:
        run = Run(args, job, POLICIES[args.dtype])
        with bug():
            principle.lesson(run)
        failed.append([claim.claim for claim in run.evidence.claims if not claim.holds])
    return failed


def test_the_claims_catch(pool: Pool) -> None:
    results = pool.run(4, failing_claims, [nullcontext, *MUST_FAIL], [])[0]
    assert results[0] == [], "without a bug"
    for bug, failed in zip(MUST_FAIL, results[1:], strict=True):
        missed = {claim for claim in MUST_FAIL[bug] if not any(f.startswith(claim) for f in failed)}
        besides = [f for f in failed if not any(f.startswith(claim) for claim in MUST_FAIL[bug])]
        assert not missed, f"{bug.__name__}: only these failed: {failed}"
        assert not besides, f"{bug.__name__}: these should hold"
