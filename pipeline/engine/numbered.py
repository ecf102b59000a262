"""A schedule as arrays: what is counted or timed of many thousand actions at once.

An action's number is its place in the rows, one after another. Checked against the validator's plain rules, and much
faster: `pipeline/compare.py` has 860,000 actions on 64 ranks, `search.py` times 17,000 schedules.

p ranks, S stages, m micro-batches, n actions
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from math import inf
from operator import itemgetter

import numpy as np

from pipeline.engine.actions import Row, Schedule

FORWARD, BOTH, DGRAD, WGRAD = range(4)
KIND = np.full(128, -1)
KIND[[ord(letter) for letter in "FBIW"]] = FORWARD, BOTH, DGRAD, WGRAD


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for cycles while many actions are made, which have none: it takes three quarters of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Numbered:
    """The actions of a schedule: arrays of n, and tables of S x m.

    Args:
        schedule: of F, B, I and W, none with a negative number.
    """

    def __init__(self, schedule: Schedule):
        flat = list(chain.from_iterable(schedule))
        self.ranks, self.n, pick = len(schedule), len(flat), itemgetter
        self.stage = np.fromiter(map(pick(0), flat), np.int64, self.n)
        self.microbatch = np.fromiter(map(pick(2), flat), np.int64, self.n)
        self.kind = KIND[np.frombuffer("".join(map(pick(1), flat)).encode(), np.uint8)]
        lengths = np.fromiter(map(len, schedule), np.int64, self.ranks)
        self.ends = np.cumsum(lengths)
        self.firsts = self.ends - lengths  # of each rank's numbers
        self.rows = [range(*ends) for ends in zip(self.firsts.tolist(), self.ends.tolist(), strict=True)]
        self.rank = np.repeat(np.arange(self.ranks), lengths)
        self.stages, self.microbatches = 1 + int(self.stage.max()), 1 + int(self.microbatch.max())
        self.key = self.stage * self.microbatches + self.microbatch
        self.number = np.full((4, self.stages * self.microbatches), -1)  # by kind and key
        self.number[self.kind, self.key] = np.arange(self.n)
        self.rank_of = np.full(self.stages * self.microbatches, -1)
        self.rank_of[self.key] = self.rank

    @property
    def share(self) -> float:
        """See `actions.stage_share`."""
        return self.ranks / self.stages

    @classmethod
    def of(cls, schedule: Schedule) -> "Numbered | None":
        """None where `validator.check_complete` has something to say."""
        flat = list(chain.from_iterable(schedule))
        stages, kinds, microbatches = (set(map(itemgetter(i), flat)) for i in range(3))
        if not all(schedule) or not flat or not kinds <= set("FBIW") or min(*stages, *microbatches, 0) < 0:
            return None
        if (1 + max(stages)) * (1 + max(microbatches)) > len(flat):
            return None
        numbered = cls(schedule)
        return numbered if numbered.is_complete() else None

    def is_complete(self) -> bool:
        """Whether each micro-batch goes once forward and once backward on every stage, in an order possible there."""
        f, b, i, w = self.number
        halves = i >= 0
        once = self.n == (self.number >= 0).sum() == 2 * f.size + halves.sum()
        if not once or (f < 0).any() or ((b >= 0) == halves).any() or (halves != (w >= 0)).any():
            return False
        last = np.where(halves, w, b)  # numbers rise along a row, so an order is one of numbers
        ordered = (f < last).all() and (f[halves] < i[halves]).all() and (i < w)[halves].all()
        same_rank = (self.rank_of[self.key] == self.rank).all()
        return bool(ordered and same_rank and max(map(len, self.ranks_of_stages())) <= 2)

    def ranks_of_stages(self) -> list[set[int]]:
        """The ranks that have a copy of each stage."""
        return [set(row) for row in self.rank_of.reshape(self.stages, -1).tolist()]

    def stages_on_ranks(self) -> list[int]:
        """How many stages each rank has."""
        pairs = np.unique(self.rank_of * self.stages + np.arange(self.rank_of.size) // self.microbatches)
        return np.bincount(pairs // self.stages, minlength=self.ranks).tolist()

    def in_flight(self) -> list[int]:
        """See `actions.most_in_flight`, of each rank."""
        live = np.cumsum(self.change())  # from the first rank on, each of which ends with none
        return np.maximum.reduceat(live, self.firsts).tolist()

    def change(self) -> np.ndarray:
        """What each action adds to the micro-batches in flight on its rank."""
        return np.array([1, -1, 0, -1])[self.kind]

    def messages(self) -> list[int]:
        """How many each rank sends: a result whose next stage is on another rank."""
        table = self.rank_of.reshape(self.stages, -1)
        apart = table[:-1] != table[1:]
        sent = np.bincount(table[:-1][apart], minlength=self.ranks)  # activations
        return (sent + np.bincount(table[1:][apart], minlength=self.ranks)).tolist()  # and gradients

    def needs(self, message: float) -> tuple[list[int], list[float]]:
        """For each action the number of that which makes its input, n where none does; and how long that travels."""
        f, b, i, _ = self.number
        made = np.where(i >= 0, i, b)  # by key: the gradient of a stage's input
        forward = (self.kind == FORWARD) & (self.stage > 0)
        backward = ((self.kind == BOTH) | (self.kind == DGRAD)) & (self.stage < self.stages - 1)
        source = np.full(self.n, self.n)
        source[forward] = f[self.key[forward] - self.microbatches]
        source[backward] = made[self.key[backward] + self.microbatches]
        rank = np.append(self.rank, -1)[source]
        travel = np.where((source < self.n) & (rank != self.rank), message, 0.0)
        return source.tolist(), travel.tolist()

    def durations(self, costs: Mapping[str, Sequence[float]]) -> list[float]:
        """Of each action, for the costs of each kind on each stage. A kind without costs is not in the schedule."""
        table = np.array([costs.get(kind, [inf] * self.stages) for kind in "FBIW"])
        return table[self.kind, self.stage].tolist()

    def blocks(self, schedule: Schedule, hidden: Mapping[tuple[int, int], float] | None) -> dict[int, float]:
        """The numbers of forwards that overlap with the backward after them, and how much less the two take."""
        found = {}
        for rank, row in enumerate(schedule):
            pairs = row.pairs if isinstance(row, Row) else ()
            for position, pair in enumerate(pairwise(row) if pairs else ()):
                if pair in pairs:
                    found[self.rows[rank].start + position] = hidden[pair[0].stage, pair[1].stage] if hidden else 0.0
        return found


class Clocks:
    """Virtual devices that carry out rows of numbers.

    Args:
        durations, needs, travel: see `Numbered`. An order on one rank that a stage needs (F before B) is not looked at.
        blocks: see `Numbered.blocks`.
    """

    def __init__(
        self, durations: list[float], needs: list[int], travel: list[float], blocks: Mapping[int, float] | None = None
    ):
        self.durations, self.needs, self.travel, self.blocks = durations, needs, travel, blocks or {}
        self.starts = [inf] * len(durations)
        self.ends = [*self.starts, 0.0]  # the last is that of nothing, which is there from the beginning

    def run(
        self,
        rows: Sequence[Sequence[int]],
        at: list[int] | None = None,
        left: Sequence[Sequence[float]] | None = None,
        limit: float = inf,
    ) -> bool:
        """Carry out each row from position `at`; starts and ends of those before are known, and those after infinite.

        Args:
            at: 0 on each rank without it. Where each rank has come to, afterwards.
            left: the work of each rank from each position on: it gives up where that cannot be done within `limit`.

        Returns:
            whether all rows have come to their end. Else ranks wait for each other, or it has given up.
        """
        starts, ends, durations, needs, travel = self.starts, self.ends, self.durations, self.needs, self.travel
        blocks, at = self.blocks, [0] * len(rows) if at is None else at
        now = [ends[row[position - 1]] if position else 0.0 for row, position in zip(rows, at, strict=True)]
        waiting, moved = [rank for rank, row in enumerate(rows) if at[rank] < len(row)], True
        while waiting and moved:
            moved, still = False, []
            for rank in waiting:
                row, position, time = rows[rank], at[rank], now[rank]
                began, stop = position, len(row)
                while position < stop:
                    number = row[position]
                    ready = ends[needs[number]] + travel[number]
                    if number in blocks:
                        ready = max(ready, ends[needs[number + 1]] + travel[number + 1])
                    if ready > time:
                        if ready == inf:
                            break
                        time = ready
                    starts[number] = time
                    time += durations[number]
                    if number in blocks:
                        starts[number + 1] = time
                        time += durations[number + 1] - blocks[number]
                        ends[number + 1] = time
                        position += 1
                    ends[number] = time
                    position += 1
                if position > began:
                    at[rank], now[rank], moved = position, time, True
                    if left and time + left[rank][position] > limit:
                        return False
                if position < stop:
                    still.append(rank)
            waiting = still
        return not waiting
