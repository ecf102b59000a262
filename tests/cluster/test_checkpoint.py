"""A run goes on from a checkpoint: bitwise in its own layout, and equal to one process in any other."""

import json
import math
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.export import export, load_export
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig
from core.model.text import Text
from core.proof import checkpoint, chunks
from core.proof.checkpoint import Checkpoints
from core.proof.launch import Job
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor, full_tensors
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import end_step
from expert_parallel.engine.routing import MoEConfig
from tests.cluster.saving import MOMENTS, SAVED
from tests.cluster.test_worker import CLIP, CONFIG, CPU, MOE, SEED, L, optimizer_of, samples_of
from tests.pool import Pool, Running
from zero.engine.engine import Engine

ELSEWHERE = SEED + 1  # the seed of a worker that is to load: what it does not load must show
Result = tuple[list[float], list[LocalTensor]]

DENSE = [  # on 4 ranks or 8
    L(dp=4, zero=3),
    L(tp=2, pp=2, dp=2, microbatches=2),
    L(tp=2, dp=2, sp=True, zero=1),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipe", zero=1),
    L(tp=2, cp=2, sp=True, zero=2),
    L(pp=2, dp=2, microbatches=2, schedule="zb-h1", zero=1),
    L(tp=2, dp=2, zero=3),
]
EXPERTS = [
    L(dp=4, ep=4, moe=True, zero=1),
    L(pp=2, dp=2, ep=2, microbatches=2, moe=True),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True, zero=2),
]
Case = tuple[Layout, bool]


def job_here() -> Job:
    return Job(dist.get_rank(), dist.get_world_size(), CPU, "gloo", 30.0)


def worker_of(
    layout: Layout,
    moe: MoEConfig | None,
    seed: int = SEED,
    dtype: torch.dtype = torch.float64,
    config: GPTConfig = CONFIG,
    bucket: int = 3000,
    mesh: Mesh | None = None,
) -> Worker:
    mesh = mesh or make_mesh(layout, "cpu", Ledger(), 30.0)
    return Worker(TrainSpec(config, moe, layout, seed, dtype, CPU, optimizer_of, bucket), mesh)


def train(worker: Worker, steps: Sequence[int]) -> list[float]:
    losses = []
    for step in steps:
        worker.zero_grad()
        share = worker.forward_backward(step, *Text(None, 16).batch(SEED, step, 16))
        _, loss = worker.clip(CLIP, share)
        worker.step()
        losses.append(loss)
    return losses


def held(worker: Worker) -> list[LocalTensor]:
    """Copies of all that a checkpoint must bring back, in the order of the names."""
    pieces = worker.master_weights() + worker.states() + worker.weights()
    return sorted((each._replace(value=each.value.clone()) for each in pieces), key=lambda each: str(each.name))


def differing(before: list[LocalTensor], after: list[LocalTensor]) -> list[str]:
    """The names of what is not equal to the last bit."""
    pairs = zip(before, after, strict=True)
    return [
        str(a.name) for a, b in pairs if (a.name, a.shard) != (b.name, b.shard) or not torch.equal(a.value, b.value)
    ]


# ---- Goes on


def save_and_go_on(
    folder: str, layout: Layout, moe: bool, dtype: torch.dtype = torch.float64
) -> tuple[list[str], list[float]]:
    """Train 2 steps, saving after the first; and again from there. What differs, and the losses."""
    first = worker_of(layout, MOE if moe else None, dtype=dtype)
    checkpoints = first.checkpoints(folder, job_here())
    assert checkpoints.latest() is None
    losses = train(first, [0])
    checkpoints.save(1, {"step": 1, "losses": losses})
    losses += train(first, [1])  # while it is written
    checkpoints.wait()
    second = worker_of(layout, MOE if moe else None, ELSEWHERE, dtype, mesh=first.mesh)
    checkpoints = second.checkpoints(folder, job_here())
    found = checkpoints.load(checkpoints.latest())
    again = train(second, range(found["step"], 2))
    assert found["losses"] + again == losses
    names = differing(held(first), held(second))
    for worker in (first, second):
        worker.close()
    return names, losses


def go_on(folders: list[str], layout: Layout, moe: bool) -> list[Result]:
    """From each of the checkpoints, one after another, one more step."""
    worker, results = worker_of(layout, MOE if moe else None, ELSEWHERE), []
    for folder in folders:
        checkpoints = worker.checkpoints(folder, job_here())
        first = checkpoints.load(checkpoints.latest())["step"]
        losses = train(worker, [first])
        results.append((losses, [p._replace(value=p.value.clone()) for p in worker.weights() + worker.states()]))
    worker.close()
    return results


@pytest.fixture(scope="module")
def one_process() -> dict[bool, tuple[list[float], Oracle]]:
    found = {}
    for moe in (False, True):
        make = (lambda config: to_moe(GPT(config), MOE)) if moe else GPT
        oracle = Oracle(CONFIG, SEED, CPU, optimizer_of, CLIP, make)
        losses = []
        for step in range(2):
            losses.append(oracle.step(*Text(None, 16).batch(SEED, step, 16), step))
            end_step(oracle.model)
        found[moe] = losses, oracle
    return found


def name_of(case: Case) -> str:
    return str(case[0]).replace("--", "") + " experts" * case[1]


def save_each(cases: list[Case], folders: dict[str, str]) -> list[tuple[list[str], list[float]]]:
    return [save_and_go_on(folders[name_of((layout, moe))], samples_of(layout), moe) for layout, moe in cases]


def go_on_each(cases: list[Case], sources: list[list[str]]) -> list[list[Result]]:
    return [go_on(each, samples_of(layout), moe) for (layout, moe), each in zip(cases, sources, strict=True)]


def by_ranks() -> dict[int, list[Case]]:
    """The layouts that one job can have one after another."""
    found: dict[int, list[Case]] = {}
    for case in DENSE + EXPERTS:
        found.setdefault(case[0].ranks, []).append(case)
    return found


def sources_of(case: Case) -> list[Case]:
    """From whose checkpoints a layout is to go on."""
    cases = EXPERTS if case[1] else DENSE
    return [cases[(cases.index(case) + k) % len(cases)] for k in ((1,) if case[1] else (1, 3))]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory, one_process: dict) -> dict[str, str]:
    """A checkpoint after the first step of every layout, from which that layout has gone on bitwise."""
    folders = {name_of(case): str(tmp_path_factory.mktemp("checkpoint")) for case in DENSE + EXPERTS}
    for ranks, cases in by_ranks().items():
        for layout, moe in cases:
            routing = {"experts": MOE.routing.experts, "top_k": MOE.routing.top_k} if moe else {}
            rules.check(samples_of(layout), replace(CONFIG, **routing), world=ranks, batch=16)
        for results in pool.run(ranks, save_each, cases, folders):
            for case, (names, losses) in zip(cases, results, strict=True):
                assert names == [], f"{name_of(case)} does not go on bitwise"
                assert losses == pytest.approx(one_process[case[1]][0], rel=1e-10)
    return folders


@pytest.fixture(scope="module")
def gone_on(pool: Pool, saved: dict[str, str]) -> dict[str, list[tuple[list[Result], ...]]]:
    """What each layout makes of each of its sources: by name, of every rank a list over the sources."""
    found = {}
    for ranks, cases in by_ranks().items():
        results = pool.run(ranks, go_on_each, cases, [[saved[name_of(s)] for s in sources_of(c)] for c in cases])
        found |= {name_of(case): each for case, *each in zip(cases, *results, strict=True)}
    return found


@pytest.mark.parametrize("case", DENSE + EXPERTS, ids=name_of)
def test_goes_on_in_another_layout(one_process: dict, gone_on: dict, case: Case) -> None:
    losses, oracle = one_process[case[1]]
    reference = oracle.parameters() | oracle.states()
    for source, *results in zip(sources_of(case), *gone_on[name_of(case)], strict=True):
        for rank_losses, _ in results:
            assert rank_losses == pytest.approx(losses[1:], rel=1e-10), name_of(source)
        full = full_tensors(piece for _, pieces in results for piece in pieces)
        assert worst_difference(full, reference) < 1e-10, name_of(source)


def test_goes_on_bitwise_in_bfloat16(pool: Pool, tmp_path: Path) -> None:
    layout = samples_of(Layout(tp=2, dp=2, zero=1))
    for names, _ in pool.run(4, save_and_go_on, str(tmp_path), layout, False, torch.bfloat16):
        assert names == [], "weights in float32 and the moments"


# ---- Killed


def said(running: Running, what: str) -> list[list]:
    """What the ranks have said of the kind, without the line that is just being written."""
    lines = [line for path in running.folder.glob("*.out") for line in path.read_text().splitlines(keepends=True)]
    return [each for each in (json.loads(line) for line in lines if line.endswith("\n")) if each[1] == what]


@pytest.fixture(scope="module")
def at_every_moment(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Running]:
    """A training that is never killed, and the folder that holds what a kill at each moment of a save would leave."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    running = pool.start(2, "tests/cluster/saving.py", str(folder))
    assert running.end().codes == [0, 0], running.said("err")
    return folder.with_name("run copies"), running


def test_at_any_moment_of_a_save_the_last_complete_checkpoint_is_there(at_every_moment: tuple) -> None:
    copies, running = at_every_moment
    left = {(rank, step): digest for rank, _, step, digest in said(running, "left")}
    found = {(rank, moment): (step, digest) for rank, _, moment, step, digest in said(running, "found")}
    for i, moment in enumerate(MOMENTS):
        step = i + 1 + (moment in SAVED)  # the first save is before all moments
        for rank in (0, 1):
            assert found[rank, moment] == (step, left[rank, step]), moment
        names = sorted(path.name for path in (copies / moment).iterdir())
        older = [f"step-{step - 1:08d}"] * (moment == SAVED[0])  # removed after the next save
        assert names == [*older, f"step-{step:08d}"], "nothing is left over"


def run_and_kill(pool: Pool, folder: Path, moment: str) -> Running:
    running = pool.start(2, "tests/cluster/saving.py", str(folder), "3", moment)
    while not said(running, "halted") and all(process.is_alive() for process in running.processes):
        time.sleep(0.02)
    for process in running.processes:
        process.kill()
        process.join()
    assert said(running, "halted"), running.said("err")
    return running


def test_killed_it_goes_on_from_the_last_complete_checkpoint(
    pool: Pool, tmp_path: Path, at_every_moment: tuple
) -> None:
    """One training, killed time and again, is that which was never killed."""
    moments, at, runs = ["halfway through a data file", "renamed, before older ones are removed"], 0, []
    for moment in moments:
        runs.append((at, run_and_kill(pool, tmp_path / "run", moment)))
        at += 1 + (moment in SAVED)
    runs.append((at, pool.start(2, "tests/cluster/saving.py", str(tmp_path / "run"), "2", "never")))
    assert runs[-1][1].end().codes == [0, 0], runs[-1][1].said("err")
    _, never_killed = at_every_moment
    right = {(rank, step): digest for rank, _, step, digest in said(never_killed, "left")}
    right |= {(rank, 0): digest for rank, _, moment, _, digest in said(never_killed, "found") if "start" in moment}
    for expected, running in runs:
        for rank, _, _, step, digest in said(running, "found"):
            assert (step, digest) == (expected, right[rank, expected])
    for rank, _, step, digest in said(runs[-1][1], "left"):
        assert digest == right[rank, step]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"step-{at + 2:08d}"], "nothing is left over"


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
    last = (["step-00000010", "step-100000000"], "step-100000000")
    assert pool.run(2, old_and_new, str(tmp_path / "not" / "yet")) == [[last, last, last]] * 2


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


# ---- One file


def there_and_back(path: str, layouts: list[tuple[Layout, bool]]) -> list[dict[str, torch.Tensor]]:
    """The weights of the first layout, exported and read by the second, from both; and what a damaged file is."""
    (first, moe), (second, _) = layouts
    workers = [worker_of(samples_of(each), MOE if moe else None, SEED + i) for i, each in enumerate((first, second))]
    train(workers[0], [0])
    export(workers[0], job_here(), path)
    load_export(workers[1], path)
    found = [dict(full_tensors(p for rank in job_here().gather(w.master_weights()) for p in rank)) for w in workers]
    published = [dict(full_tensors(p for rank in job_here().gather(w.weights()) for p in rank)) for w in workers]
    data = Path(path).read_bytes()
    for name, damaged in (("truncated", data[:-1]), ("text", b"no weights, but more than eight bytes"), ("empty", b"")):
        if dist.get_rank() == 0:
            Path(f"{path} {name}").write_bytes(damaged)
        dist.barrier()
        with pytest.raises(ValueError, match=f"{name}: is no safetensors file"):
            load_export(workers[1], f"{path} {name}")
    with pytest.raises(ValueError, match="No such file"):
        load_export(workers[1], f"{path} elsewhere")
    other = worker_of(samples_of(second), MOE if moe else None, config=replace(CONFIG, hidden=32))
    with pytest.raises(ValueError, match=r"is \[\d+, 16\], not \[\d+, 32\]|is \[16\], not \[32\]"):
        load_export(other, path)
    return [*found, *published]


@pytest.mark.parametrize("layouts", [(DENSE[5], DENSE[2]), (EXPERTS[1], EXPERTS[0])], ids=["dense", "experts"])
def test_exports_to_one_safetensors_file_and_back(pool: Pool, tmp_path: Path, layouts: tuple) -> None:
    saved, *others = pool.run(4, there_and_back, str(tmp_path / "model.safetensors"), layouts)[0]
    data = (tmp_path / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert header.keys() == saved.keys()
    end = 0
    for name, each in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert each["data_offsets"][0] == end, "the format allows no gaps"
        end = each["data_offsets"][1]
        kind = {"F64": "<f8", "F32": "<f4"}[each["dtype"]]
        value = np.frombuffer(body[each["data_offsets"][0] : end], kind).reshape(each["shape"])
        assert np.array_equal(value, saved[name].numpy()), name
    assert end == len(body)
    for weights in others:
        assert all(torch.equal(weights[name], saved[name]) for name in saved)
        assert weights.keys() == saved.keys()


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


def the_tied_copy_is_saved_too() -> AbstractContextManager:
    return patch.object(Worker, "saved_elsewhere", lambda self: set())


def not_published() -> AbstractContextManager:
    return patch.object(Engine, "publish", lambda self: None)


def not_copied() -> AbstractContextManager:
    return patch.object(chunks.Chunks, "copied", lambda self: self)


BUGS = {
    "none": (nullcontext, nullcontext),
    "padding is saved": (padding_is_saved, nullcontext),
    "the tied copy is saved too": (the_tied_copy_is_saved_too, nullcontext),
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
        elif name in ("padding is saved", "the tied copy is saved too"):
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
