"""What is counted or timed of all actions at once, against the plain rules that look at one after another."""

import random
from contextlib import suppress
from math import inf
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.actions import Action, Schedule, ScheduleError, most_in_flight, stages_of_ranks
from pipeline.engine.numbered import Clocks, Numbered
from pipeline.engine.search import Moves, Problem, makespan
from pipeline.engine.validator import bubble, bubbles_within, check_complete, validate
from pipeline.evidence.claims import messages_by_rule
from pipeline.schedules import SCHEDULES, build

GRID = [(name, p, m) for name in SCHEDULES for p, m in ((1, 1), (1, 3), (2, 4), (3, 6), (4, 5), (4, 8), (6, 13))]


def built(name: str, p: int, m: int) -> Schedule:
    try:
        return build(name, p, m)
    except ScheduleError:
        pytest.skip("there is none of these sizes")


@pytest.mark.parametrize(("name", "p", "m"), GRID)
def test_counts_are_those_of_the_plain_rules(name: str, p: int, m: int) -> None:
    schedule = built(name, p, m)
    verdict = validate(schedule, {"F": 1.1, "B": 2.3, "I": 1.0, "W": 1.3}, 0.3)
    assert verdict.in_flight == [most_in_flight(row) for row in schedule]
    assert verdict.numbered.messages() == messages_by_rule(schedule)
    assert verdict.numbered.stages_on_ranks() == [*map(len, stages_of_ranks(schedule))]
    assert verdict.makespan == max(row[-1].end[0] for row in verdict.events)
    assert (verdict.bubble_of_wall, verdict.bubble_of_ideal) == pytest.approx(bubble(verdict.events))
    assert verdict.own_bubble == pytest.approx(max(bubbles_within(verdict.events)))


def is_complete(schedule: Schedule) -> bool:
    try:
        check_complete(schedule)
    except ScheduleError:
        return False
    return True


def changed(schedule: Schedule, draw: random.Random) -> Schedule:
    """With one or two actions dropped, repeated, swapped, replaced, or given to another rank."""
    rows = [list(row) for row in schedule]
    for _ in range(draw.choice((1, 1, 2))):
        row, other = draw.choice(rows), draw.choice(rows)
        if not row:
            continue
        a, b = draw.randrange(len(row)), draw.randrange(len(row))
        match draw.choice(("drop", "repeat", "swap", "replace", "give")):
            case "drop":
                del row[a]
            case "repeat":
                row.insert(b, row[a])
            case "swap":
                row[a], row[b] = row[b], row[a]
            case "replace":
                kind, more = draw.choice("FBIW"), draw.choice((-1, 0, 0, 1, 10**9))
                row[a] = Action(row[a].stage + draw.choice((0, more)), kind, row[a].microbatch + draw.choice((0, more)))
            case "give":
                other.append(row.pop(a))
    return rows


def test_what_is_found_complete_at_once_is_what_is_found_so_one_by_one() -> None:
    draw, complete = random.Random(0), 0
    for _ in range(3000):
        name, p = draw.choice([*SCHEDULES]), draw.randint(1, 4)
        with suppress(ScheduleError):
            schedule = changed(build(name, p, draw.randint(1, 8)), draw)
            complete += (expected := is_complete(schedule))
            assert (Numbered.of(schedule) is not None) == expected, schedule
    assert 200 < complete < 2500


@pytest.mark.parametrize("schedule", [[], [[]], [[Action(0, "F", 0), Action(0, "B", 0)], []], [[Action(0, "FB", 0)]]])
def test_what_cannot_be_numbered_is_refused_in_words(schedule: Schedule) -> None:
    assert Numbered.of(schedule) is None
    with pytest.raises(ScheduleError):
        validate(schedule)


def test_a_stage_on_three_ranks_is_not_complete() -> None:
    three = [[Action(0, "F", m), Action(0, "B", m)] for m in range(3)]
    assert Numbered.of(three) is None
    assert not is_complete(three)


# ---- The search's moves


times = st.sampled_from([0.0, 0.5, 1.0, 1.3, 2.0])


def moves_agree(problem: Problem, schedule: Schedule, draw: random.Random, tries: int = 150) -> int:
    """How often a move was made; each must be timed as a schedule of its own is."""
    moves, actions = Moves(schedule, problem), [action for row in schedule for action in row]
    length, made = makespan(schedule, problem), 0
    for _ in range(tries):
        rank = draw.randrange(problem.ranks)
        old, new = (draw.randrange(len(moves.rows[rank])) for _ in range(2))
        row = moves.rows[rank].copy()
        row.insert(new, row.pop(old))
        rows = [row if r == rank else each for r, each in enumerate(moves.rows)]
        plain = [[actions[number] for number in each] for each in rows]
        fits = max(map(most_in_flight, plain)) <= moves._slots
        expected = makespan(plain, problem) if is_complete(plain) and fits else inf
        within = length + draw.random()
        expected = expected if expected <= within else inf
        assert moves.move(rank, old, new, within) == expected
        if expected < inf:
            length, made = expected, made + (old != new)
            assert moves.rows == rows
    return made


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 8), st.integers(0, 99))
def test_a_move_is_timed_as_if_all_were_timed_again(data: st.DataObject, name: str, p: int, m: int, seed: int) -> None:
    with suppress(ScheduleError):
        schedule = build(name, p, m)
        costs = {kind: data.draw(st.lists(times, min_size=2 * p, max_size=2 * p)) for kind in "FIW"}
        moves_agree(
            Problem(p, m, costs, data.draw(st.sampled_from([0.0, 0.3])), 2 * p, 2), schedule, random.Random(seed)
        )


PROBLEM = Problem(4, 8, {kind: [0.5, 0.7, 0.4, 0.6, 0.5, 0.9, 0.5, 0.5] for kind in "FIW"}, 0.2, 6)


def test_many_moves_are_made() -> None:
    assert moves_agree(PROBLEM, build("zb-v", 4, 8), random.Random(1), 400) > 30


def test_moves_that_forget_a_rank_are_noticed() -> None:
    """The bug: what follows on other ranks is not timed again after a move."""
    right = Clocks.run

    def wrong(self: Clocks, rows: list, at: list | None = None, *rest: object) -> bool:
        if at and rest:
            at[-1] = len(rows[-1])
        return right(self, rows, at, *rest)

    with patch.object(Clocks, "run", wrong), pytest.raises((AssertionError, IndexError)):
        moves_agree(PROBLEM, build("zb-v", 4, 8), random.Random(1), 400)
