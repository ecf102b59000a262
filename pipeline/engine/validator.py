"""A strict validator: check a schedule and run it on virtual devices, with no process.

A schedule that passes can be carried out, every micro-batch exactly once on every stage, and the times are those of
devices that have nothing else to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from core.proof.clock import Event
from pipeline.engine.actions import (
    UNIT_COSTS,
    Action,
    Row,
    Schedule,
    ScheduleError,
    most_in_flight,
    placement,
    size,
    stage_share,
    stages_of_ranks,
)

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

    events: Timeline  # times are 1-tuples
    in_flight: list[int]  # per rank: most at a time, over all its stages

    @property
    def makespan(self) -> float:
        return max(row[-1].end[0] for row in self.events)

    @property
    def bubble_of_wall(self) -> float:
        return bubble(self.events)[0]

    @property
    def bubble_of_ideal(self) -> float:
        return bubble(self.events)[1]

    @property
    def own_bubble(self) -> float:
        """Of the rank with most, see `bubbles_within`."""
        return max(bubbles_within(self.events))


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
    check_complete(schedule)
    share, (stages, _) = stage_share(schedule), size(schedule)
    each = {kind: c if isinstance(c, list) else [c * share] * stages for kind, c in costs.items()}
    starts = start_times(schedule, each, placement(schedule), message, together, hidden)
    reasons = []
    for rank, (row, start) in enumerate(zip(schedule, starts, strict=True)):
        if len(start) < len(row):
            result = next(filter(None, (needed(action, stages) for action in row[len(start) :])))
            where = _position(rank, len(start), row[len(start)])
            reasons.append(f"{where} waits for {Action(*result)}")
    if reasons:
        raise ScheduleError("deadlock: " + "; ".join(reasons))
    events = [
        [Event(a, (start,), (start + each[a.kind][a.stage],)) for a, start in zip(row, of_row, strict=True)]
        for row, of_row in zip(schedule, starts, strict=True)
    ]
    return Verdict(events, [most_in_flight(row) for row in schedule])


def start_times(
    schedule: Schedule,
    costs: Mapping[str, list[float]],
    rank_of: dict[tuple[int, int], int],
    message: float,
    together: bool = False,
    hidden: Mapping[tuple[int, int], float] | None = None,
) -> list[list[float]]:
    """When each action of each rank starts; the times of a rank that waits for ever end before it does.

    Args:
        costs: of each kind, on each stage.
        rank_of: see `placement`.
        message, together, hidden: see `validate`.
    """
    stages = len(costs["F"])
    done: dict[Result, float] = {}  # when each result is there, on its own rank
    starts: list[list[float]] = [[] for _ in schedule]
    now = [0.0] * len(schedule)

    def next_start(rank: int, block: list[Action]) -> float:
        """When the rank can start the block; infinity where something that it needs is not there yet."""
        start = now[rank]
        for action in block:
            stage, kind, microbatch = action
            if kind != "F" and (stage, "B" if kind == "W" else "F", microbatch) not in done:
                return inf
            if result := needed(action, stages):
                if result not in done:
                    return inf
                away = rank_of[result[0], microbatch] != rank
                start = max(start, done[result] + message if away else done[result])
        return start

    waiting, moved = list(range(len(schedule))), True
    while waiting and moved:
        moved = False
        for rank in waiting:
            row, times = schedule[rank], starts[rank]
            pairs = row.pairs if together and isinstance(row, Row) else ()
            while len(times) < len(row):
                at = len(times)
                block = row[at : at + 2] if pairs and tuple(row[at : at + 2]) in pairs else [row[at]]
                start = next_start(rank, block)
                if start == inf:
                    break
                for action in block:
                    times.append(start)
                    start += costs[action.kind][action.stage]
                if hidden and len(block) == 2:
                    start -= hidden[block[0].stage, block[1].stage]
                for stage, kind, microbatch in block:
                    done[stage, "B" if kind == "I" else kind, microbatch] = start
                now[rank], moved = start, True
        waiting = [rank for rank in waiting if len(starts[rank]) < len(schedule[rank])]
    return starts


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
