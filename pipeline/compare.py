"""Lecture 08 and 09, CODE 03: every schedule side by side, and which to choose (流水并行 1F1B/1F1B Interleaved 原理).

    torchrun --nproc_per_node=8 pipeline/compare.py --costs 1 1 1 --message 0.1 --memory 8

One table: what a step takes, how much of it is bubble, the activations and parameters that a rank has, the messages
it sends. Calculated on virtual devices with your times for F, I and W, of one p-th of the model each, and for a
message; and every schedule is also carried out by real processes, must equal one process, and must do each action
when the virtual devices do. Then a case too large for a laptop, on virtual devices alone.

    bubble        idle time of all ranks, from the first action of the step to the last
    activations   of the rank with most: micro-batches in flight x the size of a stage
    parameters    stages of a rank x the size of a stage
    messages      a stage and its neighbour on another rank: an activation there, a gradient back

`--csv FILE` adds a schedule of your own, in the notation of torch.distributed.pipelining, one row a rank. Print one to
start from with `python -m pipeline.schedules zb-v --stages 8 --microbatches 16 --csv`.

read: compare.py:63-130; then engine/validator.py

p ranks, m micro-batches
"""

import argparse
import csv
import sys
import time
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from tabulate import tabulate

from core.proof.comparison import claim_equal
from core.proof.figures import scatter
from core.proof.files import check_readable
from core.proof.lesson import Lesson, Run
from core.proof.rules import check as check_rules
from pipeline.engine.actions import Schedule, ScheduleError, size
from pipeline.engine.numbered import uncollected
from pipeline.engine.validator import Verdict, validate
from pipeline.evidence.claims import Measured, differing_actions, differing_copies, messages_by_rule, timeline_of
from pipeline.evidence.course import show_course
from pipeline.evidence.pictures import timelines
from pipeline.evidence.rules import CHUNKS, COMPARE, EVERY_SCHEDULE, OWN
from pipeline.evidence.timeline import plot, show_schedule
from pipeline.evidence.training import Engine, add_flags, measure, pipeline_axis, train_beside_one_process
from pipeline.evidence.training import check as check_stages
from pipeline.schedules import SCHEDULES, build, from_csv

WHY = {
    "naive": "nothing runs at once",
    "gpipe": "the pipeline fills and empties once a step, and every microbatch is in flight",
    "1f1b": "GPipe's bubble, but a rank has at most p microbatches in flight",
    "interleaved": "small stages fill the pipeline v times faster",
    "zb-h1": "weight gradients fill 1F1B's bubble, within its memory",
    "zb-h2": "a longer warm-up leaves no gap to fill, for nearly twice the memory",
    "zb-v": "first and last stage are on one rank, and weight gradients fill the gaps, within 1F1B's memory",
    "dualpipe": "microbatches enter at both ends, so that ranks start at once, for two copies of the parameters",
    "dualpipev": "DualPipe folded in the middle, which saves the second copy of the parameters",
}


@dataclass(frozen=True)
class Row:
    """A schedule and what it costs on virtual devices."""

    name: str
    schedule: Schedule
    verdict: Verdict

    @property
    def activations(self) -> float:
        """At the peak of the rank that has most, in micro-batches of 1/p of the model."""
        return max(self.verdict.in_flight) * self.verdict.numbered.share

    @property
    def parameters(self) -> float:
        """Of a rank, where 1/p of the model is 1."""
        return max(self.verdict.numbered.stages_on_ranks()) * self.verdict.numbered.share

    @property
    def messages(self) -> int:
        """That the rank with most sends in a step."""
        return max(self.verdict.numbered.messages())


def rows_for(ranks: int, microbatches: int, args: argparse.Namespace, own: Schedule | None) -> tuple[list[Row], str]:
    """All schedules of these sizes, and a word on those that there are not."""
    costs = dict(zip("FIW", args.costs, strict=True)) | {"B": args.costs[1] + args.costs[2]}
    found, missing = {}, []
    with uncollected():
        for name in SCHEDULES:
            if name == "naive" and ranks > 16:
                continue  # nobody would
            try:
                found[name] = build(name, ranks, microbatches, args.chunks)
            except ScheduleError as error:
                missing.append(str(error))
        if own:
            found[f"your {args.csv}"] = own
        rows = [Row(name, s, validate(s, costs, args.message)) for name, s in found.items()]
    return rows, "".join(f"not here: {why}\n" for why in missing)


def show(run: Run, rows: list[Row], message_bytes: int | None) -> None:
    header = ["schedule", "a step", "bubble\nof wall", "within\nthe step", "activations", "parameters", "messages"]
    table = []
    for row in sorted(rows, key=lambda row: -row.verdict.makespan):
        v = row.verdict
        table.append([row.name, v.makespan, v.bubble_of_wall, v.own_bubble, row.activations, row.parameters,
                      row.messages])  # fmt: skip
        if message_bytes:
            table[-1].append(row.messages * message_bytes / 1e6)
    run.say(tabulate(table, header + ["MB sent"] * bool(message_bytes), floatfmt=("", ".2f", ".4f", ".2f", "g", "g")))


def which(rows: list[Row], memory: float | None) -> str:
    """One line: the shortest step within the memory; of equals the one that needs less memory, and sends less."""
    fit = [row for row in rows if memory is None or row.activations <= memory]
    if not fit:
        return f"none of them fits --memory {memory:g}: the least is {min(row.activations for row in rows):g}"
    best = min(fit, key=lambda r: (round(r.verdict.makespan, 9), r.activations, r.parameters, r.messages))
    usual = next(row for row in rows if row.name == "1f1b")
    shorter = 1 - best.verdict.makespan / usual.verdict.makespan
    limit = "" if memory is None else f" within --memory {memory:g}"
    why = WHY.get(best.name, "it is yours")
    return (
        f"choose {best.name}{limit}: {why}; a step is {shorter:.1%} shorter than 1F1B's, with {best.activations:g} for "
        f"{usual.activations:g} microbatches of activations and {best.messages} for {usual.messages} messages a rank"
    )


def own_schedule(args: argparse.Namespace, ranks: int) -> Schedule | None:
    """The schedule in `--csv`; raises ValueError, naming rank, row and action, where it cannot run here."""
    if args.csv is None:
        return None
    usual = "print one with python -m pipeline.schedules 1f1b --stages 8 --microbatches 16 --csv"
    check_readable(f"--csv {args.csv}", args.csv, usual)
    try:
        with Path(args.csv).open(encoding="utf-8-sig", newline="") as file:  # some editors begin it with a mark
            schedule = from_csv(file)
        validate(schedule)
    except (csv.Error, ValueError) as error:  # a ScheduleError, or no text at all
        raise ValueError(f"--csv {args.csv!r}: {error}; {usual}") from None
    check_rules(argparse.Namespace(**vars(args), pp=ranks, own=size(schedule), own_ranks=len(schedule)), OWN)
    return schedule


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when a flag does not fit the others."""
    check_rules(args, (CHUNKS,))
    own = own_schedule(args, ranks)
    stages = lcm(ranks * args.chunks, 2 * ranks, size(own)[0] if own else 1)
    check_rules(argparse.Namespace(layers=args.layers, stages=stages, split=None), (EVERY_SCHEDULE,))
    check_stages(args, ranks, 1, COMPARE)


def lesson(run: Run) -> None:
    args, p, m = run.args, run.job.world_size, run.args.microbatches
    rows, missing = rows_for(p, m, args, own_schedule(args, p)) if run.job.rank == 0 else ([], "")
    schedules = run.job.share({row.name: row.schedule for row in rows})
    plans = {row.name: validate(row.schedule) for row in rows}  # with unit costs, as the ranks' clocks count
    for row in rows:
        run.say(f"{row.name}: {WHY.get(row.name, 'from --csv')}")
        run.say(show_schedule(row.schedule, plans[row.name].events) + "\n")
    axis = pipeline_axis(run)
    engines = {name: Engine(run, schedule, axis.labelled(name)) for name, schedule in schedules.items()}
    compared = train_beside_one_process(run, engines)
    measured = [measure(run, engine) for engine in engines.values()]
    if run.job.rank:
        return
    trained = list(zip(rows, measured, strict=True))
    if args.plot:
        plot(args.plot, {name: plan.events for name, plan in plans.items()})
    shown = {name: (name, timeline_of(each), 0) for name, each in zip(plans, measured, strict=True)}
    run.draw(timelines(("Every schedule as executed, in virtual time", "各个调度的实际执行，虚拟时间"), shown))
    points = [(row.name, row.verdict.makespan, row.activations, row.name) for row in rows]
    axes = ("a step, in virtual time", "一步的虚拟时间"), ("activations at the peak", "激活峰值")
    run.draw(scatter(("Time against memory", "时间与显存"), *axes, points))
    message = args.batch // m * args.sequence * args.hidden * run.dtype.itemsize
    times = f"F {args.costs[0]:g}, I {args.costs[1]:g}, W {args.costs[2]:g}, a message {args.message:g}"
    run.say(f"\n{p} ranks, {m} microbatches, in virtual time: {times}; activations, parameters: 1/p of the model = 1")
    run.say(missing)
    show(run, rows, message)
    run.say(which(rows, args.memory) + "\n")
    claim_equal(run, compared)
    claim(run, trained, plans)

    large, microbatches = args.large
    began = time.perf_counter()
    rows, missing = rows_for(large, microbatches, args, None)
    seconds = time.perf_counter() - began
    run.say(f"{large} ranks, {microbatches} microbatches, on virtual devices, calculated in {seconds:.1f} s\n{missing}")
    show(run, rows, None)
    run.say(which(rows, args.memory))
    show_course(run)


def claim(run: Run, trained: list[tuple[Row, list[Measured]]], plans: dict[str, Verdict]) -> None:
    """Of each schedule what every lesson claims of its own."""
    copies, actions, in_flight, messages = [], [], [], []
    for row, measured in trained:
        name, plan = row.name, plans[row.name]
        copies.append((f"{name}: copies", 0, differing_copies(measured)[0]))
        actions.append((f"{name}: actions", 0, differing_actions(measured, plan)))
        in_flight.append((f"{name}: in flight", max(plan.in_flight), max(m.in_flight for m in measured)))
        for r, n in enumerate(messages_by_rule(row.schedule)):
            messages.append((f"{name}: messages of rank {r}", n, measured[r].sent["engine"][0]))
    claim_each = run.evidence.each
    claim_each("copies on several ranks", "differ in 0 elements", copies, correctness=True)
    claim_each("actions executed other than drawn above", "0, by the ranks' virtual clocks", actions)
    claim_each("most in flight on a rank", "as in the table, in stages", in_flight)
    claim_each("messages of each rank", f"at most {' '.join(str(row.messages) for row, _ in trained)}", messages)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: which schedule, and why",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "Every schedule on the same model: time, bubble, memory and messages in one table.",
        smallest=2,
    )
    add_flags(frame, microbatches=16, trace=False, split=False)
    flag = frame.parser.add_argument
    flag("--chunks", type=int, default=2, help="stages a rank, of interleaved (default %(default)s)")
    flag("--costs", type=float, nargs=3, default=[1.0, 1.0, 1.0], metavar=("F", "I", "W"), help="default 1 1 1")
    flag("--message", type=float, default=0.0, help="time of a message (default %(default)s)")
    flag("--memory", type=float, help="microbatches of 1/p of the model that a rank can hold (default: any number)")
    flag("--large", type=int, nargs=2, default=[64, 128], metavar=("P", "M"), help="default 64 128")
    flag("--csv", metavar="FILE", help="a schedule of your own, to be compared too")
    frame.parser.set_defaults(layers=16, steps=2)
    sys.exit(frame.main(check, lesson))
