"""Lecture 08, further: a schedule for this machine, found and not written (流水并行 1F1B/1F1B Interleaved 原理).

    torchrun --nproc_per_node=8 pipeline/auto.py --memory 8 --message 0.2

The slides count a forward as 1 and a backward as 2, on every stage. Measured, they are not: here a step is traced
first, and the times of F, I and W of each of 2p stages are what the processes really computed. For those times, a time
for messages and a memory, the shortest step is looked for: first what a greedy rule gives, below, then
`engine/search.py`, which tries many settings of such rules, compares them with the named schedules, and moves single
actions. The schedule found then trains, and must equal one process like any other.

read: auto.py:35-67; then engine/search.py

p ranks, S stages, m micro-batches
"""

import argparse
import statistics
import sys
from collections import defaultdict

from tabulate import tabulate

from core.proof.lesson import Lesson, Run
from core.proof.training import train
from pipeline.engine.actions import Action, Schedule, size, stage_share
from pipeline.engine.search import Costs, Found, Problem, makespan, named, search
from pipeline.engine.validator import validate
from pipeline.evidence.claims import Measured
from pipeline.evidence.rules import AUTO
from pipeline.evidence.training import Engine, add_flags, measure, pipeline_axis, teach
from pipeline.evidence.training import check as check_stages
from pipeline.zero_bubble import zb_v


def greedy(costs: Costs, microbatches: int, message: float, most: int) -> Schedule:
    """One stage a rank. Again and again, of all ranks the one that can start first does its most urgent action:

    I, because the rank before waits for it; else F, where memory allows; else a pending W.

    Args:
        costs: of F, I and W on each stage.
        message: the time that a message travels.
        most: micro-batches that a rank can have in flight.
    """
    stages = len(costs["F"])
    rows: Schedule = [[] for _ in range(stages)]
    now = [0.0] * stages
    done: dict[str, list[list[float]]] = {kind: [[] for _ in range(stages)] for kind in "FIW"}  # when, in order
    while min(map(len, done["W"])) < microbatches:
        options = []  # (start, urgency, rank, kind, micro-batch)
        for rank in range(stages):
            f, i, w = (len(done[kind][rank]) for kind in "FIW")  # the next of each kind
            if i < f and rank == stages - 1:
                options.append((now[rank], 0, rank, "I", i))
            elif i < f and i < len(done["I"][rank + 1]):
                options.append((max(now[rank], done["I"][rank + 1][i] + message), 0, rank, "I", i))
            if f < microbatches and f - w < most and rank == 0:
                options.append((now[rank], 1, rank, "F", f))
            elif f < microbatches and f - w < most and f < len(done["F"][rank - 1]):
                options.append((max(now[rank], done["F"][rank - 1][f] + message), 1, rank, "F", f))
            if w < i:
                options.append((now[rank], 2, rank, "W", w))
        start, _, rank, kind, m = min(options)
        rows[rank].append(Action(rank, kind, m))
        now[rank] = start + costs[kind][rank]
        done[kind][rank].append(now[rank])
    return rows


def measured_costs(measured: list[Measured], stages: int) -> Costs:
    """Median seconds of F, I and W on each stage, from a traced step."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in (event for each in measured for event in each.events):
        action = event.label
        seconds[action.kind, action.stage].append(event.end[1] - event.start[1])
    return {kind: [statistics.median(seconds[kind, stage]) for stage in range(stages)] for kind in "FIW"}


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model cannot be split into 2p stages, or another flag does not fit."""
    check_stages(args, ranks, 2, AUTO)


def lesson(run: Run) -> None:
    args, p, m = run.args, run.job.world_size, run.args.microbatches
    memory = args.memory or p

    # What F, I and W cost here: a step of a schedule that has them apart, on 2p stages; the one before warms up.
    few = Run(argparse.Namespace(**vars(args) | {"steps": 2}), run.job, run.precision)
    axis = pipeline_axis(run)
    engine = Engine(few, zb_v(p, m), axis)
    train(few, {"": engine}, None, compare=False)
    engine.runtime.close()
    traced = measure(few, engine)
    problem = found = plainest = None
    if traced:
        costs = measured_costs(traced, 2 * p)
        unit = 2 * sum(costs["F"]) / (2 * p)  # a forward of 1/p of the model
        costs = {kind: [seconds / unit for seconds in each] for kind, each in costs.items()}
        rows = [(kind, *costs[kind]) for kind in "FIW"]
        run.say(f"measured, a forward of 1/p of the model = 1 = {unit * 1e3:.2f} ms; by half of a rank's share:")
        run.say(tabulate(rows, ("", *range(2 * p)), floatfmt=".2f") + "\n")
        problem = Problem(p, m, costs, args.message, memory, args.copies)
        schedule = greedy(problem.of(p), m, args.message, int(memory))
        plainest = Found("greedy, plainest", schedule, makespan(schedule, problem))
        found = search(problem, seed=args.seed)
    found = run.job.share(found)
    measured = teach(run, found.schedule, with_plain=False)
    if not measured:
        return

    others = list(named(problem))
    show(run, problem, [*others, plainest, found])
    as_validated = validate(found.schedule, problem.of(size(found.schedule)[0]), args.message).makespan
    of_greedy = validate(plainest.schedule, problem.of(p), args.message).makespan
    claim = run.evidence.claim
    claim("longer than the plainest greedy schedule", "0", 0, max(0.0, as_validated - of_greedy), 1e-9)
    if others:
        best = min(other.makespan for other in others)
        claim("longer than the best named one that fits", "0", 0, max(0.0, as_validated - best), 1e-9)
    share = stage_share(found.schedule)
    run.evidence.on_ranks(
        "in flight above --memory, in microbatches", f"0 above {memory:g}", 0,
        [max(0.0, each.in_flight * share - memory) for each in measured],
    )  # fmt: skip


def show(run: Run, problem: Problem, schedules: list[Found]) -> None:
    """Those that fit, the shortest step last."""
    work = sum(sum(each) for each in problem.costs.values()) * problem.microbatches / problem.ranks
    rows = []
    for found in sorted(schedules, key=lambda found: -found.makespan):
        verdict = validate(found.schedule, problem.of(size(found.schedule)[0]), problem.message)
        in_flight = max(verdict.in_flight) * stage_share(found.schedule)
        rows.append((found.name, found.makespan, found.makespan / work - 1, in_flight))
    run.say(f"\nwith the measured times, --message {problem.message:g} and --memory {problem.memory:g}:")
    header = ("schedule", "a step, in virtual time", "over equal work, no bubble", "in flight")
    run.say(tabulate(rows, header, floatfmt=".3f"))


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: a schedule that is searched",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "Measured times of forward and both halves of the backward, and the shortest step for them.",
        smallest=2,
    )
    add_flags(frame, microbatches=16, split=False)
    flag = frame.parser.add_argument
    flag("--memory", type=float, help="microbatches of 1/p of the model that a rank can hold (default: p)")
    flag("--message", type=float, default=0.0, help="time of a message, in forwards of 1/p (default %(default)s)")
    flag("--copies", type=int, default=1, help="of the model that the ranks can hold; DualPipe's 2 (default 1)")
    frame.parser.set_defaults(layers=16)
    sys.exit(frame.main(check, lesson))
