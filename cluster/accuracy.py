"""Lecture 03: can the planner be believed? Held against hundreds of published runs (大模型并行与 GPU 集群配置).

    torchrun --nproc_per_node=1 cluster/accuracy.py

First Narayanan et al. 2021 (2104.04473), table 1, from 1.7 to 1008 x 10^9 parameters on 32 to 3072 GPUs. The time of a
step has three constants that no data sheet says: what part of the peak a large matrix product reaches, how often a
forward moves a byte of activations to or from memory, what part of the links' bandwidth messages get. They are fitted
to nine runs and predict the tenth, ten times over. Then the six runs of table 2, of which nothing is fitted; and the
question that a planner is for: is the (tp, pp) that the authors chose among the first three, with all else as they had?

Then the runs of `planner/published_runs.csv`, of today's machines and programs, each with at most four constants of its
program, fitted without the runs of its model on as many GPUs: seconds by source, pairs of layouts in their order, what
a device holds. Where a run does not print what the time needs, it is predicted over all that it can mean. `--runs FILE`
holds the planner against other runs, in the same columns.

Calculated by the first rank; the others, if there are any, wait.

read: accuracy.py:45-109; planner/published.py:17-29; then planner/steptime.py, planner/validation.py
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.evidence.published_runs import (
    claim_choice,
    claim_counts,
    claim_second_table,
    claim_time,
    say_one_stage,
)
from cluster.evidence.todays_runs import by_source, claim_today
from cluster.planner.plans import plans
from cluster.planner.ptdp import TABLE, TABLE_2
from cluster.planner.published import A100, Measurement, of_row, of_second_table
from cluster.planner.rows import published, rows
from cluster.planner.software import Software
from cluster.planner.validation import with_committed
from core.proof.lesson import Lesson, Run

CONSTANTS = ("gemm", "passes", "links")
FIRST_GUESS = Software(gemm=0.7, passes=2.0, links=0.8, blocking=True, scattered=True, bucket=float("inf"))


def fit(runs: Sequence[Measurement], start: Software = FIRST_GUESS) -> Software:
    """The constants with the least squares of relative errors: Gauss-Newton, on their logarithms."""

    def software(x: np.ndarray) -> Software:
        return replace(start, **dict(zip(CONSTANTS, np.exp(x).tolist(), strict=True)))

    def errors(x: np.ndarray) -> np.ndarray:
        return np.array(relative_errors(runs, [software(x)] * len(runs)))

    x = np.log([getattr(start, name) for name in CONSTANTS])
    for _ in range(6):
        here = errors(x)
        slopes = np.array([(errors(x + 1e-5 * unit) - here) / 1e-5 for unit in np.eye(len(x))]).T
        x = np.clip(x - np.linalg.lstsq(slopes, here, rcond=None)[0], -5, 5)  # finite, if the runs do not determine it
    return software(x)


def leave_one_out(runs: Sequence[Measurement]) -> list[Software]:
    """For each run the constants of the others."""
    every = fit(runs)
    return [fit([*runs[:i], *runs[i + 1 :]], every) for i in range(len(runs))]


def relative_errors(runs: Sequence[Measurement], constants: Sequence[Software]) -> list[float]:
    return [run.predicted(software) / run.tflops - 1 for run, software in zip(runs, constants, strict=True)]


def standings(run: Measurement, software: Software) -> tuple[tuple[int, int], tuple[int, int]]:
    """The position of the run's (tp, pp) among all that fit, each at its best, and how many there are.

    First with the microbatch and the stages a rank of the run, or 1 stage where they cannot be; then with both free.
    """
    x = run.layout
    fixed = {"cp": [1], "sp": [False], "zero": [0], "recompute": ["full"], "recompute_every": [1], "split": [""],
             "schedule": ["1f1b", "interleaved"]}  # fmt: skip
    found, _ = plans(run.model, A100, x.ranks, x.batch, software, fixed | {"v": [2, 3, 4, 5, 6, 8]})
    free = [plan.layout for plan in found]  # the fastest first
    alike = [layout for layout in free if layout.microbatch == x.microbatch and layout.v in (1, x.v)]
    orders = [list(dict.fromkeys((layout.tp, layout.pp) for layout in layouts)) for layouts in (alike, free)]
    first, second = ((1 + order.index((x.tp, x.pp)), len(order)) for order in orders)
    return first, second


def lesson(run: Run) -> None:
    if run.job.rank:
        return
    runs, second = [of_row(row) for row in TABLE], [of_second_table(*row) for row in TABLE_2]
    claim_counts(run)
    every, constants = fit(runs), leave_one_out(runs)
    fitted = ", ".join(f"{name} {getattr(every, name):.3f}" for name in CONSTANTS)
    run.say(f"constants fitted to all ten: {fitted}")
    claim_time(run, runs, constants, relative_errors(runs, constants))
    one_stage = [of_row(row, row.v_in_script) for row in TABLE]
    say_one_stage(run, relative_errors(one_stage, leave_one_out(one_stage)))
    claim_second_table(run, second, every, relative_errors(second, [every] * len(second)))
    claim_choice(run, runs, [standings(each, software) for each, software in zip(runs, constants, strict=True)])
    if run.args.runs:
        others = with_committed(rows(Path(run.args.runs)))
        run.say(f"the runs of {run.args.runs}, by the committed constants\n{by_source(others)}\n")
    else:
        claim_today(run, published())


def check_file(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError: `--runs` names no such table."""
    if args.runs:
        rows(Path(args.runs))


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "03",
        "Parallelism and GPU cluster configuration: is the planner right?",
        "大模型并行与 GPU 集群配置",
        "Published runs: each predicted from others, the order of layouts, their memory, and the authors' choice.",
        example=1,
    )
    frame.parser.add_argument("--runs", metavar="FILE.csv", help="other published runs, in the table's columns")
    sys.exit(frame.main(check_file, lesson))
