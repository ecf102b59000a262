"""The ranks of one machine connect: sockets, memory that they share, and whether they may read each other's own."""

import ctypes
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import IO

import torch
from torch import Tensor

RECORD = struct.Struct("=Qqqq")  # lane, number, place, bytes; or READ, 0, place, 0: the receiver has read it
READ = 0
ROOM = 2**34  # bytes of addresses a rank; memory is taken for those in use. A place from here on is lent: an address
MEETING = 20.0  # seconds for the ranks of a machine to connect
TOKEN = 16  # bytes
GREETING = struct.Struct("=qQ")  # rank, address of the memory that it shares


class Door:
    """Where other ranks connect, and the memory that they get.

    Raises:
        OSError, AttributeError: there is no such thing on this system.
    """

    def __init__(self) -> None:
        self.name = f"\0{secrets.token_hex(16)}"  # no file
        self._memory = os.fdopen(os.memfd_create("messages"), "r+b", 0)
        self._memory.truncate(ROOM)
        self._mine = _mapped(self._memory)
        self._mine[:TOKEN] = torch.frombuffer(bytearray(secrets.token_bytes(TOKEN)), dtype=torch.uint8)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.name)
        self._socket.listen(4096)

    def meet(
        self, known: Sequence[tuple[str, str]], rank: int, timeout: float
    ) -> tuple[dict[int, socket.socket], Tensor, dict[int, Tensor], dict[int, "OwnMemory"]] | None:
        """Connect to all ranks of this host: what `Neighbours` takes.

        Args:
            known: of each rank the host, and the name of its door.
            timeout: seconds for each of them, but at most 20.

        Raises:
            OSError, ValueError: one could not be reached, or did not come; or has given up.
        """
        near = [other for other, (where, _) in enumerate(known) if where == known[rank][0]]
        timeout = min(timeout, MEETING)
        connected: list[socket.socket] = []
        with self._socket, self._memory:
            if not all(known[other][1] for other in near):
                return None
            self._socket.settimeout(timeout)
            for other in (each for each in near if each != rank):  # first those below
                if other < rank:
                    connected.append(socket.socket(socket.AF_UNIX))
                    connected[-1].settimeout(timeout)
                    connected[-1].connect(known[other][1])
                else:
                    connected.append(self._socket.accept()[0])
                    connected[-1].settimeout(timeout)
                socket.send_fds(connected[-1], [GREETING.pack(rank, self._mine.data_ptr())], [self._memory.fileno()])
        sockets, theirs, own_memory = {}, {}, {}
        for each in connected:
            greeting, (memory,), *_ = socket.recv_fds(each, GREETING.size, 1)
            other, shared = GREETING.unpack(greeting)
            sockets[other] = each
            with os.fdopen(memory, "r+b", 0) as file:
                theirs[other] = _mapped(file)
            found = OwnMemory(each)
            if found.can_be_read(shared, theirs[other][:TOKEN]):
                own_memory[other] = found
            each.setblocking(False)
        return sockets, self._mine, theirs, own_memory


def _mapped(memory: IO[bytes]) -> Tensor:
    return torch.frombuffer(mmap.mmap(memory.fileno(), ROOM), dtype=torch.uint8)  # the file may be closed


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class OwnMemory:
    """Of another process: the system lets one of the same user read it, unless told otherwise.

    Args:
        connection: to it.
    """

    def __init__(self, connection: socket.socket):
        # By the number that it has here; 0 where it has none.
        self._process, *_ = struct.unpack("=3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))

    def copy_into(self, x: Tensor, address: int) -> None:
        """Fill contiguous `x` with what lies at that address.

        Raises:
            RuntimeError: the process is gone, or may not be read.
        """
        done = 0
        while done < x.nbytes:  # the system copies at most 2 GiB at once
            here, there = (_Piece(start + done, x.nbytes - done) for start in (x.data_ptr(), address))
            copied = _read_function()(self._process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if copied <= 0:
                why = os.strerror(ctypes.get_errno())
                raise RuntimeError(f"the memory of process {self._process} cannot be read: {why}")
            done += copied

    def can_be_read(self, address: int, token: Tensor) -> bool:
        """Whether that is found there."""
        found = torch.zeros_like(token)
        try:
            self.copy_into(found, address)
        except (RuntimeError, AttributeError):
            return False
        return torch.equal(found, token)


@cache
def _read_function() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    function.restype = ctypes.c_ssize_t
    return function
