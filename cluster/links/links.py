"""The links between ranks: ping-pong, the line t = alpha + beta x bytes, and the fast domains it shows. Lecture 03.

n ranks; a time is one way, half of a round trip, in seconds; a matrix is (n, n), symmetric, and 0 from a rank to itself
"""

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from core import comm, p2p
from core.mesh import Axis
from core.proof.lesson import Run

BUDGET = 0.14  # seconds for the round trips of one size in a round, shared by the pairs
SHORTEST = 0.005  # seconds of that for a pair
FIRST, MOST = 3, 200  # round trips that tell how many more the budget allows, and the most of them; the fastest counts
APART = 2.0  # a link between domains takes at least so many times as long as one inside


class Lines(NamedTuple):
    """For every pair of ranks the time of a message as a line: alpha + beta x bytes."""

    alpha: np.ndarray  # seconds
    beta: np.ndarray  # seconds for each byte

    def predict(self, size: int) -> np.ndarray:
        """Seconds for a message of so many bytes."""
        return self.alpha + self.beta * size


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(run: Run, axis: Axis, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """The fastest time of a message between every pair of ranks, by its bytes; on rank 0, elsewhere nothing.

    One pair at a time, because pairs that talk at once share links and cores. Noise only ever adds time, so the fastest
    of many is the best estimate; the rounds are apart, so that one busy moment does not spoil all of a pair's trials.
    """
    fastest = {size: np.full((axis.size, axis.size), np.inf) for size in sizes}
    turn, pairs = torch.zeros(1, device=run.job.device), [*combinations(range(axis.size), 2)]
    budget = max(SHORTEST, BUDGET / len(pairs))
    for _ in run.steps("ping-pong"):
        for pair in pairs:
            comm.all_reduce(turn, axis.labelled("turns"))
            if axis.index in pair:
                for size in sizes:
                    took = ping_pong(axis, pair, size, budget, run.job.device)
                    fastest[size][pair] = min(fastest[size][pair], took)
    everyone = run.job.gather(fastest)
    if not everyone:
        return {}
    return {size: _symmetric(np.minimum.reduce([rank[size] for rank in everyone])) for size in sizes}


def ping_pong(axis: Axis, pair: tuple[int, int], size: int, budget: float, device: torch.device) -> float:
    """Half the fastest round trip of `budget` seconds between two ranks, which both call it; infinite on the second."""
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    more = torch.zeros(1, dtype=torch.int64, device=device)
    if axis.index == pair[1]:
        for _ in range(FIRST):
            _answer(message, axis, pair[0])
        for _ in range(int(p2p.receive(more, axis, pair[0]))):
            _answer(message, axis, pair[0])
        return np.inf
    fastest = min(_round_trip(message, axis, pair[1]) for _ in range(FIRST))
    p2p.send(more.fill_(min(MOST, int(budget / fastest))), axis, pair[1])
    return min([fastest, *(_round_trip(message, axis, pair[1]) for _ in range(int(more)))]) / 2


def _round_trip(message: torch.Tensor, axis: Axis, peer: int) -> float:
    began = _now(message.device)
    p2p.send(message, axis, peer)
    p2p.receive(message, axis, peer)
    return _now(message.device) - began


def _answer(message: torch.Tensor, axis: Axis, peer: int) -> None:
    p2p.receive(message, axis, peer)
    p2p.send(message, axis, peer)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _symmetric(upper: np.ndarray) -> np.ndarray:
    """The matrix whose upper triangle this is."""
    upper = np.triu(np.where(np.isfinite(upper), upper, 0.0), 1)
    return upper + upper.T


# ---- What it says ----------------------------------------------------------------------------------------------------


def fit(times: Mapping[int, np.ndarray]) -> Lines:
    """Least squares of the relative errors: a line through times of 50 us and 50 ms must be right for both.

    Neither alpha nor beta is negative; where the best line has a negative one, the best with a 0 there is taken.
    """
    sizes = np.array(sorted(times), dtype=float)[:, None, None]
    seconds = np.stack([times[size] for size in sorted(times)])
    off = ~np.eye(seconds.shape[-1], dtype=bool)
    weight = np.divide(1.0, seconds, out=np.zeros_like(seconds), where=off)
    # Minimise the sum of (weight x (alpha + beta x size) - 1)^2: two normal equations for each pair.
    a, b, c = (weight**2).sum(0), (weight**2 * sizes).sum(0), (weight**2 * sizes**2).sum(0)
    y, z = weight.sum(0), (weight * sizes).sum(0)
    determinant = np.where(off, a * c - b * b, 1.0)
    alpha, beta = (c * y - b * z) / determinant, (a * z - b * y) / determinant
    with np.errstate(invalid="ignore"):
        alpha, beta = np.where(beta < 0, y / a, alpha), np.where(alpha < 0, z / c, beta)
    return Lines(*(np.where(off, np.maximum(x, 0.0), 0.0) for x in (alpha, beta)))


def domains(times: np.ndarray) -> list[list[int]]:
    """The fast domains: ranks that reach each other faster than those of other domains, at least APART times.

    Of all partitions that single linkage finds, adding link by link from the fastest, the one that leaves least of the
    variance of log time when every pair has the mean of its kind, inside a domain or between two. One domain where no
    partition sets the two kinds APART. Links that are slow by chance do not split a domain, because others hold it.
    """
    n = len(times)
    domain = np.arange(n)
    first, second = np.triu_indices(n, 1)
    logs = np.log(times[first, second])
    best, found = np.inf, np.zeros(n, dtype=int)
    for link in np.argsort(logs):
        old, new = domain[second[link]], domain[first[link]]
        if old == new:
            continue
        domain[domain == old] = new
        inside = domain[first] == domain[second]
        if inside.all():
            break
        within, between = logs[inside], logs[~inside]
        left = within.var() * len(within) + between.var() * len(between)
        if left < best and between.mean() - within.mean() >= np.log(APART):
            best, found = left, domain.copy()
    groups: dict[int, list[int]] = {}
    for rank, label in enumerate(found.tolist()):
        groups.setdefault(label, []).append(rank)
    return list(groups.values())


def in_one(groups: list[list[int]]) -> np.ndarray:
    """(n, n) booleans: whether two ranks are in the same group."""
    label = {rank: i for i, group in enumerate(groups) for rank in group}
    labels = np.array([label[rank] for rank in range(len(label))])
    return labels[:, None] == labels[None, :]
