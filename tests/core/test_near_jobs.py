"""Messages through shared memory, in a job: many, of every type, on several axes; and where a rank has none of it."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm, p2p
from core.engine import direct, door, neighbours
from core.engine.direct import Exchange, TwoTurns
from core.engine.near import Neighbours
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.flight import FLIGHT
from tests.pool import Pool, WorkerError

CPU = torch.device("cpu")


def axis_of_all(timeout: float = 10.0) -> Axis:
    FLIGHT.checker = None  # it compares over gloo, before anything is sent
    return Mesh("cpu", Ledger(), timeout, dp=dist.get_world_size())["dp"]


def neighbours_of(axis: Axis) -> Neighbours:
    found = neighbours.among(axis.ranks)
    assert found is not None
    return found


def is_empty(at: Neighbours) -> bool:
    dist.barrier()
    for rank in at._sockets:
        at._hear(rank)
    return not (at.room.taken or at.room.in_flight or at._come or any(at._late.values()))


def flood() -> None:
    """Every rank sends all it has before it looks, and meets the others over gloo meanwhile."""
    axis = axis_of_all()
    mail, others = p2p.PointToPoint(axis, [], CPU), [i for i in range(axis.size) if i != axis.index]
    sizes = [1] * 300 + [2**14] * 20  # of int64: 2.5 MB a pair of ranks
    for tag, size in enumerate(sizes):
        for i in others:
            mail.send(torch.full((size,), 1000 * axis.index + tag), i, "F", tag)
    dist.barrier()
    for tag, size in reversed([*enumerate(sizes)]):
        for i in others:
            assert (mail.receive(torch.zeros(size, dtype=torch.int64), i, "F", tag)() == 1000 * i + tag).all()
    mail.close()
    assert is_empty(neighbours_of(axis))


def test_all_send_before_any_reads(pool: Pool) -> None:
    pool.run(4, flood, timeout=30)


def rounds() -> None:
    """Thousands of messages and collectives take no more than the first few: no memory, no files, no records."""
    axis, other = axis_of_all(), axis_of_all()  # two meshes of a job have the same neighbours
    at, mail = neighbours_of(axis), p2p.PointToPoint(axis, [], CPU)
    assert at is neighbours_of(other)
    found, furthest, right = [], [0], at.room.take
    at.room.take = lambda *wanted: (piece := right(*wanted), furthest.append(max(furthest.pop(), piece.end)))[0]
    for i in range(800):
        x = torch.full((1 + i * 37 % 5000,), float(i))
        arrive = mail.receive(torch.zeros(2**17), 1 - axis.index, "F", i)
        mail.send(torch.full((2**17,), float(i)), 1 - axis.index, "F", i)  # 0.5 MB each, and none is kept
        late = comm.all_gather_async(x, other)
        assert (comm.all_reduce(x, axis) == 2 * i).all()
        assert (late.wait() == i).all()
        assert (arrive() == i).all()
        if i in (199, 799):
            status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            memory = [int(status[name].split()[0]) / 1e3 for name in ("RssAnon", "RssShmem")]
            files = len(os.listdir("/proc/self/fd"))
            found.append((files, *memory))
    assert furthest[0] < 2**22
    assert max(len(mail._sent), len(at._come), len(at.room.taken)) < 9
    assert found[1][0] == found[0][0]
    assert all(after - before < 50 for before, after in zip(*found, strict=True))  # of 300 MB that were sent meanwhile
    mail.close()
    assert is_empty(at)


def test_nothing_grows(pool: Pool) -> None:
    pool.run(2, rounds)


TYPES = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
SHAPES = ((), (0,), (1,), (3,), (13,), (65,), (5, 0), (7, 3))


def every_type() -> list[Tensor]:
    """Of every type and shape, also read across memory: collectives and messages, and sums in one and in two turns."""
    axis, generator, results = axis_of_all(), torch.Generator().manual_seed(3), []
    n, me = axis.size, axis.index
    for dtype, shape, lazy in ((d, s, lazy) for d in TYPES for s in SHAPES for lazy in (False, True)):
        all_of = [torch.randint(0, 9, (*shape, 2), generator=generator).to(dtype)[..., i % 2] for i in range(n)]
        if dtype.is_complex:
            all_of = [(x * (1 + 2j)).conj() for x in all_of]
        all_of = [x.T if lazy and len(shape) == 2 else x if lazy else x.contiguous() for x in all_of]
        x, before, after = all_of[me], (me - 1) % n, (me + 1) % n
        total = sum(x.double() if x.is_floating_point() else x for x in all_of).to(dtype)
        for limit in (0, direct.IN_TWO):
            with patch.object(direct, "IN_TWO", limit):
                results.append(comm.all_reduce(x.clone(memory_format=torch.contiguous_format), axis))
            assert torch.equal(results[-1], total)
        into = torch.empty_like(x, memory_format=torch.contiguous_format)
        assert torch.equal(p2p.exchange(x, axis, 1 - me), all_of[1 - me]) if me < 2 else True
        mail = p2p.PointToPoint(axis, [], CPU)
        mail.send(x, after, "F", 0)
        assert torch.equal(mail.receive(into, before, "F", 0)(), all_of[before])
        mail.close()
        for dim in range(x.dim()):
            assert torch.equal(comm.all_gather(x, axis, dim), torch.cat(all_of, dim))
            wide = [torch.cat([y, y.flip(dim), y[..., :1].expand(y.shape)], dim) for y in all_of]
            summed = sum(y.double() if y.is_floating_point() else y for y in wide).to(dtype)
            assert torch.equal(comm.reduce_scatter(wide[me], axis, dim), summed.chunk(n, dim)[me])
        if x.dim():
            rows = [[(i + j) % 2 * len(x) for j in range(n)] for i in range(n)]  # some send nothing to some
            mine = torch.cat([x] * n)[: sum(rows[me])]
            parts = [torch.cat([all_of[i]] * n)[: rows[i][me]] for i in range(n)]
            swapped = comm.all_to_all(mine, axis, rows[me], [rows[i][me] for i in range(n)])
            assert torch.equal(swapped, torch.cat(parts))
    leaf = torch.ones(n, 2, requires_grad=True)  # what is sent and what comes is no part of what is differentiated
    gathered = comm.all_gather(leaf, axis, 1)
    swapped, summed = comm.all_to_all(leaf, axis, [1] * n, [1] * n), comm.reduce_scatter(leaf, axis)
    assert not any(x.requires_grad for x in (gathered, swapped, summed))
    assert (comm.all_reduce(leaf, axis) == n).all()
    assert (comm.all_gather_in_place_async(leaf, axis).wait() == n).all()
    assert is_empty(neighbours_of(axis))
    return results


def test_every_type_and_shape(pool: Pool) -> None:
    first, *others = pool.run(3, every_type)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def axes_at_once() -> list[Tensor]:
    """On three axes at once, messages and collectives in flight, each rank waiting in an order of its own."""
    FLIGHT.checker = None
    mesh = Mesh("cpu", Ledger(), 10.0, tp=2, dp=2)
    tp, dp, both = mesh["tp"], mesh["dp"], mesh.joined("tp", "dp")
    generator, me, results = torch.Generator().manual_seed(dist.get_rank()), dist.get_rank(), []
    for i in range(30):
        flying: list[tuple[Callable[[], Tensor], Tensor]] = []
        for axis, base in ((tp, 1.0), (dp, 10.0), (both, 100.0)):
            ranks = torch.tensor(axis.ranks)
            flying.append((comm.all_reduce_async(torch.full((9,), base * me), axis).wait, base * ranks.sum().expand(9)))
            flying.append((comm.all_gather_async(torch.tensor([base * me + i]), axis).wait, base * ranks + i))
            peer, mail = (axis.index + 1) % axis.size, p2p.PointToPoint(axis, [], CPU)
            before = axis.ranks[axis.index - 1]
            for tag in range(3):
                mail.send(torch.tensor([base * me + tag]), peer, "F", tag)
                arrive = mail.receive(torch.zeros(1), (axis.index - 1) % axis.size, "F", tag)
                flying.append((arrive, torch.tensor([base * before + tag])))
        sums = [comm.all_reduce_async(torch.randn(2**17 + 3, generator=generator), axis, in_order=True)
                for axis in (tp, dp, both)]  # fmt: skip
        for each in torch.randperm(len(flying), generator=generator).tolist():
            wait, expected = flying[each]
            assert torch.equal(wait(), expected)
        results += [each.wait() for each in sums]
        results.append(comm.all_reduce(torch.randn(2**17 + 3, generator=generator)[:99].clone(), both))  # in one turn
    assert [type(each.work) for each in sums] == [Exchange, Exchange, TwoTurns]
    return [tp.ranks, dp.ranks, *results[-4:]]


def one_number_for_all() -> list[Tensor]:
    with patch.object(Neighbours, "next_number", lambda self, lane: 0):
        return axes_at_once()


def one_lane_for_all() -> list[Tensor]:
    with patch.object(direct, "lane_of", lambda name: 7):
        return axes_at_once()


def test_axes_at_once(pool: Pool) -> None:
    found = pool.run(4, axes_at_once)
    for a, b in combinations(found, 2):
        assert all(torch.equal(x, y) for x, y in zip(a[4:], b[4:], strict=True)), "all ranks have the same bits"
        for axis in (0, 1):
            assert a[axis] != b[axis] or torch.equal(a[2 + axis], b[2 + axis])


@pytest.mark.parametrize("wrong", [one_number_for_all, one_lane_for_all])
def test_calls_that_are_not_told_apart_are_seen(pool: Pool, wrong: Callable) -> None:
    with pytest.raises(WorkerError):
        pool.run(4, wrong, timeout=20)


def fails(error: type[Exception] | None = OSError) -> Callable:
    def instead(*_: object) -> None:
        if error:
            raise error

    return instead


BREAKS = {
    "no memory": (door.os, "memfd_create", fails()),
    "no such call": (door.os, "memfd_create", fails(AttributeError)),
    "no socket": (socket.socket, "bind", fails()),
    "no addresses": (door.mmap, "mmap", fails()),
    "too many files": (door.socket, "recv_fds", lambda *_: (bytes(16), [], 0, None)),  # the system drops what comes
    "no connection": (socket.socket, "connect", fails()),
    "no memory goes over": (door.socket, "send_fds", fails()),
    "no answer": (door.socket, "send_fds", fails(None)),
}
SLOW = [*BREAKS][-3:]  # others wait for what does not come


def broken_on_one() -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)  # as in a lesson
    for name, broken in [*BREAKS.items(), ("", ())]:
        neighbours.leave()
        files, began = len(os.listdir("/proc/self/fd")), time.monotonic()
        with patch.object(*broken) if name and dist.get_rank() == 1 else nullcontext():
            axis = axis_of_all(4.0)
        assert name in SLOW or time.monotonic() - began < 1.9, f"{name}: others wait"
        assert (neighbours.among(axis.ranks) is None) == (name != ""), name
        assert not name or len(os.listdir("/proc/self/fd")) == files, f"{name}: left open"
        assert comm.all_reduce(torch.ones(3), axis).sum() == 3 * axis.size


def test_all_go_on_with_gloo_where_one_cannot(pool: Pool) -> None:
    pool.run(3, broken_on_one)


def on_two_machines() -> tuple[bool, bool]:
    FLIGHT.checker, rank = None, dist.get_rank()
    with patch.object(neighbours, "host", lambda: f"machine {rank // 2}"):
        mesh = Mesh("cpu", Ledger(), 10.0, tp=2, dp=2)
    both = mesh.joined("tp", "dp")
    for axis in (mesh["tp"], mesh["dp"], both):
        assert comm.all_reduce(torch.tensor([rank]), axis).item() == sum(axis.ranks)
        assert p2p.exchange(torch.tensor([rank]), axis, axis.size - 1 - axis.index) == axis.ranks[-1 - axis.index]
    return tuple(neighbours.among(axis.ranks) is not None for axis in (mesh["tp"], mesh["dp"], both))


def test_ranks_of_two_machines_are_neighbours_of_their_own(pool: Pool) -> None:
    assert pool.run(4, on_two_machines) == [(True, False, False)] * 4
