"""Communication over one axis of the mesh. Every call enters the ledger of that axis.

Counting follows the standard ring algorithms, per rank, for N ranks and a whole tensor of S elements: all-reduce
2(N-1)/N S, all-gather and reduce-scatter (N-1)/N S, all-to-all its off-rank part, point-to-point S.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.mesh import Axis


class PeerError(RuntimeError):
    """A wait on another rank ended without its answer: it died, or was silent for the whole timeout."""

    def __init__(self, what: str, cause: Exception):
        # gloo says: [/its/source/file.cc:123] What happened [address]. Advice.
        reason = re.sub(r"^\[.*?\] |\. .*", "", str(cause), flags=re.DOTALL)
        super().__init__(f"{what} failed: {reason or type(cause).__name__}")


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Turn the failure of a wait on other ranks into a PeerError that says in words what was waited for."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(what, error) from error


def wait(work: dist.Work, what: str) -> None:
    """Wait for `work`, at most the job's timeout.

    Raises:
        PeerError: it did not finish.
    """
    with answered(what):
        work.wait()


# ---- Collectives -----------------------------------------------------------------------------------------------------


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over the axis, in place; every rank gets the result. `x` must be contiguous."""
    if axis.size > 1:
        _record("all-reduce", axis, x, 2 * (axis.size - 1) / axis.size)
        wait(dist.all_reduce(x, op, axis.group, async_op=True), f"all-reduce over {axis.name}")
    return x


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """The ranks' tensors of equal shape, joined along `dim` in the order of the axis."""
    if axis.size == 1:
        return x
    parts = x.new_empty(axis.size, *x.shape)
    _record("all-gather", axis, parts, (axis.size - 1) / axis.size)
    work = dist.all_gather_into_tensor(parts, x.contiguous(), axis.group, async_op=True)
    wait(work, f"all-gather over {axis.name}")
    return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(), dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum `x` over the axis and keep this rank's equal part along `dim`.

    On gloo an all-to-all and a local sum in the order of the axis: faster there than gloo's own reduce-scatter, which
    is an all-reduce underneath, and with one fixed order of summation.
    """
    if axis.size == 1:
        return x
    assert x.shape[dim] % axis.size == 0, f"{tuple(x.shape)} does not divide into {axis.size} along {dim}"
    parts = torch.stack(x.chunk(axis.size, dim))
    _record("reduce-scatter", axis, parts, (axis.size - 1) / axis.size)
    what = f"reduce-scatter over {axis.name}"
    if x.device.type == "cpu":
        received = torch.empty_like(parts)
        wait(dist.all_to_all_single(received, parts, group=axis.group, async_op=True), what)
        return received.sum(0)
    mine = torch.empty_like(parts[0])
    wait(dist.reduce_scatter_tensor(mine, parts, group=axis.group, async_op=True), what)
    return mine


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Give `send[i]` rows of `x` to rank i of the axis and get `receive[i]` rows from it, in the order of the axis."""
    if axis.size == 1:
        return x
    received = x.new_empty(sum(receive), *x.shape[1:])
    row = x[0].numel() if len(x) else 0
    off_rank = (sum(send) - send[axis.index]) * row
    axis.ledger.record("all-to-all", axis.name, off_rank, x.element_size())
    work = dist.all_to_all_single(received, x.contiguous(), list(receive), list(send), axis.group, async_op=True)
    wait(work, f"all-to-all over {axis.name}")
    return received


def _record(operation: str, axis: Axis, whole: Tensor, share: float) -> None:
    axis.ledger.record(operation, axis.name, share * whole.numel(), whole.element_size())


# ---- Collectives under autograd: each pair is the other's backward ---------------------------------------------------


class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _summed(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def _own_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.index].contiguous()


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's f: identity forward, all-reduce backward."""
    return _Conjugate.apply(x, lambda t: t.view_as(t), lambda g: _summed(g, axis))


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's g: all-reduce forward, identity backward."""
    return _Conjugate.apply(x, lambda t: _summed(t, axis), lambda g: g)


def split_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` forward, all-gather backward: for a tensor that every rank of the axis holds."""
    return _Conjugate.apply(x, lambda t: _own_part(t, axis, dim), lambda g: all_gather(g, axis, dim))


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All-gather along `dim` forward, this rank's part backward: for a result that every rank uses alike."""
    return _Conjugate.apply(x, lambda t: all_gather(t, axis, dim), lambda g: _own_part(g, axis, dim))


def gather_for(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All-gather along `dim` forward, reduce-scatter backward: for a result that each rank uses differently."""
    return _Conjugate.apply(x, lambda t: all_gather(t, axis, dim), lambda g: reduce_scatter(g, axis, dim))


def scatter_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Reduce-scatter along `dim` forward, all-gather backward."""
    return _Conjugate.apply(x, lambda t: reduce_scatter(t, axis, dim), lambda g: all_gather(g, axis, dim))


# ---- Point-to-point --------------------------------------------------------------------------------------------------


def exchange(x: Tensor, axis: Axis, peer: int) -> Tensor:
    """Swap tensors of equal shape with rank `peer` of the axis; both must call it. Returns the peer's."""
    received = torch.empty_like(x)
    axis.ledger.record("exchange", axis.name, x.numel(), x.element_size())
    swap = [
        dist.P2POp(dist.isend, x, axis.ranks[peer], axis.group),
        dist.P2POp(dist.irecv, received, axis.ranks[peer], axis.group),
    ]
    for work in dist.batch_isend_irecv(swap):
        wait(work, f"exchange with rank {axis.ranks[peer]}")
    return received


class Mail:
    """Point-to-point messages along one axis that neither the sender nor the receiver stops for.

    A sent tensor is let go as soon as it has left: gloo tells that only to who waits, so a thread does.

    Args:
        routes: every (sender, receiver, kind) that will be used, as places on the axis; the same on all its ranks.
            On NCCL, which has no tags, the messages of a route arrive in the order they are sent.
    """

    def __init__(self, axis: Axis, routes: Sequence[tuple[int, int, str]], device: torch.device):
        self.axis = axis
        self._lanes: dict[tuple, dist.ProcessGroup] = {}
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._postman: threading.Thread | None = None
        if device.type != "cpu":
            self._open_lanes(routes, device)

    def send(self, x: Tensor, to: int, kind: str, tag: int) -> None:
        """Send contiguous `x` to place `to`; returns at once. The caller may drop `x` but not write to it.

        Raises:
            PeerError: an earlier send failed.
        """
        if self._failure:
            raise self._failure
        if self._postman is None:
            self._postman = threading.Thread(target=self._deliver, daemon=True)
            self._postman.start()
        self.axis.ledger.record(f"send {kind}", self.axis.name, x.numel(), x.element_size())
        what = f"send ({kind}) to rank {self.axis.ranks[to]}"
        with answered(what):
            work = dist.isend(x, self.axis.ranks[to], self._lane(self.axis.index, to, kind, x), tag)
        self._outbox.put((work, x, what))

    def receive(self, into: Tensor, sender: int, kind: str, tag: int) -> Callable[[], Tensor]:
        """Post a receive into `into`; returns at once. Call the result to wait for the message and get it.

        Raises (from that call):
            PeerError: the sender died or was silent for the whole timeout.
        """
        what = f"receive ({kind}) from rank {self.axis.ranks[sender]}"
        with answered(what):
            work = dist.irecv(into, self.axis.ranks[sender], self._lane(sender, self.axis.index, kind, into), tag)

        def arrive() -> Tensor:
            wait(work, what)
            return into

        return arrive

    def flush(self) -> None:
        """Wait until everything sent has left.

        Raises:
            PeerError: a send failed.
        """
        if self._postman is not None:
            done = threading.Event()
            self._outbox.put(done)
            done.wait()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Flush, and end the thread."""
        self.flush()
        if self._postman is not None:
            self._outbox.put(None)
            self._postman.join()
            self._postman = None

    def _deliver(self) -> None:
        while (item := self._outbox.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            work, tensor, what = item
            try:
                if tensor.device.type == "cpu":
                    wait(work, what)
                else:  # here wait() would hold up this device's stream, not this thread
                    while not work.is_completed():
                        time.sleep(0.001)
            except PeerError as error:
                self._failure = self._failure or error
            del item, work, tensor  # not kept while the thread waits for the next message

    def _lane(self, sender: int, receiver: int, kind: str, x: Tensor) -> dist.ProcessGroup | None:
        if x.device.type == "cpu":
            return self.axis.group  # gloo has tags
        return self._lanes[_lane_key(sender, receiver, kind)]

    def _open_lanes(self, routes: Sequence[tuple[int, int, str]], device: torch.device) -> None:
        # NCCL runs the messages of one communicator on one stream, in the order of the calls: a receive posted ahead
        # would hold up the sends behind it. So a lane never both sends and receives on one rank. The first message
        # makes the connection and blocks until both ends are there, hence one round in a fixed order.
        for key in sorted({_lane_key(*route) for route in routes}):
            self._lanes[key] = dist.new_group(list(self.axis.ranks), use_local_synchronization=True)
        probe = torch.zeros(1, device=device)
        for sender, receiver, kind in sorted(routes):
            group = self._lanes[_lane_key(sender, receiver, kind)]
            if self.axis.index == sender:
                dist.send(probe, self.axis.ranks[receiver], group)
            elif self.axis.index == receiver:
                dist.recv(probe, self.axis.ranks[sender], group)


def _lane_key(sender: int, receiver: int, kind: str) -> tuple[str, bool, int]:
    return kind, sender < receiver, sender % 2
