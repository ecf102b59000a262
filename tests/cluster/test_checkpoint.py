"""A run goes on from a checkpoint: bitwise in its own layout, and equal to one process in any other."""

import json
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run.arguments import full_model
from cluster.run.export import export
from cluster.run.load import check_init, load_export
from core.model.gpt import GPT
from core.model.precision import POLICIES, Precision
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import end_step
from tests.cluster.resuming import ELSEWHERE, FLOAT64, differing, held, job_here, train, worker_of
from tests.cluster.saving import MOMENTS, SAVED
from tests.cluster.test_worker import CLIP, CONFIG, CPU, MOE, SEED, L, optimizer_of, samples_of
from tests.pool import Pool, Running

Result = tuple[list[float], list[LocalTensor]]

DENSE = [  # on 4 ranks or 8
    L(dp=4, zero=3),
    L(tp=2, pp=2, dp=2, microbatches=2),
    L(tp=2, dp=2, sp=True, zero=1),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipe", zero=1),
    L(tp=2, cp=2, sp=True, zero=2),
    L(pp=2, dp=2, microbatches=2, schedule="zb-h1", zero=1, split="E,t*3|t,L"),
    L(pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=3),
    L(tp=2, dp=2, zero=3),
]
EXPERTS = [
    L(dp=4, ep=4, moe=True, zero=1),
    L(pp=2, dp=2, ep=2, microbatches=2, moe=True, split="E|t*4,L"),
    L(dp=4, ep=2, moe=True, zero=3),
    L(tp=2, dp=2, ep=4, moe=True, zero=1),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True, zero=2),
    L(pp=2, dp=2, ep=2, microbatches=4, moe=True, schedule="dualpipe", zero=1),
    L(pp=2, dp=2, ep=2, microbatches=4, moe=True, schedule="dualpipev", v=2, zero=3),
]
Case = tuple[Layout, bool]


# ---- Goes on


def save_and_go_on(
    folder: str, layout: Layout, moe: bool, precision: Precision = FLOAT64
) -> tuple[list[str], list[float]]:
    """Train 2 steps, saving after the first; and again from there. What differs, and the losses."""
    first = worker_of(layout, MOE if moe else None, precision=precision)
    checkpoints = first.checkpoints(folder, job_here())
    assert checkpoints.latest() is None
    losses = train(first, [0])
    checkpoints.save(1, {"step": 1, "losses": losses})
    losses += train(first, [1])  # while it is written
    checkpoints.wait()
    second = worker_of(layout, MOE if moe else None, ELSEWHERE, precision, mesh=first.mesh)
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
    for names, _ in pool.run(4, save_and_go_on, str(tmp_path), layout, False, POLICIES["bfloat16"]):
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


# ---- One file


def there_and_back(path: str, layouts: list[tuple[Layout, bool]]) -> list[dict[str, torch.Tensor]]:
    """The weights of the first layout, exported and read by the second, from both; and what a damaged file is."""
    (first, moe), (second, _) = layouts
    workers = [worker_of(samples_of(each), MOE if moe else None, SEED + i) for i, each in enumerate((first, second))]
    train(workers[0], [0])
    mixture = MOE if moe else None
    export(workers[0], path, full_model(workers[0].spec.config, mixture), 10**9, None)
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
    with pytest.raises(ValueError, match=r"is \[\d+, 16\], not \[\d+, 32\]|is \[16\], not \[32\]"):
        check_init(path, full_model(replace(CONFIG, hidden=32), mixture))
    return [*found, *published]


@pytest.mark.parametrize("layouts", [(DENSE[5], DENSE[2]), (EXPERTS[1], EXPERTS[0])], ids=["dense", "experts"])
def test_exports_to_one_safetensors_file_and_back(pool: Pool, tmp_path: Path, layouts: tuple) -> None:
    saved, *others = pool.run(4, there_and_back, str(tmp_path / "model.safetensors"), layouts)[0]
    data = (tmp_path / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert header.pop("__metadata__") == {"format": "pt"}
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
