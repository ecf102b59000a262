"""The links between ranks, and the fast domains that they show. Lecture 03."""

from typing import NamedTuple

import numpy as np

APART = 2.0  # a link between domains takes at least so many times as long as one inside


class Links(NamedTuple):
    """For every pair of n ranks the time of a message as a line, alpha + beta x bytes: (n, n), symmetric."""

    alpha: np.ndarray  # seconds; 0 from a rank to itself
    beta: np.ndarray  # seconds for each byte

    def predict(self, size: int) -> np.ndarray:
        """Seconds for a message of so many bytes."""
        return self.alpha + self.beta * size


def domains(times: np.ndarray) -> list[list[int]]:
    """The fast domains: ranks that reach each other faster than those of other domains, at least APART times.

    Of all partitions that single linkage finds, adding link by link from the fastest, the one that leaves least of the
    variance of log time when every pair has the mean of its kind, inside a domain or between two. One domain where no
    partition sets the two kinds APART. Links that are slow by chance do not split a domain, because others join it.
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


def same_domain(groups: list[list[int]]) -> np.ndarray:
    """(n, n) booleans: whether two ranks are in the same group."""
    label = {rank: i for i, group in enumerate(groups) for rank in group}
    labels = np.array([label[rank] for rank in range(len(label))])
    return labels[:, None] == labels[None, :]
