"""The split that the planner proposes: no other is faster, it fits, and the command says it."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster import plan
from cluster.planner.balance import Work, balance, better_split, groups_of, slowest
from cluster.planner.hardware import PRESETS as MACHINES
from cluster.planner.layout import Layout, add_flags, given
from cluster.planner.memory import rank_memory
from cluster.planner.models import PRESETS
from cluster.planner.plans import plans
from cluster.planner.rulebook import Case, keeps_all
from cluster.planner.software import Software
from cluster.planner.steptime import step
from core.model.config import ModelConfig
from pipeline.split import notation, parse

H100, SOFTWARE = MACHINES["dgx-h100"], Software()
SHAPES = [("1f1b", 2, 1), ("1f1b", 4, 1), ("interleaved", 2, 2), ("zb-v", 2, 2), ("zb-v", 3, 2), ("dualpipe", 4, 1)]


def splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every one."""
    if stages == 1:
        yield (layers,)
        return
    for n in range(layers + 1):
        yield from ((n, *rest) for rest in splits(layers - n, stages - 1))


def test_no_other_split_is_faster() -> None:
    """All of them, of random times. Bugs: the head left out; ranks with two stages balanced stage by stage."""
    draw = random.Random(1)
    for _ in range(120):
        schedule, pp, v = draw.choice(SHAPES)
        groups = groups_of(schedule, pp, v)
        of_dense, of_moe, of_head = draw.choice([0.3, 1.0]), draw.choice([0.7, 1.0, 2.0]), draw.choice([0, 0.3, 1.7])
        work = Work(draw.choice([0, 0, 1, 2, 3]), draw.randint(1, 5), of_dense, of_moe, of_head)
        found = balance(work, groups)
        assert sum(found) == work.dense + work.moe
        best = min(slowest(work, groups, other) for other in splits(sum(found), pp * v))
        mine = slowest(work, groups, found)
        assert mine[0] == pytest.approx(best[0]), (schedule, pp, v, work, found)
        assert work.dense or mine[1] == pytest.approx(best[1]), "and then no stage is slower"
    assert balance(Work(0, 4, 0, 1.0, 0), ((0,), (1,)), {0: 1, 1: 2}) is None, "they do not fit"
    assert balance(Work(0, 4, 0, 1.0, 0), ((0,), (1,)), {1: 1}) == (3, 1)


LARGE = ModelConfig(vocabulary=128_000, sequence=256, hidden=512, layers=7, heads=4)  # a head of some layers
UNEVEN = {
    "a head of some layers": (LARGE, Layout(pp=3, microbatches=6)),
    "two stages a rank": (replace(LARGE, layers=8), Layout(pp=2, v=2, schedule="interleaved", microbatches=6)),
    "dense layers first": (
        replace(LARGE, vocabulary=1000, experts=4, top_k=2, dense_layers=3, gated=True), Layout(pp=3, microbatches=6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEVEN)
def test_no_other_split_of_a_model_has_a_shorter_step(name: str) -> None:
    """By the planner's own time of a step, every split tried; and where memory is short, of those that fit."""
    model, layout = UNEVEN[name]
    every = [replace(layout, split=notation(split)) for split in splits(model.layers, layout.stages)]
    every = [each for each in every if keeps_all(Case(each, model))]
    needs = {x: max(rank_memory(model, x, rank).total for rank in range(x.pp)) for x in every}
    seconds = {x: step(model, x, H100, SOFTWARE).seconds for x in every}
    found = better_split(model, layout, H100, SOFTWARE, lambda split, rank: True)
    assert seconds[found] == pytest.approx(min(seconds.values()))
    assert seconds[found] < step(model, layout, H100, SOFTWARE).seconds
    memory = sorted(needs.values())[len(needs) // 3]

    def has_room(split: Layout, rank: int) -> bool:
        return rank_memory(model, split, rank).total <= memory

    found = better_split(model, layout, H100, SOFTWARE, has_room)
    fitting = min(seconds[x] for x in every if needs[x] <= memory)
    usual = step(model, layout, H100, SOFTWARE).seconds
    if layout.v > 1:  # which of a rank's stages gets a layer matters then: what is found fits, or nothing is
        assert found is None or needs[found] <= memory
    elif found is None:
        assert fitting >= usual * (1 - 1e-9)
    else:
        assert needs[found] <= memory
        assert seconds[found] == pytest.approx(fitting)


@pytest.mark.parametrize(
    ("name", "pp", "schedule", "v", "expected"),
    [
        ("llama3-405b", 16, "1f1b", 1, (7, *[8] * 14, 7)),  # as its authors have it: 2407.21783, section 3.3.2
        ("deepseek-v3", 16, "zb-v", 2, None),
        ("deepseek-v3", 32, "1f1b", 1, None),
    ],
)
def test_published_models(name: str, pp: int, schedule: str, v: int, expected: tuple[int, ...] | None) -> None:
    model, experts = PRESETS[name], name == "deepseek-v3"
    fixed = {"tp": [8], "pp": [pp], "cp": [1], "sp": [True], "zero": [1], "schedule": [schedule], "microbatch": [1],
             "recompute": ["full"], "v": [v], "ep": [8 if experts else 1]}  # fmt: skip
    found, _ = plans(model, H100, 8 * pp * 8, 1024, SOFTWARE, fixed)
    layout = found[0].layout
    split = parse(layout.split) if layout.split else expected
    assert sum(split) == model.layers
    assert split == expected or expected is None
    assert step(model, replace(layout, split=notation(split)), H100, SOFTWARE).seconds == found[0].step.seconds
    said = "\n".join(plan.why(model, H100, found))
    assert f"--stages '{notation(split)}'" in said
    made = argparse.ArgumentParser()
    add_flags(made)
    assert Layout(**given(made.parse_args(layout.flags()))) == layout
    if experts:
        assert layout.split, "61 layers do not go into 32 stages of one or more equally"
        assert f"--stages '{layout.split}'" in str(layout)
