"""The constants of a named program, fitted to its published runs; and each run predicted without its like. Lecture 03.

Least squares of the logarithm of predicted over published seconds, by Gauss-Newton on the logarithms of the constants.
Runs that are far off weigh less (Huber), and a constant stays near where it began unless the runs say otherwise: a
program with two runs keeps what papers say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log

import numpy as np

from cluster.planner.layout import Layout
from cluster.planner.residency import has_room
from cluster.planner.rows import Row, software_of
from cluster.planner.software import BY_NAME, FITTED, NAMED, Software
from cluster.planner.steptime import Step, step

NOISE, BELIEF = 0.04, 0.3  # standard deviations, in logarithms: of a run, and of a constant about where it begins
FAR = 0.08  # logarithm of an error from which a run weighs less


@cache
def possible(row: Row) -> tuple[Layout, ...]:
    """The layouts that a row can mean and that fit its device; all of them, if none does."""
    software = software_of(row)
    fit = tuple(x for x in row.layouts if has_room(row.model, x, row.machine, software))
    return fit or row.layouts


@dataclass(frozen=True)
class Prediction:
    """Of a row: the step of the layout that is fastest of those it can mean, and the seconds of the slowest."""

    step: Step
    layout: Layout
    slowest: float

    @property
    def seconds(self) -> float:
        return self.step.seconds


def predict(row: Row, software: Software | None = None) -> Prediction:
    """Authors have tuned what they publish, so where a row does not print something it is what is fastest."""
    told = software_of(row, software)
    found = [(step(row.model, layout, row.machine, told), layout) for layout in possible(row)]
    best, layout = min(found, key=lambda each: each[0].seconds)
    return Prediction(best, layout, max(each.seconds for each, _ in found))


def error(row: Row, software: Software | None = None) -> float:
    """Predicted seconds over published ones, less 1."""
    return predict(row, software).seconds / row.seconds - 1


def with_constants(software: Software, names: Sequence[str], logarithms: np.ndarray) -> Software:
    return replace(software, **dict(zip(names, np.exp(logarithms).tolist(), strict=True)))


@dataclass(frozen=True)
class Fit:
    """Constants fitted to rows, and what is needed to leave some of these rows out."""

    software: Software
    names: tuple[str, ...]
    rows: tuple[Row, ...]
    slopes: np.ndarray  # (rows, constants) of the logarithms
    left: np.ndarray  # (rows) logarithm of predicted over published
    prior: np.ndarray  # (constants) the logarithms less where they began

    def without(self, group: object) -> Software:
        """The constants of the rows of other groups: one more step, from those of all."""
        return self.leaving({id(row) for row in self.rows if row.group == group})

    def leaving(self, out: set[int]) -> Software:
        """The constants of all rows but these, by their identities; where none is left, those where the fit began."""
        others = np.array([id(row) not in out for row in self.rows])
        if others.all():
            return self.software
        change = solve(self.slopes[others], self.left[others], self.prior) if others.any() else -self.prior
        x = np.log([getattr(self.software, name) for name in self.names])
        return with_constants(self.software, self.names, x + change)


def solve(slopes: np.ndarray, left: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The change of the constants' logarithms that leaves least."""
    weights = np.minimum(1.0, FAR / np.maximum(np.abs(left), 1e-12)) / NOISE**2
    normal = slopes.T @ (weights[:, None] * slopes) + np.eye(slopes.shape[1]) / BELIEF**2
    return -np.linalg.solve(normal, slopes.T @ (weights * left) + prior / BELIEF**2)


def fit(rows: Sequence[Row], name: str, steps: int = 6) -> Fit:
    """The constants of `FITTED`, from the committed ones on; what they are believed to be is where `BEGIN` has them."""
    begin, names = BY_NAME[name], FITTED[name]
    start = np.log([getattr(begin, each) for each in names])
    x, shift = np.log([getattr(NAMED[name], each) for each in names]), 1e-3

    def of(constants: np.ndarray) -> np.ndarray:
        software = with_constants(begin, names, constants)
        return np.array([log(predict(row, software).seconds / row.seconds) for row in rows])

    for _ in range(steps):
        left = of(x)
        slopes = np.array([(of(x + shift * unit) - left) / shift for unit in np.eye(len(x))]).T
        change = np.clip(solve(slopes, left, x - start), -0.5, 0.5)
        x = x + change
        if np.abs(change).max() < 2e-4:
            break
    return Fit(with_constants(begin, names, x), names, tuple(rows), slopes, of(x), x - start)


def fitted_to(rows: Sequence[Row], name: str) -> list[Row]:
    """Of a program the rows that its constants are fitted to: those of a device whose runs say most, in 16 bits."""
    return [r for r in rows if r.software == name and not r.why and r.seconds and r.bits == 16
            and r.machine.processors == 132 and r.cells["gpu"] != "H800 80GB"]  # fmt: skip
