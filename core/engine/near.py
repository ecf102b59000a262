"""Messages between the ranks of one machine: through memory that they share, in place of gloo's sockets.

Gloo sends by TCP also where all ranks are on one machine: the kernel copies every byte twice, and a thread of its own
wakes for every piece. Here a rank writes what it sends into its part of the shared memory, and tells the others where
in 32 bytes over a socket; who waits for it reads it there, and says that it has. So does NCCL inside a machine. What
is large is lent instead: the receiver copies it from where it lies in the sender's own memory.

As with gloo, what is sent is on its way whatever the others do meanwhile, a wait ends at its timeout, and a rank that
dies is noticed at once, because its sockets close. One thread at a time sends and waits, as everywhere in this project.
"""

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from core.engine.door import READ, RECORD, ROOM, OwnMemory
from core.engine.room import Piece, Room

PLENTY = 2**20  # bytes in flight from which on it is asked what has been read meanwhile
AT_ONCE = 2**16  # bytes of records
NOW = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)  # as Linux has them


class Neighbours:
    """This rank's connections to the others of its machine, and the memory in which they leave what they send.

    Args:
        sockets: by rank. They say that something has come, or has been read.
        memory: this rank's part, into which it writes.
        theirs: the parts of the others, by rank.
        own_memory: of the others, by rank, where this rank may read from it.

    Attributes:
        lends: whether all of them may.
    """

    def __init__(self, sockets: dict[int, socket.socket], memory: Tensor, theirs: dict[int, Tensor],
                 own_memory: dict[int, OwnMemory]):  # fmt: skip
        self._sockets, self._theirs, self._own_memory = sockets, theirs, own_memory
        self.lends = len(own_memory) == len(sockets)
        self.room = Room(memory)
        self._lent: dict[int, Piece] = {}  # by place: ROOM and an address in this process
        self._begun: dict[int, bytes] = {}  # records of which only this has come, by rank
        self._late: dict[int, deque[bytes]] = {rank: deque() for rank in sockets}  # records that a thread sends
        self._lock = threading.Lock()  # for these
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

    def empty(self, size: int) -> Tensor | None:
        """So many bytes of this rank's part, for what is sent from where it is; None where there is no room."""
        self.hear()  # what has been read meanwhile
        return self.room.keep(size)

    def send(self, x: Tensor, to: Sequence[int], lane: int, number: int, stays: bool = False) -> Piece:
        """Leave `x` where these ranks can read it, and tell them. `x` may change at once.

        It is no error that one of them is gone, where nothing is expected of it; a wait for it is one.

        Args:
            stays: plain `x` does not change before it has been read: it is not copied where it is from `empty`.
        """
        place = self.room.place_of(x) if stays else None
        if place is not None:
            piece = self.room.at(place)
            piece.unread += to
        else:
            if self.room.in_flight > PLENTY:
                self.hear()
            piece = self.room.take(x.nbytes, to)
            place = piece.place
            self._typed(self.room.memory, place, x.nbytes, x.dtype).view(x.shape).copy_(x.detach())
        for rank in to:
            self._tell(rank, RECORD.pack(lane, number, place, x.nbytes))
        return piece

    def wait_until_all_read(self, x: Tensor, deadline: float) -> None:
        """Until all have read what was sent of `x`, which is from `empty`: it may be written to again.

        Raises:
            RuntimeError: as `wait_until_read`.
        """
        if (place := self.room.place_of(x)) is not None:  # there was room for it
            self.wait_until_read(self.room.at(place), deadline)

    def lend(self, x: Tensor, to: int, lane: int, number: int) -> Piece:
        """Tell that rank where plain `x` lies, which must stay as it is until it has been read."""
        place = ROOM + x.data_ptr()  # an address may be as low as a place, where the executable is at a fixed one
        piece = self._lent.setdefault(place, Piece(place, place, []))
        piece.unread.append(to)
        self._tell(to, RECORD.pack(lane, number, place, x.nbytes))
        return piece

    def receive(self, of: int, lane: int, number: int, like: Tensor, deadline: float) -> tuple[Tensor, int]:
        """Wait for what that rank sends; (values, place), in its memory until `has_read`.

        Args:
            like: has the type and the number of elements that are expected.

        Raises:
            RuntimeError: it is gone, has not sent anything in time, or has sent something else.
        """
        place, size = self._come_from(of, lane, number, like.nbytes, deadline)
        return self._typed(self._theirs[of], place, size, like.dtype), place

    def receive_into(self, x: Tensor, of: int, lane: int, number: int, deadline: float) -> None:
        """Wait for what that rank sends or lends, and copy it into `x`, which is contiguous where it may be lent.

        Raises:
            RuntimeError: as `receive`.
        """
        place, size = self._come_from(of, lane, number, x.nbytes, deadline)
        if place >= ROOM:
            assert x.is_contiguous(), f"received into a tensor of strides {x.stride()}"
            self._own_memory[of].copy_into(x, place - ROOM)
        else:
            x.detach().copy_(self._typed(self._theirs[of], place, size, x.dtype).view(x.shape))
        self.has_read(of, place)

    def _come_from(self, of: int, lane: int, number: int, expected: int, deadline: float) -> tuple[int, int]:
        key = (of, lane, number)
        if key not in self._come:
            self._hear(of)
        while key not in self._come:
            if of in self._gone:
                raise RuntimeError(f"rank {of} has closed its connection")
            self._wait(deadline, f"without rank {of}")
        place, size = self._come[key].pop(0)
        if not self._come[key]:
            del self._come[key]
        if size != expected:
            raise RuntimeError(f"rank {of} has sent {size} bytes where {expected} are expected")
        return place, size

    def has_read(self, of: int, place: int) -> None:
        """Let that rank write there again."""
        self._tell(of, RECORD.pack(READ, 0, place, 0))

    def wait_until_read(self, piece: Piece, deadline: float) -> None:
        """Until all to whom it was sent have read it.

        Raises:
            RuntimeError: one of them is gone, or has not within the time.
        """
        while piece.unread:
            if gone := self._gone.intersection(piece.unread):
                raise RuntimeError(f"rank {min(gone)} has closed its connection")
            self._wait(deadline, f"not read by rank {', '.join(map(str, sorted({*piece.unread})))}")

    def hear(self) -> None:
        """Take what has come, without waiting."""
        for number, _ in self._poll.poll(0):
            self._hear(self._ranks[number])

    def close(self) -> None:
        self._gone.update(self._sockets)
        for each in self._sockets.values():
            each.close()

    # ---- What has come

    def _wait(self, deadline: float, lacking: str) -> None:
        """Until anything has come, from any rank: a rank whose records nobody took could send no more."""
        left = min(deadline - time.monotonic(), 1e6)  # poll takes no more, in ms
        if left <= 0 or not (ready := self._poll.poll(1e3 * left)):  # others may go on sending for ever
            raise RuntimeError(f"timed out, {lacking}")
        for number, _ in ready:
            self._hear(self._ranks[number])

    def _hear(self, rank: int) -> None:
        """Take all records that have come from this rank."""
        while rank not in self._gone:
            try:
                data = self._sockets[rank].recv(AT_ONCE, NOW)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it left before it had taken all of ours; what it sent is still there
                continue
            if not data:
                self._gone.add(rank)
                self._poll.unregister(self._sockets[rank])
                return
            records = self._begun.pop(rank, b"") + data
            if rest := len(records) % RECORD.size:
                self._begun[rank], records = records[-rest:], records[:-rest]
            for lane, number, place, size in RECORD.iter_unpack(records):
                if lane == READ:
                    self._was_read(place, rank)
                else:
                    self._come.setdefault((rank, lane, number), []).append((place, size))
            if len(data) < AT_ONCE:
                return

    def _was_read(self, place: int, rank: int) -> None:
        if place < ROOM:
            self.room.read(place, rank)
            return
        self._lent[place].unread.remove(rank)
        if not self._lent[place].unread:
            del self._lent[place]

    def _tell(self, rank: int, record: bytes) -> None:
        """Send a record. Where 278 wait for the other one, a thread goes on: neither stops for what the other does."""
        late = self._late[rank]
        with self._lock:
            if left := record if late else self._not_sent(rank, record):
                late.append(left)
                if len(late) == 1:
                    threading.Thread(target=self._tell_late, args=(rank, late), daemon=True).start()

    def _tell_late(self, rank: int, late: deque[bytes]) -> None:
        while late:
            time.sleep(1e-3)
            with self._lock:
                while late:
                    late[0] = self._not_sent(rank, late[0])
                    if late[0]:
                        break
                    late.popleft()

    def _not_sent(self, rank: int, record: bytes) -> bytes:
        """What is left of it; nothing where that rank is gone, as whoever waits for it notices."""
        try:
            return record[self._sockets[rank].send(record, NOW) :]
        except BlockingIOError:
            return record
        except OSError:
            return b""

    @staticmethod
    def _typed(memory: Tensor, place: int, size: int, dtype: torch.dtype) -> Tensor:
        return memory[place : place + size].view(dtype)
