"""What `cluster/accuracy.py` claims of the runs published since: seconds by source, order of layouts, memory."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median

from tabulate import tabulate

from cluster.planner.fitting import Fit
from cluster.planner.rows import Row
from cluster.planner.software import BORROWED, CONSTANTS, FITTED
from cluster.planner.validation import Outcome, holdings, outcomes, pairs, quantiles, too_large, without_sources
from core.proof.lesson import Run

BARS = {"dense": (0.06, 0.15), "mixtures of experts": (0.10, 0.25)}  # median and 90th percentile, H100 in bfloat16
PAIRS, MEMORY = 0.85, 0.08
MISSES = 10


def by_source(found: Sequence[Outcome]) -> str:
    groups: dict[tuple, list[Outcome]] = {}
    for each in found:
        row = each.row
        kind = "dense" if each.dense else "experts"
        groups.setdefault((row.source, row.cells["gpu"], row.bits, kind, row.software), []).append(each)
    lines = []
    for key, several in groups.items():
        middle, ninth, worst = quantiles(each.error for each in several)
        unsaid = sum(bool(each.row.open) for each in several)
        mean = fmean(each.error for each in several)
        lines.append((*key, len(several), unsaid or "", *(100 * x for x in (middle, ninth, worst, mean))))
    header = ("source", "GPU", "bits", "kind", "program", "runs", "unsaid", "median %", "90 %", "worst %", "mean %")
    return tabulate(lines, header, floatfmt=".1f")


def constants(fits: dict[str, Fit]) -> str:
    lines = [
        (name, len(fits[name].rows) if name in fits else BORROWED.get(name, "table 1"),
         ", ".join(f"{constant} {value:.3g}" for constant, value in zip(FITTED[name], CONSTANTS[name], strict=True)))
        for name in FITTED
    ]  # fmt: skip
    return tabulate(lines, ("program", "runs", "constants fitted"))


def ranges(found: Sequence[Outcome]) -> str:
    """Of runs that leave something open: how much slower the slowest is that they can mean, and where they are."""
    lines = []
    for name in sorted({each.row.source for each in found if each.row.open}):
        several = [each for each in found if each.row.source == name and each.row.open]
        wide = median(each.prediction.slowest / each.prediction.seconds for each in several)
        inside = sum(
            0.94 * each.prediction.seconds <= each.row.seconds <= 1.06 * each.prediction.slowest for each in several
        )
        lacks = Counter(what for each in several for what in each.row.open)
        lines.append((name, len(several), ", ".join(lacks), f"{wide:.2f}", f"{inside} of {len(several)}"))
    return tabulate(lines, ("source", "runs", "not printed", "slowest / fastest", "inside, 6 % around"))


def say_misses(run: Run, found: Sequence[Outcome]) -> None:
    counted = sorted((each for each in found if each.counts), key=lambda each: -abs(each.error))
    lines = []
    for each in counted[:MISSES]:
        cells, parts = each.row.cells, each.prediction.step.parts
        largest = max(parts, key=parts.__getitem__)
        layout = " ".join(f"{n} {cells[n]}" for n in ("tp", "cp", "ep", "pp") if cells[n] not in ("", "1"))
        lines.append((each.row.source, cells["model"][:24], cells["gpus"], layout, f"{each.error:+.0%}",
                      f"{largest} {parts[largest] / each.prediction.seconds:.0%}"))  # fmt: skip
    header = ("source", "model", "GPUs", "layout", "error", "spent on, as predicted")
    run.say(f"the {MISSES} largest misses\n{tabulate(lines, header)}\n")


def claim_today(run: Run, rows: Sequence[Row]) -> None:
    """Each run predicted without the runs of its model on a cluster of its size."""
    found, fits = outcomes(rows)
    why = Counter(row.why for row in rows if row.why)
    left = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
    run.say(f"{len(found)} of {len(rows)} runs say enough. The others: {left}.\n")
    run.say(f"{constants(fits)}\n\nseconds of a step, predicted over published\n{by_source(found)}\n")
    run.say(f"runs that leave something open are predicted as the fastest that fits\n{ranges(found)}\n")
    say_misses(run, found)
    harder = [each for each in without_sources(rows, fits) if each.counts]
    for dense, kind in ((True, "dense"), (False, "mixtures")):
        middle, ninth, _ = quantiles(each.error for each in harder if each.dense == dense)
        run.say(f"without all runs of its source, {kind}: median {middle:.1%}, 90th percentile {ninth:.1%}")
    for kind, (middle_bar, ninth_bar) in BARS.items():
        errors = [each.error for each in found if each.counts and each.dense == (kind == "dense")]
        middle, ninth, _ = quantiles(errors)
        runs = f"{len(errors)} runs of H100 in bfloat16, {kind}"
        run.evidence.claim(f"median error, {kind}", f"0, at most {middle_bar:.0%}; {runs}", 0, middle, middle_bar)
        run.evidence.claim(f"90th percentile of errors, {kind}", f"0, at most {ninth_bar:.0%}", 0, ninth, ninth_bar)
    right, wrong = pairs(found)
    every = len(right) + len(wrong)
    share = len(wrong) / every
    formula = f"0, at most {1 - PAIRS:.0%} of {every} that are more than 2 % apart"
    run.evidence.claim("pairs of layouts ordered wrongly", formula, 0, share, 1 - PAIRS)
    claim_memory(run, rows)


def claim_memory(run: Run, rows: Sequence[Row]) -> None:
    found = holdings(rows)
    middle, ninth, worst = quantiles(each.error for each in found)
    run.say(f"memory of {len(found)} runs: median error {middle:.1%}, 90th percentile {ninth:.0%}, worst {worst:.0%}")
    run.evidence.claim("median error of the memory", f"0, at most {MEMORY:.0%}", 0, middle, MEMORY)
    run.evidence.claim("layouts that ran and are called too large", "none", 0, len(too_large(rows)))
