"""Experts with DualPipe: in which order rows travel and layers compute, in models whose stages are not alike."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from cluster.evidence.flights import Flights, hidden_by
from cluster.planner.layout import Layout
from core.model.gpt import GPTConfig
from expert_parallel.engine.routing import MoEConfig
from tests.cluster import test_worker
from tests.cluster.resuming import job_here, worker_of
from tests.cluster.resuming import train as go_on
from tests.cluster.test_worker import CONFIG, Result, differences, reference, samples_of, train
from tests.llama import BOTH, LLAMA
from tests.pool import Pool

OF_EXPERTS = {"experts": 4, "top_k": 2, "expert_feed_forward": 24, "shared_feed_forward": 8}
GPT2 = replace(CONFIG, **OF_EXPERTS)
LLAMA = replace(LLAMA, sequence=16, layers=4, **BOTH, **OF_EXPERTS)
DUALPIPE = Layout(pp=2, dp=2, ep=2, microbatches=4, schedule="dualpipe", zero=3)
DUALPIPEV = Layout(pp=2, dp=2, ep=2, microbatches=4, schedule="dualpipev", v=2, zero=1)
CASES = {
    "dense layers first": (replace(GPT2, dense_layers=2), DUALPIPE),  # all of the first stage
    "dense layers first, folded": (replace(LLAMA, dense_layers=1), DUALPIPEV),
    "stages that are not equal": (replace(LLAMA, layers=5, dense_layers=1), DUALPIPE),
}
Claims = dict[str, tuple[float, float]]


def trained(config: GPTConfig, layout: Layout) -> tuple[Result, Claims]:
    """What `train` finds, and what is claimed of another worker that takes two steps: expected and measured."""
    moe, claims = MoEConfig.of(config, aux=0.01, z=0.001, bias_rate=0.01), {}
    with patch.object(test_worker, "MOE", moe):
        result = train(layout, True, config)
    worker = worker_of(layout, moe, config=config)
    flights = Flights(worker)
    go_on(worker, [0, 1])
    evidence = SimpleNamespace(claim=lambda name, _, expected, found, *__: claims.update({name: (expected, found)}))
    args = SimpleNamespace(verify=True)
    flights.claim(SimpleNamespace(args=args, job=job_here(), evidence=evidence), 2)
    worker.close()
    return result, claims


@pytest.mark.parametrize("case", CASES)
def test_dense_layers_and_mixtures(pool: Pool, case: str) -> None:
    """Equal to one process; all that can travel behind the other direction does, in the time of virtual devices."""
    config, layout = CASES[case]
    layout = samples_of(layout)
    with patch.object(test_worker, "MOE", MoEConfig.of(config, aux=0.01, z=0.001, bias_rate=0.01)):
        expected = reference(True, config)
    results = pool.run(layout.ranks, trained, config, layout)
    found = differences([result for result, _ in results], expected)
    assert max(found.values()) < 1e-10, found
    claims = results[0][1]
    assert len(claims) == 2 * layout.ranks + 2
    for name, (planned, measured) in claims.items():
        assert measured == pytest.approx(planned, rel=1e-12), name
    by_turns, one_by_one = (claims[f"virtual time of a step, F&B {name}"][0] for name in
                            ("by turns", "one after the other"))  # fmt: skip
    assert by_turns <= one_by_one


def test_what_a_pair_can_hide() -> None:
    assert [hidden_by(*pair) for pair in ((4, 4), (2, 4), (4, 2), (0, 4), (4, 0), (0, 0))] == [8, 4, 4, 1, 0, 0]
    assert hidden_by(0, 4, computes=False) == 0, "a stage that is the head alone"
