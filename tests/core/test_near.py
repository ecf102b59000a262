"""Messages through shared memory: nobody stops for what another rank does, and what ends another is told at once."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import combinations
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm, p2p
from core.engine import direct, near
from core.engine.direct import Coming, Exchange, Sent, TwoTurns
from core.engine.near import Neighbours
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.peers import PeerError
from tests.pool import Pool

CPU = torch.device("cpu")
LANE, SOON, FEW, MANY = 7, timedelta(seconds=5), timedelta(seconds=0.2), 1000

# ---- Several ranks in this process, without a job


def connected(ranks: int) -> list[Neighbours]:
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(ranks)]
    for a, b in combinations(range(ranks), 2):
        sockets[a][b], sockets[b][a] = socket.socketpair(socket.AF_UNIX)
    memory = [torch.zeros(2**23, dtype=torch.uint8) for _ in range(ranks)]
    return [Neighbours(s, memory[i], dict(enumerate(memory)), {}) for i, s in enumerate(sockets)]


def axis_of(index: int, ranks: int) -> Axis:
    return Axis("dp", (*range(ranks),), index, SimpleNamespace(group_name="all"), Ledger(), SOON)


def number(i: int) -> Tensor:
    return torch.tensor([i])


def came(at: Neighbours, of: int, tag: int, count: int = 1) -> Tensor:
    into = torch.zeros(count, dtype=torch.int64)
    Coming(at, into, of, LANE, tag).wait(SOON)
    return into


def in_time(does: Callable[[], None]) -> None:
    thread = threading.Thread(target=does, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it stopped for what another rank does"


def test_a_place_that_is_used_again_is_another_message() -> None:
    a, b = connected(2)
    first = Sent(a, number(1), 1, LANE, 0)
    came(b, 0, 0)
    Sent(b, number(3), 0, LANE, 0)
    came(a, 1, 0)  # and hears that the first one has been read
    assert first.is_completed()
    second = Sent(a, number(2), 1, LANE, 1)
    assert second._piece.place == first._piece.place
    first.wait(FEW)
    with pytest.raises(RuntimeError, match="timed out"):
        second.wait(FEW)
    b.close()
    first.wait(FEW)
    with pytest.raises(RuntimeError, match="rank 1 has closed its connection"):
        second.wait(SOON)


def nobody_looks() -> None:
    a, b = connected(2)
    go_on = threading.Event()
    with patch.object(near.time, "sleep", lambda _: go_on.wait(10)):  # of the thread that sends what is late
        in_time(lambda: [Sent(a, number(i), 1, LANE, 0) for i in range(MANY)])  # many more than a socket takes
        found = [came(b, 0, 0).item() for _ in range(100)]
        in_time(lambda: [Sent(a, number(MANY + i), 1, LANE, 0) for i in range(MANY)])  # has room, after the others
    go_on.set()
    in_time(lambda: found.extend(came(b, 0, 0).item() for _ in range(2 * MANY - 100)))  # while a takes no record
    assert found == [*range(2 * MANY)]
    last = Sent(a, number(0), 1, LANE, 1)
    came(b, 0, 1)
    last.wait(SOON)
    with a._lock, b._lock:
        assert not any([*a.room.taken, a.room.in_flight, *b._come, *a._late.values(), *b._late.values()])


def test_nobody_stops_for_a_rank_that_does_not_look() -> None:
    nobody_looks()


def test_records_that_pass_others_are_seen() -> None:
    right = Neighbours._tell

    def wrong(self: Neighbours, rank: int, record: bytes) -> None:
        if left := self._not_sent(rank, record):
            right(self, rank, left)

    with patch.object(Neighbours, "_tell", wrong), pytest.raises(AssertionError):
        nobody_looks()


def test_a_wait_ends_in_time_though_others_go_on_sending() -> None:
    a, _, c = connected(3)
    right, began = a._hear, time.monotonic()

    def hear(rank: int) -> None:
        right(rank)
        if time.monotonic() < began + 3:
            Sent(c, number(0), 0, LANE, 0)

    with patch.object(a, "_hear", hear):
        for work in (Coming(a, number(0), 1, LANE, 0), Sent(a, number(0), 1, LANE, 0)):
            with pytest.raises(RuntimeError, match="timed out"):
                work.wait(FEW)
    assert time.monotonic() - began < 2


def test_a_wait_may_be_longer_than_the_system_waits_at_once() -> None:
    a, b = connected(2)
    threading.Timer(0.2, lambda: Sent(b, number(5), 0, LANE, 1)).start()
    Coming(a, into := number(0), 1, LANE, 1).wait(timedelta(days=9999))
    assert into.item() == 5


def test_what_a_rank_sent_before_it_left_still_comes() -> None:
    a, b = connected(2)
    Sent(b, number(5), 0, LANE, 0)  # a leaves without having taken it: b's socket says so once, before what is in it
    for i in range(200):
        Sent(a, number(i), 1, LANE, i)
    a.close()
    assert [came(b, 0, i).item() for i in range(200)] == [*range(200)]
    with pytest.raises(RuntimeError, match="rank 0 has closed its connection"):
        came(b, 0, 200)
    with pytest.raises(RuntimeError, match="rank 1 has closed its connection"):
        came(a, 1, 0)  # after its own end


def test_another_size_is_told() -> None:
    a, b = connected(2)
    Sent(a, number(1), 1, LANE, 0)
    with pytest.raises(RuntimeError, match="rank 0 has sent 8 bytes where 24 are expected"):
        came(b, 0, 0, 3)
    sums = [direct.all_reduce(torch.ones(3 + i), dist.ReduceOp.SUM, axis_of(i, 2), n, False)
            for i, n in enumerate((a, b))]  # fmt: skip
    for i, work in enumerate(sums):
        with pytest.raises(RuntimeError, match=f"rank {1 - i} has sent {16 - 4 * i} bytes where {12 + 4 * i} are"):
            work.wait(SOON)


def test_a_wait_that_ended_without_a_slow_rank_goes_on_where_it_was() -> None:
    all_three, x = connected(3), [torch.arange(4.0) + i for i in range(3)]
    works = []
    for i in (0, 1, 2):
        works.append(direct.all_reduce(x[i], dist.ReduceOp.SUM, axis_of(i, 3), all_three[i], False))
        if i < 2:
            with pytest.raises(RuntimeError, match="timed out"):
                works[0].wait(FEW)
    assert all(work.wait(SOON) for work in works)
    assert all(torch.equal(each, 3 * torch.arange(4.0) + 3) for each in x)
    a, b = connected(2)
    y = [torch.arange(5.0), torch.arange(5.0)]
    first, began = TwoTurns(a, axis_of(0, 2), y[0], torch.add), time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        first.wait(FEW)
    second = TwoTurns(b, axis_of(1, 2), y[1], torch.add)
    with pytest.raises(RuntimeError, match="timed out"):
        second.wait(FEW)  # has the first turn, not the second one
    assert all(work.wait(SOON) for work in (first, second, first))
    assert all(torch.equal(each, 2 * torch.arange(5.0)) for each in y)
    assert time.monotonic() - began < 2
    b._hear(0)
    assert not b._come, "sent twice"


def read_and_told() -> None:
    """What is read stays as it is until it is said to be read: the sender writes as much as it can meanwhile."""
    a, b = connected(2)
    seen = []

    def use(come: list[Tensor | None]) -> None:
        a._wait(time.monotonic() + 0.1, "") if a._poll.poll(0) else None
        for i in range(20):
            Sent(a, torch.full((64,), i), 1, LANE, i)
        seen.append(come[0].clone())

    like = torch.zeros(64, dtype=torch.int64)
    Exchange(a, axis_of(0, 2), torch.full((64,), -1), [like, like], use)
    Exchange(b, axis_of(1, 2), like[:0], [like, like], use).wait(SOON)
    assert (seen[0] == -1).all()
    right, told = b.has_read, []
    with patch.object(b, "has_read", lambda *read: (told.append(like.clone()), right(*read))):
        Coming(b, like, 0, LANE, 3).wait(SOON)
    assert (told[0] == 3).all()


def test_what_is_read_is_not_overwritten() -> None:
    read_and_told()


def test_a_place_that_is_given_back_too_early_is_seen() -> None:
    right = Neighbours.receive

    def wrong(self: Neighbours, of: int, *more: Any) -> tuple[Tensor, int]:
        found = right(self, of, *more)
        self.has_read(of, found[1])
        return found

    with patch.object(Neighbours, "receive", wrong), pytest.raises(AssertionError):
        read_and_told()


# ---- Ranks that die or stop


def failure(does: Callable[[], object]) -> tuple[str, float]:
    began = time.monotonic()
    try:
        does()
    except PeerError as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def end(rank: int, by: int, child: bool = False) -> None:
    if dist.get_rank() == rank:
        time.sleep(0.5)
        if child and not os.fork():
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), by)


def mortals(tell: Callable[[tuple[str, float]], None]) -> None:
    axis = Mesh("cpu", Ledger(), 10.0, dp=4)["dp"]
    rank, x, wide = axis.index, torch.ones(3), torch.ones(2**18)
    tell(failure(lambda: comm.all_reduce(wide, axis)))
    if rank:
        end(3, signal.SIGKILL, child=True)
        time.sleep(1)  # the first rank waits already, those between begin after the death
    tell(failure(lambda: comm.all_reduce(x, axis)))
    tell(failure(lambda: comm.all_reduce(wide, axis)))
    tell(failure(lambda: p2p.send(x, axis, 3)))
    end(2, signal.SIGKILL)
    tell(failure(lambda: p2p.receive(x, axis, 2)))
    if rank:
        time.sleep(0.2)
    end(1, signal.SIGSTOP)
    axis = replace(axis, timeout=timedelta(seconds=1.5))
    mail = p2p.PointToPoint(axis, [], CPU)
    tell(failure(lambda: [mail.send(x, 1, "F", i) for i in range(MANY)]))
    tell(failure(mail.flush))
    tell(failure(lambda: comm.all_gather(x, axis)))


def mortal(pipe: Connection, port: int, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=ranks)
    mortals(pipe.send)
    pipe.close()
    time.sleep(60)


@pytest.fixture(scope="module")
def told(pool: Pool) -> Iterator[list[list[tuple[str, float]]]]:
    """What each rank has seen, and after how long."""
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(4)]
    processes = [context.Process(target=mortal, args=(pipe, store.port, rank, 4), daemon=True)
                 for rank, (_, pipe) in enumerate(pipes)]  # fmt: skip
    for process in processes:
        process.start()
    found = [[] for _ in pipes]
    for each, (ours, theirs) in zip(found, pipes, strict=True):
        theirs.close()
        with suppress(EOFError):
            while ours.poll(20 if each is found[0] else 1):
                each.append(ours.recv())
    yield found
    for process in processes:
        process.kill()


def test_a_death_is_told_at_once_by_all_who_wait(told: list[list[tuple[str, float]]]) -> None:
    assert [len(each) for each in told] == [8, 5, 4, 1]
    for each in told[:3]:
        (fine, _), *collectives = each[:3]
        assert fine == ""
        for said, seconds in collectives:
            assert said == "all-reduce over dp failed: rank 3 has closed its connection"
            assert seconds < 6
        assert each[3][0] == "send to rank 3 failed: rank 3 has closed its connection"
    for said, seconds in (told[0][4], told[1][4]):
        assert said == "receive from rank 2 failed: rank 2 has closed its connection"
        assert seconds < 6


def test_a_stopped_rank_is_waited_for_until_the_timeout_and_not_longer(told: list[list[tuple[str, float]]]) -> None:
    (sent, _), (flushed, seconds), (gathered, _) = told[0][5:]
    assert sent == ""
    assert flushed.startswith("send (F) to rank 1 failed: timed out")
    assert 1.4 < seconds < 5
    assert gathered.startswith("all-gather over dp failed: timed out")
