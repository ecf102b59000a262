"""Checkpoints that are damaged, too many or not written, and bugs put into saving and loading: each shows."""

import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from cluster.planner.layout import Layout
from core.model.text import Text
from core.proof import checkpoint, chunks
from core.proof.checkpoint import Checkpoints
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from tests.cluster.resuming import ELSEWHERE, differing, held, job_here, train, worker_of
from tests.cluster.test_worker import CLIP, CONFIG, CPU, MOE, SEED, optimizer_of, samples_of
from tests.pool import Pool
from zero.engine.engine import Engine

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
    "heads": (replace(CONFIG, heads=2), None),
    "sequence": (replace(CONFIG, sequence=8), None),
}


def refusals(folder: str) -> tuple[list[str], dict[str, str], bool]:
    """What the ranks are told of each spoilt checkpoint, and of one of each other model; whether nothing was read."""
    layout, job = samples_of(Layout(dp=2, zero=1)), job_here()
    worker = worker_of(layout, None)
    train(worker, [0])
    checkpoints = worker.checkpoints(folder, job)
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
        other = worker_of(layout, moe, config=config).checkpoints(folder, job)
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
    checkpoints = worker.checkpoints(folder, job, keep=2)

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
    for step in (3, 4, 5):  # of a run that has gone back, behind as many newer ones as are kept
        checkpoints.save(step, {"time": 3})
    look()
    if job.rank == 0:
        for step in (4, 5):
            shutil.rmtree(checkpoints.folder / f"step-{step:08d}")
    dist.barrier()
    train(worker, [0])
    assert checkpoints.load(checkpoints.folder / "step-00000010") == {"time": 2}
    assert worker.states() == [], "it is from before the first step"
    if job.rank == 0:  # killed between two renames, in a removal, in a write
        (checkpoints.folder / "step-100000000").rename(checkpoints.folder / ".step-100000000.replaced")
        for left in (".step-00000009.removed", ".step-00000011.part", ".step-00000010.replaced"):
            (checkpoints.folder / left).mkdir()
    dist.barrier()
    checkpoints.latest()
    look()
    return found


def test_the_last_are_kept_and_left_overs_removed(pool: Pool, tmp_path: Path) -> None:
    """Of what is newer than what was just saved none is removed, and it is not either."""
    newest = "step-100000000"
    last = (["step-00000010", newest], newest)
    back = (["step-00000004", "step-00000005", "step-00000010", newest], newest)
    assert pool.run(2, old_and_new, str(tmp_path / "not" / "yet")) == [[last, last, back, last]] * 2


def full_disk(folder: str) -> str:
    """What all ranks are told when one cannot write."""
    worker, job = worker_of(samples_of(Layout(dp=2)), None), job_here()
    checkpoints = worker.checkpoints(folder, job)
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
    assert "step-00000001: cannot be written: rank 1: [Errno 28] No space left on device; " in one
    assert " MB are free there" in one
    with pytest.raises(ValueError, match="--keep 0"):
        Checkpoints(tmp_path, None, None, keep=0)


# ---- Bugs put in


def padding_is_saved() -> AbstractContextManager:
    return patch.object(chunks, "min", lambda first, *rest: first if rest else min(first), create=True)


def read_one_element_further() -> AbstractContextManager:
    right = chunks.cover

    def wrong(first: int, end: int, shape: Sequence[int]) -> Iterator[chunks.Extent]:
        further = end < math.prod(shape)
        return right(first + further, end + further, shape)

    return patch.object(chunks, "cover", wrong)


def not_read(what: str) -> AbstractContextManager:
    right = checkpoint.chunks_of
    return patch.object(
        checkpoint, "chunks_of",
        lambda trained, *but: {name: each for name, each in right(trained, *but).items() if not name.endswith(what)},
    )  # fmt: skip


def not_published() -> AbstractContextManager:
    return patch.object(Engine, "publish", lambda self: None)


def not_copied() -> AbstractContextManager:
    return patch.object(chunks.Chunks, "copied", lambda self: self)


BUGS = {
    "none": (nullcontext, nullcontext),
    "padding is saved": (padding_is_saved, nullcontext),
    "read one element further": (nullcontext, read_one_element_further),
    "first moments are not read": (nullcontext, partial(not_read, "|exp_avg")),
    "steps are not read": (nullcontext, partial(not_read, "|step")),
    "biases are not read": (nullcontext, partial(not_read, "norm.bias")),
    "not published": (nullcontext, not_published),
    "none, and the ranks train while it is written": (nullcontext, nullcontext),
    "not copied": (not_copied, nullcontext),
}


def with_each_bug(folder: str) -> dict[str, float | str]:
    """The largest difference from one process, or the refusal, of a run that goes on from a checkpoint after step 0."""
    job = job_here()
    padded, tied, second = Layout(tp=2, dp=2, zero=1), Layout(pp=2, dp=2, microbatches=2, zero=1), Layout(dp=4, zero=2)
    firsts = [worker_of(samples_of(layout), None, bucket=10_000) for layout in (padded, tied)]  # the tied with others
    second = worker_of(samples_of(second), None, ELSEWHERE)
    oracle = Oracle(CONFIG, SEED, CPU, optimizer_of, CLIP)
    for step in (0, 1):
        oracle.step(*Text(None, 16).batch(SEED, step, 16), step)
    for worker in firsts:
        train(worker, [0])
    found: dict[str, float | str] = {}
    trained = threading.Event()
    right = Checkpoints._write

    def write_later(*arguments: Any) -> None:
        trained.wait(30)
        right(*arguments)

    for name, (in_save, in_load) in BUGS.items():
        first = firsts["tied" in name]
        try:
            with in_save(), patch.object(Checkpoints, "_write", write_later):
                checkpoints = [worker.checkpoints(f"{folder}/{name}", job) for worker in (first, second)]
                checkpoints[0].save(1, {})
                if name in ("none, and the ranks train while it is written", "not copied"):
                    before = held(first)
                    train(first, [1])
                trained.set()
                checkpoints[0].wait()
                trained.clear()
            if name == "none, and the ranks train while it is written":
                checkpoints[0].load(checkpoints[0].latest())
                assert differing(before, held(first)) == []
            with in_load():
                checkpoints[1].load(checkpoints[1].latest())
        except ValueError as error:
            trained.clear()
            found[name] = str(error)
            continue
        train(second, [1])
        pieces = [p for rank in job.gather(second.weights() + second.states()) for p in rank]
        found[name] = (
            worst_difference(full_tensors(pieces), oracle.parameters() | oracle.states()) if job.rank == 0 else 0.0
        )
    return found


def test_every_bug_shows(pool: Pool, tmp_path: Path) -> None:
    found, *_ = pool.run(4, with_each_bug, str(tmp_path))
    for name, result in found.items():
        if name.startswith("none"):
            assert result < 1e-10, name
        elif name == "padding is saved":
            assert "cannot be written" in str(result), name
        else:
            assert result > 1e-6, name


def name_at_once() -> AbstractContextManager:
    """As a rename before the other ranks have written."""
    right = Checkpoints._write

    def wrong(self: Checkpoints, target: Path, *rest: Any) -> None:
        target.mkdir(parents=True, exist_ok=True)
        right(self, target, *rest)

    return patch.object(Checkpoints, "_write", wrong)


def the_newest_is_removed() -> AbstractContextManager:
    right = Checkpoints._complete
    return patch.object(Checkpoints, "_complete", lambda self: right(self)[::-1])


def three_saves(folder: str, bug: Callable[[], AbstractContextManager]) -> tuple[list[str], bool]:
    """What is left of three, and whether a checkpoint had its name while a rank still wrote."""
    checkpoints = worker_of(samples_of(Layout(dp=2)), None).checkpoints(folder, job_here())
    right, early = filesystem._write_item, []

    def write(*arguments: Any) -> Any:
        early.append((checkpoints.folder / f"step-{step:08d}").exists())
        return right(*arguments)

    with bug(), patch.object(filesystem, "_write_item", write):
        for step in (1, 2, 3):
            checkpoints.save(step, {})
            checkpoints.wait()
    dist.barrier()
    return sorted(path.name for path in checkpoints.folder.iterdir()), any(early)


def test_bugs_in_the_order_show(pool: Pool, tmp_path: Path) -> None:
    last = ["step-00000002", "step-00000003"]
    assert pool.run(2, three_saves, str(tmp_path / "right"), nullcontext) == [(last, False)] * 2
    assert any(early for _, early in pool.run(2, three_saves, str(tmp_path / "early"), name_at_once))
    assert pool.run(2, three_saves, str(tmp_path / "keep"), the_newest_is_removed)[0][0] != last
