"""What one rank has sent, by operation and axis: the measurement behind every claim on communication volume.

Counted where it is sent, so that the number is the same on a laptop with two cores and on a cluster.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
        TOTAL.enter(operation, axis, elements, element_size)
        self.enter(operation, axis, elements, element_size)

    def enter(self, operation: str, axis: str, elements: float, element_size: int) -> None:
        """Enter it in this ledger and those that it records to, and not as sent once more."""
        entry = self.traffic[operation, axis]
        entry.messages += 1
        entry.elements += elements
        entry.bytes += elements * element_size
        if self._also:
            self._also.enter(operation, axis, elements, element_size)

    @contextmanager
    def recording_to(self, other: "Ledger") -> Iterator[None]:
        """Enter in `other` too what is sent within: a forward pass, for example."""
        before, self._also = self._also, other
        try:
            yield
        finally:
            self._also = before


TOTAL = Ledger()  # all that this process has sent, whatever other ledger it is entered in
