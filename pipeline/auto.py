"""Lecture 08, further: a schedule for this machine, found and not written (流水并行 1F1B/1F1B Interleaved 原理).

    torchrun --nproc_per_node=8 pipeline/auto.py --memory 8 --message 0.2

The slides count a forward as 1 and a backward as 2, on every stage. Measured, they are not: here a step is traced
first, and the times of F, I and W of each of 2p parts of the model are what the processes really computed. For those
times, a time for messages and a memory, `search.py` looks for the shortest step. The schedule found then trains, and
must equal one process like any other.

p ranks, m microbatches
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict

from tabulate import tabulate

from core.proof.lesson import Lesson, Run
from pipeline.evidence import Measured, write_timeline
from pipeline.schedules import build, part_of_rank, size
from pipeline.search import Costs, Found, Problem, named, search
from pipeline.training import add_flags, claim_all, show_plan, train_with
from pipeline.training import check as check_stages
from pipeline.validator import validate


def measured_costs(measured: list[Measured], stages: int) -> Costs:
    """Median seconds of F, I and W on each stage, from a traced step."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in (event for each in measured for event in each.events):
        stage, kind = re.match(r"(\d+)([FIW])", event.label).groups()
        seconds[kind, int(stage)].append(event.end[1] - event.start[1])
    return {kind: [statistics.median(seconds[kind, stage]) for stage in range(stages)] for kind in "FIW"}


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model cannot be cut into 2p parts, or another flag does not fit."""
    check_stages(args, 2 * ranks, 2)
    if not 0 <= args.message < float("inf"):
        raise ValueError(f"--message {args.message}: must not be negative; use --message 0.1")
    if not (args.memory is None or 1 <= args.memory < float("inf")):
        raise ValueError(f"--memory {args.memory}: a rank must hold at least one microbatch; use --memory {ranks}")
    if args.copies < 1:
        raise ValueError(f"--copies {args.copies}: the model must be there once; use --copies 1")


def lesson(run: Run) -> None:
    args, p, m = run.args, run.job.world_size, run.args.microbatches
    memory = args.memory or p

    # What F, I and W cost here: a step of a schedule that has them apart, on 2p stages.
    traced, _ = train_with(run, build("zb-v", p, m))
    problem = found = None
    if traced:
        costs = measured_costs(traced, 2 * p)
        unit = 2 * sum(costs["F"]) / (2 * p)  # a forward of 1/p of the model
        costs = {kind: [seconds / unit for seconds in each] for kind, each in costs.items()}
        rows = [(kind, *costs[kind]) for kind in "FIW"]
        run.say(f"measured, a forward of 1/p of the model = 1 = {unit * 1e3:.2f} ms; by half of a rank's part:")
        run.say(tabulate(rows, ("", *range(2 * p)), floatfmt=".2f") + "\n")
        problem = Problem(p, m, costs, args.message, memory, args.copies)
        found = search(problem, seed=args.seed)
    found = run.job.share(found)
    planned = show_plan(run, found.schedule)
    measured, worst = train_with(run, found.schedule)
    if not measured:
        return

    others = list(named(problem))
    show(run, problem, [*others, found])
    claim_all(run, found.schedule, planned, measured, worst)
    write_timeline(run, measured)
    if others:
        best = min(other.makespan for other in others)
        as_validated = validate(found.schedule, problem.of(size(found.schedule)[0]), args.message).makespan
        run.evidence.claim("longer than the best named one that fits", "0", 0, max(0.0, as_validated - best), 1e-9)
    part = part_of_rank(found.schedule)
    run.evidence.on_ranks(
        "held above --memory, in microbatches", f"0 above {memory:g}", 0,
        [max(0.0, each.in_flight * part - memory) for each in measured],
    )  # fmt: skip


def show(run: Run, problem: Problem, schedules: list[Found]) -> None:
    """Those that fit, the shortest step last."""
    work = sum(sum(each) for each in problem.costs.values()) * problem.microbatches / problem.ranks
    rows = []
    for found in sorted(schedules, key=lambda found: -found.makespan):
        verdict = validate(found.schedule, problem.of(size(found.schedule)[0]), problem.message)
        held = max(verdict.in_flight) * part_of_rank(found.schedule)
        rows.append((found.name, found.makespan, found.makespan / work - 1, held))
    run.say(f"\nwith the measured times, --message {problem.message:g} and --memory {problem.memory:g}:")
    run.say(tabulate(rows, ("schedule", "a step", "over equal work, no bubble", "held"), floatfmt=".3f"))


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: a schedule that is searched",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "Measured times of forward and both halves of the backward, and the shortest step for them.",
        smallest=2,
    )
    add_flags(frame, microbatches=16)
    flag = frame.parser.add_argument
    flag("--memory", type=float, help="microbatches of 1/p of the model that a rank can hold (default: p)")
    flag("--message", type=float, default=0.0, help="time of a message, in forwards of 1/p (default %(default)s)")
    flag("--copies", type=int, default=1, help="of the model that the ranks can hold; DualPipe's 2 (default 1)")
    frame.parser.set_defaults(layers=16)
    sys.exit(frame.main(check, lesson))
