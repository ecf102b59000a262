"""What is sent from where it is: memory of this rank that others read, without a copy, until it is let go."""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core import comm
from core.engine import direct, room
from core.engine.near import Neighbours
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.peers import PeerError
from tests.core.test_near import FEW, SOON, axis_of, connected
from tests.pool import Pool
from zero.engine.engine import zero1, zero2

CPU = torch.device("cpu")
LENGTH = 1000


def floats(of: Neighbours, count: int) -> Tensor:
    return of.empty(4 * count).view(torch.float32)


def begun(ranks: list[Neighbours], sent: list[Tensor]) -> tuple[list[direct.Exchange], list[Tensor]]:
    sums = [torch.empty(LENGTH) for _ in ranks]
    works = [
        direct.reduce_scatter(x.chunk(len(ranks)), mine, axis_of(i, len(ranks)), ranks[i])
        for i, (x, mine) in enumerate(zip(sent, sums, strict=True))
    ]
    return works, sums


def dropped_before_it_is_read() -> None:
    """It is let go when it is sent, and as much is made and filled at once; also by Python's collector."""
    ranks = connected(3)
    values = [torch.randn(3 * LENGTH) for _ in ranks]
    for again in range(3):
        sent = [floats(rank, 3 * LENGTH).copy_(x) for rank, x in zip(ranks, values, strict=True)]
        before = [len(rank.room.taken) for rank in ranks]
        works, sums = begun(ranks, sent)
        assert [len(rank.room.taken) for rank in ranks] == before, "copied"
        cycle = [sent]
        cycle.append(cycle)
        for work in works if again == 2 else ():
            work.wait(SOON)
        del sent, cycle
        gc.collect()
        if again < 2:
            others = [floats(rank, 3 * LENGTH).fill_(-7.0) for rank in ranks]
            for work in works:
                work.wait(SOON)
            assert all((each == -7.0).all() for each in others)
            del others
        whole = values[0] + values[1] + values[2]
        assert torch.equal(torch.cat(sums), whole)
        del works
    for rank in ranks:
        rank.hear()
        rank.room.take(1, [1])  # takes what was let go, and is in its place
        assert [(piece.place, piece.kept) for piece in rank.room.taken] == [(0, False)]
        assert rank.room.in_flight == rank.room.taken[0].end


def test_what_is_let_go_is_not_used_again_before_it_is_read() -> None:
    dropped_before_it_is_read()


def test_readers_that_are_not_counted_are_seen() -> None:
    right = Neighbours.send

    def wrong(self: Neighbours, x: Tensor, to: list[int], *where: int) -> object:
        piece = right(self, x, to, *where)
        del piece.unread[-len(to) :]
        return piece

    with patch.object(Neighbours, "send", wrong), pytest.raises((AssertionError, IndexError, ValueError)):
        dropped_before_it_is_read()


def test_it_is_written_to_again_when_all_have_read_it() -> None:
    ranks, axis = connected(2), axis_of(0, 2)
    sent = [floats(rank, 2 * LENGTH).fill_(1.0) for rank in ranks]
    works, _ = begun(ranks, sent)
    works[0].wait(SOON)
    object.__setattr__(axis, "timeout", FEW)
    with patch.object(direct, "neighbours", lambda *_: ranks[0]):
        with pytest.raises(
            PeerError, match="wait for readers of what was sent over dp failed: timed out, not read by rank 1"
        ):
            comm.wait_until_read(sent[0], axis)
        works[1].wait(SOON)
        comm.wait_until_read(sent[0], axis)


def test_a_reader_that_is_gone_is_named_at_once() -> None:
    ranks, axis = connected(3), axis_of(0, 3)
    sent = [floats(rank, 3 * LENGTH).fill_(1.0) for rank in ranks]
    works, _ = begun(ranks, sent)
    works[1].wait(SOON)
    ranks[2].close()
    began = time.monotonic()
    said = "wait for readers of what was sent over dp failed: rank 2 has closed its connection"
    with patch.object(direct, "neighbours", lambda *_: ranks[0]), pytest.raises(PeerError, match=said):
        comm.wait_until_read(sent[0], axis)
    assert time.monotonic() - began < SOON.total_seconds() / 2


def test_what_may_change_is_copied() -> None:
    """Of the same memory, in a sum in place, whose result others would read; or not in one piece."""
    ranks = connected(2)
    x = [floats(rank, LENGTH).copy_(torch.arange(LENGTH)) for rank in ranks]
    works = [direct.all_reduce(x[i], dist.ReduceOp.SUM, axis_of(i, 2), rank, False) for i, rank in enumerate(ranks)]
    for work in works:
        work.wait(SOON)
    assert all(torch.equal(each, 2 * torch.arange(LENGTH).float()) for each in x)
    wide = [floats(rank, 2 * LENGTH).copy_(torch.arange(2 * LENGTH)).view(LENGTH, 2) for rank in ranks]
    sums = [torch.empty(LENGTH, 1) for _ in ranks]
    works = [direct.reduce_scatter(w.chunk(2, 1), s, axis_of(i, 2), ranks[i])
             for i, (w, s) in enumerate(zip(wide, sums, strict=True))]  # fmt: skip
    for work in works:
        work.wait(SOON)
    assert all(torch.equal(each, wide[0][:, i : i + 1] * 2) for i, each in enumerate(sums))


def test_where_much_is_kept_the_rest_is_elsewhere() -> None:
    ranks, axis = connected(2), axis_of(0, 2)
    with patch.object(room, "MOST_KEPT", 9 * LENGTH), patch.object(direct, "neighbours", lambda *_: ranks[0]):
        kept = [comm.empty(LENGTH, torch.float32, CPU, axis) for _ in range(3)]
        assert [ranks[0].room.place_of(x) for x in kept] == [0, ranks[0].room.taken[1].place, None]
        works, sums = begun(ranks, [kept[2][:LENGTH].fill_(3.0).repeat(2), torch.ones(2 * LENGTH)])
        for work in works:
            work.wait(SOON)
        comm.wait_until_read(kept[2], axis)
    assert (torch.cat(sums) == 4.0).all()


# ---- Ranks of their own


def axis_of_all() -> Axis:
    return Mesh("cpu", Ledger(), 20.0, dp=dist.get_world_size())["dp"]


def memory() -> None:
    axis = axis_of_all()
    assert comm.empty(0, torch.float32, CPU, axis).numel() == 0
    x = comm.empty(7, torch.float64, CPU, axis)
    assert (x.shape, x.dtype) == ((7,), torch.float64)
    taken = direct.neighbours(x, axis)
    assert [piece.kept for piece in taken.room.taken] == [True]
    with patch.object(direct, "among", lambda _: None):  # as with ranks of other machines
        comm.wait_until_read(elsewhere := comm.empty(7, torch.float64, CPU, axis), axis)
    assert elsewhere.shape == (7,)
    assert len(taken.room.taken) == 1
    alone = Mesh("cpu", Ledger(), 20.0, dp=dist.get_world_size(), tp=1)["tp"]
    comm.wait_until_read(comm.empty(7, torch.float64, CPU, alone), alone)
    assert len(taken.room.taken) == 1


def test_memory_of_any_axis(pool: Pool) -> None:
    pool.run(2, memory)


def slow_rank(make: Callable) -> None:
    """A rank that waits late gets what the others had when they sent it, though they go on to the next step."""
    axis = axis_of_all()
    model = nn.Linear(30, 20, bias=False, dtype=torch.float64)
    engine = make(model, axis, lambda p: torch.optim.SGD(p, lr=0.0), None, torch.float64)
    x = torch.arange(30.0, dtype=torch.float64) + axis.index
    engine.zero_grad()
    right = comm.Pending.wait

    def late(self: comm.Pending) -> Tensor:
        time.sleep(0.3 * (axis.index == 1))
        return right(self)

    with patch.object(comm.Pending, "wait", late):
        engine.backward(model(x).sum())
    (found,) = (each.value.flatten() for each in engine.gradients())
    engine.zero_grad()
    engine.backward(model(-9 * x).sum())
    assert torch.equal(found, (2 * torch.arange(30.0, dtype=torch.float64) + 1).repeat(20).chunk(2)[axis.index])


@pytest.mark.parametrize("make", [zero1, zero2])
def test_a_rank_that_is_late_gets_the_step_that_it_waits_for(pool: Pool, make: Callable) -> None:
    pool.run(2, slow_rank, make)


def impatient(make: Callable) -> None:
    with not_waited_for():
        slow_rank(make)


def not_waited_for() -> AbstractContextManager:
    return patch.object(comm, "wait_until_read", lambda *_: None)


def test_a_step_that_begins_before_all_have_read_is_seen(pool: Pool) -> None:
    with pytest.raises(Exception, match="AssertionError"):
        pool.run(2, impatient, zero1)
