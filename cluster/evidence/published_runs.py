"""What `cluster/accuracy.py` claims: the planner's counts, times and choices against the published runs."""

from collections.abc import Callable, Sequence

import numpy as np
from tabulate import tabulate

from cluster.planner.counting import model_parameters, step_flops
from cluster.planner.models import PRESETS
from cluster.planner.plans import fits
from cluster.planner.ptdp import TABLE, TABLE_2, Published
from cluster.planner.published import A100, Measurement
from cluster.planner.software import Software
from cluster.planner.steptime import step
from core.proof.figures import bars, scatter
from core.proof.lesson import Run

FIRST, MEAN, LARGEST = 3, 0.025, 0.06
NAMES = [f"{row.billions:g}B" for row in TABLE]
DAYS = (  # section 5.10: (model, tokens, GPUs, TFLOP/s per GPU, days as printed)
    ("gpt3-175b", 300e9, 1024, 140, 34),
    ("ptdp-1008b", 450e9, 3072, 163, 84),
)
CAUSES = {"matrix products": "products", "memory": "memory", "tp": "tp", "bubble": "bubble", "pp": "pp", "dp": "dp"}


def claim_counts(run: Run) -> None:
    """Parameters and floating-point operations, counted matrix by matrix, against what is printed."""

    def each(claim: str, formula: str, expected: Callable, measured: Callable, tolerance: float = 0.0) -> None:
        cases = [(f"{claim}, {n}", expected(r), measured(r)) for n, r in zip(NAMES, TABLE, strict=True)]
        run.evidence.each(claim, formula, cases, tolerance)

    def flop_ratio(row: Published) -> float:
        return step_flops(PRESETS[row.name], row.batch, 2) / equation_3(row)

    def size(name: str) -> float:
        return model_parameters(PRESETS[name])

    each("parameters, 10^9", "as printed", lambda r: r.billions, lambda r: round(size(r.name) / 1e9, 1))
    each("FLOP a step, over equation 3", "1", lambda r: 1.0, flop_ratio, 1e-12)
    each(
        "% of the peak, of the TFLOP/s copied here",
        "as printed",
        lambda r: r.percent,
        lambda r: round(100 * r.tflops * 1e12 / A100.peak),
    )
    days = [
        (f"days, {size(name) / 1e9:.4g}B", printed, round(8 * tokens * size(name) / (gpus * tflops * 1e12) / 86400))
        for name, tokens, gpus, tflops, printed in DAYS
    ]
    run.evidence.each("days of training, 8TP/(nX)", "34 and 84, as printed", days)


def equation_3(row: Published) -> float:
    s, v, h = 2048, 51_200, row.hidden
    return 96 * row.batch * s * row.layers * h**2 * (1 + s / (6 * h) + v / (16 * row.layers * h))


def claim_time(run: Run, runs: Sequence[Measurement], constants: Sequence[Software], errors: Sequence[float]) -> None:
    """Each of the ten runs, predicted with the constants of the nine others; beside it the guess of their mean."""
    rows = []
    for name, each, software, error in zip(NAMES, runs, constants, errors, strict=True):
        time = step(each.model, each.layout, A100, software)
        shares = [time.parts[cause] / time.seconds for cause in CAUSES]
        rows.append((name, each.tflops, each.predicted(software), 100 * error, *shares))
    header = ("run", "published", "predicted", "error %", *CAUSES.values())
    run.say(f"TFLOP/s per GPU, each predicted from the nine others\n{tabulate(rows, header, floatfmt='.3g')}\n")
    rates = np.array([each.tflops for each in runs])
    guesses = np.abs((rates.sum() - rates) / (len(rates) - 1) / rates - 1)
    sizes = np.abs(errors)
    guess = f"guessing the others' mean gives {guesses.mean():.1%}"
    run.evidence.claim("mean error, leave one out", f"0, at most {MEAN:.1%}; {guess}", 0, sizes.mean(), MEAN)
    guess = f"guessing the others' mean gives {guesses.max():.1%}"
    run.evidence.claim("largest error, leave one out", f"0, at most {LARGEST:.0%}; {guess}", 0, sizes.max(), LARGEST)
    series = {"published": rates.tolist(), "predicted": [row[2] for row in rows]}
    title = (
        "PTD-P on A100: each run predicted from the nine others", "A100 上的 PTD-P：每一次由另外九次预测",
    )  # fmt: skip
    run.draw(bars(title, "TFLOP/s per GPU", NAMES, series), chart=True)
    points = [(name, each.tflops, row[2], "") for name, each, row in zip(NAMES, runs, rows, strict=True)]
    title = "Predicted against published", "预测值与公开值"
    axes = ("published, TFLOP/s", "公开值，TFLOP/s"), ("predicted", "预测值")
    run.draw(scatter(title, *axes, points, diagonal=True))


def say_one_stage(run: Run, errors: Sequence[float]) -> None:
    sizes = np.abs(errors)
    run.say(
        "With one stage a rank in the 39.1B and the 1008B, as in the authors' script but not in their text, the mean "
        f"error is {sizes.mean():.2%} and the largest {sizes.max():.2%}."
    )


def claim_second_table(run: Run, runs: Sequence[Measurement], software: Software, errors: Sequence[float]) -> None:
    """Table 2, of which nothing is fitted: the same two models on ever more GPUs, so ever fewer microbatches."""
    cases = [
        (f"error, table 2, {size}B on {gpus}", 0.0, error)
        for (size, gpus, *_), error in zip(TABLE_2, errors, strict=True)
    ]
    run.evidence.each("errors in table 2, never fitted", f"0, at most {LARGEST:.0%}", cases, LARGEST)
    half = len(runs) // 2
    for few, many in ((runs[0], runs[half - 1]), (runs[half], runs[-1])):
        published = many.tflops / few.tflops - 1
        predicted = many.predicted(software) / few.predicted(software) - 1
        size = model_parameters(few.model) / 1e9
        what = f"change from {few.layout.ranks} to {many.layout.ranks} GPUs, {size:.0f}B"
        run.evidence.claim(what, f"{published:.1%}, within 2 points: the bubble grows", published, predicted, 0.02)


def claim_choice(
    run: Run, runs: Sequence[Measurement], standings: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    """The published layout fits, and is one that the planner would have proposed."""
    rows = []
    for name, each, (alike, free) in zip(NAMES, runs, standings, strict=True):
        memory = fits(each.model, each.layout, A100)
        gigabytes = memory.total / 1e9 if memory else None
        orders = [f"{order} of {count}" for order, count in (alike, free)]
        rows.append((name, f"{each.layout.tp}, {each.layout.pp}", gigabytes, *orders))
    header = ("run", "tp, pp", "GB", "position", "position, microbatch and v free too")
    run.say(tabulate(rows, header, floatfmt=".1f"))
    run.say("The authors chose by rule of thumb, tp up to a node and then pp, and not by search.\n")
    unfit = sum(row[2] is None for row in rows)
    run.evidence.claim("runs whose layout does not fit 80 GB", "0 of 10", 0, unfit)
    far = sum(order > FIRST for (order, _), _ in standings)
    run.evidence.claim(f"runs whose (tp, pp) is not among the first {FIRST}", "0 of 10", 0, far)
