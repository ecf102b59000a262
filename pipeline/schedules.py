"""Every schedule by its name, and the command that prints one. Lectures 07 and 08.

    python -m pipeline.schedules interleaved --stages 4 --microbatches 8 --chunks 2
    python -m pipeline.schedules zb-v --stages 4 --microbatches 8 --csv

The second is the CSV notation of `torch.distributed.pipelining`: one row a rank, `2F0` the forward of micro-batch 0 on
stage 2, `2B0` its backward, or `2I0` and `2W0` that in two parts: the gradient of the stage's input, and those of its
weights.

read: schedules.py:28-55; then engine/actions.py, engine/validator.py
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TextIO

from core.proof.language import LANGUAGES, catalogue, language_of
from core.proof.terminal import fit
from pipeline import dualpipe, gpipe, interleaved, naive, zero_bubble
from pipeline.engine.actions import Action, Schedule, ScheduleError
from pipeline.engine.validator import validate
from pipeline.evidence.timeline import show_schedule

one_f_one_b = import_module("pipeline.1f1b")  # no name that an import statement takes

# Each makes the schedule for p ranks and m micro-batches; interleaved for v stages a rank, too.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "naive": naive.schedule,
    "gpipe": gpipe.schedule,
    "1f1b": one_f_one_b.schedule,
    "interleaved": interleaved.schedule,
    "zb-h1": zero_bubble.zb_h1,
    "zb-h2": zero_bubble.zb_h2,
    "zb-v": zero_bubble.zb_v,
    "dualpipe": dualpipe.dualpipe,
    "dualpipev": dualpipe.dualpipev,
}


def build(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """The schedule called `name`.

    Args:
        chunks: stages a rank, where that is free: of interleaved.

    Raises:
        ScheduleError: there is none of these sizes.
    """
    if name == "interleaved":
        return interleaved.schedule(ranks, microbatches, chunks)
    return SCHEDULES[name](ranks, microbatches)


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
            try:
                schedule[rank] += _actions(cell.strip())
            except ValueError:
                raise ScheduleError(
                    f"rank {rank}, position {position}: {cell!r} is no action like 0F0 or 0B0"
                ) from None
    return schedule


def _actions(cell: str) -> list[Action]:
    """Torch's `(2F3;1B0)OVERLAP_F_B` is a forward and then a backward: here a rank computes one thing at a time."""
    if not cell:
        return []
    if pair := re.fullmatch(r"\((.*);(.*)\)OVERLAP_F_B", cell):
        return _actions(pair[1]) + _actions(pair[2])
    if single := re.fullmatch(r"(\d+)([FBIW])(\d+)", cell):
        return [Action(int(single[1]), single[2], int(single[3]))]
    raise ValueError(cell)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.schedules", description="Print a schedule.")
    parser.add_argument("name", choices=tuple(SCHEDULES))
    parser.add_argument("--stages", type=int, required=True, help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--chunks", type=int, help="stages a rank, of interleaved (default 2)")
    parser.add_argument(
        "--csv", action="store_true", help="the actions, in the notation of torch.distributed.pipelining"
    )
    parser.add_argument("--lang", choices=LANGUAGES, help="of what is printed (default: what LANG says)")
    args, known = parser.parse_args(), catalogue(language_of(sys.argv[1:]))
    if args.chunks is not None and args.name != "interleaved":
        no = f"--chunks {args.chunks}: {args.name} has no choice of stages a rank; leave --chunks out"
        parser.error(known.gettext(no))
    for flag in ("stages", "microbatches", "chunks"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(known.gettext(f"--{flag} {getattr(args, flag)}: must be at least 1; use --{flag} 4"))
    try:
        schedule = build(args.name, args.stages, args.microbatches, args.chunks or 2)
    except ScheduleError as error:
        parser.error(known.gettext(str(error)))
    verdict = validate(schedule)
    if args.csv:
        to_csv(schedule, sys.stdout)
        return 0
    print(fit(known.printed(show_schedule(schedule, verdict.events))))
    bubbles = f"bubble: {verdict.bubble_of_wall:.4f} of wall time, {verdict.bubble_of_ideal:.4f} of ideal time; "
    print(fit(known.gettext(f"{bubbles}in flight per rank: {' '.join(map(str, verdict.in_flight))}")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
