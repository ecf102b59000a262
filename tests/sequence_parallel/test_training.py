"""A GPT with sequence parallelism, alone and in a pipeline, equals one process in every corner."""

import pytest

from core.model.gpt import GPTConfig
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool

SMALL = {"sequence": 12, "hidden": 24, "layers": 2, "heads": 12}  # for 2, 3, 4 and 6 ranks
DROPOUT = {"dropout": 0.3, "attention": "softmax"}


def layout(**options: object) -> Layout:
    return Layout(**{"sequence": True, "length": 12} | options)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": False, "head_bias": True},
        {"vocabulary": 257},  # padded to 258, 260, 258
        DROPOUT,
        {"feed_forward": 36},
        {"sequence": 20},  # more positions than tokens
    ],
    ids=str,
)
def test_equals_one_process(pool: Pool, ranks: int, options: dict) -> None:
    equals_one_process(pool, GPTConfig(**SMALL | options), layout(tp=ranks))


def test_one_token_a_rank_and_one_sample(pool: Pool) -> None:
    equals_one_process(pool, GPTConfig(**SMALL), layout(tp=4, length=4, samples=1))


@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        (("embed.token",), {}),
        (("embed", "blocks.0"), {"tied": False}),  # the first trained layer's input needs no gradient
        (("blocks.1",), {}),  # gradients pass through
        (("norm", "head", "blocks.1"), {"tied": False}),
        (("embed.pos", "blocks.0.attention_norm", "blocks.0.mlp.down.bias"), {}),  # of what is summed, a part
    ],
)
def test_frozen_parameters(pool: Pool, freeze: tuple[str, ...], options: dict) -> None:
    equals_one_process(pool, GPTConfig(**SMALL | options), layout(tp=3, freeze=freeze))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("freeze", [(), ("embed", "blocks.0")])
def test_recomputation(pool: Pool, recompute: str, freeze: tuple[str, ...]) -> None:
    config = GPTConfig(**SMALL | DROPOUT, tied=False)
    equals_one_process(pool, config, layout(tp=4, recompute=recompute, freeze=freeze))


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("options", [{}, {"tied": False} | DROPOUT, {"vocabulary": 259}], ids=str)
def test_in_a_pipeline(pool: Pool, tp: int, pp: int, options: dict) -> None:
    config = GPTConfig(**SMALL | {"layers": 4} | options)
    equals_one_process(pool, config, layout(tp=tp, pp=pp, samples=6, microbatches=3))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_in_a_pipeline(pool: Pool, recompute: str) -> None:
    config = GPTConfig(**SMALL | {"layers": 4} | DROPOUT)
    equals_one_process(pool, config, layout(tp=2, pp=4, samples=6, microbatches=6, recompute=recompute))


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches"), [("interleaved", 2, 6), ("zb-h1", 4, 6), ("zb-v", 4, 3), ("dualpipe", 2, 6)]
)
def test_with_any_schedule(pool: Pool, schedule: str, pp: int, microbatches: int) -> None:
    """Weight gradients that are left for later gather their input then."""
    config = GPTConfig(**SMALL | {"layers": 8})
    equals_one_process(pool, config, layout(tp=2, pp=pp, samples=6, microbatches=microbatches, schedule=schedule))
