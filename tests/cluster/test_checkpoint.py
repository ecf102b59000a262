"""A run goes on from a checkpoint: bitwise in its own layout, and equal to one process in any other."""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from cluster import models, rules
from cluster.checkpoint import Checkpoints
from cluster.layout import Layout
from cluster.worker import Worker, make_mesh
from core.gpt import GPT, GPTConfig
from core.launch import Job
from core.ledger import Ledger
from core.oracle import Oracle, worst_difference
from core.seeded import Draw
from core.shards import Piece, join
from core.text import Text
from expert_parallel.gating import end_step
from expert_parallel.moe import MoEConfig, to_moe
from tests.cluster.test_worker import CLIP, CONFIG, CPU, MOE, SEED, L, optimizer_of, samples_of
from tests.pool import Pool, Running

ELSEWHERE = SEED + 1  # the seed of a worker that is to load: what it does not load must show
Result = tuple[list[float], list[Piece]]

DENSE = [
    L(dp=8, zero=3),
    L(tp=2, pp=2, dp=2, microbatches=2),
    L(tp=4, dp=2, sp=True, zero=1),
    L(pp=2, cp=2, dp=2, microbatches=4, schedule="dualpipe", zero=1),
    L(tp=2, cp=2, dp=2, sp=True, zero=2),
    L(pp=4, dp=2, microbatches=4, schedule="zb-h1", zero=1),
    L(dp=2),
    L(tp=2, dp=2, zero=3),
]
EXPERTS = [
    L(dp=8, ep=4, moe=True, zero=1),
    L(pp=2, dp=4, ep=4, microbatches=2, moe=True),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True, zero=1),
    L(tp=2, dp=4, ep=2, sp=True, moe=True, zero=2, microbatches=2),
]


def job_here() -> Job:
    return Job(dist.get_rank(), dist.get_world_size(), CPU, "gloo", 30.0)


def worker_of(
    layout: Layout,
    moe: MoEConfig | None,
    seed: int = SEED,
    dtype: torch.dtype = torch.float64,
    config: GPTConfig = CONFIG,
) -> Worker:
    mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
    return Worker(config, moe, layout, mesh, seed, dtype, CPU, optimizer_of, 3000)


def train(worker: Worker, steps: Sequence[int]) -> list[float]:
    losses = []
    for step in steps:
        worker.zero_grad()
        share = worker.forward_backward(*Text(None, 16).batch(SEED, step, 16), Draw(SEED, step, 0))
        _, loss = worker.clip(CLIP, share)
        worker.step()
        losses.append(loss)
    return losses


def held(worker: Worker) -> list[Piece]:
    """Copies of all that a checkpoint must bring back, in the order of the names."""
    pieces = worker.master_weights() + worker.states() + worker.weights()
    return sorted((each._replace(value=each.value.clone()) for each in pieces), key=lambda each: str(each.name))


def differing(before: list[Piece], after: list[Piece]) -> list[str]:
    """The names of what is not equal to the last bit."""
    pairs = zip(before, after, strict=True)
    return [
        str(a.name) for a, b in pairs if (a.name, a.shard) != (b.name, b.shard) or not torch.equal(a.value, b.value)
    ]


# ---- Goes on


def save_and_go_on(folder: str, layout: Layout, moe: bool, dtype: torch.dtype) -> tuple[list[str], list[float]]:
    """Train 4 steps, saving after 2; and again from there. What differs, and the losses."""
    first = worker_of(layout, MOE if moe else None, dtype=dtype)
    checkpoints = Checkpoints(folder, first, job_here())
    assert checkpoints.latest() is None
    losses = train(first, [0, 1])
    extra = {"step": 2, "losses": losses}
    checkpoints.save(2, extra)
    losses += train(first, [2, 3])  # while it is written
    checkpoints.wait()
    second = worker_of(layout, MOE if moe else None, ELSEWHERE, dtype)
    checkpoints = Checkpoints(folder, second, job_here())
    found = checkpoints.load(checkpoints.latest())
    again = train(second, range(found["step"], 4))
    assert found["losses"] + again == losses
    names = differing(held(first), held(second))
    for worker in (first, second):
        worker.close()
    return names, losses


def go_on(folders: list[str], layout: Layout, moe: bool) -> list[Result]:
    """From each of the checkpoints, one after another, two more steps."""
    worker, results = worker_of(layout, MOE if moe else None, ELSEWHERE), []
    for folder in folders:
        checkpoints = Checkpoints(folder, worker, job_here())
        first = checkpoints.load(checkpoints.latest())["step"]
        losses = train(worker, [first, first + 1])
        results.append((losses, [p._replace(value=p.value.clone()) for p in worker.weights() + worker.states()]))
    worker.close()
    return results


@pytest.fixture(scope="module")
def one_process() -> dict[bool, tuple[list[float], Oracle]]:
    found = {}
    for moe in (False, True):
        make = (lambda config: to_moe(GPT(config), MOE)) if moe else GPT
        oracle = Oracle(CONFIG, SEED, CPU, torch.float64, optimizer_of, CLIP, make)
        losses = []
        for step in range(4):
            losses.append(oracle.step(*Text(None, 16).batch(SEED, step, 16), Draw(SEED, step, 0)))
            end_step(oracle.model)
        found[moe] = losses, oracle
    return found


def name_of(case: tuple[Layout, bool]) -> str:
    return str(case[0]).replace("--", "") + " experts" * case[1]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory, one_process: dict) -> dict[str, str]:
    """A checkpoint after 2 steps of every layout, from which that layout has gone on bitwise."""
    folders = {}
    for case in DENSE + EXPERTS:
        layout, moe = samples_of(case[0]), case[1]
        routing = {"experts": MOE.routing.experts, "top_k": MOE.routing.top_k} if moe else {}
        rules.check(layout, replace(models.of_gpt(CONFIG), **routing), world=layout.ranks, batch=16)
        folders[name_of(case)] = str(tmp_path_factory.mktemp("checkpoint"))
        for names, losses in pool.run(layout.ranks, save_and_go_on, folders[name_of(case)], layout, moe, torch.float64):
            assert names == [], f"{name_of(case)} does not go on bitwise"
            assert losses == pytest.approx(one_process[moe][0], rel=1e-10)
    return folders


@pytest.mark.parametrize("case", DENSE + EXPERTS, ids=name_of)
def test_goes_on_in_another_layout(pool: Pool, one_process: dict, saved: dict[str, str], case: tuple) -> None:
    layout, moe = samples_of(case[0]), case[1]
    cases = EXPERTS if moe else DENSE
    at = cases.index(case)
    sources = [name_of(cases[(at + k) % len(cases)]) for k in ((1, 3) if moe else (1, 2, 5))]
    losses, oracle = one_process[moe]
    reference = oracle.parameters() | oracle.states()
    ranks = pool.run(layout.ranks, go_on, [saved[name] for name in sources], layout, moe)
    for source, *results in zip(sources, *ranks, strict=True):
        for rank_losses, _ in results:
            assert rank_losses == pytest.approx(losses[2:], rel=1e-10), source
        assert worst_difference(join(piece for _, pieces in results for piece in pieces), reference) < 1e-10, source


# ---- Killed

AS_BEFORE = [
    "between two saves",
    "before a data file is opened",
    "halfway through a data file",
    "all data written, before the index",
    "index written, not yet under its name",
    "another rank hashes its file",
    "before the JSON",
    "halfway through the JSON",
    "all written, before the rename",
]
SAVED = ["renamed, before older ones are removed", "while an older one is being removed"]


def said(running: Running, what: str) -> list[list]:
    """What the ranks have said of the kind, without the line that is just being written."""
    lines = [line for path in running.folder.glob("*.out") for line in path.read_text().splitlines(keepends=True)]
    return [each for each in (json.loads(line) for line in lines if line.endswith("\n")) if each[1] == what]


def run_and_kill(pool: Pool, folder: Path, moment: str) -> Running:
    running = pool.start(2, "tests/cluster/saving.py", str(folder), "3", moment)
    while not said(running, "halted") and all(process.is_alive() for process in running.processes):
        time.sleep(0.02)
    for process in running.processes:
        process.kill()
        process.join()
    assert said(running, "halted"), running.said("err")
    return running


def test_killed_at_any_moment_it_goes_on_from_the_last_complete_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """One training, killed time and again, is that which was never killed."""
    moments = AS_BEFORE + SAVED
    steps = 2 * len(moments)
    whole = pool.start(2, "tests/cluster/saving.py", str(tmp_path / "whole"), str(steps), "never")
    folder, at = tmp_path / "killed", 0
    runs = []
    for moment in moments:
        runs.append((at, run_and_kill(pool, folder, moment)))
        at += 1 + (moment in SAVED)
    runs.append((at, pool.start(2, "tests/cluster/saving.py", str(folder), str(steps - at), "never")))
    for running in (whole, runs[-1][1]):
        assert running.end().codes == [0, 0], running.said("err")
    right = {(rank, step): digest for rank, _, step, digest in said(whole, "left")}
    right |= {(rank, 0): digest for rank, _, _, digest in said(whole, "found")}
    for (expected, running), moment in zip(runs, ["never", *moments], strict=True):
        for rank, _, step, digest in said(running, "found"):
            assert (step, digest) == (expected, right[rank, expected]), f"after a kill: {moment}"
    for rank, _, step, digest in said(runs[-1][1], "left"):
        assert digest == right[rank, step]
    assert [path.name for path in folder.iterdir()] == [f"step-{steps:08d}"], "nothing is left over"


# ---- Refused


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    else:
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


SPOILT = [
    (".metadata", "missing", ".metadata: is missing"),
    (".metadata", "truncated", ".metadata: has "),
    (".metadata", "altered", ".metadata: is altered"),
    ("__0_0.distcp", "altered", "__0_0.distcp: is altered"),
    ("__1_0.distcp", "missing", "__1_0.distcp: is missing"),
    ("__1_0.distcp", "truncated", "__1_0.distcp: has "),
    ("checkpoint.json", "missing", "is no checkpoint, it lacks checkpoint.json"),
    ("checkpoint.json", "truncated", "checkpoint.json: is truncated or altered"),
    ("checkpoint.json", "altered", "checkpoint.json: is truncated or altered"),
]
OTHERS = {
    "hidden": (replace(CONFIG, hidden=32, feed_forward=64), None),
    "layers": (replace(CONFIG, layers=8), None),
    "vocabulary": (replace(CONFIG, vocabulary=258), None),
    "tied": (replace(CONFIG, tied=False), None),
    "experts": (CONFIG, MOE),
}


def refusals(folder: str) -> tuple[list[str], dict[str, str], bool]:
    """What the ranks are told of each spoilt checkpoint, and of one of each other model; whether nothing was read."""
    layout, job = samples_of(Layout(dp=2, zero=1)), job_here()
    worker = worker_of(layout, None)
    train(worker, [0])
    checkpoints = Checkpoints(folder, worker, job)
    checkpoints.save(1, {})
    checkpoints.wait()
    before = held(worker)
    messages = []
    for i, (name, how, _) in enumerate(SPOILT):
        copy = Path(folder) / f"spoilt {i}"
        if job.rank == 0:
            shutil.copytree(checkpoints.folder / "step-00000001", copy)
            spoil(copy / name, how)
        dist.barrier()
        with pytest.raises(ValueError) as error:
            checkpoints.load(copy)
        messages.append(str(error.value))
    same = differing(before, held(worker)) == []
    others = {}
    for name, (config, moe) in OTHERS.items():
        other = Checkpoints(folder, worker_of(layout, moe, config=config), job)
        with pytest.raises(ValueError) as error:
            other.load(other.latest())
        others[name] = str(error.value)
    return messages, others, same


def test_what_is_damaged_or_of_another_model_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(2, refusals, str(tmp_path))
    assert results[0] == results[1], "all ranks together"
    messages, others, same = results[0]
    for (name, how, expected), message in zip(SPOILT, messages, strict=True):
        assert expected in message, f"{name} {how}"
    assert same
    for name, message in others.items():
        assert f"its model has {name} " in message
    assert "its model has experts 0, this run's 4" in others["experts"]
    assert "its model has hidden 16, this run's 32" in others["hidden"]


def old_and_new(folder: str) -> list[tuple[list[str], str]]:
    """What is in the folder, and the newest, after several events."""
    worker, job, found = worker_of(samples_of(Layout(dp=2)), None), job_here(), []
    checkpoints = Checkpoints(folder, worker, job, keep=2)

    def look() -> None:
        checkpoints.wait()
        names = sorted(path.name for path in checkpoints.folder.iterdir())
        found.append((names, checkpoints.latest().name))
        dist.barrier()

    for step in (8, 9, 10, 100_000_000):
        checkpoints.save(step, {"time": 1})
    look()
    checkpoints.save(10, {"time": 2})  # again, of a run that has gone back
    look()
    assert checkpoints.load(checkpoints.folder / "step-00000010") == {"time": 2}
    if job.rank == 0:  # killed between two renames, in a removal, in a write
        (checkpoints.folder / "step-100000000").rename(checkpoints.folder / ".step-100000000.replaced")
        for left in (".step-00000009.removed", ".step-00000011.part", ".step-00000010.replaced"):
            (checkpoints.folder / left).mkdir()
    dist.barrier()
    checkpoints.latest()
    look()
    return found


def test_the_last_are_kept_and_left_overs_removed(pool: Pool, tmp_path: Path) -> None:
    last = (["step-00000010", "step-100000000"], "step-100000000")
    assert pool.run(2, old_and_new, str(tmp_path / "not" / "yet")) == [[last, last, last]] * 2


def full_disk(folder: str) -> str:
    """What all ranks are told when one cannot write."""
    worker, job = worker_of(samples_of(Layout(dp=2)), None), job_here()
    checkpoints = Checkpoints(folder, worker, job)
    full = OSError(28, "No space left on device")
    with patch.object(filesystem, "_write_item", side_effect=full) if job.rank else nullcontext():
        checkpoints.save(1, {})
        with pytest.raises(ValueError) as error:
            checkpoints.wait()
    assert checkpoints.latest() is None
    assert list(checkpoints.folder.iterdir()) == []
    checkpoints.save(2, {})  # there is room again
    checkpoints.wait()
    assert checkpoints.latest().name == "step-00000002"
    return str(error.value)


def test_a_failed_write_is_told_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    one, other = pool.run(2, full_disk, str(tmp_path))
    assert one == other
    assert "step-00000001: cannot be written: rank 1: [Errno 28] No space left on device" in one
    with pytest.raises(ValueError, match="--keep 0"):
        Checkpoints(tmp_path, None, None, keep=0)
