"""Lecture 03: can the planner be believed? Held against ten published runs (大模型并行与 GPU 集群配置).

    torchrun --nproc_per_node=1 cluster/accuracy.py

Narayanan et al. 2021 (2104.04473), table 1, from 1.7 to 1008 x 10^9 parameters on 32 to 3072 GPUs. The time of a step
has three constants that no data sheet says: what part of the peak a large matrix product reaches, how often a forward
moves a byte of activations to or from memory, what part of the links' bandwidth messages get. They are fitted to nine
runs and predict the tenth, ten times over. Then the six runs of table 2, of which nothing is fitted; and the question
that a planner is for: is the (tp, pp) that the authors chose among the first three, with all else as they had it?

Calculated by the first rank; the others, if there are any, wait.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tabulate import tabulate

from cluster.planner.hardware import PRESETS as MACHINES
from cluster.planner.hardware import Software
from cluster.planner.layout import Layout
from cluster.planner.models import PRESETS, Model
from cluster.planner.plans import fits, plans
from cluster.planner.ptdp import TABLE, TABLE_2, Published
from cluster.planner.steptime import step
from core.proof.lesson import Lesson, Run
from core.proof.plot import bars

A100 = MACHINES["dgx-a100"]
CONSTANTS = ("gemm", "passes", "links")
FIRST_GUESS = Software(gemm=0.7, passes=2.0, links=0.8, blocking=True, scattered=True, bucket=float("inf"))
FEW, MEAN, LARGEST = 3, 0.025, 0.06


@dataclass(frozen=True)
class Measurement:
    """A run: the model, how it was laid out, and the TFLOP/s per GPU that were published."""

    model: Model
    layout: Layout
    tflops: float

    def predicted(self, software: Software) -> float:
        """TFLOP/s per GPU, counted as the paper does: what is computed again counts."""
        seconds = step(self.model, self.layout, A100, software).seconds
        return self.model.flops(self.layout.batch, forwards=2) / seconds / self.layout.ranks / 1e12


def measurement(
    name: str, tp: int, pp: int, gpus: int, batch: int, microbatch: int, v: int, tflops: float
) -> Measurement:
    dp = gpus // (tp * pp)
    schedule = "interleaved" if v > 1 else "1f1b"
    layout = Layout(tp, 1, 1, 1, pp, dp, v, schedule=schedule, microbatch=microbatch,
                    microbatches=batch // (dp * microbatch), recompute="full")  # fmt: skip
    # The kernels of that time keep the scores of attention, and every dropout its mask.
    return Measurement(replace(PRESETS[name], attention="softmax", dropout=True), layout, tflops)


def of_row(row: Published, v: int | None = None) -> Measurement:
    return measurement(row.name, row.tp, row.pp, row.gpus, row.batch, row.microbatch, v or row.v, row.tflops)


# ---- The constants ---------------------------------------------------------------------------------------------------


def fit(runs: Sequence[Measurement], start: Software = FIRST_GUESS) -> Software:
    """The constants with the least squares of relative errors: Gauss-Newton, on their logarithms."""

    def software(x: np.ndarray) -> Software:
        return replace(start, **dict(zip(CONSTANTS, np.exp(x).tolist(), strict=True)))

    def errors(x: np.ndarray) -> np.ndarray:
        return np.array([run.predicted(software(x)) / run.tflops - 1 for run in runs])

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


def place(run: Measurement, software: Software, free: bool) -> tuple[int, int]:
    """Which place its (tp, pp) takes among all that fit, each at its best, and how many there are.

    Args:
        free: choose the microbatch and the stages a rank too; else they are the run's, or 1 stage where they cannot be.
    """
    x = run.layout
    fixed = {"cp": [1], "sp": [False], "zero": [0], "recompute": ["full"], "schedule": ["1f1b", "interleaved"]}
    fixed |= {"v": [2, 3, 4, 5, 6, 8]} if free else {"v": [x.v], "microbatch": [x.microbatch]}
    if not free and x.v == 1:
        fixed["schedule"] = ["1f1b"]
    found, _ = plans(run.model, A100, x.ranks, x.batch, software, fixed)
    order = list(dict.fromkeys((plan.layout.tp, plan.layout.pp) for plan in found))
    return 1 + order.index((x.tp, x.pp)), len(order)


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    if run.job.rank:
        return
    runs = [of_row(row) for row in TABLE]
    names = [f"{row.billions:g}B" for row in TABLE]
    claim_counts(run, names)
    constants = leave_one_out(runs)
    errors = relative_errors(runs, constants)
    claim_time(run, names, runs, constants, errors)
    claim_choice(run, names, runs, constants, errors)


def claim_counts(run: Run, names: Sequence[str]) -> None:
    """Parameters and floating-point operations, counted matrix by matrix, against what is printed."""
    models = [PRESETS[row.name] for row in TABLE]

    def each(claim: str, formula: str, expected: Callable, measured: Callable, tolerance: float = 0.0) -> None:
        cases = [(f"{claim}, {n}", expected(r), measured(m, r)) for n, m, r in zip(names, models, TABLE, strict=True)]
        run.evidence.each(claim, formula, cases, tolerance)

    each("parameters, 10^9", "as printed", lambda r: r.billions, lambda m, r: round(m.parameters() / 1e9, 1))
    each("FLOP a step, over equation 3", "1", lambda r: 1.0, lambda m, r: m.flops(r.batch, 2) / equation_3(r), 1e-12)
    each(
        "% of the peak, of the TFLOP/s copied here",
        "as printed",
        lambda r: r.percent,
        lambda m, r: round(100 * r.tflops * 1e12 / A100.peak),
    )
    steps = [(174.6, "gpt3-175b", 300e9, 1024, 140, 34), (1008, "ptdp-1008b", 450e9, 3072, 163, 84)]
    days = [(f"days, {b:g}B", printed, round(8 * tokens * PRESETS[name].parameters() / (n * x * 1e12) / 86400))
            for b, name, tokens, n, x, printed in steps]  # fmt: skip
    run.evidence.each("days of training, 8TP/(nX)", "34 and 84, as printed", days)


def equation_3(row: Published) -> float:
    s, v, h = 2048, 51_200, row.hidden
    return 96 * row.batch * s * row.layers * h**2 * (1 + s / (6 * h) + v / (16 * row.layers * h))


def claim_time(
    run: Run, names: list[str], runs: list[Measurement], constants: list[Software], errors: list[float]
) -> None:
    every = fit(runs)
    said = ", ".join(f"{name} {getattr(every, name):.3f}" for name in CONSTANTS)
    run.say(f"constants fitted to all ten: {said}")
    rows = []
    for name, each, software, error in zip(names, runs, constants, errors, strict=True):
        parts = step(each.model, each.layout, A100, software)
        shares = [
            parts.parts[cause] / parts.seconds for cause in ("matrix products", "memory", "tp", "bubble", "pp", "dp")
        ]
        rows.append((name, each.tflops, each.predicted(software), 100 * error, *shares))
    header = ("run", "published", "predicted", "error %", "products", "memory", "tp", "bubble", "pp", "dp")
    run.say(f"TFLOP/s per GPU, each predicted from the nine others\n{tabulate(rows, header, floatfmt='.3g')}\n")
    others = [(sum(r.tflops for r in runs) - each.tflops) / (len(runs) - 1) / each.tflops - 1 for each in runs]
    sizes = np.abs(errors)
    guess = f"guessing the others' mean gives {np.mean(np.abs(others)):.1%}"
    run.evidence.claim("mean error, leave one out", f"0, at most {MEAN:.1%}; {guess}", 0, sizes.mean(), MEAN)
    guess = f"guessing the others' mean gives {np.max(np.abs(others)):.1%}"
    run.evidence.claim("largest error, leave one out", f"0, at most {LARGEST:.0%}; {guess}", 0, sizes.max(), LARGEST)

    script = [of_row(row, row.v_in_script) for row in TABLE]
    other = np.abs(relative_errors(script, leave_one_out(script)))
    run.say(
        "With one stage a rank in the 39.1B and the 1008B, as in the authors' script but not in their text, the mean "
        f"error is {other.mean():.2%} and the largest {other.max():.2%}."
    )

    claim_second_table(run, every)
    if run.args.plot:
        series = {"published": [r.tflops for r in runs], "predicted": [row[2] for row in rows]}
        bars(run.args.plot, "PTD-P on A100: each run predicted from the nine others", "TFLOP/s per GPU", names, series)


def claim_second_table(run: Run, software: Software) -> None:
    """Table 2, of which nothing is fitted: the same two models on ever more GPUs, so ever fewer microbatches."""
    second = [of_second_table(*row) for row in TABLE_2]
    cases = [
        (f"error, table 2, {size}B on {gpus}", 0.0, error)
        for (size, gpus, *_), error in zip(TABLE_2, relative_errors(second, [software] * len(second)), strict=True)
    ]
    run.evidence.each("errors in table 2, never fitted", f"0, at most {LARGEST:.0%}", cases, LARGEST)
    half = len(second) // 2
    for few, many in ((second[0], second[half - 1]), (second[half], second[-1])):
        expected, measured = (of(many) / of(few) - 1 for of in (lambda r: r.tflops, lambda r: r.predicted(software)))
        what = f"change from {few.layout.ranks} to {many.layout.ranks} GPUs, {few.model.parameters() / 1e9:.0f}B"
        run.evidence.claim(what, f"{expected:.1%}, within 2 points: the bubble grows", expected, measured, 0.02)


def of_second_table(size: float, gpus: int, batch: int, tflops: float) -> Measurement:
    name, pp = ("gpt3-175b", 12) if size < 200 else ("ptdp-529.6b", 35)
    return measurement(name, 8, pp, gpus, batch, 1, 1, tflops)


def claim_choice(
    run: Run, names: list[str], runs: list[Measurement], constants: list[Software], errors: list[float]
) -> None:
    """The published layout fits, and is one that the planner would have proposed."""
    rows, places = [], []
    for name, each, software in zip(names, runs, constants, strict=True):
        need = fits(each.model, each.layout, A100)
        (here, of), (free, of_free) = (place(each, software, free) for free in (False, True))
        places.append(here)
        rows.append((name, f"{each.layout.tp}, {each.layout.pp}", need.total / 1e9 if need else float("nan"),
                     f"{here} of {of}", f"{free} of {of_free}"))  # fmt: skip
    header = ("run", "tp, pp", "GB", "place", "place, microbatch and v free too")
    run.say(tabulate(rows, header, floatfmt=".1f"))
    run.say("The authors chose by rule of thumb, tp up to a node and then pp, and not by search.\n")
    unfit = sum(row[2] != row[2] for row in rows)
    run.evidence.claim("runs whose layout does not fit 80 GB", "0 of 10", 0, unfit)
    far = sum(here > FEW for here in places)
    run.evidence.claim(f"runs whose (tp, pp) is not among the first {FEW}", "0 of 10", 0, far)


def refuse(args: argparse.Namespace, ranks: int) -> None:
    """Nothing depends on the ranks."""


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "03",
        "Parallelism and GPU cluster configuration: is the planner right?",
        "大模型并行与 GPU 集群配置",
        "Ten published runs: each predicted from the nine others, and the authors' choice found again.",
        example=1,
    )
    sys.exit(frame.main(refuse, lesson))
