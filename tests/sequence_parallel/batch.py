"""Several layouts of as many ranks in one call of the pool, each against one process."""

from collections.abc import Callable, Sequence
from typing import Any

from core.model.gpt import GPTConfig
from tests.layouts import Layout, equals_one_process, train
from tests.pool import Pool

Case = tuple[GPTConfig, Layout]


class Trained:
    """In place of a pool: the ranks have already trained."""

    def __init__(self, results: list[Any]):
        self.results = results

    def run(self, ranks: int, function: Callable, *args: Any) -> list[Any]:
        assert ranks == len(self.results)
        return self.results


def train_all(cases: Sequence[Case]) -> list[Any]:
    return [train(config, layout) for config, layout in cases]


def all_equal_one_process(pool: Pool, ranks: int, cases: Sequence[Case]) -> None:
    """Losses, norms, gradients and parameters of every case; all on `ranks` ranks."""
    results = pool.run(ranks, train_all, cases, timeout=110)
    for i, (config, layout) in enumerate(cases):
        try:
            equals_one_process(Trained([rank[i] for rank in results]), config, layout)
        except AssertionError as error:
            raise AssertionError(f"{config} {layout}") from error
