"""Lecture 08 and 09: every schedule side by side, and which to choose (流水并行 1F1B/1F1B Interleaved 原理).

    torchrun --nproc_per_node=8 pipeline/compare.py --costs 1 1 1 --message 0.1 --memory 8

One table: what a step takes, how much of it is bubble, the activations and parameters that a rank holds, the messages
it sends. Calculated on virtual devices with your times for F, I and W, of one p-th of the model each, and for a
message; and every schedule is also carried out by real processes, must equal one process, and must do each action
when the virtual devices do. Then a case too large for a laptop, on virtual devices alone.

`--csv FILE` adds a schedule of your own, in the notation of torch.distributed.pipelining, one row a rank. Print one to
start from with `python -m pipeline.schedules zb-v --stages 8 --microbatches 16 --csv`.

p ranks, m microbatches
"""

import argparse
import csv
import sys
import time
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from tabulate import tabulate

from core.proof.lesson import DTYPES, Lesson, Run
from core.proof.oracle import TOLERANCE
from core.proof.training import Comparison
from pipeline.evidence import Measured, differing_actions, differing_copies, messages_by_rule
from pipeline.schedules import SCHEDULES, Schedule, ScheduleError, build, from_csv, held, part_of_rank, size
from pipeline.timeline import draw, legend, plot
from pipeline.training import add_flags, train_with
from pipeline.training import check as check_stages
from pipeline.validator import Verdict, validate

LARGEST = 100_000  # ranks x microbatches of a calculation that ends while the other ranks wait
WHY = {
    "naive": "nothing runs at once",
    "gpipe": "the pipeline fills and empties once a step, and every microbatch is held",
    "1f1b": "GPipe's bubble, but a rank holds at most p microbatches",
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
        """At the peak of the rank that holds most, in microbatches of 1/p of the model."""
        return max(self.verdict.in_flight) * part_of_rank(self.schedule)

    @property
    def parameters(self) -> float:
        """That a rank holds, in p-th parts of the model."""
        return max(map(len, held(self.schedule))) * part_of_rank(self.schedule)

    @property
    def messages(self) -> int:
        """That the rank with most sends in a step."""
        return max(messages_by_rule(self.schedule))


def rows_for(ranks: int, microbatches: int, args: argparse.Namespace, own: Schedule | None) -> tuple[list[Row], str]:
    """All schedules of these sizes, and a word on those that there are not."""
    costs = dict(zip("FIW", args.costs, strict=True)) | {"B": args.costs[1] + args.costs[2]}
    found, missing = {}, []
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
    header = ["schedule", "a step", "bubble of wall", "within the step", "activations", "parameters", "messages"]
    table = []
    for row in sorted(rows, key=lambda row: -row.verdict.makespan):
        v = row.verdict
        table.append([row.name, v.makespan, v.bubble_of_wall, v.own_bubble, row.activations, row.parameters,
                      row.messages])  # fmt: skip
        if message_bytes:
            table[-1].append(row.messages * message_bytes / 1e6)
    run.say(tabulate(table, header + ["MB sent"] * bool(message_bytes), floatfmt=("", ".2f", ".4f", ".2f", "g", "g")))


def which(rows: list[Row], memory: float | None) -> str:
    """One line: the shortest step within the memory; of equals the one that holds less, and sends less."""
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
    try:
        with Path(args.csv).open(encoding="utf-8", newline="") as file:
            schedule = from_csv(file)
        validate(schedule)
    except OSError as error:
        raise ValueError(f"--csv {args.csv}: {error.strerror}; {usual}") from None
    except (csv.Error, ValueError) as error:  # a ScheduleError, or no text at all
        raise ValueError(f"--csv {args.csv!r}: {error}; {usual}") from None
    _, microbatches = size(schedule)
    if len(schedule) != ranks:
        raise ValueError(f"--csv {args.csv}: is for {len(schedule)} ranks; use --nproc_per_node {len(schedule)}")
    if microbatches != args.microbatches:
        batch = -(-args.batch // microbatches) * microbatches
        use = f"--microbatches {microbatches} --batch {batch}"
        raise ValueError(f"--csv {args.csv}: has {microbatches} microbatches; use {use}")
    return schedule


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when a flag does not fit the others."""
    if args.chunks < 1:
        raise ValueError(f"--chunks {args.chunks}: a rank holds at least one stage; use --chunks 2")
    own = own_schedule(args, ranks)
    all_counts = lcm(ranks * args.chunks, 2 * ranks, size(own)[0] if own else 1)
    if args.layers % all_counts or args.layers < all_counts:
        raise ValueError(
            f"--layers {args.layers}: must be a multiple of {all_counts}, the stages of every schedule; "
            f"use --layers {max(1, round(args.layers / all_counts)) * all_counts}"
        )
    check_stages(args, ranks)
    if not all(0 < cost < float("inf") for cost in args.costs) or not 0 <= args.message < float("inf"):  # NaN neither
        raise ValueError("--costs and --message: times, F, I and W more than 0; use --costs 1 1 1 --message 0")
    if args.memory is not None and not 0 < args.memory < float("inf"):
        raise ValueError(f"--memory {args.memory}: must be positive; use --memory {ranks}")
    if min(args.large) < 1 or args.large[0] * args.large[1] > LARGEST:
        raise ValueError(
            f"--large {args.large[0]} {args.large[1]}: ranks and microbatches, at least 1 and at most {LARGEST:,} "
            "together; use --large 64 512"
        )


def lesson(run: Run) -> None:
    args, p, m = run.args, run.job.world_size, run.args.microbatches
    own = own_schedule(args, p)
    rows, missing = rows_for(p, m, args, own)
    plans = {row.name: validate(row.schedule) for row in rows}  # with unit costs, as the ranks' clocks count
    for row in rows:
        run.say(f"{row.name}: {WHY.get(row.name, 'from --csv')}\n{legend(row.schedule)}")
        run.say(draw(row.schedule, plans[row.name].events, sys.stdout.isatty()) + "\n")
    done: list[tuple[Row, list[Measured], Comparison]] = []
    for row in rows:
        done.append((row, *train_with(run, row.schedule)))
    if run.job.rank:
        return
    if args.plot:
        plot(args.plot, {name: plan.events for name, plan in plans.items()})
    message = args.batch // m * args.sequence * args.hidden * DTYPES[args.dtype].itemsize
    times = f"F {args.costs[0]:g}, I {args.costs[1]:g}, W {args.costs[2]:g}, a message {args.message:g}"
    run.say(f"\n{p} ranks, {m} microbatches, {times}; activations and parameters in p-th parts of the model\n{missing}")
    show(run, rows, message)
    run.say(which(rows, args.memory) + "\n")
    claim(run, done, plans)

    large, microbatches = args.large
    began = time.perf_counter()
    rows, missing = rows_for(large, microbatches, args, None)
    run.say(f"{large} ranks, {microbatches} microbatches, on virtual devices, calculated in "
            f"{time.perf_counter() - began:.1f} s\n{missing}")  # fmt: skip
    show(run, rows, None)
    run.say(which(rows, args.memory))


def claim(run: Run, done: list[tuple[Row, list[Measured], Comparison]], plans: dict[str, Verdict]) -> None:
    """Of each schedule what every lesson claims of its own."""
    tolerance, each = TOLERANCE[run.dtype], run.evidence.each
    for what, field, limit in (("losses", "loss", tolerance.loss), ("gradients", "gradient", tolerance.gradient),
                               ("the norm", "norm", tolerance.loss),
                               ("parameters", "parameter", tolerance.parameter)):  # fmt: skip
        cases = [(f"{row.name}: {what}", 0, getattr(worst, field)) for row, _, worst in done]
        each(f"{what} equal one process", "largest relative difference 0, each schedule", cases, limit)
    cases = [(f"{row.name}: copies", 0, differing_copies(measured)[0]) for row, measured, _ in done]
    each("copies on several ranks", "differ in 0 elements", cases)
    cases = [(f"{row.name}: actions", 0, differing_actions(measured, plans[row.name])) for row, measured, _ in done]
    each("actions executed other than drawn above", "0, by the ranks' virtual clocks", cases)
    cases = [(f"{row.name}: in flight", max(plans[row.name].in_flight), max(m.in_flight for m in measured))
             for row, measured, _ in done]  # fmt: skip
    each("most in flight on a rank", "as in the table, in stages", cases)
    cases = [(f"{row.name}: messages of rank {r}", n, measured[r].sent()[0])
             for row, measured, _ in done for r, n in enumerate(messages_by_rule(row.schedule))]  # fmt: skip
    most = " ".join(f"{row.messages}" for row, _, _ in done)
    each("messages of each rank", f"at most {most}", cases)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: which schedule, and why",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "Every schedule on the same model: time, bubble, memory and messages in one table.",
        smallest=2,
    )
    add_flags(frame, microbatches=16, trace=False)
    flag = frame.parser.add_argument
    flag("--chunks", type=int, default=2, help="stages a rank holds, of interleaved (default %(default)s)")
    flag("--costs", type=float, nargs=3, default=[1.0, 1.0, 1.0], metavar=("F", "I", "W"), help="default 1 1 1")
    flag("--message", type=float, default=0.0, help="time of a message (default %(default)s)")
    flag("--memory", type=float, help="microbatches of 1/p of the model that a rank can hold (default: any number)")
    flag("--large", type=int, nargs=2, default=[64, 512], metavar=("P", "M"), help="default 64 512")
    flag("--csv", metavar="FILE", help="a schedule of your own, to be compared too")
    frame.parser.set_defaults(layers=16, steps=2)
    sys.exit(frame.main(check, lesson))
