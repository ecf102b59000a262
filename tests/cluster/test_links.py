"""The line of a link, the domains of a matrix, and both measured on real ranks whose links are slowed down."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster import topology
from cluster.links.links import APART, Links, domains, same_domain
from cluster.topology import fit
from core import p2p
from core.mesh import Axis
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Run
from tests.pool import Pool

SIZES = [8, 4096, 65536, 2**20]


def symmetric(draw: Callable[[int], np.ndarray], n: int) -> np.ndarray:
    """A symmetric matrix with 0 on the diagonal and above it what `draw` gives."""
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = draw(n * (n - 1) // 2)
    return matrix + matrix.T


# ---- The line


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_the_line_of_exact_times(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    alpha = symmetric(lambda k: 10 ** random.uniform(-6, -3, k), n)
    beta = symmetric(lambda k: 10 ** random.uniform(-11, -7, k), n)
    found = fit({size: alpha + beta * size for size in SIZES})
    assert np.allclose(found.alpha, alpha, rtol=1e-6, atol=0)
    assert np.allclose(found.beta, beta, rtol=1e-6, atol=0)
    assert np.allclose(found.predict(10**6), alpha + beta * 10**6)


def test_errors_of_small_and_large_times_count_alike() -> None:
    """20 % too slow at 8 bytes moves alpha by as much, although the largest message takes a thousand times as long."""
    times = {size: np.array([[0, 1e-5 + 1e-8 * size], [1e-5 + 1e-8 * size, 0]]) for size in SIZES}
    times[2**20] = times[2**20] * 1.2
    found = fit(times)
    assert found.alpha[0, 1] == pytest.approx(1e-5, rel=0.02)
    assert 1e-8 < found.beta[0, 1] < 1.2e-8


@pytest.mark.parametrize("falling", [(9e-5, 8e-5, 7e-5, 7e-5), (1e-9, 1e-4, 2e-3, 4e-2)])
def test_neither_latency_nor_time_for_a_byte_is_negative(falling: tuple[float, ...]) -> None:
    found = fit({size: np.array([[0, t], [t, 0]]) for size, t in zip(SIZES, falling, strict=True)})
    assert found.alpha[0, 1] >= 0
    assert found.beta[0, 1] >= 0
    assert found.alpha[0, 1] + found.beta[0, 1] > 0
    assert np.isfinite(found.predict(100)).all()


# ---- The domains


@st.composite
def partitions(draw: st.DrawFn) -> list[list[int]]:
    """Ranks in at least two groups, of which one has two or more, in any order."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4).filter(lambda s: max(s) > 1))
    ranks = draw(st.permutations(range(sum(sizes))))
    ends = np.cumsum(sizes)
    return sorted(sorted(ranks[end - size : end]) for end, size in zip(ends, sizes, strict=True))


@settings(deadline=None)
@given(partitions(), st.floats(2.5, 100), st.integers(0, 2**31))
def test_domains_are_found(groups: list[list[int]], slower: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    same = same_domain(groups)
    times = symmetric(lambda k: 1e-4 * random.uniform(1, 1.2, k), len(same)) * np.where(same, 1, slower)
    assert sorted(domains(times)) == groups


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31))
def test_noise_is_one_domain(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    times = symmetric(lambda k: 1e-4 * random.uniform(1, 1.8, k), n)
    assert domains(times) == [list(range(n))]


def test_links_slow_by_chance_do_not_split_a_domain() -> None:
    same = same_domain([[0, 1, 2, 3], [4, 5, 6, 7]])
    times = np.where(same, 1.0, 8.0)
    times[0, 1] = times[1, 0] = 6.0
    times[5, 7] = times[7, 5] = 3.0
    assert domains(times) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert domains(np.where(same, 1.0, 0.9 * APART)) == [list(range(8))], "not far enough apart"


def test_of_three_levels_the_border_that_explains_most() -> None:
    """Two nodes of two sockets: the network is what matters."""
    times = np.where(same_domain([[0, 1], [2, 3], [4, 5], [6, 7]]), 1.0, 1.5)
    times = np.where(same_domain([[0, 1, 2, 3], [4, 5, 6, 7]]), times, 20.0)
    assert domains(times) == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ---- Measured, and the claims

HOSTS = [[0, 2], [1, 3]]


def slow_between(hosts: list[list[int]], latency: float) -> AbstractContextManager:
    """Messages between hosts take these seconds, and as long as at 100 MB/s."""
    right, same = p2p.send, same_domain(hosts)

    def slow(x: Tensor, axis: Axis, peer: int) -> None:
        if not same[axis.index, peer]:
            time.sleep(latency + 1e-8 * x.numel() * x.element_size())
        right(x, axis, peer)

    return patch.object(p2p, "send", slow)


def the_line_is_flat() -> AbstractContextManager:
    return patch.object(topology, "fit", lambda times: Links(fit(times).alpha, 0 * fit(times).beta))


def latency_is_left_out() -> AbstractContextManager:
    return patch.object(topology, "fit", lambda times: Links(0 * fit(times).alpha, fit(times).beta))


def bits_for_bytes() -> AbstractContextManager:
    return patch.object(topology, "fit", lambda times: Links(fit(times).alpha, fit(times).beta / 8))


def one_domain() -> AbstractContextManager:
    return patch.object(topology, "domains", lambda times: [[0, 1, 2, 3]])


def the_wrong_domains() -> AbstractContextManager:
    return patch.object(topology, "domains", lambda times: [[0, 1], [2, 3]])


LINE, EXPLAINED = "error of the line", "pairs that the domains do not explain"
MUST_FAIL = {
    the_line_is_flat: LINE,
    latency_is_left_out: LINE,
    bits_for_bytes: LINE,
    one_domain: EXPLAINED,
    the_wrong_domains: EXPLAINED,
}


@dataclass
class Measured:
    """What one rank has of the measured lesson on two slow hosts."""

    times: dict[int, np.ndarray]
    messages: int
    result: dict[str, Any]
    failed: dict[str, list[str]] = field(default_factory=dict)  # claims, by bug; "" without one


def lesson(rounds: int, recorded: dict[int, np.ndarray] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The measured part of the lesson, or what follows from times recorded before; and the claims that failed."""
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    run = Run(Namespace(steps=rounds, largest=2**18, plot=None, json=None, file=None), job, POLICIES["float64"])
    again = patch.object(topology, "measure", lambda *_: recorded) if recorded is not None else nullcontext()
    with again:
        result = topology.measured(run)
    return result, [claim.claim for claim in run.evidence.claims if not claim.holds]


def record(rounds: int, latency: float) -> Measured:
    ledgers, seen, right = [], [], topology.measure

    def recording(run: Run, axis: Axis, sizes: list[int]) -> dict[int, np.ndarray]:
        ledgers.append(axis.ledger)
        seen.append(right(run, axis, sizes))
        return seen[-1]

    with slow_between(HOSTS, latency), patch.object(topology, "measure", recording):
        result, failed = lesson(rounds)
    return Measured(seen[0], ledgers[0].traffic["send", "dp"].messages, result, {"": failed})


def with_every_bug() -> Measured:
    """Measured once; the bugs are in what follows. Latency must weigh for its bug, and not for the others."""
    with patch.object(topology, "BUDGET", 0.0):  # so SHORTEST for each pair
        usual, late = record(5, 1e-4), record(1, 5e-3)
    for bug in MUST_FAIL:
        with bug():
            usual.failed[bug.__name__] = lesson(1, (late if bug is latency_is_left_out else usual).times)[1]
    return usual


@pytest.fixture(scope="module")
def measured(pool: Pool) -> list[Measured]:
    return pool.run(4, with_every_bug)


def test_every_pair_is_measured(measured: list[Measured]) -> None:
    times, found = measured[0].times, measured[0].result
    assert all(not other.times and not other.result for other in measured[1:])
    for matrix in times.values():
        assert (matrix == matrix.T).all()
        assert ((matrix > 0) == ~np.eye(4, dtype=bool)).all()
    assert (found["ranks"], found["device"], found["domains"], found["nodes"]) == (4, "cpu", HOSTS, [[0, 1, 2, 3]])
    alpha, beta, between = np.array(found["alpha"]), np.array(found["beta"]), ~same_domain(HOSTS)
    assert (alpha == alpha.T).all()
    assert ((alpha > 0) == ~np.eye(4, dtype=bool)).all()
    assert (beta == beta.T).all()
    assert (alpha[between] > 1e-4).all()
    assert (beta[between] > 0.9e-8).all()
    assert (times[2**18][~between] < 0.5e-8 * 2**18).all(), "what is slowed down does not slow the others"
    assert all(rank.messages >= 5 * 3 * 5 * 3 for rank in measured), "rounds, pairs, sizes, and trials at least"


def test_without_a_bug_every_claim_holds(measured: list[Measured]) -> None:
    assert measured[0].failed[""] == []


@pytest.mark.parametrize("bug", MUST_FAIL, ids=lambda bug: bug.__name__)
def test_the_claims_catch(measured: list[Measured], bug: Callable) -> None:
    failed = measured[0].failed[bug.__name__]
    assert any(claim.startswith(MUST_FAIL[bug]) for claim in failed), failed
