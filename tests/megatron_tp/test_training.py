"""A tensor-parallel GPT or Llama, alone and in a pipeline, equals one process in every corner."""

from dataclasses import replace

import pytest

from core.model.gpt import GPTConfig
from tests.layouts import Layout, equals_one_process
from tests.llama import BOTH, CASES, LLAMA
from tests.pool import Pool

SMALL = {"sequence": 8, "hidden": 24, "layers": 2, "heads": 12}  # 12 heads: for 2, 3, 4 and 6 ranks


DROPOUT = {"dropout": 0.3, "attention": "softmax"}
CORNERS = {"tied": False, "head_bias": True, "feed_forward": 36, "sequence": 20}  # more positions than tokens


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", [{}, {"vocabulary": 257} | DROPOUT, {"vocabulary": 257} | CORNERS], ids=str)
def test_equals_one_process(pool: Pool, ranks: int, options: dict) -> None:
    """257 rows are padded to 258, 260, 258."""
    equals_one_process(pool, GPTConfig(**SMALL | options), Layout(tp=ranks))


@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        (("embed.token",), {}),
        (("embed", "blocks.0"), {"tied": False}),  # the first trained layer's input needs no gradient
        (("blocks.1",), {}),  # gradients pass through
        (("norm", "head", "blocks.1"), {"tied": False}),
    ],
)
def test_frozen_parameters(pool: Pool, freeze: tuple[str, ...], options: dict) -> None:
    equals_one_process(pool, GPTConfig(**SMALL | options), Layout(tp=3, freeze=freeze))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(pool: Pool, recompute: str) -> None:
    config = GPTConfig(**SMALL, dropout=0.3, attention="softmax")
    equals_one_process(pool, config, Layout(tp=4, recompute=recompute))


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("options", [{"tied": False} | DROPOUT, {"vocabulary": 259}], ids=str)
def test_in_a_pipeline(pool: Pool, tp: int, pp: int, options: dict) -> None:
    config = GPTConfig(**SMALL | {"layers": 4} | options)
    equals_one_process(pool, config, Layout(tp=tp, pp=pp, samples=6, microbatches=3))


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches"),
    [("interleaved", 2, 6), ("zb-h1", 4, 6), ("zb-h2", 2, 3), ("zb-v", 4, 3), ("dualpipe", 2, 6), ("dualpipev", 2, 6)],
)
def test_with_any_schedule(pool: Pool, schedule: str, pp: int, microbatches: int) -> None:
    """Several stages a rank, and weight gradients that the layers leave for later."""
    config = GPTConfig(**SMALL | {"layers": 8})
    equals_one_process(pool, config, Layout(tp=2, pp=pp, samples=6, microbatches=microbatches, schedule=schedule))


def test_recomputation_with_split_backwards(pool: Pool) -> None:
    config = GPTConfig(**SMALL | {"layers": 8}, dropout=0.3, attention="softmax")
    equals_one_process(
        pool, config, Layout(tp=2, pp=4, samples=6, microbatches=6, schedule="zb-v", recompute="selective")
    )


# ---- Llamas


@pytest.mark.parametrize(("ranks", "options"), CASES, ids=str)
def test_llamas(pool: Pool, ranks: int, options: dict) -> None:
    """Samples of an odd number of tokens, shorter than the longest."""
    equals_one_process(pool, replace(LLAMA, **options), Layout(tp=ranks, length=9))


@pytest.mark.parametrize("freeze", [("embed", "blocks.0"), ("blocks.0.attention.k", "blocks.1.attention.q")], ids=str)
def test_a_llama_with_frozen_parameters(pool: Pool, freeze: tuple[str, ...]) -> None:
    """The second: some of the layers that share an input, with biases and norms."""
    equals_one_process(pool, replace(LLAMA, **BOTH | {"tied": False}), Layout(tp=4, freeze=freeze))


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches", "recompute"),
    [("1f1b", 2, 3, "full"), ("interleaved", 2, 6, "none"), ("zb-h1", 2, 3, "selective"), ("zb-v", 2, 3, "none"),
     ("dualpipe", 2, 6, "none"), ("dualpipev", 2, 6, "none")],
)  # fmt: skip
def test_a_llama_in_a_pipeline(pool: Pool, schedule: str, pp: int, microbatches: int, recompute: str) -> None:
    """Each head of keys and values on two ranks, and weight gradients that are left for later."""
    config = replace(LLAMA, layers=4, **BOTH)
    layout = Layout(tp=4, pp=pp, samples=6, microbatches=microbatches, schedule=schedule, recompute=recompute, length=9)
    equals_one_process(pool, config, layout)
