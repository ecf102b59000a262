"""A strict validator: check a schedule and run it on virtual devices, with no process.

A schedule that passes can be carried out, every microbatch exactly once on every stage, and the times are those of
devices that have nothing else to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from core.ledger import Event
from pipeline.schedules import UNIT_COSTS, Action, Schedule, ScheduleError, placement


def bubble(timeline: list[list[Event]], model: int = 0) -> tuple[float, float]:
    """Idle time over wall time, and over computing time, of a timeline under one of its cost models.

    (p-1)/(m+p-1) and (p-1)/m on the slides of GPipe and 1F1B.
    """
    busy = sum(e.end[model] - e.start[model] for row in timeline for e in row)
    wall = len(timeline) * max(row[-1].end[model] for row in timeline)
    return 1 - busy / wall, wall / busy - 1


@dataclass(frozen=True)
class Verdict:
    """What a valid schedule costs on devices of its own. Times are in the units of the costs given."""

    events: list[list[Event]]  # per rank; times are 1-tuples
    makespan: float
    busy: list[float]  # per rank
    in_flight: list[int]  # per rank: most microbatches between forward and backward, over all its stages

    @property
    def bubble_of_wall(self) -> float:
        return bubble(self.events)[0]

    @property
    def bubble_of_ideal(self) -> float:
        return bubble(self.events)[1]


def validate(schedule: Schedule, costs: Mapping[str, float] = UNIT_COSTS, message: float = 0.0) -> Verdict:
    """Check that the schedule is complete and can run, and run it on virtual devices.

    Args:
        costs: time of each kind of action.
        message: time a message between ranks travels.

    Raises:
        ScheduleError: a stage on two ranks or missing; a microbatch without exactly one forward and one backward on
            every stage; a backward before its forward; ranks that wait for each other for ever.
    """
    _check_complete(schedule)
    rank_of = placement(schedule)
    last = max(rank_of)
    done: dict[Action, float] = {}  # when each action's result is there
    events: list[list[Event]] = [[] for _ in schedule]
    at = [0] * len(schedule)  # next position of each rank
    held, most = [0] * len(schedule), [0] * len(schedule)

    def ready(rank: int) -> float | Action:
        """When the rank's next action can start, or the action that it still waits for."""
        action = schedule[rank][at[rank]]
        start = events[rank][-1].end[0] if events[rank] else 0.0
        for source in _sources(action, last):
            if source not in done:
                return source
            start = max(start, done[source] + (message if rank_of[source.stage] != rank else 0.0))
        return start

    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(schedule):
            while at[rank] < len(row) and isinstance(start := ready(rank), float):
                action = row[at[rank]]
                done[action] = start + costs[action.kind]
                events[rank].append(Event(str(action), (start,), (done[action],)))
                held[rank] += 1 if action.kind == "F" else -1
                most[rank] = max(most[rank], held[rank])
                at[rank] += 1
                progress = True
    stuck = [r for r, row in enumerate(schedule) if at[r] < len(row)]
    if stuck:
        waits = [f"rank {r}, position {at[r]}, {schedule[r][at[r]]} waits for {ready(r)}" for r in stuck]
        raise ScheduleError("deadlock: " + "; ".join(waits))
    busy = [sum(e.end[0] - e.start[0] for e in row) for row in events]
    return Verdict(events, max(row[-1].end[0] for row in events), busy, most)


def _sources(action: Action, last: int) -> list[Action]:
    """The actions whose results this one needs."""
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage > 0 else []
    return [Action(stage, "F", microbatch)] + ([Action(stage + 1, "B", microbatch)] if stage < last else [])


def _check_complete(schedule: Schedule) -> None:
    if not any(schedule):
        raise ScheduleError("the schedule has no action")
    where: dict[Action, str] = {}
    owner: dict[int, int] = {}
    for rank, row in enumerate(schedule):
        if not row:
            raise ScheduleError(f"rank {rank} has no action")
        for position, action in enumerate(row):
            here = f"rank {rank}, position {position}, {action}"
            if action.kind not in UNIT_COSTS:
                raise ScheduleError(f"{here}: not F or B, the compute actions; messages are added by rule")
            if action.stage < 0 or action.microbatch < 0:
                raise ScheduleError(f"{here}: stages and microbatches count from 0")
            if owner.setdefault(action.stage, rank) != rank:
                raise ScheduleError(f"{here}: stage {action.stage} is already on rank {owner[action.stage]}")
            if action in where:
                raise ScheduleError(f"{here}: done twice, first at {where[action]}")
            if action.kind == "B" and action._replace(kind="F") not in where:
                raise ScheduleError(f"{here}: backward before its forward")
            where[action] = here
    microbatches = 1 + max(action.microbatch for action in where)
    for stage in range(1 + max(owner)):
        for kind in UNIT_COSTS:
            for microbatch in range(microbatches):
                if Action(stage, kind, microbatch) not in where:
                    holder = f"rank {owner[stage]}" if stage in owner else "every rank"
                    raise ScheduleError(f"{holder}: {stage}{kind}{microbatch} is missing")
