"""Large messages between ranks of one machine: read from the sender's own memory, which stays as it is until then."""

import gc
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm, p2p
from core.engine import door, neighbours
from core.engine.direct import LENT, Coming, Sent
from core.engine.door import OwnMemory
from core.engine.near import Neighbours
from core.ledger import Ledger
from core.mesh import Mesh
from tests.pool import Pool

LANE, SOON = 7, timedelta(seconds=5)
CPU = torch.device("cpu")
COUNT = LENT // 8 + 3  # of int64
MAP_32BIT = 0x40  # Linux on x86-64


@pytest.fixture
def pair() -> Iterator[list[Neighbours]]:
    """Two ranks in this process."""
    ends = socket.socketpair(socket.AF_UNIX)
    memory = [torch.zeros(2**23, dtype=torch.uint8) for _ in ends]
    both = [Neighbours({1 - i: end}, memory[i], {1 - i: memory[1 - i]}, {1 - i: OwnMemory(end)})
            for i, end in enumerate(ends)]  # fmt: skip
    yield both
    for each in both:
        each.close()


def numbers(seed: int) -> Tensor:
    return torch.arange(COUNT) * 3 + seed


def received(at: Neighbours, tag: int) -> Tensor:
    into = torch.zeros(COUNT, dtype=torch.int64)
    Coming(at, into, 1, LANE, tag).wait(SOON)
    return into


def dropped_before_it_is_read(receiver: Neighbours, sender: Neighbours) -> None:
    """What the sender lets go of must live on."""
    flying = [Sent(sender, numbers(tag), 0, LANE, tag) for tag in range(4)]
    others = [torch.full((COUNT,), -1) for _ in range(8)]  # in the memory that was freed, if any was
    for tag in (2, 0, 3, 1):
        assert torch.equal(received(receiver, tag), numbers(tag))
    for each in flying:
        each.wait(SOON)
    assert len(others) == 8


def test_what_is_dropped_lives_until_it_is_read(pair: list[Neighbours]) -> None:
    dropped_before_it_is_read(*pair)


def test_what_is_let_go_too_early_is_seen(pair: list[Neighbours]) -> None:
    right = Sent.__init__

    def wrong(self: Sent, to: Neighbours, x: Tensor, *where: int) -> None:
        right(self, to, x, *where)
        self._lent = None

    with patch.object(Sent, "__init__", wrong), pytest.raises(AssertionError):
        dropped_before_it_is_read(*pair)


def test_nothing_is_copied_and_nothing_kept(pair: list[Neighbours]) -> None:
    receiver, sender = pair
    for tag in range(200):
        x = numbers(tag)
        alive, flying = ref(x), Sent(sender, x, 0, LANE, 0)
        del x
        if tag < 20:  # slow, beside all that a whole suite has loaded
            gc.collect()
        assert alive() is not None
        assert not flying.is_completed()
        assert torch.equal(received(receiver, 0), numbers(tag))
        assert flying.is_completed()
        flying.wait(SOON)
        assert alive() is None
    assert not any([sender.room.taken, sender._lent, sender.room.in_flight, receiver._come])
    assert not sender.room.memory.any()


def test_one_tensor_lent_twice_is_kept_for_both(pair: list[Neighbours]) -> None:
    receiver, sender = pair
    x = numbers(5)
    first, second = (Sent(sender, x, 0, LANE, tag) for tag in range(2))
    received(receiver, 1)
    assert not first.is_completed()
    assert torch.equal(received(receiver, 0), x)
    assert first.is_completed()
    assert second.is_completed()


def test_small_and_strided_ones_are_copied(pair: list[Neighbours]) -> None:
    receiver, sender = pair
    strided = torch.arange(2 * COUNT).view(COUNT, 2)[:, 0]
    for x in (numbers(0)[: LENT // 8 - 1], strided):
        sent = Sent(sender, x, 0, LANE, 0)
        assert sender.room.taken
        assert not sender._lent
        into = torch.zeros(len(x), dtype=torch.int64)
        Coming(receiver, into, 1, LANE, 0).wait(SOON)
        assert torch.equal(into, x)
        sent.wait(SOON)


def test_what_lies_at_a_low_address_is_no_place(pair: list[Neighbours]) -> None:
    """As all does where the executable is at a fixed address: Debian's own Python."""
    receiver, sender = pair
    low = mmap.mmap(-1, 8 * COUNT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_32BIT)
    x = torch.frombuffer(low, dtype=torch.int64).copy_(numbers(4))
    if x.data_ptr() >= door.ROOM:
        pytest.skip("there are no low addresses on this processor")
    for tag in range(2):
        sent = Sent(sender, x, 0, LANE, tag)
        assert sender._lent
        assert torch.equal(received(receiver, tag), numbers(4))
        sent.wait(SOON)
    assert not sender._lent


def test_conjugated_and_negated_views_are_copied(pair: list[Neighbours]) -> None:
    receiver, sender = pair
    z = torch.complex(numbers(0).double(), numbers(1).double())
    for x in (z.conj(), z.conj().imag):
        into = torch.zeros(x.shape, dtype=x.dtype)
        sent = Sent(sender, x, 0, LANE, 0)
        Coming(receiver, into, 1, LANE, 0).wait(SOON)
        assert torch.equal(into, x.resolve_conj().resolve_neg())
        sent.wait(SOON)


def test_a_lent_message_is_not_read_into_strides(pair: list[Neighbours]) -> None:
    receiver, sender = pair
    Sent(sender, numbers(0), 0, LANE, 0)
    with pytest.raises(AssertionError, match="strides"):
        Coming(receiver, torch.zeros(2 * COUNT, dtype=torch.int64)[::2], 1, LANE, 0).wait(SOON)


def transposed() -> None:
    axis, me = Mesh("cpu", Ledger(), 20.0, dp=2)["dp"], dist.get_rank()
    for size in (16, 512):  # copied, and lent
        x = torch.arange(size * size, dtype=torch.float64).view(size, size) + me
        theirs = p2p.exchange(x if me else x.T.contiguous().T, axis, 1 - me)
        assert torch.equal(theirs, x - me + 1 - me)


def test_an_exchange_of_a_transposed_tensor(pool: Pool) -> None:
    pool.run(2, transposed)


def test_a_process_that_is_gone_or_another_one_is_not_read() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    token = torch.arange(16, dtype=torch.uint8)
    own = OwnMemory(ours)
    assert own.can_be_read(token.data_ptr(), token)
    assert not own.can_be_read(token.data_ptr(), token + 1)  # another process has that number here
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    own._process = child
    assert not own.can_be_read(token.data_ptr(), token)
    with pytest.raises(RuntimeError, match=f"process {child} cannot be read: No such process"):
        own.copy_into(torch.zeros(16, dtype=torch.uint8), token.data_ptr())
    ours.close()
    theirs.close()


def round_trips() -> bool:
    """Messages round a ring and gathers, whose parts are large; whether they were lent."""
    neighbours.leave()
    axis, me = Mesh("cpu", Ledger(), 20.0, dp=dist.get_world_size())["dp"], dist.get_rank()
    mail = p2p.PointToPoint(axis, [], CPU)
    for step in range(3):
        after, before = (me + 1) % axis.size, (me - 1) % axis.size
        arrive = mail.receive(torch.zeros(COUNT, dtype=torch.int64), before, "F", step)
        mail.send(numbers(me + 10 * step), after, "F", step)
        assert torch.equal(arrive(), numbers(before + 10 * step))
    mail.flush()
    assert torch.equal(p2p.exchange(numbers(me), axis, me ^ 1), numbers(me ^ 1))
    gathered = comm.all_gather(numbers(me).unsqueeze(0), axis)
    assert torch.equal(gathered, torch.stack([numbers(i) for i in range(axis.size)]))
    comm.all_reduce(torch.ones(1), axis)  # all have read
    found = neighbours.among(axis.ranks)
    found.hear()
    assert not found._lent
    return found.lends


def one_cannot_read() -> bool:
    function = door._read_function()
    refuses = (lambda *_: -1) if dist.get_rank() == 1 else function
    with patch.object(door, "_read_function", lambda: refuses):
        return round_trips()


@pytest.mark.parametrize(("way", "lends"), [(round_trips, True), (one_cannot_read, False)])
def test_messages_arrive_lent_or_not(pool: Pool, way: Callable, lends: bool) -> None:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if lends and scope.exists() and scope.read_text().strip() != "0":
        pytest.skip("this system lets no process read another")
    assert pool.run(4, way) == [lends] * 4
