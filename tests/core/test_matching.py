"""What ranks compare before they exchange it: two and three of them in turn, with a store of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.proof import matching
from core.proof.flight import Call
from core.proof.matching import Checker, MismatchError

RANKS = (4, 6, 7)  # of the axis, in the job


def call(number: int = 5, lane: object = "tp", **more: Any) -> Call:
    made = Call()
    usual = {"operation": "all-reduce", "name": "tp", "ranks": RANKS, "shape": (4, 8), "dtype": torch.float32,
             "peer": None, "direction": "", "uneven": False, "number": number, "lane": lane}  # fmt: skip
    for name, value in (usual | more).items():
        setattr(made, name, value)
    return made


def message(direction: str, number: int = 0, **more: Any) -> Call:
    peer = 6 if direction == "send" else 4
    return call(number, (4, 6, "F"), operation="F", direction=direction, peer=peer, **more)


@pytest.fixture
def checkers() -> dict[int, Checker]:
    store = dist.HashStore()
    return {rank: Checker(store, rank) for rank in RANKS}


@pytest.mark.parametrize(
    ("theirs", "more", "said"),
    [
        ({"operation": "all-gather"}, "", "all-gather (4, 8) torch.float32"),
        ({"shape": (8, 4)}, "", "all-reduce (8, 4) torch.float32"),
        ({"dtype": torch.int32}, "", "all-reduce (4, 8) torch.int32"),
        ({}, "max", "all-reduce (4, 8) torch.float32 max"),
    ],
)
def test_each_is_compared(checkers: dict[int, Checker], theirs: dict, more: str, said: str) -> None:
    checkers[4].compare(call())
    checkers[7].compare(call())
    with pytest.raises(MismatchError) as error:
        checkers[6].compare(call(**theirs), more)
    has = f"rank 6 has {said}, rank 4 has all-reduce (4, 8) torch.float32"
    assert str(error.value) == f"{call(**theirs).operation} 5 over tp: {has}"


def test_other_numbers_and_other_groups_are_other_calls(checkers: dict[int, Checker]) -> None:
    checkers[4].compare(call())
    checkers[6].compare(call(6, shape=(1,)))
    checkers[6].compare(call(lane="dp", shape=(2,)))


def test_rows_may_differ_and_columns_not(checkers: dict[int, Checker]) -> None:
    checkers[4].compare(call(shape=(1, 8), uneven=True))
    checkers[6].compare(call(shape=(3, 8), uneven=True))
    with pytest.raises(MismatchError, match=r"rank 7 has all-reduce \('rows', 9\) .* rank 4 has .* \('rows', 8\)"):
        checkers[7].compare(call(shape=(1, 9), uneven=True))


@pytest.mark.parametrize("theirs", [{"shape": (4, 9)}, {"dtype": torch.float64}])
def test_both_sides_of_a_message(checkers: dict[int, Checker], theirs: dict) -> None:
    """Those of one tag are in order; receives of different tags may be posted in another order than the sends."""
    checkers[4].compare(message("send"), tag=1)
    checkers[4].compare(message("send", 1, **theirs), tag=2)
    checkers[4].compare(message("send", 2, **theirs), tag=1)
    checkers[6].compare(message("receive", **theirs), tag=2)
    checkers[6].compare(message("receive", 1), tag=1)
    assert checkers[6].store.num_keys() == 1  # both sides of two messages have been here
    with pytest.raises(MismatchError, match="receive .F. 2 from rank 4 over tp: rank 6 has .* rank 4 has"):
        checkers[6].compare(message("receive", 2), tag=1)


SENDS = {4: [1, 2, 3], 6: [4, 5, 6], 7: [7, 8, 9]}  # rows to the first, the second, the third rank of the axis


def expected(of: int) -> list[int]:
    return [sends[RANKS.index(of)] for sends in SENDS.values()]


def test_what_is_sent_is_what_is_expected(checkers: dict[int, Checker]) -> None:
    for number in (0, 1):
        for rank in (6, 4, 7):
            checkers[rank].compare_rows(call(number), SENDS[rank], expected(rank))


@pytest.mark.parametrize("later", [4, 7])
@pytest.mark.parametrize("odd", ["sends", "expects"])
def test_of_two_ranks_whoever_comes_later_compares(checkers: dict[int, Checker], later: int, odd: str) -> None:
    """Rank 7 sends, or expects, a row more than rank 4 does expect, or send."""
    sends, expects = {rank: [*rows] for rank, rows in SENDS.items()}, {rank: expected(rank) for rank in RANKS}
    (sends if odd == "sends" else expects)[7][0] += 1
    first = 11 - later
    checkers[first].compare_rows(call(), sends[first], expects[first])
    checkers[6].compare_rows(call(), sends[6], expects[6])
    said = "rank 7 sends 8 rows to rank 4, which expects 7"
    if odd == "expects":
        said = "rank 4 sends 3 rows to rank 7, which expects 4"
    with pytest.raises(MismatchError) as error:
        checkers[later].compare_rows(call(), sends[later], expects[later])
    assert str(error.value) == f"all-reduce 5 over tp: {said}"


def test_a_rank_may_be_many_calls_behind(checkers: dict[int, Checker]) -> None:
    for number in range(100):
        checkers[4].compare(call(number))
    with pytest.raises(MismatchError):
        checkers[6].compare(call(0, shape=(1,)))


def test_what_is_left_is_removed_once_all_have_been_there(
    checkers: dict[int, Checker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "LEFT", 4)
    store = checkers[4].store
    for number in range(20):
        for rank in RANKS:  # the first leaves what it does, and the rows
            checkers[rank].compare(call(number))
            checkers[rank].compare_rows(call(number), SENDS[rank], expected(rank))
            assert store.check([f"tp {number}"])
    assert store.num_keys() == 4
    assert store.check(["tp 18", "tp 18 rows", "tp 19", "tp 19 rows"])
