"""Messages between the ranks of one machine: through memory that they share, in place of gloo's sockets.

Gloo sends by TCP also where all ranks are on one machine: the kernel copies every byte twice, and a thread of its own
wakes for every piece. Here a rank writes what it sends into its part of the shared memory, and tells the others where
in 32 bytes over a socket; who waits for it reads it there, and says that it has. So does NCCL inside a machine. What
is large is lent instead: the receiver copies it from where it lies in the sender's own memory.

As with gloo, what is sent is on its way whatever the others do meanwhile, a wait ends at its timeout, and a rank that
dies is noticed at once, because its sockets close. One thread at a time sends and waits, as everywhere in this project.
"""

import ctypes
import select
import socket
import threading
import time
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.engine.door import READ, RECORD, ROOM, OwnMemory

ALIGNED = 64
MOST_KEPT = ROOM // 2  # bytes
PLENTY = 2**20  # bytes in flight from which on it is asked what has been read meanwhile
AT_ONCE = 2**16  # bytes of records
NOW = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)  # as Linux has them


@dataclass
class Piece:
    """What a rank has left for others, or lent to one."""

    place: int
    end: int  # what is lent takes no place: 0
    unread: list[int]  # ranks that are to read it, once for each message
    kept: bool = False  # somebody has it, from `empty`


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
        self._sockets, self._memory, self._theirs, self._own_memory = sockets, memory, theirs, own_memory
        self.lends = len(own_memory) == len(sockets)
        self._taken: list[Piece] = []  # by place
        self._dropped: deque[int] = deque()  # places that nobody keeps any more
        self._lent: dict[int, Piece] = {}  # by place
        self._begun: dict[int, bytes] = {}  # records of which only this has come, by rank
        self._in_flight = 0  # bytes of those
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
        """So many bytes of this rank's part, for what is sent from where it is; free with the last tensor in them.

        None where so much is kept already that messages could find no room.
        """
        self.hear()  # what has been read meanwhile
        if size + sum(piece.end - piece.place for piece in self._taken if piece.kept) > MOST_KEPT:
            return None
        piece = self._room(size, [])
        piece.kept, self._in_flight = True, self._in_flight - (piece.end - piece.place)
        kept = (ctypes.c_char * size).from_address(self._memory.data_ptr() + piece.place)
        # Anywhere, by Python's collector too: it only notes it. The memory is not given back before that.
        weakref.finalize(kept, lambda place, _: self._dropped.append(place), piece.place, self._memory).atexit = False
        return torch.frombuffer(kept, dtype=torch.uint8)

    def send(self, x: Tensor, to: Sequence[int], lane: int, number: int, stays: bool = False) -> Piece:
        """Leave `x` where these ranks can read it, and tell them. `x` may change at once.

        It is no error that one of them is gone, where nothing is expected of it; a wait for it is one.

        Args:
            stays: contiguous `x` does not change before it has been read: it is not copied where it is from `empty`.
        """
        place = self._place_of(x) if stays and x.is_contiguous() else None
        if place is not None:
            piece = self._taken[self._at(place)]
            piece.unread += to
        else:
            piece = self._room(x.nbytes, to)
            place = piece.place
            self._typed(self._memory, place, x.nbytes, x.dtype).view(x.shape).copy_(x.detach())
        for rank in to:
            self._tell(rank, RECORD.pack(lane, number, place, x.nbytes))
        return piece

    def wait_until_all_read(self, x: Tensor, deadline: float) -> None:
        """Until all have read what was sent of `x`, which is from `empty`: it may be written to again.

        Raises:
            RuntimeError: one of them is gone, or has not within the time.
        """
        if (place := self._place_of(x)) is None:  # there was no room for it
            return
        piece = self._taken[self._at(place)]
        try:
            self.wait_until_read(piece, deadline)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; still to be read by ranks {sorted(set(piece.unread))}") from error

    def lend(self, x: Tensor, to: int, lane: int, number: int) -> Piece:
        """Tell that rank where contiguous `x` lies, which must stay as it is until it has been read."""
        piece = self._lent.setdefault(x.data_ptr(), Piece(x.data_ptr(), 0, []))
        piece.unread.append(to)
        self._tell(to, RECORD.pack(lane, number, piece.place, x.nbytes))
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
            self._own_memory[of].copy_into(x, place)
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

    def wait_until_read(self, piece: Piece, deadline: float) -> None:
        """Until all to whom it was sent have read it.

        Raises:
            RuntimeError: one of them is gone, or has not within the time.
        """
        while piece.unread:
            if gone := self._gone.intersection(piece.unread):
                raise RuntimeError(f"rank {min(gone)} has closed its connection")
            self._wait(deadline)

    def hear(self) -> None:
        """Take what has come, without waiting."""
        for number, _ in self._poll.poll(0):
            self._hear(self._ranks[number])

    def close(self) -> None:
        self._gone.update(self._sockets)
        for each in self._sockets.values():
            each.close()

    # ---- What has come

    def _wait(self, deadline: float) -> None:
        """Until anything has come, from any rank: a rank whose records nobody took could send no more."""
        left = min(deadline - time.monotonic(), 1e6)  # poll takes no more, in ms
        if left <= 0 or not (ready := self._poll.poll(1e3 * left)):  # others may go on sending for ever
            raise RuntimeError("timed out")
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
                    self._read(place, rank)
                else:
                    self._come.setdefault((rank, lane, number), []).append((place, size))
            if len(data) < AT_ONCE:
                return

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

    # ---- Its memory: the first place that is large enough, so that little of it is ever touched

    def _room(self, size: int, readers: Sequence[int]) -> Piece:
        while self._dropped:
            at = self._at(self._dropped.popleft())
            self._taken[at].kept = False
            self._in_flight += self._taken[at].end - self._taken[at].place
            self._let_go(at)
        if self._in_flight > PLENTY:
            self.hear()
        size = max(ALIGNED, -(-size // ALIGNED) * ALIGNED)
        place, at = 0, 0
        for piece in self._taken:
            if piece.place - place >= size:
                break
            place, at = piece.end, at + 1
        if place + size > len(self._memory):
            raise RuntimeError(f"more than {ROOM >> 30} GiB have been sent and not been received")
        self._taken.insert(at, Piece(place, place + size, [*readers]))
        self._in_flight += size
        return self._taken[at]

    def _read(self, place: int, by: int) -> None:
        if place < ROOM:
            at = self._at(place)
            self._taken[at].unread.remove(by)
            self._let_go(at)
            return
        self._lent[place].unread.remove(by)
        if not self._lent[place].unread:
            del self._lent[place]

    def _let_go(self, at: int) -> None:
        piece = self._taken[at]
        if not piece.unread and not piece.kept:
            del self._taken[at]
            self._in_flight -= piece.end - piece.place

    def _place_of(self, x: Tensor) -> int | None:
        """Where `x` lies in this rank's part, if it does."""
        place = x.data_ptr() - self._memory.data_ptr()
        return place if 0 <= place < len(self._memory) else None

    def _at(self, place: int) -> int:
        """Which piece that is taken has this place."""
        return bisect(self._taken, place, key=lambda piece: piece.place) - 1

    @staticmethod
    def _typed(memory: Tensor, place: int, size: int, dtype: torch.dtype) -> Tensor:
        return memory[place : place + size].view(dtype)
