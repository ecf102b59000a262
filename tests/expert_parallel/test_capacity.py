"""What an expert drops where a sample's tokens are on several ranks: what one process drops, with equal scores too."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from cluster.run.build import positions_of_ranks
from core.ledger import Ledger
from core.mesh import Mesh
from expert_parallel.engine import capacity
from expert_parallel.engine.capacity import Holders, runs
from expert_parallel.engine.routing import Routing, choose, keep
from sequence_parallel.engine.ulysses import context_parallel
from tests.pool import Pool

CPU, SAMPLES, EXPERTS = torch.device("cpu"), 3, 6
CASES = {  # tp, cp, ulysses, zigzag, tokens of a sample
    "tp, shares of 3, 3, 3 and 2": (4, 1, 1, True, 11),
    "tp, ranks without tokens": (4, 1, 1, True, 2),
    "zigzag": (1, 4, 1, True, 16),
    "in order": (1, 4, 1, False, 12),
    "ulysses and zigzag": (1, 4, 2, True, 16),
    "tp and zigzag, shares of two runs": (2, 2, 1, True, 20),
    "tp and zigzag, shares of 3 and 3": (2, 2, 1, True, 12),
}
ROUTINGS = {drop: Routing(EXPERTS, 2, "sigmoid", capacity=0.6, drop=drop) for drop in ("position", "probability")}


def differing(bug: str) -> set[tuple[str, str]]:
    """The cases where this rank keeps other choices than one process."""
    found = set()
    for name, (tp, cp, ulysses, zigzag, tokens) in CASES.items():
        mesh = Mesh("cpu", Ledger(), 30.0, tp=tp, cp=cp)
        attention = context_parallel(mesh["cp"], CPU, ulysses, zigzag)
        with BUGS[bug]():
            holders = Holders((mesh["tp"], mesh["cp"]), partial(positions_of_ranks, attention, tp))
            mine = positions_of_ranks(attention, tp, tokens)[holders.index]
            scores = torch.rand(SAMPLES, tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
            scores = (3 * scores).round() / 4 + 0.1  # of four values
            for drop, routing in ROUTINGS.items():
                experts = choose(scores, routing)
                right = keep(experts, scores, routing)
                assert tokens < 3 or not right.all(), "something is dropped, so it is seen which"
                kept = holders.keep(experts[:, mine], scores[:, mine], routing, tokens)
                if not torch.equal(kept, right[:, mine]):
                    found.add((name, drop))
        attention.close()
    return found


def of_this_rank_alone() -> AbstractContextManager:
    def wrong(self: Holders, x: torch.Tensor) -> torch.Tensor:
        own = torch.zeros_like(x).repeat(self.ranks, *[1] * (x.dim() - 1))
        own[self.index * len(x) : (self.index + 1) * len(x)] = x
        return own

    return patch.object(Holders, "_gathered", wrong)


def zigzag_ignored() -> AbstractContextManager:
    """The first rank's tokens before the second's, and so on."""
    right = Holders.keep

    def wrong(self: Holders, *case: Any) -> torch.Tensor:
        sizes = [*map(len, self.positions(case[-1]))]
        return right(replace(self, positions=lambda tokens: torch.arange(tokens).split(sizes)), *case)

    return patch.object(Holders, "keep", wrong)


def one_run_a_rank() -> AbstractContextManager:
    return patch.object(capacity, "runs", lambda here: [(int(here[0]) if len(here) else 0, len(here))])


def of_equal_scores_the_last() -> AbstractContextManager:
    last = lambda scores: scores.flip(1).argsort(dim=1, descending=True, stable=True).argsort(1).flip(1)  # noqa: E731
    return patch.object(capacity, "by_score", last)


def one_token_more() -> AbstractContextManager:
    right = Holders.chosen_before
    return patch.object(Holders, "chosen_before", lambda self, *case: right(self, *case) - 1)


BUGS = {"": nullcontext, "decided by this rank's tokens": of_this_rank_alone, "zigzag ignored": zigzag_ignored,
        "one run a rank": one_run_a_rank, "of equal scores the last": of_equal_scores_the_last,
        "one token more": one_token_more}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_what_is_dropped_is_what_one_process_drops(pool: Pool, bug: str) -> None:
    found = set().union(*pool.run(4, differing, bug))
    assert bool(found) == bool(bug), found
    if bug in ("zigzag ignored", "one run a rank"):
        assert all("zigzag" in name for name, _ in found), "the others have one run a rank, in order"


def test_runs() -> None:
    assert runs(torch.tensor([0, 1, 6, 7])) == [(0, 2), (6, 2)]
    assert runs(torch.tensor([2, 3, 4])) == [(2, 3)]
    assert runs(torch.tensor([], dtype=torch.int64)) == [(0, 0)]
