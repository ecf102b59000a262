"""A pipeline schedule is plain data: for each rank, the list of actions it carries out in order. Lecture 07, 08.

    python -m pipeline.schedules 1f1b --stages 4 --microbatches 8 --csv

prints one, in the CSV notation of `torch.distributed.pipelining`: one row a rank, `2F0` the forward of microbatch 0
on stage 2, `2B0` its backward. Here too is the rule that adds the sends and receives; `validator.py` says what a
schedule costs, and whether it can run at all.
"""

import argparse
import csv
import re
import sys
from collections import deque
from collections.abc import Iterable
from importlib import import_module
from typing import NamedTuple, TextIO

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
    from pipeline.timeline import draw  # here: both import this module
    from pipeline.validator import validate

    schedule = build(args.name, args.stages, args.microbatches)
    verdict = validate(schedule)
    if args.csv:
        to_csv(schedule, sys.stdout)
    else:
        print(draw(verdict.events))
        print(
            f"bubble: {verdict.bubble_of_wall:.4f} of wall time, {verdict.bubble_of_ideal:.4f} of ideal time; "
            f"in flight per rank: {' '.join(map(str, verdict.in_flight))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
