"""The combined run of Llamas and Qwens: equal to one process, also where ranks hold the same keys and values.

Bugs are put in, too, and seen; and a run goes on in a layout that shards the keys and values otherwise.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run import worker
from cluster.run.worker import Worker
from core.model.gpt import GPTConfig
from core.shards import shard_of
from tests.cluster.resuming import ELSEWHERE, differing, held, job_here, worker_of
from tests.cluster.resuming import train as go_on
from tests.cluster.test_worker import Reference, Result, differences, reference, samples_of, train
from tests.llama import BOTH, LLAMA, QWEN3
from tests.pool import Pool

LLAMA = replace(LLAMA, sequence=16, layers=4)
QWEN = replace(LLAMA, **BOTH)  # all that a Qwen2 or Qwen3 has
ONE = replace(QWEN, kv_heads=1)
UNTIED = replace(LLAMA, **QWEN3, kv_heads=1)
CASES = [
    (QWEN, Layout(tp=2, pp=2, dp=2, microbatches=2)),
    (QWEN, Layout(tp=2, pp=2, dp=2, microbatches=2, zero=1, sp=True)),
    (QWEN, Layout(tp=4)),
    (ONE, Layout(tp=4, dp=2, zero=1)),
    (QWEN, Layout(tp=4, dp=2, zero=2, microbatches=2, recompute="selective")),
    (QWEN, Layout(tp=4, dp=2, zero=3, sp=True)),
    (UNTIED, Layout(tp=2, dp=4, zero=3, microbatches=2, recompute="full")),
    (QWEN, Layout(tp=4, pp=2, microbatches=2, schedule="interleaved", v=2)),
    (ONE, Layout(tp=2, pp=2, dp=2, microbatches=2, schedule="zb-h1", sp=True)),
    (QWEN, Layout(tp=4, pp=2, microbatches=2, schedule="zb-v", v=2, recompute="selective", sp=True)),
    (UNTIED, Layout(tp=2, pp=2, microbatches=4, schedule="dualpipe")),
    (ONE, Layout(tp=2, pp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, sp=True, zero=1)),
    (QWEN, Layout(tp=2, pp=2, dp=2, microbatches=4, sp=True, zero=3)),
    (ONE, Layout(tp=2, pp=2, dp=2, microbatches=4, schedule="zb-h1", zero=3, reduce="step", reshard="step")),
    (ONE, Layout(tp=2, pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=3, recompute="full")),
    (UNTIED, Layout(pp=2, dp=2, microbatches=4, schedule="interleaved", v=2, zero=2)),
    (ONE, Layout(tp=2, pp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, sp=True, zero=2)),
    (QWEN, Layout(pp=2, dp=2, microbatches=4, schedule="dualpipe", zero=3)),
    (UNTIED, Layout(cp=2, pp=2, microbatches=4, schedule="zb-h2", zero=3)),
]


@cache
def one_process(config: GPTConfig) -> Reference:
    return reference(False, config)


@pytest.mark.parametrize(
    ("config", "layout"), CASES, ids=[f"{c.kv_heads} {str(x).replace('--', '')}" for c, x in CASES]
)
def test_equals_one_process(pool: Pool, config: GPTConfig, layout: Layout) -> None:
    layout = samples_of(layout)
    rules.check(layout, config, world=layout.ranks, batch=16)
    found = differences(pool.run(layout.ranks, train, layout, False, config), one_process(config))
    assert max(found.values()) < 1e-10, found


# ---- Bugs


def summed_twice() -> AbstractContextManager:
    right = Worker._sum_over_tp

    def wrong(self: Worker) -> None:
        right(self)
        right(self)

    return patch.object(Worker, "_sum_over_tp", wrong)


def the_norm_counts_every_copy() -> AbstractContextManager:
    right = Worker._counted
    return patch.object(Worker, "_counted", lambda self, p: shard_of(p) is not None or right(self, p))


def over_all_ranks_of_tp() -> AbstractContextManager:
    right = Worker.__init__

    def wrong(self: Worker, *arguments: object) -> None:
        right(self, *arguments)
        self.same_heads = self.tp

    return patch.object(Worker, "__init__", wrong)


BUGS: dict[str, tuple[Callable[[], AbstractContextManager], str]] = {  # and what differs
    "keys and values are not summed": (lambda: patch.object(worker, "is_copied", lambda p: False), "gradients"),
    "norms of heads are not summed": (lambda: patch.object(worker, "heads_norms", lambda model: set()), "gradients"),
    "summed twice": (summed_twice, "gradients"),
    "summed over all ranks of tp": (over_all_ranks_of_tp, "gradients"),
    "the norm counts every copy": (the_norm_counts_every_copy, "norms"),
}


def with_every_bug(layout: Layout) -> dict[str, Result]:
    found = {}
    for name, (bug, _) in {"": (nullcontext, ""), **BUGS}.items():
        with bug():
            found[name] = train(layout, False, QWEN)
    return found


def test_every_bug_is_seen(pool: Pool) -> None:
    ranks = pool.run(4, with_every_bug, samples_of(Layout(tp=4)), timeout=100)
    for name, (_, what) in {"": (None, ""), **BUGS}.items():
        found = differences([rank[name] for rank in ranks], one_process(QWEN))
        seen = {kind for kind, apart in found.items() if apart > 1e-6}
        assert what in seen if name else not seen, (name, found)


# ---- Checkpoints


def save(folder: str, config: GPTConfig, layout: Layout) -> list[str]:
    """One step, saved; what differs where the same layout loads it."""
    first = worker_of(layout, None, config=config)
    checkpoints = first.checkpoints(folder, job_here())
    go_on(first, [0])
    checkpoints.save(1, {})
    checkpoints.wait()
    second = worker_of(layout, None, ELSEWHERE, config=config, mesh=first.mesh)
    again = second.checkpoints(folder, job_here())
    again.load(again.latest())
    return differing(held(first), held(second))


def resume(folder: str, config: GPTConfig, layout: Layout) -> Result:
    resumed = worker_of(layout, None, ELSEWHERE, config=config)
    checkpoints = resumed.checkpoints(folder, job_here())
    checkpoints.load(checkpoints.latest())
    losses = go_on(resumed, [1])
    return losses, [], [], resumed.weights(), resumed.states(), 0.0


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        (ONE, Layout(tp=2), Layout()),
        (ONE, Layout(), Layout(tp=2, sp=True)),
        (QWEN, Layout(tp=4, dp=2, zero=1), Layout(tp=2, pp=2, microbatches=2)),
        (QWEN, Layout(tp=2, dp=2, zero=3), Layout(tp=4, dp=2, zero=3, sp=True)),
    ],
    ids=str,
)  # fmt: skip
def test_goes_on_in_another_layout(
    pool: Pool, tmp_path: Path, config: GPTConfig, before: Layout, after: Layout
) -> None:
    before, after = samples_of(before), samples_of(after)
    assert not any(pool.run(before.ranks, save, str(tmp_path), config, before))
    ranks = pool.run(after.ranks, resume, str(tmp_path), config, after)
    losses, norms, oracle, _ = one_process(config)
    for rank in ranks:
        assert rank[0] == pytest.approx(losses[1:], rel=1e-10)
    found = differences([(losses, norms, [], *rank[3:5], 1.0) for rank in ranks], (losses, norms, oracle, 1.0))
    assert max(found["parameters"], found["states"]) < 1e-10
