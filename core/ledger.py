"""What one rank sent, holds and waited for: the measurements behind the claims.

Traffic is counted where it is sent, memory where autograd saves it, and time on a virtual clock, so that every
number is the same on a laptop with two cores and on a cluster.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass
class Traffic:
    """What one rank sent with one operation over one axis, in the ring accounting of `core.comm`."""

    messages: int = 0
    elements: float = 0.0
    bytes: float = 0.0


class Ledger:
    """The traffic of this rank, by (operation, axis name)."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self._also: Ledger | None = None

    def record(self, operation: str, axis: str, elements: float, element_size: int) -> None:
        entry = self.traffic[operation, axis]
        entry.messages += 1
        entry.elements += elements
        entry.bytes += elements * element_size
        if self._also:
            self._also.record(operation, axis, elements, element_size)

    @contextmanager
    def also(self, other: "Ledger") -> Iterator[None]:
        """Enter in `other` too what is sent within: a forward pass, for example."""
        before, self._also = self._also, other
        try:
            yield
        finally:
            self._also = before


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage counted once however many views share it."""
    return sum({_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _key(tensor: Tensor) -> int:
    """The same for all tensors on one storage, and not its address, which changes where ZeRO-3 frees and gathers."""
    return tensor.untyped_storage()._cdata


class SavedActivations:
    """Bytes that autograd keeps for backward, now and at the peak; each storage counted once.

    Use as a context manager around the forward passes; tensors leave the count when backward frees them.

    Args:
        held_anyway: tensors that do not count: parameters, which linear layers save too, and the batch.
    """

    def __init__(self, held_anyway: Iterable[Tensor]):
        self.live = self.peak = 0
        self._holders: dict[int, int] = defaultdict(int)
        self._ignored: set[int] = set()
        self.ignore(held_anyway)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(t, self), lambda held: held.tensor)

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def ignore(self, held_anyway: Iterable[Tensor]) -> None:
        """Nor do these count, from now on."""
        self._ignored |= {_key(t) for t in held_anyway}

    def keep(self, tensors: Iterable[Tensor]) -> list["_Held"]:
        """Count these too, as long as what is returned lives."""
        return [_Held(t, self) for t in tensors]

    def _change(self, tensor: Tensor, step: int) -> None:
        key = _key(tensor)
        if key in self._ignored:
            return
        before = self._holders[key]
        self._holders[key] += step
        if before == 0 or before + step == 0:
            self.live += step * tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.live)


class _Held:
    """A saved tensor; autograd drops this object when it frees the graph node that saved it."""

    def __init__(self, tensor: Tensor, account: SavedActivations):
        self.tensor, self.account = tensor, account
        account._change(tensor, +1)

    def __del__(self) -> None:
        self.account._change(self.tensor, -1)


class Event(NamedTuple):
    """One action on a virtual clock. `start` and `end` hold one time per cost model, see `VirtualClock.COSTS`."""

    label: str
    start: tuple[float, ...]
    end: tuple[float, ...]


class VirtualClock:
    """The time this rank would read if it had a device of its own.

    An action advances the clock by its cost, a message carries its sender's clock, a receive takes the maximum. Two
    cost models run side by side: the unit costs of the slides, and the time this machine really computed.
    """

    COSTS = ("unit", "measured")  # the second in seconds

    def __init__(self, device: torch.device):
        self.now = np.zeros(len(self.COSTS))
        self.events: list[Event] = []
        self._device = device

    @contextmanager
    def action(self, label: str, unit_cost: float) -> Iterator[None]:
        """Run one action under the clock."""
        began = self._seconds()
        yield
        start = tuple(self.now.tolist())
        self.now += (unit_cost, self._seconds() - began)
        self.events.append(Event(label, start, tuple(self.now.tolist())))

    def stamp(self) -> Tensor:
        """The clock as a message, on the CPU."""
        return torch.from_numpy(self.now.copy())

    def hear(self, stamp: Tensor) -> None:
        """What a message said: nothing that needs it can start before it was sent."""
        np.maximum(self.now, stamp.numpy(), out=self.now)

    def _seconds(self) -> float:
        if self._device.type == "cpu":
            return time.thread_time()  # not wall time: eight ranks share two cores
        # Only what computes: a receive posted ahead is still running, and waiting for it here would be a deadlock.
        torch.accelerator.current_stream(self._device).synchronize()
        return time.perf_counter()
