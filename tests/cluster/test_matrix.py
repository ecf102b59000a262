"""The covering matrix: that its rows have all they should, that what none has is refused, and that bugs show in a row.

`python -m tests.cluster.matrix` runs all rows; here those come first that have the most of what those before have not.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.run import worker
from cluster.run.arguments import check
from cluster.run.worker import Worker
from core.proof.checkpoint import Checkpoints
from core.proof.launch import Job
from tests.cluster.covering import Covering, Refusal, Row
from tests.cluster.matrix import (
    SAME_IN_ALL,
    SIZES,
    Found,
    Matrix,
    common,
    kept_rows,
    lesson_of_the_run,
    parsed,
    run_all,
    run_row,
    write_tokens,
)
from tests.cluster.test_mutations import instead
from tests.pool import Pool
from zero.engine.engine import Engine

FIRST = {8: 14, 6: 14}  # rows that run here
TOGETHER = 4  # in one test

WORLDS = pytest.mark.parametrize("world", SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("matrix")
    write_tokens(made)
    return made


# ---- The rows


@pytest.fixture(scope="module")
def refused() -> dict[int, dict]:
    return {world: Matrix(world).refused(kept_rows(world)) for world in SIZES}


def test_every_flag_is_in_the_table() -> None:
    """Or it is said why not: a new flag of the run cannot be forgotten."""
    matrix = Matrix(8)
    flags = {action.dest for action in lesson_of_the_run().parser._actions}
    outside = {flag for some in SAME_IN_ALL.values() for flag in some}
    assert flags - set(matrix.numbers(matrix.plain())) == outside


@WORLDS
def test_the_rows_are_legal(world: int, folder: Path) -> None:
    """By the rules of the run itself, all of them."""
    matrix = Matrix(world)
    for row in kept_rows(world):
        assert matrix.refusal(row) is None
        check(parsed(f"{common(folder)} {matrix.line(row)}"), world)


@WORLDS
def test_what_no_row_has_is_refused(world: int, refused: dict[int, dict], folder: Path) -> None:
    """Proved, by rules; and each of these rules refuses in the run itself too, with its reason."""
    matrix, seen = Matrix(world), set()
    assert len(refused[world]) > 500
    for combination, rules in refused[world].items():
        assert rules
        assert not any(rule.startswith("none found") for rule in rules), combination
        row = matrix.plain() | dict(combination)
        why = matrix.refusal(row)
        assert why is not None
        if why.rule not in seen and not why.rule.startswith("no effect"):
            seen.add(why.rule)
            with pytest.raises(ValueError, match="; use "):
                check(parsed(f"{common(folder)} {matrix.line(row)}"), world)
    assert len(seen) > 8


def test_the_rules_read_what_is_said() -> None:
    """What refuses a row refuses every other one with the same values of what it has read: else the proof is none."""
    matrix, random = Matrix(8), Random(0)
    seen = set()
    for _ in range(3000):
        row = {name: random.choice(values) for name, values in matrix.table.items()}
        axes = random.choice([{"dp": 8}, {"tp": 2, "pp": 4}, {"cp": 4, "dp": 2}, {"tp": 2, "cp": 2, "dp": 2}])
        row |= dict.fromkeys(("tp", "cp", "dp", "pp"), 1) | axes
        why = matrix.refusal(row)
        if why is None:
            continue
        other = {name: row[name] if name in why.reads else random.choice(values)
                 for name, values in matrix.table.items()}  # fmt: skip
        again = matrix.refusal(other)
        assert again is not None, (why, row, other)
        seen.add(why.rule)
    assert len(seen) > 15


def test_a_covering_array_covers() -> None:
    """All triples of three, all pairs, but what cannot be: found, though the rule that refuses reads a third."""
    table = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2), "d": (0, 1)}

    def refusal(row: Row) -> Refusal | None:
        if row["a"] == 2 and row["c"] != 1:
            return Refusal("c", frozenset("ac"))
        return Refusal("d", frozenset("cd")) if row["c"] == row["d"] == 1 else None

    found = Covering(table, refusal, {3: ("a", "b", "c"), 2: None}, seed=3)
    pairs = {c: rules for c, rules in found.refused.items() if len(c) == 2}
    assert pairs == {
        (("a", 2), ("c", 0)): {"c"}, (("a", 2), ("c", 2)): {"c"}, (("c", 1), ("d", 1)): {"d"},
        (("a", 2), ("d", 1)): {"c", "d"},
    }  # fmt: skip
    assert len([c for c in found.refused if len(c) == 3]) == 4
    assert all(refusal(row) is None for row in found.rows)
    assert not Covering(table, refusal, {3: ("a", "b", "c"), 2: None}, given=found.rows).rows
    assert len(found.rows) <= 16
    again = Covering(table, refusal, {3: ("a", "b", "c"), 2: None}, given=found.rows[1:])
    assert again.rows  # one row less, and something is missing


# ---- Run


@pytest.mark.parametrize(
    ("world", "first"), [(world, first) for world, rows in FIRST.items() for first in range(0, rows, TOGETHER)]
)
def test_a_row_equals_one_process(pool: Pool, folder: Path, world: int, first: int) -> None:
    matrix = Matrix(world)
    lines = [matrix.line(row) for row in kept_rows(world)[first : min(first + TOGETHER, FIRST[world])]]
    found = [*run_all(pool, world, str(folder), lines)]
    assert len(found) == len(lines)
    assert [each for each in found if each.failed] == []


@WORLDS
def test_the_first_rows_have_most(world: int) -> None:
    rows, names = kept_rows(world), [*combinations(Matrix(world).table, 2)]
    every, first = ({(a, row[a], b, row[b]) for row in some for a, b in names} for some in (rows, rows[: FIRST[world]]))
    assert len(first) > 0.7 * len(every)


# ---- The bugs

SMALL = "--vocabulary 41 --hidden 16 --heads 4 --feed-forward 32 --sequence 8 --layers 2"
ROWS = {
    "tp x cp": "--tp 2 --cp 2 --sp --batch 2 --optimizer muon",
    "experts": "--dp 4 --ep 2 --experts 4 --batch 4 --zero 1",
    "pipeline": "--pp 2 --dp 2 --microbatches 2 --batch 4",
    "shards of other sizes": "--tp 2 --cp 2 --sp --zero 3 --optimizer muon --model llama --kv-heads 1 --batch 2",
    "chunks of a head whose weights are freed": "--pp 2 --dp 2 --microbatches 2 --batch 4 --zero 3 --loss-chunk 7 "
    "--schedule zb-h1",
    "resumed": "--tp 2 --dp 2 --zero 2 --batch 4 --save RUN --save-every 1",
}


def times(factor: float, engine: Engine | None) -> None:
    for own in engine.own_gradients if engine else ():
        own.mul_(factor)


def after(also: Callable[[Any], None]) -> Callable:
    """What was there, and then this with its object."""

    def wrong(right: Callable, self: Any, *arguments: Any, **named: Any) -> Any:
        result = right(self, *arguments, **named)
        also(self)
        return result

    return wrong


def only_on_the_first(right: Callable, self: Worker, clip: float, share: Tensor) -> tuple[float, float]:
    norm, loss = right(self, clip, share)
    return norm, loss if dist.get_rank() == 0 else loss / 2


def of_other_elements(right: Callable, self: Engine) -> list:
    return [each._replace(value=each.value.flip(0)) for each in right(self)]


BUGS: dict[str, tuple[str, Callable[[], AbstractContextManager], str]] = {  # row, bug, what is seen
    "the shown loss is that of tp times cp": (
        "tp x cp", lambda: instead(Worker, "clip", lambda right, self, c, share: (
            right(self, c, share)[0], 2 * right(self, c, share)[1])), "loss",
    ),
    "only the first rank shows the whole loss": (
        "tp x cp", lambda: instead(Worker, "clip", only_on_the_first), "shown loss",
    ),
    "the validation loss is one rank's": (
        "tp x cp", lambda: instead(Worker, "evaluate", lambda right, *x: right(*x) / 2), "validation loss",
    ),
    "experts' gradients are ep times too large": (
        "experts", lambda: instead(Worker, "_sum_over_tp", after(lambda self: times(2, self.expert_engine))),
        "gradient",
    ),
    "the norm misses the experts": (
        "experts", lambda: instead(worker, "hypot", lambda _, dense, experts: dense), "norm",
    ),
    "a pipeline's gradients are means over microbatches": (
        "pipeline",
        lambda: instead(Worker, "_sum_over_copies", after(lambda self: [times(0.5, e) for e in self.engines])),
        "gradient",
    ),
    "moments are of other elements": ("experts", lambda: instead(Engine, "states", of_other_elements), "moment"),
    "moments are not loaded": (
        "resumed", lambda: instead(Checkpoints, "load", without_moments), "parameter",
    ),
    "weight decay is left out": (
        "tp x cp", lambda: instead(worker, "shard_optimizer", lambda right, model, spec, *x: right(
            model, _without_decay(spec), *x)), "parameter",
    ),
}  # fmt: skip


def without_moments(right: Callable, self: Checkpoints, path: Path) -> dict:
    extra = right(self, path)
    for optimizer, _ in self.trained.named_optimizers():
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
    return extra


def _without_decay(spec: Any) -> Any:
    return worker.TrainSpec(**vars(spec) | {"weight_decay": 0.0})


def with_every_bug(folder: str) -> dict[str, Found | None]:
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 60.0)
    runs = {name: (name, nullcontext, "") for name in ROWS} | BUGS
    found = {}
    for name, (row, bug, _) in runs.items():
        with bug():
            found[name] = run_row(f"{common(folder)} {SMALL} {ROWS[row]}", job)
    return found


@pytest.fixture(scope="module")
def seen(pool: Pool, folder: Path) -> dict[str, Found]:
    return pool.run(4, with_every_bug, str(folder), timeout=100)[0]


@pytest.mark.parametrize("name", ROWS)
def test_without_a_bug_a_row_holds(seen: dict[str, Found], name: str) -> None:
    assert seen[name].failed == []
    assert all(0 <= apart < 1e-10 for apart in seen[name].largest.values())


@pytest.mark.parametrize("name", BUGS)
def test_a_row_shows_the_bug(seen: dict[str, Found], name: str) -> None:
    what = BUGS[name][2]
    assert seen[name].largest[what] > 1e-6, seen[name]
