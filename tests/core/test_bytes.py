"""The ledger counts bytes: the tensor handed over times the ring's share. Here they are measured, in the sockets.

As between machines: on one, ranks share memory, and nothing goes over a wire. The kernel says of each TCP socket how
many bytes it has sent (TCP_INFO), so other processes do not matter. Found, with
gloo in torch 2.13 over 2, 3 and 4 ranks, for a full tensor of S bytes, on every rank:

    all-reduce            2(N-1)/N S    a ring
    all-gather            (N-1)/N S     a ring
    reduce-scatter        (N-1)/N S     ours, by an all-to-all; gloo's own sends 2(N-1)/N S, an all-reduce underneath
    all-to-all            (N-1)/N S     what is for other ranks, to each its part
    send, exchange        S             on the rank that sends

and beside it 48 bytes a message, the header, and those of the barriers around each measurement.
"""

import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from core import comm, p2p
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from tests.core.sharing import far
from tests.pool import Pool

ELEMENTS = 2**17 * 12  # of 8 bytes; a multiple of 2, 3 and 4
SIZE = 8 * ELEMENTS
HEADERS = 8192  # bytes at most for all headers and barriers of one operation, less than 0.1 % of its bytes
BYTES_SENT, BYTES_RETRANSMITTED = 200, 208  # where they are in the kernel's struct tcp_info, since Linux 4.19


def bytes_by_socket() -> dict[tuple, int]:
    """What each TCP socket of this process has sent, without what was sent again."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                ends = each.getsockname(), each.getpeername()
        except OSError:  # closed meanwhile, or of another kind
            continue
        (sent,), (again,) = (struct.unpack_from("=Q", info, at) for at in (BYTES_SENT, BYTES_RETRANSMITTED))
        found[ends] = sent - again
    return found


def quiet() -> None:
    """Until every rank has received what was sent to it, and has said so."""
    dist.barrier()
    dist.barrier()


class Found(NamedTuple):
    """Bytes that one rank has sent in one operation."""

    counted: float  # by the ledger
    measured: int  # in the sockets


def measure(operation: Callable[[torch.Tensor, Axis], object], axis: Axis, x: torch.Tensor) -> Found:
    operation(x.clone(), axis)  # once before, so that all connections are there
    quiet()
    axis.ledger.traffic.clear()
    before = bytes_by_socket()
    operation(x.clone(), axis)
    quiet()
    sent = sum(n - before.get(ends, 0) for ends, n in bytes_by_socket().items())
    return Found(sum(t.bytes for t in axis.ledger.traffic.values()), sent)


def equal_all_to_all(x: torch.Tensor, axis: Axis) -> None:
    rows = [len(x) // axis.size] * axis.size
    comm.all_to_all(x, axis, rows, rows)


def uneven_all_to_all(x: torch.Tensor, axis: Axis) -> None:
    """Everything to rank 0."""
    received = [len(x)] * axis.size if axis.index == 0 else [0] * axis.size
    comm.all_to_all(x, axis, [len(x), *[0] * (axis.size - 1)], received)


def from_first_to_last(x: torch.Tensor, axis: Axis) -> None:
    if axis.index == 0:
        p2p.send(x, axis, axis.size - 1)
    elif axis.index == axis.size - 1:
        p2p.receive(x, axis, 0)


def round_the_ring(x: torch.Tensor, axis: Axis) -> None:
    n, r = axis.size, axis.index
    messages = p2p.PointToPoint(axis, [(i, (i + 1) % n, "KV") for i in range(n)], x.device)
    arrive = messages.receive(torch.empty_like(x), (r - 1) % n, "KV", 0)
    messages.send(x, (r + 1) % n, "KV", 0)
    arrive()
    messages.close()


def first_two_swap(x: torch.Tensor, axis: Axis) -> None:
    if axis.index < 2:
        p2p.exchange(x, axis, 1 - axis.index)


OPERATIONS: Mapping[str, Callable[[torch.Tensor, Axis], object]] = {
    "all-reduce": comm.all_reduce,
    "all-gather": lambda x, axis: comm.all_gather(x.chunk(axis.size)[axis.index].contiguous(), axis),
    "all-gather in place": lambda x, axis: comm.all_gather_in_place_async(x, axis).wait(),
    "reduce-scatter": comm.reduce_scatter,
    "all-to-all": equal_all_to_all,
    "uneven all-to-all": uneven_all_to_all,
    "send": from_first_to_last,
    "send round a ring": round_the_ring,
    "exchange": first_two_swap,
}
# In units of S, for N ranks and on rank r.
EXPECTED: Mapping[str, Callable[[int, int], float]] = {
    "all-reduce": lambda n, r: 2 * (n - 1) / n,
    "all-gather": lambda n, r: (n - 1) / n,
    "all-gather in place": lambda n, r: (n - 1) / n,
    "reduce-scatter": lambda n, r: (n - 1) / n,
    "all-to-all": lambda n, r: (n - 1) / n,
    "uneven all-to-all": lambda n, r: r > 0,
    "send": lambda n, r: r == 0,
    "send round a ring": lambda n, r: 1,
    "exchange": lambda n, r: r < 2,
}


def all_operations(bug: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, Found]:
    axis = Mesh("cpu", Ledger(), 60.0, tp=dist.get_world_size())["tp"]
    x = torch.ones(ELEMENTS, dtype=torch.float64)
    with far(), bug():
        found = {name: measure(operation, axis, x) for name, operation in OPERATIONS.items()}
    own = torch.empty(ELEMENTS // axis.size, dtype=torch.float64)
    found["gloo's reduce-scatter"] = measure(
        lambda x, axis: dist.reduce_scatter_single(own, x, group=axis.group), axis, x
    )
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="sockets are asked by Linux's TCP_INFO")


@linux
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_the_ledger_counts_goes_through_the_sockets(pool: Pool, ranks: int) -> None:
    for rank, found in enumerate(pool.run(ranks, all_operations, timeout=120.0)):
        for name, expected in EXPECTED.items():
            counted, measured = found[name]
            assert counted == expected(ranks, rank) * SIZE, f"{name}, rank {rank}: counted"
            assert 0 <= measured - counted <= HEADERS, f"{name}, rank {rank}: counted {counted}, measured {measured}"
        more = found["gloo's reduce-scatter"].measured - 2 * (ranks - 1) / ranks * SIZE
        assert 0 <= more <= HEADERS, "gloo's own reduce-scatter is an all-reduce underneath: comm does it otherwise"


def all_gathers_are_counted_in_full() -> AbstractContextManager:
    right = comm._record
    return patch.object(comm, "_record", lambda op, axis, x, share, *more: right(op, axis, x, max(share, 1.0), *more))


def twice_as_much_is_sent() -> AbstractContextManager:
    """A reduce-scatter as torch has it on gloo, counted as the ring that it is not."""

    def wrong(x: torch.Tensor, axis: Axis, dim: int = 0) -> comm.Pending:
        comm._record("reduce-scatter", axis, x, (axis.size - 1) / axis.size)
        own = x.new_empty(len(x) // axis.size)
        work = dist.reduce_scatter_single(own, x, group=axis.group, async_op=True)
        return comm.Pending(work, axis, own, "reduce-scatter")

    return patch.object(comm, "reduce_scatter_async", wrong)


@linux
@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (all_gathers_are_counted_in_full, {"all-gather", "all-gather in place", "reduce-scatter"}),
        (twice_as_much_is_sent, {"reduce-scatter"}),
    ],
)
def test_a_wrong_account_is_seen(pool: Pool, bug: Callable[[], AbstractContextManager], seen: set[str]) -> None:
    for found in pool.run(3, all_operations, bug, timeout=120.0):
        wrong = {name for name in EXPECTED if not 0 <= found[name].measured - found[name].counted <= HEADERS}
        assert wrong == seen
