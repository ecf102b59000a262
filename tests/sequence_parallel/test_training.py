"""A GPT or a Llama with sequence parallelism, alone and in a pipeline, equals one process in every corner."""

from dataclasses import replace
from itertools import product

import pytest

from core.model.gpt import GPTConfig
from sequence_parallel.engine.recompute import KINDS
from tests.layouts import Layout
from tests.llama import BOTH, CASES, LLAMA
from tests.pool import Pool
from tests.sequence_parallel.batch import all_equal_one_process

SMALL = {"sequence": 12, "hidden": 24, "layers": 2, "heads": 12}  # for 2, 3, 4 and 6 ranks
DROPOUT = {"dropout": 0.3, "attention": "softmax"}
OPTIONS = [
    {},
    {"tied": False, "head_bias": True},
    {"vocabulary": 257},  # padded to 258, 260, 258
    DROPOUT,
    {"feed_forward": 36},
    {"sequence": 20},  # more positions than tokens
]


def layout(**options: object) -> Layout:
    return Layout(**{"sequence": True, "length": 12} | options)


@pytest.mark.parametrize(("ranks", "options"), [(2, OPTIONS), (3, OPTIONS), (4, OPTIONS), (6, [{}, OPTIONS[2]])])
def test_equals_one_process(pool: Pool, ranks: int, options: list[dict]) -> None:
    all_equal_one_process(pool, ranks, [(GPTConfig(**SMALL | each), layout(tp=ranks)) for each in options])


def test_frozen_parameters(pool: Pool) -> None:
    cases = [
        (("embed.token",), {}),
        (("embed", "blocks.0"), {"tied": False}),  # the first trained layer's input needs no gradient
        (("blocks.1",), {}),  # gradients pass through
        (("norm", "head", "blocks.1"), {"tied": False}),
        (("embed.pos", "blocks.0.attention_norm", "blocks.0.mlp.down.bias"), {}),  # some of what is summed
    ]
    cases = [(GPTConfig(**SMALL | options), layout(tp=3, freeze=freeze)) for freeze, options in cases]
    all_equal_one_process(pool, 3, cases)


def test_one_token_a_rank_and_recomputation(pool: Pool) -> None:
    cases = [(GPTConfig(**SMALL), layout(tp=4, length=4, samples=1))]
    for recompute, freeze in product(KINDS[1:], ((), ("embed", "blocks.0"))):
        config = GPTConfig(**SMALL | DROPOUT, tied=False)
        cases.append((config, layout(tp=4, recompute=recompute, freeze=freeze)))
    all_equal_one_process(pool, 4, cases)


def test_in_a_pipeline(pool: Pool) -> None:
    cases = []
    for options in ({}, {"tied": False} | DROPOUT, {"vocabulary": 259}):
        cases.append((GPTConfig(**SMALL | {"layers": 4} | options), layout(tp=2, pp=2, samples=6, microbatches=3)))
    for recompute in KINDS[1:]:
        config = GPTConfig(**SMALL | {"layers": 4} | DROPOUT)
        schedule = "zb-h1" if recompute in ("pointwise", "operators") else "1f1b"
        sizes = {"tp": 2, "pp": 2, "samples": 6, "microbatches": 6, "schedule": schedule}
        cases.append((config, layout(**sizes, recompute=recompute)))
    # Weight gradients that are left for later gather their input then.
    for schedule, microbatches in (("interleaved", 6), ("zb-h1", 6), ("zb-v", 3), ("dualpipe", 6)):
        config = GPTConfig(**SMALL | {"layers": 4})
        cases.append((config, layout(tp=2, pp=2, samples=6, microbatches=microbatches, schedule=schedule)))
    all_equal_one_process(pool, 4, cases)


def test_in_a_pipeline_of_eight_ranks(pool: Pool) -> None:
    config = GPTConfig(**SMALL | {"layers": 4, "tied": False} | DROPOUT)
    cases = [(config, layout(tp=tp, pp=8 // tp, samples=6, microbatches=3)) for tp in (2, 4)]
    all_equal_one_process(pool, 8, cases)


# ---- Llamas


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_llamas(pool: Pool, ranks: int) -> None:
    """At one rank nothing is sharded; a rank's tokens are any number of them."""
    sizes = [options for n, options in CASES if n == ranks]
    lengths = {1: 9, 2: 10, 3: 9, 4: 12, 6: 6}
    cases = [(replace(LLAMA, **options), layout(tp=ranks, length=lengths[ranks])) for options in sizes]
    all_equal_one_process(pool, ranks, cases)


def test_a_llama_with_frozen_parameters(pool: Pool) -> None:
    config = replace(LLAMA, **BOTH | {"tied": False})
    frozen = (("embed", "blocks.0"), ("blocks.0.attention.k", "blocks.1.attention.q"))
    all_equal_one_process(pool, 4, [(config, layout(tp=4, freeze=freeze)) for freeze in frozen])


def test_a_llama_in_a_pipeline(pool: Pool) -> None:
    """Each head of keys and values on two ranks. Of layers that are left for later the input is gathered once."""
    config, cases = replace(LLAMA, layers=4, **BOTH), []
    for schedule, microbatches, recompute in (
        ("1f1b", 3, "full"), ("interleaved", 6, "none"), ("zb-h1", 3, "selective"), ("zb-v", 3, "pointwise"),
        ("dualpipe", 6, "operators"), ("dualpipev", 6, "none"),
    ):  # fmt: skip
        sizes = {"pp": 2, "samples": 6, "microbatches": microbatches, "schedule": schedule, "recompute": recompute}
        cases.append((config, layout(tp=4, **sizes)))
    all_equal_one_process(pool, 8, cases)
