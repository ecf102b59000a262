"""Messages between the ranks of one machine: through memory that they share, in place of gloo's sockets.

Gloo sends by TCP also where all ranks are on one machine: the kernel copies every byte twice, and a thread of its own
wakes for every piece. Here a rank writes what it sends into its part of the shared memory, and tells the others where
in 32 bytes over a socket; who waits for it reads it there, and says that it has. So does NCCL inside a machine. What
is large is lent instead: the receiver copies it from where it lies in the sender's own memory.

As with gloo, what is sent is on its way whatever the others do meanwhile, a wait ends at its timeout, and a rank that
dies is noticed at once, because its sockets close. One thread at a time sends and waits, as everywhere in this project.
"""

import hashlib
import select
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from core.engine.meeting import READ, RECORD, ROOM, Door, copy_from, process_of
from core.proof.flight import host

ALIGNED = 64
PLENTY = 2**17  # bytes in flight from which on it is asked what has been read meanwhile


class Neighbours:
    """This rank's connections to the others of its machine, and the memory in which they leave what they send.

    Args:
        sockets: by rank. They say that something has come, or has been read.
        memory: this rank's part, into which it writes.
        theirs: the parts of the others, by rank.
        lends: whether they may read from each other's own memory.
    """

    def __init__(self, sockets: dict[int, socket.socket], memory: Tensor, theirs: dict[int, Tensor], lends: bool):
        self._sockets, self._memory, self._theirs, self.lends = sockets, memory, theirs, lends
        self._taken: list[tuple[int, int]] = []  # places in use, from and to, in their order
        self._readers: dict[int, int] = {}  # by place: how many have not read it yet
        self._in_flight = 0  # bytes of those
        self._come: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # places and sizes, by rank, lane, number
        self._started: dict[int, int] = {}  # by lane: collectives of this rank
        self._gone: set[int] = set()
        self._poll = select.poll()
        self._ranks = {each.fileno(): rank for rank, each in sockets.items()}
        for each in sockets.values():
            self._poll.register(each, select.POLLIN)

    def has(self, ranks: Collection[int]) -> bool:
        """Whether all of these are on this machine; this rank may be among them."""
        return sum(rank in self._sockets for rank in ranks) >= len(ranks) - 1

    def next_number(self, lane: int) -> int:
        """Of a collective of this lane: all its ranks start the same ones in the same order."""
        self._started[lane] = self._started.get(lane, -1) + 1
        return self._started[lane]

    def send(self, x: Tensor, to: Sequence[int], lane: int, number: int) -> int:
        """Leave `x` where these ranks can read it, and tell them; returns its place. `x` may change at once.

        Raises:
            RuntimeError: one of them is gone.
        """
        place = self._room(x.nbytes, len(to))
        self._typed(self._memory, place, x.nbytes, x.dtype).view(x.shape).copy_(x.detach())
        for rank in to:
            if not self._tell(rank, RECORD.pack(lane, number, place, x.nbytes)):
                raise RuntimeError(f"rank {rank} has closed its connection")
        return place

    def lend(self, x: Tensor, to: int, lane: int, number: int) -> int:
        """Tell that rank where contiguous `x` lies, which must stay until it has been read; returns its place.

        Raises:
            RuntimeError: it is gone.
        """
        place = x.data_ptr()
        self._readers[place] = self._readers.get(place, 0) + 1
        if not self._tell(to, RECORD.pack(lane, number, place, x.nbytes)):
            raise RuntimeError(f"rank {to} has closed its connection")
        return place

    def receive(self, of: int, lane: int, number: int, like: Tensor, deadline: float) -> tuple[Tensor, int]:
        """Wait for what that rank sends; (values, place), in its memory until `has_read`.

        Args:
            like: has the type and the number of elements that are expected.

        Raises:
            RuntimeError: it is gone, has not sent anything in time, or has sent something else.
        """
        place, size = self._await(of, lane, number, like.nbytes, deadline)
        return self._typed(self._theirs[of], place, size, like.dtype), place

    def receive_into(self, x: Tensor, of: int, lane: int, number: int, deadline: float) -> None:
        """Wait for what that rank sends or lends, and copy it into contiguous `x`.

        Raises:
            RuntimeError: as `receive`.
        """
        place, size = self._await(of, lane, number, x.nbytes, deadline)
        if place < ROOM:
            x.copy_(self._typed(self._theirs[of], place, size, x.dtype).view(x.shape))
        else:
            copy_from(process_of(self._sockets[of]), place, x)
        self.has_read(of, place)

    def _await(self, of: int, lane: int, number: int, expected: int, deadline: float) -> tuple[int, int]:
        key = (of, lane, number)
        if key not in self._come:
            self._hear(of)
        while key not in self._come:
            if of in self._gone:
                raise RuntimeError(f"rank {of} has closed its connection")
            self._wait(deadline)
        place, size = self._come[key].pop(0)
        if not self._come[key]:
            del self._come[key]
        if size != expected:
            raise RuntimeError(f"rank {of} has sent {size} bytes where {expected} are expected")
        return place, size

    def has_read(self, of: int, place: int) -> None:
        """Let that rank write there again."""
        self._tell(of, RECORD.pack(READ, 0, place, 0))

    def wait_until_read(self, place: int, to: int, deadline: float) -> None:
        """Until `to`, the one rank to which it was sent, has read it.

        Raises:
            RuntimeError: it is gone, or has not within the time.
        """
        while place in self._readers:
            if to in self._gone:
                raise RuntimeError(f"rank {to} has closed its connection")
            self._wait(deadline)

    def has_been_read(self, place: int, to: int) -> bool:
        if place in self._readers:
            self._hear(to)
        return place not in self._readers

    def close(self) -> None:
        for each in self._sockets.values():
            each.close()

    # ---- What has come

    def _wait(self, deadline: float) -> None:
        """Until anything has come, from any rank: a rank whose records nobody took could send no more."""
        ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)
        if not ready:
            raise RuntimeError("timed out")
        for number, _ in ready:
            self._hear(self._ranks[number])

    def _hear(self, rank: int) -> None:
        """Take all records that have come from this rank."""
        take = self._sockets[rank].recv
        while rank not in self._gone:
            try:
                record = take(RECORD.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it left before it had taken all of ours; what it sent is still there
                continue
            if not record:
                self._gone.add(rank)
                self._poll.unregister(self._sockets[rank])
                return
            lane, number, place, size = RECORD.unpack(record)
            if lane == READ:
                self._let_go(place)
            else:
                self._come.setdefault((rank, lane, number), []).append((place, size))

    def _tell(self, rank: int, record: bytes) -> bool:
        """Send a record. Where too many wait for the other one, take what has come: it may be waiting for that."""
        while rank not in self._gone:
            try:
                self._sockets[rank].send(record, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                self._poll.modify(self._sockets[rank], select.POLLIN | select.POLLOUT)
                for number, _ in self._poll.poll():
                    self._hear(self._ranks[number])
                if rank not in self._gone:
                    self._poll.modify(self._sockets[rank], select.POLLIN)
            except OSError:
                return False
        return False

    # ---- Its memory: the first place that is large enough, so that little of it is ever touched

    def _room(self, size: int, readers: int) -> int:
        if self._in_flight > PLENTY:
            for rank in self._sockets:
                self._hear(rank)
        size = max(ALIGNED, -(-size // ALIGNED) * ALIGNED)
        place, at = 0, 0
        for at, (first, end) in enumerate(self._taken):  # noqa: B007
            if first - place >= size:
                break
            place = end
        else:
            at = len(self._taken)
        if place + size > len(self._memory):
            raise RuntimeError(f"more than {ROOM >> 30} GiB have been sent and not been received")
        self._taken.insert(at, (place, place + size))
        self._readers[place] = readers
        self._in_flight += size
        return place

    def _let_go(self, place: int) -> None:
        self._readers[place] -= 1
        if not self._readers[place]:
            del self._readers[place]
            if place >= ROOM:  # lent
                return
            at = next(i for i, (first, _) in enumerate(self._taken) if first == place)
            self._in_flight -= self._taken[at][1] - place
            del self._taken[at]

    @staticmethod
    def _typed(memory: Tensor, place: int, size: int, dtype: torch.dtype) -> Tensor:
        return memory[place : place + size].view(dtype)


# ---- The neighbours of this process ----------------------------------------------------------------------------------

_known: tuple[dist.ProcessGroup, Neighbours | None] | None = None  # of which job, and who they are


def meet(timeout: float) -> None:
    """Connect to the ranks of this machine, once a job; every rank of it calls this at the same time.

    Where that is not possible for every rank, as on another system than Linux, all go on with gloo.

    Args:
        timeout: seconds for it.
    """
    global _known
    job = dist.group.WORLD
    if _known and _known[0] is job:
        return
    leave()
    if dist.get_world_size() == 1 or dist.get_backend() != "gloo":
        return
    found = None
    with suppress(OSError, ValueError, AttributeError):  # of memfd_create, mmap, sockets; no Linux
        found = Door()
    known: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(known, (host(), found.name if found else ""))
    neighbours = None
    with suppress(OSError):
        if met := found and found.meet(known, dist.get_rank(), timeout):
            neighbours = Neighbours(*met)
    able = [(False, False)] * dist.get_world_size()
    dist.all_gather_object(able, (neighbours is not None, neighbours is not None and neighbours.lends))
    if neighbours:
        neighbours.lends = all(lends for _, lends in able)
        if not all(connected for connected, _ in able):
            neighbours.close()
            neighbours = None
    _known = job, neighbours


def leave() -> None:
    """Close all connections, before the job ends."""
    global _known
    if _known and _known[1]:
        _known[1].close()
    _known = None


def among(ranks: Collection[int]) -> Neighbours | None:
    """The neighbours of this rank, if all these ranks are on its machine."""
    neighbours = _known and _known[1]
    return neighbours if neighbours and neighbours.has(ranks) else None


@cache
def lane_of(name: str) -> int:
    """A number for a group of ranks, the same on all of them."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) | 1  # never READ
