"""Virtual time: what each rank's clock would read if it had a device of its own."""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Event(NamedTuple):
    """One action on a virtual clock. `start` and `end` hold one time per cost model, see `VirtualClock.COSTS`."""

    label: Hashable
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
    def action(self, label: Hashable, unit_cost: float) -> Iterator[None]:
        """Run one action under the clock."""
        began = self._seconds()
        yield
        start = tuple(self.now.tolist())
        self.now += (unit_cost, self._seconds() - began)
        self.events.append(Event(label, start, tuple(self.now.tolist())))

    def stamp(self) -> Tensor:
        """The clock as a message, on the CPU."""
        return torch.from_numpy(self.now.copy())

    def receive(self, stamp: Tensor) -> None:
        """What a message said: nothing that needs it can start before it was sent."""
        np.maximum(self.now, stamp.numpy(), out=self.now)

    def _seconds(self) -> float:
        if self._device.type == "cpu":
            return time.thread_time()  # not wall time: eight ranks share two cores
        # Only what computes: a receive posted ahead is still running, and waiting for it here would be a deadlock.
        torch.accelerator.current_stream(self._device).synchronize()
        return time.perf_counter()
