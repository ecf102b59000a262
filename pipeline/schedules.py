"""A pipeline schedule is plain data: for each rank, the list of actions it carries out in order. Lecture 07, 08.

    python -m pipeline.schedules 1f1b --stages 4 --microbatches 8 --csv

prints one, in the CSV notation of `torch.distributed.pipelining`: one row a rank, `2F0` the forward of microbatch 0
on stage 2, `2B0` its backward. Here too are the rules that add the sends and receives, and the strict validator that
runs a schedule on virtual devices, with no process.
"""

import argparse
import csv
import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, TextIO

from core.ledger import Event

# F forward, B backward; the slides count a backward as two forwards: input gradient 1 + weight gradient 1.
UNIT_COSTS = {"F": 1.0, "B": 2.0}
LESSONS = {"naive": "pipeline.naive", "gpipe": "pipeline.gpipe", "1f1b": "pipeline.1f1b"}


class Action(NamedTuple):
    """One thing a rank does for one microbatch: kind F or B, or SEND_F, RECV_F, SEND_B, RECV_B.

    The stage is the one that computes, sends or receives.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Action]]  # Schedule[rank] in order


class ScheduleError(ValueError):
    """A schedule that no pipeline could run; says which rank, which position in its row, and which action."""


def build(name: str, stages: int, microbatches: int) -> Schedule:
    """The schedule of the lesson called `name`, one stage a rank."""
    return import_module(LESSONS[name]).schedule(stages, microbatches)


def to_csv(schedule: Schedule, file: TextIO) -> None:
    """Write the schedule in torch's notation, one row a rank."""
    csv.writer(file, lineterminator="\n").writerows([map(str, row) for row in schedule])


def from_csv(file: Iterable[str]) -> Schedule:
    """Read a schedule in torch's notation; empty cells are idle time and are left out.

    Raises:
        ScheduleError: a cell is not a compute action.
    """
    schedule: Schedule = []
    for rank, row in enumerate(csv.reader(file)):
        schedule.append([])
        for position, cell in enumerate(row):
            if not cell.strip():
                continue
            match = re.fullmatch(r"(\d+)([FB])(\d+)", cell.strip())
            if not match:
                raise ScheduleError(f"rank {rank}, position {position}: {cell!r} is no action like 0F0 or 0B0")
            schedule[rank].append(Action(int(match[1]), match[2], int(match[3])))
    return schedule


# ---- The rule for communication --------------------------------------------------------------------------------------


def placement(schedule: Schedule) -> dict[int, int]:
    """The rank that holds each stage."""
    return {action.stage: rank for rank, row in enumerate(schedule) for action in row}


def with_communication(schedule: Schedule) -> Schedule:
    """Add sends and receives by rule: an action's result leaves right after it, its input is asked for ahead.

    A receive is posted one action before the one that needs it, so the message travels while that action computes.
    Receives from one rank and direction are posted in the order in which that rank sends, which NCCL relies on.
    """
    rank_of = placement(schedule)
    arriving: dict[tuple[int, int, str], deque[Action]] = {}  # by (sender, receiver, kind), in the sender's order
    for rank, row in enumerate(schedule):
        for action in row:
            receive = _delivery(action)
            if receive.stage in rank_of:
                arriving.setdefault((rank, rank_of[receive.stage], receive.kind), deque()).append(receive)

    program: Schedule = []
    for rank, row in enumerate(schedule):
        out: list[Action] = []
        posted: set[Action] = set()
        for position, action in enumerate(row):
            for needing in row[position : position + 2]:
                receive = Action(needing.stage, f"RECV_{needing.kind}", needing.microbatch)
                sender = rank_of.get(_supplier(needing))
                while sender is not None and receive not in posted:
                    out.append(arriving[sender, rank, receive.kind].popleft())
                    posted.add(out[-1])
            out.append(action)
            if _delivery(action).stage in rank_of:
                out.append(Action(action.stage, f"SEND_{action.kind}", action.microbatch))
        program.append(out)
    return program


def _supplier(action: Action) -> int:
    """The stage whose result `action` takes from a message; none has that number at the ends of the pipeline."""
    return action.stage - 1 if action.kind == "F" else action.stage + 1


def _delivery(action: Action) -> Action:
    """The receive, on the next stage in its direction, of what `action` makes."""
    return Action(action.stage + (1 if action.kind == "F" else -1), f"RECV_{action.kind}", action.microbatch)


# ---- The validator: a run on virtual devices -------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a valid schedule costs on devices of its own. Times are in the units of the costs given."""

    events: list[list[Event]]  # per rank; times are 1-tuples
    makespan: float
    busy: list[float]  # per rank
    in_flight: list[int]  # per rank: most microbatches between forward and backward, over all its stages

    @property
    def bubble_of_wall(self) -> float:
        """Idle share of all the time of all devices: (p-1)/(m+p-1) on the slides of GPipe and 1F1B."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)

    @property
    def bubble_of_ideal(self) -> float:
        """Idle time over computing time: (p-1)/m on the same slides."""
        return len(self.busy) * self.makespan / sum(self.busy) - 1.0


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
                raise ScheduleError(f"{here}: not a compute action; sends and receives are added by rule")
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.schedules", description="Print a schedule.")
    parser.add_argument("name", choices=tuple(LESSONS))
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=1, help="stages a rank holds; these schedules take 1")
    parser.add_argument(
        "--csv", action="store_true", help="the actions, in the notation of torch.distributed.pipelining"
    )
    args = parser.parse_args()
    for flag in ("stages", "microbatches"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1; use --{flag} 4")
    if args.chunks != 1:
        parser.error(f"--chunks {args.chunks}: {args.name} holds one stage a rank; use --chunks 1")
    schedule = build(args.name, args.stages, args.microbatches)
    verdict = validate(schedule)
    if args.csv:
        to_csv(schedule, sys.stdout)
    else:
        from pipeline.timeline import draw  # after the schedule is known to be good

        print(draw(verdict.events))
        print(
            f"bubble: {verdict.bubble_of_wall:.4f} of wall time, {verdict.bubble_of_ideal:.4f} of ideal time; "
            f"in flight per rank: {' '.join(map(str, verdict.in_flight))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
