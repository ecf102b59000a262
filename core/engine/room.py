"""A rank's part of the memory that the ranks of a machine share: what lies where, and who is still to read it."""

import ctypes
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.engine.door import ROOM

ALIGNED = 64
MOST_KEPT = ROOM // 2  # bytes


@dataclass
class Piece:
    """What a rank has left for others, or lends to one."""

    place: int
    end: int
    unread: list[int]  # ranks that are to read it, once for each message
    kept: bool = False  # somebody has it, from `keep`


class Room:
    """Takes the first place that is large enough, so that little of the memory is ever touched.

    Attributes:
        taken: the pieces, by place.
        in_flight: bytes of those that nobody keeps.
    """

    def __init__(self, memory: Tensor):
        self.memory = memory
        self.taken: list[Piece] = []
        self.in_flight = 0
        self._dropped: deque[int] = deque()  # places that nobody keeps any more

    def take(self, size: int, readers: Sequence[int]) -> Piece:
        """Raises RuntimeError: there is no room for so many bytes."""
        self._take_back()
        size = max(ALIGNED, -(-size // ALIGNED) * ALIGNED)
        place, at = 0, 0
        for piece in self.taken:
            if piece.place - place >= size:
                break
            place, at = piece.end, at + 1
        if place + size > len(self.memory):
            raise RuntimeError(f"more than {ROOM >> 30} GiB have been sent and not been received")
        self.taken.insert(at, Piece(place, place + size, [*readers]))
        self.in_flight += size
        return self.taken[at]

    def keep(self, size: int) -> Tensor | None:
        """So many bytes, free with the last tensor in them. A child of this process writes to them as this one does.

        None where so much is kept already that messages could find no room.
        """
        self._take_back()
        if size + sum(piece.end - piece.place for piece in self.taken if piece.kept) > MOST_KEPT:
            return None
        piece = self.take(size, ())
        piece.kept, self.in_flight = True, self.in_flight - (piece.end - piece.place)
        kept = (ctypes.c_char * size).from_address(self.memory.data_ptr() + piece.place)
        # Anywhere, by Python's collector too: it only notes it. The memory is not given back before that.
        weakref.finalize(kept, lambda place, _: self._dropped.append(place), piece.place, self.memory).atexit = False
        return torch.frombuffer(kept, dtype=torch.uint8)

    def read(self, place: int, by: int) -> None:
        """That rank has read what lies there."""
        piece = self.at(place)
        piece.unread.remove(by)
        self._let_go(piece)

    def at(self, place: int) -> Piece:
        """The piece in which that is."""
        return self.taken[self._index(place)]

    def place_of(self, x: Tensor) -> int | None:
        """Where `x` lies in this memory, if it does."""
        place = x.data_ptr() - self.memory.data_ptr()
        return place if 0 <= place < len(self.memory) else None

    def _take_back(self) -> None:
        while self._dropped:
            piece = self.at(self._dropped.popleft())
            piece.kept, self.in_flight = False, self.in_flight + piece.end - piece.place
            self._let_go(piece)

    def _let_go(self, piece: Piece) -> None:
        if not piece.unread and not piece.kept:
            del self.taken[self._index(piece.place)]
            self.in_flight -= piece.end - piece.place

    def _index(self, place: int) -> int:
        return bisect(self.taken, place, key=lambda piece: piece.place) - 1
