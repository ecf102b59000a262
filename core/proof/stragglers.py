"""Stragglers: which rank the others wait for, from the seconds that each has spent in each phase of its steps.

A slow rank waits little, and makes all others wait: so what counts is the time that a rank has not waited.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from core.proof.flight import WAITING

NOTABLE = 3.0  # times the median: below it, ranks have different work, or share cores

Phases = dict[str, list[dict[str, float]]]  # by version, of each rank: seconds by phase, and waiting by axis


class Slowest(NamedTuple):
    """The rank that has worked longest, and in which phase it lies furthest behind."""

    rank: int
    seconds: float  # at work
    median: float  # of all ranks
    phase: str  # in which it exceeds the median of that phase by most
    phase_seconds: float
    phase_median: float

    @property
    def notable(self) -> bool:
        return self.seconds > NOTABLE * self.median

    def __str__(self) -> str:
        return (
            f"the slowest rank is {self.rank}: {self.seconds:.2f} s at work, the median {self.median:.2f} s; most of "
            f"it in {self.phase}, {self.phase_seconds:.2f} s, the median {self.phase_median:.2f} s"
        )


def at_work(seconds: Mapping[str, float]) -> dict[str, float]:
    """Without the waits."""
    return {phase: some for phase, some in seconds.items() if not phase.startswith(WAITING)}


def slowest_of(ranks: Sequence[Mapping[str, float]]) -> Slowest | None:
    """Of the ranks' seconds by phase; None where there is one rank, which nobody waits for."""
    if len(ranks) < 2:
        return None
    work = [at_work(seconds) for seconds in ranks]
    totals = [sum(seconds.values()) for seconds in work]
    rank = max(range(len(ranks)), key=totals.__getitem__)
    usual = {phase: median(seconds.get(phase, 0.0) for seconds in work) for phase in work[rank]}
    phase = max(usual, key=lambda phase: work[rank][phase] - usual[phase])
    return Slowest(rank, totals[rank], median(totals), phase, work[rank][phase], usual[phase])
