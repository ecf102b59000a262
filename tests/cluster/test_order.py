"""In which order a rank computes, gathers and reduces under a pipeline: what travels while something is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from cluster.planner.layout import Layout
from pipeline.engine.actions import Action
from pipeline.engine.observer import what_follows
from pipeline.schedules import SCHEDULES, build
from tests.cluster.resuming import train, worker_of
from tests.cluster.test_worker import samples_of
from tests.pool import Pool
from zero.engine.engine import Engine
from zero.engine.gathered import GatheredWeights


class Seen(NamedTuple):
    """Of one action, as it begins."""

    action: Action
    ahead: bool  # whether all that it needs first has been gathered, or is on its way
    reducing: int  # buckets whose sum over the data ranks is on its way
    held: int  # bytes of gathered weights


class Look:
    """An observer that looks before the engine does anything."""

    def __init__(self, engine: Engine):
        self.engine, self.seen = engine, []

    def begins(self, action: Action, then: Sequence[Action], final: bool) -> None:
        weights, held, ahead = self.engine.sharding.weights, 0, True
        if isinstance(weights, GatheredWeights):
            held = sum(unit.full[0].untyped_storage().nbytes() for unit in weights.units)
            first = weights.walks[action.stage].first(action.kind == "F") if action.kind != "W" else []
            ahead = all(unit.full[0].untyped_storage().nbytes() > 0 for unit in first)
        self.seen.append(Seen(action, ahead, len(self.engine.sharding.gradients.in_flight), held))

    def ends(self, action: Action) -> None: ...

    def done(self) -> None: ...


def look(layouts: list[Layout]) -> list[list[Seen]]:
    """One step of each layout on this rank, of the pipeline's first rank where it is that."""
    found = []
    for layout in layouts:
        worker = worker_of(samples_of(layout), None, bucket=10**6)
        looks = Look(worker.dense_engine)
        worker.pipeline.observers = [looks, *worker.pipeline.observers]
        train(worker, [0])
        worker.close()
        found.append(looks.seen)
    return found


TWO = {"interleaved": 2, "zb-v": 2, "dualpipev": 2}
NAMES = [name for name in SCHEDULES if name != "naive"]


def of_all(pool: Pool, **more: object) -> dict[str, list[Seen]]:
    layouts = [Layout(pp=2, dp=2, microbatches=4, schedule=name, v=TWO.get(name, 1), **more) for name in NAMES]
    return dict(zip(NAMES, pool.run(4, look, layouts)[0], strict=True))


@pytest.mark.parametrize("reshard", ["forward", "step"])
def test_what_an_action_needs_first_is_on_its_way_before(pool: Pool, reshard: str) -> None:
    """Bug: each action gathers as it begins, and waits. All but the first of the step."""
    for name, seen in of_all(pool, zero=3, reshard=reshard).items():
        late = [str(each.action) for each in seen if not each.ahead]
        assert late == [str(seen[0].action)], name


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_is_complete_is_reduced_while_others_compute(pool: Pool, zero: int) -> None:
    """Bug: all is reduced after the last action. Where a rank has two stages, one is complete before the other."""
    more = {"reduce": "step"} if zero >= 2 else {}
    for name, seen in of_all(pool, zero=zero, **more).items():
        follows = what_follows([each.action for each in seen])
        finals = [i for i, each in enumerate(seen) if follows[each.action][1]]
        assert not any(each.reducing for each in seen[: finals[0] + 1]), name
        if len(finals) > 1:
            assert all(each.reducing for each in seen[finals[0] + 1 :]), name


def test_weights_are_freed_or_kept(pool: Pool) -> None:
    """Between actions a rank has what comes next, or, kept, all that it has used."""
    freed, kept = (of_all(pool, zero=3, reshard=reshard)["gpipe"] for reshard in ("forward", "step"))
    assert {each.held for each in kept[1:]} == {kept[-1].held}
    assert max(each.held for each in freed) < kept[-1].held


def test_what_follows() -> None:
    """The W of a split backward reads no weights, and the last of a stage is its final action."""
    row = build("zb-h1", 2, 4)[0]
    follows = what_follows(row)
    assert [str(a) for a, (_, final) in follows.items() if final] == ["0W3"]
    for action, (then, _) in follows.items():
        after = [a for a in row[row.index(action) + 1 :] if a.kind != "W"]
        assert then == tuple(after[:1])
