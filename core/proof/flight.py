"""The flight record of a rank: which collectives and messages it has started and finished, and where in a step it is.

Every collective of an axis has a number, counted by each of its ranks; so has every message of a route. The heart
(`core.proof.watch`) sends the record along with each beat; who waits for what, `core.proof.diagnosis` reads from the
records of all ranks. The same record keeps how long the rank has spent in each phase, and waiting, by axis.
"""

import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

KEPT = 8  # calls of each axis and route that the record shows
WAITING = "waiting, "  # begins the name of the time spent in waits, which ends with the axis
OUTSIDE = "outside a step"


class Ranks(Protocol):
    """What a call goes over: an axis of the mesh, or the job."""

    name: str
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None


class Group(NamedTuple):
    """A process group that is no axis of the mesh."""

    name: str
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None  # None: that of all ranks

    @classmethod
    def of_all(cls, name: str, group: dist.ProcessGroup | None = None) -> "Group":
        return cls(name, (*range(dist.get_world_size()),), group)


class Where(NamedTuple):
    """Where in a step; None where that has no meaning."""

    phase: str = OUTSIDE
    step: int | None = None
    microbatch: int | None = None
    stage: int | None = None
    layer: str | None = None

    def __str__(self) -> str:
        named = {"stage": self.stage, "layer": self.layer, "step": self.step}
        of = "" if self.microbatch is None else f" of micro-batch {self.microbatch}"
        return ", ".join([self.phase + of, *(f"{name} {value}" for name, value in named.items() if value is not None)])


class Comparer(Protocol):
    """Compares what ranks are about to exchange: `core.proof.matching`."""

    def compare(self, call: "Call", more: object = "", tag: int = 0) -> None: ...

    def compare_rows(self, call: "Call", send: Sequence[int], receive: Sequence[int]) -> None: ...


class Call:
    """One collective, or one rank's side of a message."""

    __slots__ = ("began", "direction", "dtype", "lane", "layer", "name", "number", "operation", "peer", "ranks",
                 "shape", "since", "uneven", "where")  # fmt: skip


class Lane:
    """The calls of one group of ranks, or of one route, in their order."""

    __slots__ = ("count", "kept")

    def __init__(self) -> None:
        self.count, self.kept = 0, deque(maxlen=KEPT)


class FlightRecord:
    """What one rank has started and finished, and where it is.

    A call costs a few microseconds: what is shown is put into words when the heart beats.
    """

    def __init__(self) -> None:
        self.checker: Comparer | None
        self.checked = False  # whether to compare all calls, whatever a lesson's flag says
        self.reset()

    def reset(self, state: str = "running") -> None:
        """Forget all: a new job begins."""
        self.state, self.checker = state, None
        self.where, self.layer, self.moved = Where(), None, time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)  # by phase, and by axis of the waits
        self.finished: Call | None = None
        self._lanes: dict[Hashable, Lane] = {}
        self._waits: dict[int, Call] = {}  # by id: what this rank is waiting for
        self._marks: deque[tuple[Call, Any]] = deque()  # calls that a device's stream has not passed yet
        self._phase, self._mark = OUTSIDE, self.moved
        self._waiting: dict[str, str] = {}  # by name of an axis: what the time of its waits is counted as
        self._frozen: dict[str, Any] | None = None

    # ---- Where in a step

    def at(self, phase: str, microbatch: int | None = None, stage: int | None = None, step: int | None = None) -> None:
        """This rank is now there; the step stays what it was where none is given."""
        self.go_to(Where(phase, self.where.step if step is None else step, microbatch, stage))

    def go_to(self, where: Where) -> Where:
        """Return to where it was; gives where it comes from."""
        before, self.where, self.layer, self.moved = self.where, where, where.layer, time.perf_counter()
        if where.phase != before.phase:
            self.count_as(where.phase)
        return before

    def in_layer(self, layer: str) -> None:
        """The same place, in this layer. Called most often, so it makes no new tuple."""
        self.layer, self.moved = layer, time.perf_counter()

    def here(self) -> Where:
        """Where this rank is, with its layer."""
        return self.where._replace(layer=self.layer)

    def count_as(self, phase: str) -> str:
        """From now on the time is spent in this; returns in what it was until now."""
        now, before = time.perf_counter(), self._phase
        self.seconds[before] += now - self._mark
        self._phase, self._mark = phase, now
        return before

    def spent(self) -> dict[str, float]:
        """Seconds by phase since it was last asked."""
        self.count_as(self._phase)
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found

    # ---- Collectives and messages

    def start(self, operation: str, over: Ranks, x: Tensor | None = None, more: object = "",
              rows: tuple[Sequence[int], Sequence[int]] | None = None) -> Call:  # fmt: skip
        """A collective that this rank starts now, before it does.

        Args:
            more: what the ranks must agree on beside operation, shape and type: how it reduces.
            rows: of an all-to-all, what this rank sends to each and expects from each.

        Raises:
            MismatchError: another rank has started something else, or with a tensor that does not fit.
        """
        call = self._start(_name(over), operation, over, x, None, "")
        call.uneven = rows is not None
        if self.checker:
            self.checker.compare(call, more)
            if rows:
                self.checker.compare_rows(call, *rows)
        return call

    def start_message(self, kind: str, over: Any, x: Tensor, sender: int, receiver: int, tag: int = 0) -> Call:
        """This rank's side of a message from one rank of an axis to another, which are told by their index on it.

        Raises:
            MismatchError: the other side has a tensor that does not fit.
        """
        lane, mine = (over.ranks[sender], over.ranks[receiver], kind, _name(over)), over.index == sender
        call = self._start(lane, kind, over, x, lane[1] if mine else lane[0], "send" if mine else "receive")
        if self.checker:
            self.checker.compare(call, tag=tag)
        return call

    def _start(
        self, lane: Hashable, operation: str, over: Ranks, x: Tensor | None, peer: int | None, direction: str
    ) -> Call:
        call, calls = Call(), self._lanes.get(lane)
        if calls is None:
            calls = self._lanes[lane] = Lane()
        call.number, calls.count = calls.count, calls.count + 1
        call.lane, call.operation, call.name, call.ranks = lane, operation, over.name, over.ranks
        call.peer, call.direction, call.where, call.layer = peer, direction, self.where, self.layer
        call.shape, call.dtype = ((), None) if x is None else (x.shape, x.dtype)
        call.began, call.since, call.uneven = time.perf_counter(), None, False
        calls.kept.append(call)
        return call

    def wait(self, call: Call | None, background: bool = False) -> str:
        """A wait for the call begins. Returns what `done` wants to have.

        Args:
            background: on a thread beside the one that trains, whose time it does not take.
        """
        if call is None:
            return ""
        call.since = time.perf_counter()
        self._waits[id(call)] = call
        if background:
            return ""
        if (phase := self._waiting.get(call.name)) is None:
            phase = self._waiting[call.name] = WAITING + call.name.split()[0]
        return self.count_as(phase)

    def done(self, call: Call | None, phase: str, device: torch.device) -> None:
        """The wait is over; what fails never gets here. On a GPU it is the stream that waits: see `_passed`."""
        if phase:
            self.count_as(phase)
        if call is None:
            return
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._marks.append((call, event))
            self._pass()
            return
        self._waits.pop(id(call), None)
        self.finished = call

    def _pass(self) -> None:
        """Look which calls the stream has passed. A tensor is not kept alive for it: only an event is."""
        while self._marks and self._marks[0][1].query():
            call, _ = self._marks.popleft()
            self._waits.pop(id(call), None)
            self.finished = call

    def overdue(self, seconds: float) -> str:
        """The oldest call that has been waited for longer than that, in words."""
        self._pass()
        now = time.perf_counter()
        late = [call for call in list(self._waits.values()) if now - call.since > seconds]
        return in_words(min(late, key=lambda call: call.since)) if late else ""

    # ---- What is sent along

    def freeze(self, state: str | None = None) -> None:
        """The record stays what it is now: what a rank does after it has failed says nothing."""
        if self._frozen is None:
            self.state = state or self.state
            self._frozen = self.snapshot(full=True)

    def snapshot(self, full: bool = False) -> dict[str, Any]:
        """What a beat sends along, as what JSON can hold. Another thread may go on with the record meanwhile.

        Args:
            full: the last few calls of each axis and route, not the last one alone.
        """
        if self._frozen:
            return self._frozen
        with suppress(RuntimeError):
            self._pass()
        now = time.perf_counter()
        waits = [call for call in _copy(self._waits.values) if call.since is not None]
        return {
            "state": self.state,
            "where": str(self.here()),
            "moved": now - self.moved,
            "waits": [_shown(call, now) for call in sorted(waits, key=lambda call: call.since)],
            "finished": self.finished and _shown(self.finished, now),
            "lanes": [[_shown(call, now) for call in _copy(lambda lane=lane: lane.kept)[0 if full else -1 :]]
                      for lane in _copy(self._lanes.values)],
            "process": [host(), os.getpid()],
        }  # fmt: skip


def _name(over: Ranks) -> str:
    """Of the process group, the same on all its ranks: two may have the same ranks."""
    return over.group.group_name if over.group is not None else ""


def host() -> str:
    """Where process numbers mean the same."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def in_words(call: Call) -> str:
    """As a message names it."""
    if call.direction:
        way = {"send": "to", "receive": "from"}[call.direction]
        return f"{call.direction}{_kind(call.operation)} {call.number} {way} rank {call.peer} over {call.name}"
    return f"{call.operation} {call.number} over {call.name}"


def _kind(kind: str) -> str:
    return f" ({kind})" if kind else ""


def _copy(of: Callable[[], Any]) -> list[Any]:
    while True:
        try:
            return list(of())
        except RuntimeError:  # changed meanwhile
            continue


def _shown(call: Call, now: float) -> dict[str, Any]:
    return {
        "lane": str(call.lane),
        "operation": call.operation,
        "axis": call.name,
        "ranks": [*call.ranks] if not call.direction else [*call.lane[:2]],
        "number": call.number,
        "shape": [*call.shape],
        "dtype": str(call.dtype).removeprefix("torch.") if call.dtype else "",
        "peer": call.peer,
        "direction": call.direction,
        "uneven": call.uneven,
        "where": str(call.where._replace(layer=call.layer)),
        "age": now - call.began,
        "waited": 0.0 if call.since is None else now - call.since,
    }


FLIGHT = FlightRecord()  # of this process, as the heart sends it along
