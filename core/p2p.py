"""Messages from one rank of an axis to another, which neither stops for. Every one enters the ledger of that axis."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.comm import wait
from core.engine import direct
from core.engine.communicators import Communicators, Route
from core.mesh import Axis
from core.proof import host
from core.proof.flight import FLIGHT, WAITING
from core.proof.peers import PeerError, peer_errors


def exchange(x: Tensor, axis: Axis, peer: int) -> Tensor:
    """Swap tensors of equal shape with rank `peer` of the axis; both must call it. Returns the peer's."""
    sent, received = host.outgoing(x, axis.group), torch.empty_like(x, memory_format=torch.contiguous_format)
    landing, near = host.landing(received, axis.group), direct.neighbours(x, axis)
    axis.ledger.record("exchange", axis.name, x.numel(), x.element_size())
    FLIGHT.start_message("exchange", axis, x, axis.index, peer)
    call = FLIGHT.start_message("exchange", axis, received, peer, axis.index)
    for work in direct.batch([(direct.Coming, landing), (direct.Sent, sent)], axis, peer, near):
        wait(work, axis, landing, f"exchange with rank {axis.ranks[peer]}", call)
    return host.fill(received, landing)


def send(x: Tensor, axis: Axis, peer: int) -> None:
    """Send contiguous `x` to rank `peer` of the axis, which must call `receive`, and wait until it has left."""
    axis.ledger.record("send", axis.name, x.numel(), x.element_size())
    _message(direct.Sent, host.outgoing(x, axis.group), axis, peer, "send to", direct.neighbours(x, axis))


def receive(into: Tensor, axis: Axis, peer: int) -> Tensor:
    """Wait for what rank `peer` of the axis sends. Returns `into`, filled."""
    landing = host.landing(into, axis.group)
    _message(direct.Coming, landing, axis, peer, "receive from", direct.neighbours(into, axis))
    return host.fill(into, landing)


def _message(kind: type, x: Tensor, axis: Axis, peer: int, what: str, near: Any) -> None:
    call = FLIGHT.start_message("", axis, x, *((axis.index, peer) if kind is direct.Sent else (peer, axis.index)))
    for work in direct.batch([(kind, x)], axis, peer, near):
        wait(work, axis, x, f"{what} rank {axis.ranks[peer]}", call)


class PointToPoint:
    """Point-to-point messages along one axis that neither the sender nor the receiver stops for.

    A sent tensor is let go once it and what was sent before it have left: gloo tells that only to who waits, so a
    thread does. What a rank of the same machine gets is a copy, or where it is large read from where it lies.

    Args:
        routes: every (sender, receiver, kind) that will be used, as indices on the axis; the same on all its ranks.
            On NCCL, which has no tags, the messages of a route arrive in the order they are sent.
    """

    def __init__(self, axis: Axis, routes: Sequence[tuple[int, int, str]], device: torch.device):
        self.axis = axis
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._sender: threading.Thread | None = None
        self._sent: deque = deque()  # what neighbours have been left
        self._device, self._nothing = device, torch.empty(0, device=device)
        self._near = direct.neighbours(self._nothing, axis)
        by_nccl = device.type != "cpu" and not host.is_needed(self._nothing, axis.group)
        self._communicators = Communicators(axis, routes, device) if by_nccl else None  # gloo has tags

    def send(self, x: Tensor, to: int, kind: str, tag: int) -> None:
        """Send contiguous `x` to rank `to` of the axis; returns at once. The caller may drop `x` but not write to it.

        Raises:
            PeerError: an earlier send failed.
        """
        if self._failure:
            raise self._failure
        self.axis.ledger.record(f"send {kind}", self.axis.name, x.numel(), x.element_size())
        what = f"send ({kind}) to rank {self.axis.ranks[to]}"
        call = FLIGHT.start_message(kind, self.axis, x, self.axis.index, to, tag)
        x = host.outgoing(x, self.axis.group)
        with peer_errors(what):
            work = self._start(direct.Sent, x, to, (self.axis.index, to, kind), tag)
        if isinstance(work, direct.Sent):
            self._sent.append((work, what, call))
            return self._let_go(all_read=False)
        if self._sender is None:
            self._sender = threading.Thread(target=self._deliver, daemon=True)
            self._sender.start()
        # The device is read here: a fake tensor tells it on the thread that computes with it only.
        self._queue.put((work, x, x.device.type == "cpu", what, call))

    def receive(self, into: Tensor, sender: int, kind: str, tag: int) -> Callable[[], Tensor]:
        """Post a receive into `into`; returns at once. Call the result to wait for the message and get it.

        Raises (from that call):
            PeerError: the sender died or was silent for all of the timeout.
        """
        rank = self.axis.ranks[sender]
        what = f"receive ({kind}) from rank {rank}"
        call = FLIGHT.start_message(kind, self.axis, into, sender, self.axis.index, tag)
        landing = host.landing(into, self.axis.group)
        with peer_errors(what):
            work = self._start(direct.Coming, landing, sender, (sender, self.axis.index, kind), tag)

        def arrive() -> Tensor:
            wait(work, self.axis, landing, what, call)
            return host.fill(into, landing)

        return arrive

    def flush(self) -> None:
        """Wait until everything sent has left.

        Raises:
            PeerError: a send failed.
        """
        if self._sender is not None:
            done, phase = threading.Event(), FLIGHT.count_as(f"{WAITING}{self.axis.name.split()[0]}")
            self._queue.put(done)
            done.wait()
            FLIGHT.count_as(phase)
        self._let_go(all_read=True)
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Flush, and end the thread."""
        self.flush()
        if self._sender is not None:
            self._queue.put(None)
            self._sender.join()
            self._sender = None

    def _let_go(self, all_read: bool) -> None:
        """What neighbours have been left and have read, in the order of sending; `all_read`: wait until they have."""
        while self._sent and (all_read or self._sent[0][0].is_completed()):
            work, what, call = self._sent.popleft()
            wait(work, self.axis, self._nothing, what, call)

    def _start(self, way: type, x: Tensor, peer: int, route: Route, tag: int) -> dist.Work:
        group = self._communicators.of(*route) if self._communicators else self.axis.group
        return direct.message(way, x, self.axis, peer, self._near, group, tag)

    def _deliver(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            work, tensor, on_cpu, what, call = item
            try:
                if on_cpu:
                    wait(work, self.axis, tensor, what, call, background=True)
                else:
                    self._await_nccl(work, what)
            except Exception as error:  # whatever it is: told by the next send or flush, on the main thread
                self._failure = self._failure or error
            del item, work, tensor  # not kept while the thread waits for the next message

    def _await_nccl(self, work: dist.Work, what: str) -> None:
        # Not work.wait(), which would hold up this device's stream and not this thread.
        deadline = time.monotonic() + self.axis.timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise PeerError(what, TimeoutError(f"not taken within {self.axis.timeout.total_seconds():.0f} s"))
            time.sleep(0.001)
        if failure := work.exception():
            raise PeerError(what, RuntimeError(str(failure)))
