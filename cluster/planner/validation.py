"""The planner held against published runs: seconds, order of layouts, and memory. Lecture 03."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from cluster.planner.fitting import Fit, Prediction, fit, fitted_to, possible, predict
from cluster.planner.residency import has_room, largest, reserved
from cluster.planner.rows import Row, software_of
from cluster.planner.software import FITTED

APART = 0.02  # runs whose speeds differ by less are as fast


@dataclass(frozen=True)
class Outcome:
    """A run and what was predicted of it by the constants of runs of other models or clusters."""

    row: Row
    prediction: Prediction

    @cached_property
    def error(self) -> float:
        """Of the seconds of a step, relative."""
        return self.prediction.seconds / self.row.seconds - 1

    @property
    def dense(self) -> bool:
        return not self.row.model.experts

    @property
    def counts(self) -> bool:
        """Whether it is one of the runs that the bars are about: in 16 bits on H100."""
        return self.row.bits == 16 and self.row.cells["gpu"].startswith("H100")

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of a device, published and predicted."""
        tokens = self.row.layouts[0].batch * self.row.model.sequence / self.row.layouts[0].ranks
        return tokens / self.row.seconds, tokens / self.prediction.seconds


def outcomes(rows: Sequence[Row]) -> tuple[list[Outcome], dict[str, Fit]]:
    """Of all rows that say enough, in their order; and the fits, by program."""
    fits = {name: fit(few, name) for name in FITTED if (few := fitted_to(rows, name))}
    found = []
    for row in rows:
        if row.why or not row.seconds:
            continue
        made = fits.get(row.software)
        found.append(Outcome(row, predict(row, made.without(row.group) if made else None)))
    return found, fits


def without_sources(rows: Sequence[Row], fits: dict[str, Fit]) -> list[Outcome]:
    """The same, each predicted by constants of which all of its source's runs are left out: harder still.

    Of a program that only one source has published those are what its fit begins with: papers and documentation.
    """
    found = []
    for row in rows:
        if not row.why and row.seconds:
            made = fits.get(row.software)
            found.append(Outcome(row, predict(row, made.leaving({id(r) for r in made.rows if r.source == row.source})
                                              if made else None)))  # fmt: skip
    return found


def with_committed(rows: Iterable[Row]) -> list[Outcome]:
    """The same of runs that nothing was fitted to, by the constants that are committed."""
    return [Outcome(row, predict(row)) for row in rows if not row.why and row.seconds]


def quantiles(errors: Iterable[float]) -> tuple[float, float, float]:
    """Median, 90th percentile and largest of the sizes of errors."""
    sizes = np.abs(list(errors))
    return float(np.median(sizes)), float(np.quantile(sizes, 0.9)), float(sizes.max())


# ---- Pairs -----------------------------------------------------------------------------------------------------------

LAID_OUT = ("tp", "cp", "ep", "pp", "vpp", "zero", "mbs")


def job(row: Row) -> tuple[str, ...]:
    """What two runs have in common that differ in their layout: source, model, cluster, precision and sequence."""
    return tuple(row.cells[name] for name in ("source", "model", "gpu", "gpus", "precision", "seq"))


def laid_out_alike(a: Row, b: Row) -> bool:
    """Whether two rows print no difference between their layouts."""
    words = a.cells["recompute"], b.cells["recompute"]
    said = tuple(set(row.features) - {"balanced"} for row in (a, b))
    same = all(a.cells[name] == b.cells[name] for name in LAID_OUT) and said[0] == said[1]
    return same and a.software == b.software and (words[0] == words[1] or not all(words))


def pairs(found: Sequence[Outcome]) -> tuple[list[tuple[Outcome, Outcome]], list[tuple[Outcome, Outcome]]]:
    """Pairs of layouts of one job whose speeds are APART: ordered rightly, and wrongly."""
    right, wrong = [], []
    for a, b in combinations(found, 2):
        if job(a.row) != job(b.row) or laid_out_alike(a.row, b.row):
            continue
        (published_a, predicted_a), (published_b, predicted_b) = a.tokens_per_second, b.tokens_per_second
        if abs(published_a / published_b - 1) > APART:
            (right if (published_a > published_b) == (predicted_a > predicted_b) else wrong).append((a, b))
    return right, wrong


# ---- Memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """A run that prints what a device holds, and what it is expected to hold."""

    row: Row
    expected: float

    @property
    def error(self) -> float:
        return self.expected / self.row.memory - 1


def holdings(rows: Iterable[Row]) -> list[Holding]:
    """Of all that print it: once where a page prints one figure for several runs."""
    found, seen = [], set()
    for row in rows:
        if row.why or not row.memory:
            continue
        layout = possible(row)[0]
        if row.memory_dp:
            if (key := (row.cells["model"], row.memory_dp)) in seen:
                continue
            seen.add(key)
            layout = replace(layout, dp=row.memory_dp)
        software = software_of(row)
        found.append(Holding(row, reserved(largest(row.model, layout, software), software)))
    return found


def too_large(rows: Iterable[Row]) -> list[Row]:
    """Rows of which no layout that they can mean fits the device on which it ran."""
    return [
        row for row in rows
        if row.layouts and not row.why
        and not any(has_room(row.model, x, row.machine, software_of(row)) for x in row.layouts)
    ]  # fmt: skip
