"""The ranks of one machine connect: sockets, memory that they share, and whether they may read each other's own."""

import ctypes
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

RECORD = struct.Struct("=Qqqq")  # lane, number, place, bytes; or READ, 0, place, 0: the receiver has read it
READ = 0
ROOM = 2**34  # bytes of addresses a rank; memory is taken for those only that are in use. A place above is an address
MEETING = 20.0  # seconds for the ranks of a machine to connect
TOKEN = 16  # bytes


class Door:
    """Where other ranks connect, and the memory that they get.

    Raises:
        OSError, AttributeError: there is no such thing on this system.
    """

    def __init__(self) -> None:
        self.name = f"\0{secrets.token_hex(16)}"  # no file
        self._memory = os.memfd_create("messages")
        os.ftruncate(self._memory, ROOM)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self.name)
        self._socket.listen(4096)

    def meet(
        self, known: Sequence[tuple[str, str]], rank: int, timeout: float
    ) -> tuple[dict[int, socket.socket], Tensor, dict[int, Tensor], bool] | None:
        """Connect to all ranks of this host: sockets by rank, this rank's memory, theirs, whether all can be read.

        Args:
            known: of each rank the host, and the name of its door.
            timeout: seconds for each of them.

        Raises:
            OSError: one could not be reached, or did not come.
        """
        mine = _mapped(self._memory)
        mine[:TOKEN] = torch.frombuffer(bytearray(secrets.token_bytes(TOKEN)), dtype=torch.uint8)
        greeting = RECORD.pack(READ, rank, mine.data_ptr(), 0)
        near = [other for other, (where, _) in enumerate(known) if where == known[rank][0]]
        sockets: dict[int, socket.socket] = {}
        with self._socket:
            self._socket.settimeout(min(timeout, MEETING))
            for other in (each for each in near if each < rank):
                if not known[other][1]:
                    return None
                sockets[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sockets[other].settimeout(min(timeout, MEETING))
                sockets[other].connect(known[other][1])
                socket.send_fds(sockets[other], [greeting], [self._memory])
            for _ in (each for each in near if each > rank):
                came, _ = self._socket.accept()
                came.settimeout(min(timeout, MEETING))
                _, other, *_ = RECORD.unpack(came.recv(RECORD.size, socket.MSG_PEEK))
                sockets[other] = came
                socket.send_fds(came, [greeting], [self._memory])
        os.close(self._memory)  # the mapping keeps it
        theirs, readable = {}, True
        for other, each in sockets.items():
            record, (memory,), *_ = socket.recv_fds(each, RECORD.size, 1)
            theirs[other] = _mapped(memory)
            os.close(memory)
            readable &= _can_read(process_of(each), RECORD.unpack(record)[2], theirs[other][:TOKEN])
            each.setblocking(False)
        return sockets, mine, theirs, readable


def _mapped(memory: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(memory, ROOM), dtype=torch.uint8)


# ---- Another process's own memory: where the system lets one read it, as it does unless told otherwise


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _read_function() -> ctypes._CFuncPtr:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    function.restype = ctypes.c_ssize_t
    return function


def copy_from(process: int, address: int, x: Tensor) -> None:
    """Fill contiguous `x` with what lies at that address of another process.

    Raises:
        RuntimeError: it is gone, or does not let us.
    """
    done = 0
    while done < x.nbytes:  # the system copies at most 2 GiB at once
        here, there = (_Piece(base + done, x.nbytes - done) for base in (x.data_ptr(), address))
        copied = _read_function()(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if copied <= 0:
            raise RuntimeError(f"the memory of process {process} cannot be read: {os.strerror(ctypes.get_errno())}")
        done += copied


@cache
def process_of(connection: socket.socket) -> int:
    """Which process is at the other end, by the number that it has here; 0: it has none."""
    return struct.unpack("=3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def _can_read(process: int, address: int, token: Tensor) -> bool:
    found = torch.empty_like(token)
    try:
        copy_from(process, address, found)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found, token)
