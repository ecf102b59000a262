"""A strict validator: check a schedule and run it on virtual devices, with no process.

A schedule that passes can be carried out, every micro-batch exactly once on every stage, and the times are those of
devices that have nothing else to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from core.proof.clock import Event
from pipeline.engine.actions import UNIT_COSTS, Action, Schedule, ScheduleError, size, stages_of_ranks
from pipeline.engine.numbered import Clocks, Numbered

Costs = Mapping[str, float | list[float]]
Timeline = list[list[Event]]  # one row a rank; an event's label is its action
Result = tuple[int, str, int]  # (stage, "F" or "B", micro-batch) of what is computed and passed on; an I makes it too


def bubble(timeline: Timeline, model: int = 0) -> tuple[float, float]:
    """Idle time over wall time, and over computing time, of a timeline under one of its cost models.

    (p-1)/(m+p-1) and (p-1)/m on the slides of GPipe and 1F1B.
    """
    busy = sum(e.end[model] - e.start[model] for row in timeline for e in row)
    wall = len(timeline) * max(row[-1].end[model] for row in timeline)
    return 1 - busy / wall, wall / busy - 1


def bubbles_within(timeline: Timeline) -> list[float]:
    """Idle time between the first and the last action of each rank.

    Of the rank that has most it is what is lost in a step when no rank waits for another between steps: the zero-bubble
    paper's measure. It is all that 1F1B loses, too, whose first rank starts first and ends last.
    """
    return [row[-1].end[0] - row[0].start[0] - sum(e.end[0] - e.start[0] for e in row) for row in timeline]


@dataclass(frozen=True)
class Verdict:
    """What a valid schedule costs on devices of its own.

    Times are in the units of the costs given. A micro-batch is in flight on a stage from its forward to the end of its
    backward, the wgrad included.
    """

    schedule: Schedule
    numbered: Numbered
    starts: np.ndarray  # of each action, by its number
    durations: np.ndarray

    @cached_property
    def events(self) -> Timeline:
        """Times are 1-tuples."""
        starts, ends = self.starts.tolist(), (self.starts + self.durations).tolist()
        return [
            [Event(action, (starts[n],), (ends[n],)) for action, n in zip(row, numbers, strict=True)]
            for row, numbers in zip(self.schedule, self.numbered.rows, strict=True)
        ]

    @cached_property
    def in_flight(self) -> list[int]:
        """Per rank: most at a time, over all its stages."""
        return self.numbered.in_flight()

    @property
    def makespan(self) -> float:
        return float(self._ended.max())

    @property
    def bubble_of_wall(self) -> float:
        return 1 - self.durations.sum() / (len(self.schedule) * self.makespan)

    @property
    def bubble_of_ideal(self) -> float:
        return len(self.schedule) * self.makespan / self.durations.sum() - 1

    @property
    def own_bubble(self) -> float:
        """Of the rank with most, see `bubbles_within`."""
        first = self.numbered.firsts
        return float((self._ended - self.starts[first] - np.add.reduceat(self.durations, first)).max())

    @property
    def _ended(self) -> np.ndarray:
        """When each rank's last action has."""
        last = self.numbered.ends - 1
        return self.starts[last] + self.durations[last]


def validate(
    schedule: Schedule,
    costs: Costs = UNIT_COSTS,
    message: float = 0.0,
    together: bool = False,
    hidden: Mapping[tuple[int, int], float] | None = None,
) -> Verdict:
    """Check that the schedule is complete and can run, and run it on virtual devices.

    Args:
        costs: time of each kind of action on 1/p of the model; where stages are smaller it is less in proportion. Or a
            list: the time on each stage.
        message: time a message between ranks travels.
        together: take the pairs that are meant to overlap as one block: it starts when both can, and both results are
            there at its end, after the sum of their times.
        hidden: how much less that block takes, by the stages of its forward and its backward.

    Raises:
        ScheduleError: a stage missing, or on three ranks; a micro-batch without exactly one forward and one backward,
            in one or in two parts, on every stage; a backward before its forward; ranks that wait for each other for
            ever.
    """
    if (numbered := Numbered.of(schedule)) is None:
        check_complete(schedule)
        raise AssertionError("what is counted at once and what is looked at one by one are the same")
    share, stages = numbered.share, numbered.stages
    each = {kind: c if isinstance(c, list) else [c * share] * stages for kind, c in costs.items()}
    durations = numbered.durations(each)
    clocks = Clocks(durations, *numbered.needs(message), numbered.blocks(schedule, hidden) if together else {})
    at = [0] * len(schedule)
    if not clocks.run(numbered.rows, at):
        reasons = []
        for rank, (row, reached) in enumerate(zip(schedule, at, strict=True)):
            if reached < len(row):
                result = next(filter(None, (needed(action, stages) for action in row[reached:])))
                reasons.append(f"{_position(rank, reached, row[reached])} waits for {Action(*result)}")
        raise ScheduleError("deadlock: " + "; ".join(reasons))
    return Verdict(schedule, numbered, np.array(clocks.starts), np.array(durations))


def needed(action: Action, stages: int) -> Result | None:
    """What comes from a neighbouring stage."""
    stage, kind, microbatch = action
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage > 0 else None
    return (stage + 1, "B", microbatch) if kind != "W" and stage < stages - 1 else None


# ---- Complete: every micro-batch exactly once forward and once backward on every stage -------------------------------

BEFORE = {"B": "F", "I": "F", "W": "I"}  # what a stage must have done before
SAME_WORK = {"F": "F", "B": "BIW", "I": "IB", "W": "WB"}  # actions of which one stage does only one for a micro-batch


def check_complete(schedule: Schedule) -> None:
    """Raises ScheduleError unless all that must be done is done once, in an order possible on each stage."""
    if not any(schedule):
        raise ScheduleError("the schedule has no action")
    done: dict[Action, tuple[int, int]] = {}  # rank and position
    rank_of: dict[tuple[int, int], int] = {}  # by (stage, micro-batch)
    for rank, row in enumerate(schedule):
        if not row:
            raise ScheduleError(f"rank {rank} has no action")
        for position, action in enumerate(row):
            if why := _impossible(action, rank, done, rank_of):
                raise ScheduleError(f"{_position(rank, position, action)}: {why}")
            done[action] = rank, position
    stages, microbatches = size(schedule)
    stages = min(stages, 1 + len(rank_of))  # whatever number a stage has: one is missing before it
    of_ranks = stages_of_ranks(schedule)
    for stage in range(stages):
        ranks = [rank for rank, stages_here in enumerate(of_ranks) if stage in stages_here]
        if len(ranks) > 2:
            raise ScheduleError(f"stage {stage} is on ranks {', '.join(map(str, ranks))}; at most two have a copy")
        for microbatch in range(microbatches):
            kinds = "FIW" if (stage, "I", microbatch) in done else "FB"
            if missing := [kind for kind in kinds if (stage, kind, microbatch) not in done]:
                there = rank_of.get((stage, microbatch), ranks[0] if ranks else None)
                where = "every rank" if there is None else f"rank {there}"
                raise ScheduleError(f"{where}: {stage}{missing[0]}{microbatch} is missing")


def _impossible(
    action: Action, rank: int, done: dict[Action, tuple[int, int]], rank_of: dict[tuple[int, int], int]
) -> str | None:
    """Why the action cannot come after those done, if it cannot."""
    stage, kind, microbatch = action
    if kind not in UNIT_COSTS:
        return "not F, B, I or W, the compute actions; messages are added by rule"
    if stage < 0 or microbatch < 0:
        return "stages and microbatches count from 0"
    if rank_of.setdefault((stage, microbatch), rank) != rank:
        return f"stage {stage} of microbatch {microbatch} is already on rank {rank_of[stage, microbatch]}"
    for same in (action._replace(kind=other) for other in SAME_WORK[kind]):
        if same in done:
            return f"done twice, first as {_position(*done[same], same)}"
    if kind in BEFORE and action._replace(kind=BEFORE[kind]) not in done:
        return f"before its {BEFORE[kind]}"
    return None


def _position(rank: int, position: int, action: Action) -> str:
    return f"rank {rank}, position {position}, {action}"
