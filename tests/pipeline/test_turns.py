"""F&B by turns: who computes when, what is put back, and what becomes of it where one of the two fails."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipeline.engine.actions import Action, side_by_side, with_communication
from pipeline.engine.observer import what_follows
from pipeline.engine.turns import Turns
from pipeline.schedules import build

CPU = torch.device("cpu")


@pytest.fixture
def turns() -> Iterator[Turns]:
    turns = Turns(CPU)
    yield turns
    turns.close()


def talking(turns: Turns, heard: list[str], name: str, times: int) -> Callable[[], None]:
    def talk() -> None:
        for i in range(times):
            heard.append(f"{name}{i}")
            turns.give()
        heard.append(f"{name}.")

    return talk


@pytest.mark.parametrize(
    ("first", "second", "order"),
    [(2, 2, "B0 F0 B1 F1 B. F."), (1, 3, "B0 F0 B. F1 F2 F."), (3, 1, "B0 F0 B1 F. B2 B."), (0, 2, "B. F0 F1 F."),
     (2, 0, "B0 F. B1 B.")],
)  # fmt: skip
def test_they_alternate_until_one_has_ended(turns: Turns, first: int, second: int, order: str) -> None:
    for _ in range(3):  # a second time, too
        heard: list[str] = []
        turns.together(talking(turns, heard, "B", first), talking(turns, heard, "F", second))
        assert " ".join(heard) == order


def test_alone_there_is_no_turn_to_give(turns: Turns) -> None:
    turns.give()
    turns.together(lambda: None, lambda: None)
    turns.give()


def test_each_finds_what_it_has_set() -> None:
    """Bug: a forward draws the masks of the micro-batch whose backward goes on beside it."""
    place, found = [0], []
    turns = Turns(CPU, lambda: place[0], lambda was: place.__setitem__(0, was))

    def at(here: int) -> Callable[[], None]:
        def compute() -> None:
            place[0] = here
            for _ in range(3):
                turns.give()
                found.append((here, place[0]))

        return compute

    turns.together(at(1), at(2))
    turns.close()
    assert len(found) == 6
    assert all(set_here == seen for set_here, seen in found)


@pytest.mark.parametrize("who", ["B", "F"])
def test_the_failure_of_one_ends_both(turns: Turns, who: str) -> None:
    """Bug: the other waits for its turn for ever, or goes on into collectives that nobody joins."""
    heard: list[str] = []

    def fails() -> None:
        turns.give()
        raise RuntimeError(f"{who} fails")

    other = talking(turns, heard, "x", 5)
    with pytest.raises(RuntimeError, match=f"{who} fails"):
        turns.together(*((fails, other) if who == "B" else (other, fails)))
    assert "x." not in heard
    turns.together(talking(turns, heard, "B", 1), talking(turns, heard, "F", 1))  # and it can be used again


def test_within_a_backward(turns: Turns) -> None:
    """A forward that runs while a backward waits makes a graph of its own, and is no part of that backward."""

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            turns.give()
            return gradient

    x, z = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, made, inside = Waits.apply(2 * x), [], []

    def forward() -> None:
        inside.append(torch._C._current_graph_task_id())
        made.append(Waits.apply(z * z))

    turns.together(y.backward, forward)
    assert (inside, x.grad, z.grad) == ([-1], 2, None)
    made[0].backward()
    assert z.grad == 2


def test_fake_on_both_threads(turns: Turns) -> None:
    """Bug: a dry run computes, and takes memory for, every forward of an F&B."""
    made = []

    def makes() -> None:
        made.append(torch.zeros(2) + 1)
        turns.give()

    with FakeTensorMode():
        turns.together(makes, makes)
    assert [type(each) for each in made] == [FakeTensor, FakeTensor]


@pytest.mark.parametrize(("name", "ranks"), [("dualpipe", 2), ("dualpipe", 4), ("dualpipev", 2), ("dualpipev", 3)])
def test_a_pair_is_side_by_side(name: str, ranks: int) -> None:
    """What a pair needs is posted before, in the order of before, and what it makes is sent after it."""
    schedule = build(name, ranks, 2 * ranks + 2)
    for row, before in zip(schedule, with_communication(schedule), strict=True):
        after = side_by_side(before, dict(row.pairs))
        assert sorted(map(str, before)) == sorted(map(str, after))
        for kind in ("RECV", "SEND", ""):
            assert [a for a in before if a.kind.startswith(kind or tuple("FBIW"))] == [
                a for a in after if a.kind.startswith(kind or tuple("FBIW"))
            ]
        for forward, backward in row.pairs:
            at = after.index(forward)
            assert after[at + 1] == backward
            for action in (forward, backward):
                receive = action._replace(kind=f"RECV_{action.kind}")
                assert receive not in after or after.index(receive) < at
                send = action._replace(kind=f"SEND_{action.kind}")
                assert send not in after or after.index(send) > at + 1


def test_a_pair_is_what_follows() -> None:
    """Bug: weights of the backward of a pair are gathered when it begins, and waited for."""
    f, g, b, w = Action(0, "F", 0), Action(0, "F", 1), Action(1, "B", 0), Action(0, "W", 0)
    last = Action(1, "B", 1)
    follows = what_follows([f, g, b, w, last], {g: b})
    assert [follows[a][0] for a in (f, g, b, w, last)] == [(g, b), (last,), (last,), (last,), ()]
