"""Collectives and messages of ranks on one machine, through the memory they share (`core.engine.near`).

A rank leaves every other one its part, all at once, and what comes is used where it lies: a sum adds up what the others
have left, in the order of the axis. Elsewhere, and for ranks that share a GPU, all goes over gloo or NCCL. N ranks.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from core.engine.near import Neighbours
from core.engine.neighbours import among
from core.mesh import Axis
from core.proof import host
from core.proof.flight import FLIGHT
from core.proof.peers import peer_errors

IN_TWO = 2**19  # bytes that all ranks have to sum, from which on each sums its part only and sends it to the others
CHUNK = 2**16  # elements that are summed at once: the total stays in the processor's cache
LENT = 2**19  # bytes of a message from which on it is not copied, but read from where it is
ADD = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MAX: torch.maximum}


def neighbours(x: Tensor, axis: Axis) -> Neighbours | None:
    """The other ranks of the axis, where all are on this machine and x is not on a GPU."""
    return None if x.device.type != "cpu" or host.is_needed(x, axis.group) else among(axis.ranks)


def empty(size: int, dtype: torch.dtype, device: torch.device, axis: Axis) -> Tensor:
    """Memory (size) without values, from where `reduce_scatter` sends without a copy where ranks can read it.

    What has been sent from it is not written to before `wait_until_read`, or is dropped.
    """
    near = neighbours(torch.empty(0, device=device), axis) if axis.size > 1 and size else None
    found = near and near.empty(size * dtype.itemsize)
    return torch.empty(size, dtype=dtype, device=device) if found is None else found.view(dtype)


def wait_until_read(x: Tensor, axis: Axis) -> None:
    """Until the others have read what was sent from `x`, which is from `empty`.

    Raises:
        PeerError: they have not within the timeout of the axis.
    """
    if axis.size > 1 and x.numel() and (near := neighbours(x, axis)):
        what = "wait for readers"
        call = FLIGHT.start(what, axis)
        phase = FLIGHT.wait(call)
        with peer_errors(f"{what} of what was sent over {axis.name}"):
            near.wait_until_all_read(x, time.monotonic() + axis.timeout.total_seconds())
        FLIGHT.done(call, phase, x.device)


def is_plain(x: Tensor) -> bool:
    """Whether its values lie in memory one after another, as they are."""
    return x.is_contiguous() and not x.is_conj() and not x.is_neg()


@cache
def lane_of(name: str) -> int:
    """A number for a group of ranks, the same on all of them."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) | 1  # never READ


class Exchange:
    """What goes to and comes from the other ranks of an axis, in flight; waited for as a `dist.Work` is.

    Args:
        send: what each of them gets, in the order of the axis, nothing where it is empty; or one tensor for all.
        expect: of what each of them sends, the type and the number of elements.
        use: what is done with it when all has come: one-dimensional, in the order of the axis; of this rank nothing.
            None: it is copied into `expect`.
        stays: what is sent does not change before it has been read.
    """

    def __init__(self, to: Neighbours, axis: Axis, send: Tensor | Sequence[Tensor], expect: Sequence[Tensor],
                 use: Callable[[list[Tensor | None]], None] | None, number: int | None = None,
                 stays: bool = False):  # fmt: skip
        self._to, self._axis, self._expect, self._use = to, axis, expect, use
        self._lane = lane_of(axis.group.group_name)
        self._number = to.next_number(self._lane) if number is None else number
        self._come: list[Tensor | None] = [None] * len(expect)
        self._places: list[tuple[int, int]] = []  # by rank, of what has come and is not copied
        others = [(axis.index + step) % axis.size for step in range(1, axis.size)]  # not all send to one first
        if isinstance(send, Tensor):
            if send.numel():
                to.send(send, [axis.ranks[i] for i in others], self._lane, self._number)
            return
        for i in others:
            if send[i].numel():
                to.send(send[i], [axis.ranks[i]], self._lane, self._number, stays and is_plain(send[i]))

    def wait(self, timeout: timedelta) -> bool:
        if not self._expect:
            return True
        key, deadline = (self._lane, self._number), time.monotonic() + timeout.total_seconds()
        for i, like in enumerate(self._expect):
            rank = self._axis.ranks[i]
            if i == self._axis.index or self._come[i] is not None:  # by a wait that ended without the others'
                continue
            if self._use and like.numel():
                self._come[i], place = self._to.receive(rank, *key, like, deadline)
                self._places.append((rank, place))
                continue
            if like.numel():
                self._to.receive_into(like, rank, *key, deadline)
            self._come[i] = like
        if self._use:
            self._use(self._come)
        for rank, place in self._places:
            self._to.has_read(rank, place)
        self._expect, self._come, self._places, self._use = (), [], [], None
        return True


class TwoTurns:
    """An all-reduce of contiguous `x`, in place: each rank sums its part, and sends it to the others when it waits."""

    def __init__(self, to: Neighbours, axis: Axis, x: Tensor, add: Callable[..., Tensor]):
        self._to, self._axis, self._parts = to, axis, x.view(-1).tensor_split(axis.size)
        mine = self._parts[axis.index]
        self._first = Exchange(to, axis, self._parts, [mine] * axis.size, lambda come: _reduce(come, mine, add))
        self._number, self._second = to.next_number(lane_of(axis.group.group_name)), None

    def wait(self, timeout: timedelta) -> bool:
        deadline = time.monotonic() + timeout.total_seconds()
        self._first.wait(timeout)
        if self._second is None:
            mine = self._parts[self._axis.index]
            self._second = Exchange(self._to, self._axis, mine, self._parts, None, self._number)
            self._parts = ()
        return self._second.wait(timedelta(seconds=deadline - time.monotonic()))


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, axis: Axis, near: Neighbours | None,
               in_order: bool) -> dist.Work:  # fmt: skip
    """Start to reduce contiguous `x` over the axis, in place.

    Args:
        in_order: all ranks wait for it in the same order as for the other sums in flight, so that it may take two
            turns: in any other, one would wait for the second turn of a rank that waits for another sum's.
    """
    if near is None or op not in ADD:
        return dist.all_reduce(x, op, axis.group, async_op=True)
    if in_order and axis.size > 2 and x.nbytes * axis.size > IN_TWO:  # two ranks would add up as much either way
        return TwoTurns(near, axis, x.detach(), ADD[op])
    flat = x.detach().view(-1)
    return Exchange(near, axis, flat, [flat] * axis.size, lambda come: _reduce(come, flat, ADD[op]))


def all_gather(parts: Sequence[Tensor], axis: Axis, near: Neighbours) -> Exchange:
    """Start to fill the ranks' parts of a tensor, of which this rank has its own."""
    return Exchange(near, axis, parts[axis.index], parts, None)


def reduce_scatter(parts: Sequence[Tensor], into: Tensor, axis: Axis, near: Neighbours) -> Exchange:
    """Start to sum this rank's part over the axis; `parts` must not change before it is waited for."""
    own = parts[axis.index].detach()

    def use(come: list[Tensor | None]) -> None:
        come[axis.index] = own.reshape(-1)
        _reduce(come, into, torch.add)

    return Exchange(near, axis, parts, [into] * axis.size, use, stays=True)


def all_to_all(send: Sequence[Tensor], receive: Sequence[Tensor], axis: Axis, near: Neighbours) -> Exchange:
    """Start to give each rank its part and to get one from each; this rank's own is copied at once."""
    receive[axis.index].copy_(send[axis.index].detach())
    return Exchange(near, axis, send, receive, None)


def _reduce(come: Sequence[Tensor | None], mine: Tensor, add: Callable[..., Tensor]) -> None:
    """Into `mine`, in the order of the axis. What has less than float32 is added up in float32, and rounded once."""
    flat = mine.view(-1)
    for start in range(0, len(flat), CHUNK):
        here = flat[start : start + CHUNK]
        first, *others = (here if each is None else each[start : start + CHUNK] for each in come)
        total = first.float() if first.is_floating_point() and first.element_size() < 4 else first
        for values in others[:-1]:
            total = add(total, values) if total is first else add(total, values, out=total)
        if total.dtype == mine.dtype:
            add(total, others[-1], out=here)
        else:
            here.copy_(add(total, others[-1]))


# ---- Messages from one rank to another -------------------------------------------------------------------------------


class Sent:
    """A message that this rank has left for another one; waited for until that one has read it.

    A large one is lent: it is kept until then, and must not be written to.
    """

    def __init__(self, to: Neighbours, x: Tensor, rank: int, lane: int, tag: int):
        self._to = to
        self._lent = x if to.lends and x.nbytes >= LENT and is_plain(x) else None
        self._piece = to.send(x, [rank], lane, tag) if self._lent is None else to.lend(x, rank, lane, tag)

    def is_completed(self) -> bool:
        if self._lent is not None:
            self._to.hear()
        return not self._piece.unread

    def wait(self, timeout: timedelta) -> bool:
        self._to.wait_until_read(self._piece, time.monotonic() + timeout.total_seconds())
        self._lent = None
        return True


class Coming:
    """A message that another rank leaves for this one."""

    def __init__(self, of: Neighbours, into: Tensor, rank: int, lane: int, tag: int):
        self._of, self._into, self._rank, self._key = of, into, rank, (lane, tag)

    def wait(self, timeout: timedelta) -> bool:
        if self._into is not None:
            deadline = time.monotonic() + timeout.total_seconds()
            self._of.receive_into(self._into, self._rank, *self._key, deadline)
            self._into = None
        return True


def message(kind: type[Sent] | type[Coming], x: Tensor, axis: Axis, peer: int, near: Neighbours | None,
            group: dist.ProcessGroup, tag: int = 0) -> dist.Work | Sent | Coming:  # fmt: skip
    """Start to send contiguous `x` to rank `peer` of the axis, or to receive into it."""
    rank = axis.ranks[peer]
    if near:
        return kind(near, x, rank, lane_of(f"messages of {group.group_name}"), tag)
    return (dist.isend if kind is Sent else dist.irecv)(x, rank, group, tag)


def batch(both: Sequence[tuple[type[Sent] | type[Coming], Tensor]], axis: Axis, peer: int,
          near: Neighbours | None) -> list[dist.Work]:  # fmt: skip
    """The same of several messages at once: alone, each would make NCCL open a communicator for every pair of ranks."""
    if near:
        return [message(kind, x, axis, peer, near, axis.group) for kind, x in both]
    ways = [(dist.isend if kind is Sent else dist.irecv, x) for kind, x in both]
    return dist.batch_isend_irecv([dist.P2POp(way, x, axis.ranks[peer], axis.group) for way, x in ways])
