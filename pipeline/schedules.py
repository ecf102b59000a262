"""A pipeline schedule is plain data: for each rank, the list of actions it carries out in order. Lecture 07, 08.

    python -m pipeline.schedules interleaved --stages 4 --microbatches 8 --chunks 2 --csv

prints one, in the CSV notation of `torch.distributed.pipelining`: one row a rank, `2F0` the forward of microbatch 0
on stage 2, `2B0` its backward, or `2I0` and `2W0` that in two parts: the gradient of the stage's input, and those of
its weights. Here too is the rule that adds the sends and receives; `validator.py` says what a schedule costs, and
whether it can run at all.

p ranks, S stages, m microbatches
"""

import argparse
import csv
import re
import sys
from collections import deque
from collections.abc import Iterable
from importlib import import_module
from typing import NamedTuple, TextIO

# The slides count a backward B as two forwards: input gradient I, weight gradient W.
UNIT_COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
# module and function of each; those that hold a free number of stages a rank take it as a third argument
SCHEDULES = {
    "naive": ("pipeline.naive", "schedule"),
    "gpipe": ("pipeline.gpipe", "schedule"),
    "1f1b": ("pipeline.1f1b", "schedule"),
    "interleaved": ("pipeline.interleaved", "schedule"),
    "zb-h1": ("pipeline.zero_bubble", "zb_h1"),
    "zb-h2": ("pipeline.zero_bubble", "zb_h2"),
    "zb-v": ("pipeline.zero_bubble", "zb_v"),
    "dualpipe": ("pipeline.dualpipe", "dualpipe"),
    "dualpipev": ("pipeline.dualpipe", "dualpipev"),
}


class Action(NamedTuple):
    """One thing a rank does for one microbatch: kind F, B, I or W, or SEND_F, RECV_F, SEND_B, RECV_B.

    The stage is the one that computes, sends or receives.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Action]]  # Schedule[rank] in order


class Row(list[Action]):
    """A rank's actions under construction, where it holds several stages: counts their microbatches.

    Args:
        stages: stage and its first microbatch, of each.
    """

    def __init__(self, *stages: tuple[int, int]):
        super().__init__()
        self._stages = [stage for stage, _ in stages]
        self._next = [{"F": first, "B": first} for _, first in stages]
        self._owed: list[tuple[int, Action]] = []  # weight gradients that input gradients have left, in their order
        self.pairs: set[tuple[Action, Action]] = set()  # a forward and a backward that are meant to overlap

    def forward(self, which: int) -> None:
        """The next microbatch's, on stage number `which` of those held."""
        self._add(which, "F", "F")

    def backward(self, which: int, split: bool = False) -> None:
        """The next microbatch's, whole, or only that of the input."""
        self._add(which, "I" if split else "B", "B")
        if split:
            self._owed.append((which, self[-1]._replace(kind="W")))

    def together(self, forward: int, backward: int) -> None:
        """A forward on one stage and a backward on another, which overlap where a device can do both at once."""
        self.forward(forward)
        self.backward(backward)
        self.pairs.add((self[-2], self[-1]))

    def weights(self, which: int | None = None) -> None:
        """The oldest that is owed, of this stage or of any."""
        owed = next(each for each in self._owed if which in (None, each[0]))
        self._owed.remove(owed)
        self.append(owed[1])

    def started(self, which: int) -> int:
        """The next microbatch to go forward."""
        return self._next[which]["F"]

    def all_weights(self, which: int) -> None:
        """All that is owed of this stage."""
        for _ in [each for each in self._owed if each[0] == which]:
            self.weights(which)

    def _add(self, which: int, kind: str, counted: str) -> None:
        self.append(Action(self._stages[which], kind, self._next[which][counted]))
        self._next[which][counted] += 1


class ScheduleError(ValueError):
    """A schedule that no pipeline could run; says which rank, which position in its row, and which action."""


def build(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """The schedule called `name`.

    Args:
        chunks: stages a rank holds, where that is free: of interleaved.

    Raises:
        ScheduleError: there is none of these sizes.
    """
    module, function = SCHEDULES[name]
    free = (chunks,) if name == "interleaved" else ()
    return getattr(import_module(module), function)(ranks, microbatches, *free)


def to_csv(schedule: Schedule, file: TextIO) -> None:
    """Write the schedule in torch's notation, one row a rank."""
    csv.writer(file, lineterminator="\n").writerows([map(str, row) for row in schedule])


def from_csv(file: Iterable[str]) -> Schedule:
    """Read a schedule in torch's notation; empty cells are idle time and are left out.

    Torch's `(2F3;1B0)OVERLAP_F_B` is a forward and then a backward: here one rank computes one thing at a time.

    Raises:
        ScheduleError: a cell is not a compute action.
    """
    schedule: Schedule = []
    for rank, row in enumerate(csv.reader(file)):
        schedule.append([])
        for position, cell in enumerate(row):
            pair = re.fullmatch(r"\((.*);(.*)\)OVERLAP_F_B", cell.strip())
            for single in pair.groups() if pair else [cell.strip()] * bool(cell.strip()):
                match = re.fullmatch(r"(\d+)([FBIW])(\d+)", single)
                if not match:
                    raise ScheduleError(f"rank {rank}, position {position}: {cell!r} is no action like 0F0 or 0B0")
                schedule[rank].append(Action(int(match[1]), match[2], int(match[3])))
    return schedule


# ---- Who holds what --------------------------------------------------------------------------------------------------


def placement(schedule: Schedule) -> dict[tuple[int, int], int]:
    """The rank that computes a stage for a microbatch, by (stage, microbatch).

    Most schedules have each stage on one rank. DualPipe has it on two, and microbatches go through either.
    """
    return {(action.stage, action.microbatch): rank for rank, row in enumerate(schedule) for action in row}


def held(schedule: Schedule) -> list[list[int]]:
    """The stages that each rank holds, in order."""
    return [sorted({action.stage for action in row}) for row in schedule]


def size(schedule: Schedule) -> tuple[int, int]:
    """Stages and microbatches."""
    actions = [action for row in schedule for action in row]
    return 1 + max(a.stage for a in actions), 1 + max(a.microbatch for a in actions)


def part_of_rank(schedule: Schedule) -> float:
    """A stage as part of a model that is cut once for every rank, the unit of costs and memory: p/S."""
    return len(schedule) / size(schedule)[0]


# ---- The rule for communication --------------------------------------------------------------------------------------


def with_communication(schedule: Schedule) -> Schedule:
    """Add sends and receives by rule: an action's result leaves right after it, its input is asked for ahead.

    A receive is posted one action before the one that needs it, so the message travels while that action computes.
    Receives from one rank and direction are posted in the order in which that rank sends, which NCCL relies on.
    Where the next stage is on the same rank, nothing is sent.
    """
    rank_of = placement(schedule)
    arriving: dict[tuple[int, int, str], deque[Action]] = {}  # by (sender, receiver, kind), in the sender's order
    for rank, row in enumerate(schedule):
        for action in row:
            receive = delivery(action)
            if receive and (receiver := rank_of.get((receive.stage, receive.microbatch), rank)) != rank:
                arriving.setdefault((rank, receiver, receive.kind), deque()).append(receive)

    program: Schedule = []
    for rank, row in enumerate(schedule):
        out: list[Action] = []
        posted: set[Action] = set()
        for position, action in enumerate(row):
            for needing in row[position : position + 2]:
                receive = needed(needing)
                sender = rank_of.get((_supplier(receive), receive.microbatch), rank) if receive else rank
                while sender != rank and receive not in posted:
                    out.append(arriving[sender, rank, receive.kind].popleft())
                    posted.add(out[-1])
            out.append(action)
            sent = delivery(action)
            if sent and rank_of.get((sent.stage, sent.microbatch), rank) != rank:
                out.append(Action(action.stage, sent.kind.replace("RECV", "SEND"), action.microbatch))
        program.append(out)
    return program


def needed(action: Action) -> Action | None:
    """The receive of what `action` computes with, on its own stage; none for a W. The pipeline's ends get none."""
    return None if action.kind == "W" else Action(action.stage, _received(action), action.microbatch)


def delivery(action: Action) -> Action | None:
    """The receive, on the next stage in its direction, of what `action` makes; none for a W."""
    if action.kind == "W":
        return None
    return Action(action.stage + (1 if action.kind == "F" else -1), _received(action), action.microbatch)


def _received(action: Action) -> str:
    return "RECV_F" if action.kind == "F" else "RECV_B"


def _supplier(receive: Action) -> int:
    """The stage that sends this; none has that number at the ends of the pipeline."""
    return receive.stage - 1 if receive.kind == "RECV_F" else receive.stage + 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.schedules", description="Print a schedule.")
    parser.add_argument("name", choices=tuple(SCHEDULES))
    parser.add_argument("--stages", type=int, required=True, help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--chunks", type=int, help="stages a rank holds, of interleaved (default 2)")
    parser.add_argument(
        "--csv", action="store_true", help="the actions, in the notation of torch.distributed.pipelining"
    )
    args = parser.parse_args()
    if args.chunks is not None and args.name != "interleaved":
        parser.error(f"--chunks {args.chunks}: {args.name} has no choice of stages a rank; leave --chunks out")
    for flag in ("stages", "microbatches", "chunks"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1; use --{flag} 4")
    from pipeline.timeline import draw, legend  # here: both import this module
    from pipeline.validator import validate

    try:
        schedule = build(args.name, args.stages, args.microbatches, args.chunks or 2)
    except ValueError as error:  # a ScheduleError; this module's own, when it is run, is another class
        parser.error(str(error))
    verdict = validate(schedule)
    if args.csv:
        to_csv(schedule, sys.stdout)
    else:
        print(f"{legend(schedule)}\n{draw(schedule, verdict.events)}")
        print(
            f"bubble: {verdict.bubble_of_wall:.4f} of wall time, {verdict.bubble_of_ideal:.4f} of ideal time; "
            f"in flight per rank: {' '.join(map(str, verdict.in_flight))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
