"""A strict validator: check a schedule and run it on virtual devices, with no process.

A schedule that passes can be carried out, every microbatch exactly once on every stage, and the times are those of
devices that have nothing else to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from core.proof.clock import Event
from pipeline.schedules import UNIT_COSTS, Action, Schedule, ScheduleError, held, part_of_rank, placement, size


def bubble(timeline: list[list[Event]], model: int = 0) -> tuple[float, float]:
    """Idle time over wall time, and over computing time, of a timeline under one of its cost models.

    (p-1)/(m+p-1) and (p-1)/m on the slides of GPipe and 1F1B.
    """
    busy = sum(e.end[model] - e.start[model] for row in timeline for e in row)
    wall = len(timeline) * max(row[-1].end[model] for row in timeline)
    return 1 - busy / wall, wall / busy - 1


@dataclass(frozen=True)
class Verdict:
    """What a valid schedule costs on devices of its own.

    Times are in the units of the costs given. A microbatch is in flight on a stage from its forward to the end of its
    backward, the weights' part included.
    """

    events: list[list[Event]]  # per rank; times are 1-tuples
    makespan: float
    busy: list[float]  # per rank
    in_flight: list[int]  # per rank: most at a time, over all its stages

    @property
    def bubble_of_wall(self) -> float:
        return bubble(self.events)[0]

    @property
    def bubble_of_ideal(self) -> float:
        return bubble(self.events)[1]

    @property
    def own_bubble(self) -> float:
        """Idle time between the first and the last action of a rank, of the rank that has most.

        What is lost in a step when no rank waits for another between steps: the zero-bubble paper's measure. It is
        the whole loss of 1F1B, too, whose first rank starts first and ends last.
        """
        return max(row[-1].end[0] - row[0].start[0] - busy for row, busy in zip(self.events, self.busy, strict=True))


Costs = Mapping[str, float | list[float]]


def validate(schedule: Schedule, costs: Costs = UNIT_COSTS, message: float = 0.0, together: bool = False) -> Verdict:
    """Check that the schedule is complete and can run, and run it on virtual devices.

    Args:
        costs: time of each kind of action on one of p equal parts of the model, one a rank; where stages are smaller
            it is less in proportion. Or a list: the time on each stage.
        message: time a message between ranks travels.
        together: take the pairs that are meant to overlap as one block: it starts when both can, and both results are
            there at its end, after the sum of their times.

    Raises:
        ScheduleError: a stage missing, or on three ranks; a microbatch without exactly one forward and one backward,
            whole or in two parts, on every stage; a backward before its forward; ranks that wait for each other for
            ever.
    """
    _check_complete(schedule)
    rank_of = placement(schedule)
    stages, _ = size(schedule)
    part = part_of_rank(schedule)
    cost = {kind: c if isinstance(c, list) else [c * part] * stages for kind, c in costs.items()}
    done: dict[tuple[int, str, int], float] = {}  # when a result is there: of F, of B or I, of W
    events: list[list[Event]] = [[] for _ in schedule]
    now = [0.0] * len(schedule)
    at = [0] * len(schedule)  # next position of each rank
    in_flight, most = [0] * len(schedule), [0] * len(schedule)

    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(schedule):
            while at[rank] < len(row):
                block = row[at[rank] : at[rank] + 1]
                if together and (*row[at[rank] : at[rank] + 2],) in getattr(row, "pairs", ()):
                    block = row[at[rank] : at[rank] + 2]
                start = now[rank]
                for action in block:
                    if (source := _source(action, stages)) is not None:
                        if source not in done:
                            break
                        away = rank_of[source[0], source[2]] != rank
                        start = max(start, done[source] + (message if away else 0.0))
                else:
                    for action in block:
                        stage, kind, microbatch = action
                        end = start + cost[kind][stage]
                        events[rank].append(Event(str(action), (start,), (end,)))
                        in_flight[rank] += {"F": 1, "I": 0}.get(kind, -1)
                        most[rank] = max(most[rank], in_flight[rank])
                        start = end
                    for stage, kind, microbatch in block:
                        done[stage, "B" if kind == "I" else kind, microbatch] = end
                    now[rank] = end
                    at[rank] += len(block)
                    progress = True
                    continue
                break
    stuck = [r for r, row in enumerate(schedule) if at[r] < len(row)]
    if stuck:
        waits = [
            f"rank {r}, position {at[r]}, {schedule[r][at[r]]} waits for {{}}{{}}{{}}".format(
                *_source(schedule[r][at[r]], stages)
            )
            for r in stuck
        ]
        raise ScheduleError("deadlock: " + "; ".join(waits))
    busy = [sum(e.end[0] - e.start[0] for e in row) for row in events]
    return Verdict(events, max(now), busy, most)


def _source(action: Action, stages: int) -> tuple[int, str, int] | None:
    """The result that comes from another action than this rank's own before; of an I it is called B."""
    stage, kind, microbatch = action
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage > 0 else None
    return (stage + 1, "B", microbatch) if kind in "BI" and stage < stages - 1 else None


def _check_complete(schedule: Schedule) -> None:
    if not any(schedule):
        raise ScheduleError("the schedule has no action")
    where: dict[Action, tuple[int, int]] = {}
    home: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(schedule):
        if not row:
            raise ScheduleError(f"rank {rank} has no action")
        for position, action in enumerate(row):
            stage, kind, microbatch = action
            if kind not in UNIT_COSTS:
                why = "not F, B, I or W, the compute actions; messages are added by rule"
            elif stage < 0 or microbatch < 0:
                why = "stages and microbatches count from 0"
            elif home.setdefault((stage, microbatch), rank) != rank:
                why = f"stage {stage} of microbatch {microbatch} is already on rank {home[stage, microbatch]}"
            elif twice := [a for a in (action, *_other_form(action)) if a in where]:
                why = f"done twice, first as {_here(*where[twice[0]], twice[0])}"
            elif kind != "F" and (stage, "I" if kind == "W" else "F", microbatch) not in where:
                why = f"before its {'I' if kind == 'W' else 'F'}"
            else:
                where[action] = rank, position
                continue
            raise ScheduleError(f"{_here(rank, position, action)}: {why}")
    stages, microbatches = size(schedule)
    stages = min(stages, 1 + len(home))  # whatever number a stage has: one is missing before it
    everyone = held(schedule)
    holders = [[rank for rank, those in enumerate(everyone) if stage in those] for stage in range(stages)]
    for stage, ranks in enumerate(holders):
        if len(ranks) > 2:
            raise ScheduleError(f"stage {stage} is on ranks {', '.join(map(str, ranks))}; at most two hold a copy")
        for microbatch in range(microbatches):
            for kind in "FIW" if (stage, "I", microbatch) in where else "FB":
                if (stage, kind, microbatch) not in where:
                    there = home.get((stage, microbatch), ranks[0] if ranks else None)
                    holder = "every rank" if there is None else f"rank {there}"
                    raise ScheduleError(f"{holder}: {stage}{kind}{microbatch} is missing")


def _other_form(action: Action) -> list[Action]:
    """What does the same as this backward, or a part of it."""
    return [action._replace(kind=kind) for kind in {"B": "IW", "I": "B", "W": "B"}.get(action.kind, "")]


def _here(rank: int, position: int, action: Action) -> str:
    return f"rank {rank}, position {position}, {action}"
