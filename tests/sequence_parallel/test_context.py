"""A GPT whose sequence is cut, attention included, alone and with tensor, pipeline and data parallelism."""

from functools import partial

import pytest
import torch
from torch import Tensor

import megatron_tp.layers
import megatron_tp.loss
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize
from core.model.text import Text
from core.proof.oracle import Oracle, worst_difference
from core.shards import full_tensors
from sequence_parallel import context
from sequence_parallel.hybrid import context_parallel
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool
from tests.zero.test_composition import is_whole
from tests.zero.test_stages import CPU, SEED, STAGES

SMALL = {"sequence": 48, "hidden": 24, "layers": 2, "heads": 12}


def layout(**options: object) -> Layout:
    return Layout(**{"length": 48, "samples": 2} | options)


@pytest.mark.parametrize(
    ("cp", "ulysses", "zigzag"),
    [(2, 1, True), (3, 1, False), (4, 4, True), (6, 2, True), (6, 3, False), (8, 1, True)],
)
def test_equals_one_process(pool: Pool, cp: int, ulysses: int, zigzag: bool) -> None:
    equals_one_process(pool, GPTConfig(**SMALL), layout(cp=cp, ulysses=ulysses, zigzag=zigzag))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"sequence": 60, "tied": False, "head_bias": True}, {}),  # more positions than tokens
        ({}, {"recompute": "selective"}),
        ({}, {"recompute": "full", "freeze": ("embed", "blocks.0")}),
        ({"tied": False}, {"freeze": ("embed.token", "blocks.1")}),
    ],
    ids=str,
)
def test_corners(pool: Pool, config: dict, options: dict) -> None:
    equals_one_process(pool, GPTConfig(**SMALL | config), layout(cp=4, ulysses=2, **options))


def test_one_token_a_piece_and_one_sample(pool: Pool) -> None:
    equals_one_process(pool, GPTConfig(**SMALL), layout(cp=8, length=16, samples=1))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("tp", "cp", "ulysses"), [(2, 4, 2), (3, 2, 1)])
def test_with_tensor_parallelism(pool: Pool, sequence: bool, tp: int, cp: int, ulysses: int) -> None:
    """Heads within, sequence across; with Megatron's sequence parallelism the rest of the layer is cut by both."""
    config = GPTConfig(**SMALL, vocabulary=257)
    equals_one_process(pool, config, layout(tp=tp, cp=cp, ulysses=ulysses, sequence=sequence))


@pytest.mark.parametrize(
    ("schedule", "tp", "cp", "pp", "ulysses"),
    [("1f1b", 1, 2, 4, 1), ("1f1b", 1, 4, 2, 2), ("zb-h1", 1, 2, 4, 2), ("interleaved", 1, 4, 2, 1),
     ("dualpipe", 2, 2, 2, 1)],
)  # fmt: skip
def test_in_a_pipeline(pool: Pool, schedule: str, tp: int, cp: int, pp: int, ulysses: int) -> None:
    options = {"tp": tp, "cp": cp, "pp": pp, "ulysses": ulysses, "schedule": schedule}
    config = GPTConfig(**SMALL | {"layers": 8, "hidden": 12})
    equals_one_process(pool, config, layout(**options, samples=4, microbatches=4, sequence=tp > 1, length=24))


# ---- ZeRO: to gradients cp is data parallelism, so its axis is dp x cp

SIZES = GPTConfig(sequence=24, hidden=16, layers=2, heads=4, vocabulary=257)
SAMPLES, STEPS, CLIP = 4, 2, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def zero(kind: str, tp_size: int, cp_size: int, dp_size: int) -> tuple[list, ...]:
    mesh = Mesh("cpu", Ledger(), 30.0, tp=tp_size, cp=cp_size, dp=dp_size)
    tp, cp, dp, every = mesh["tp"], mesh["cp"], mesh["dp"], mesh.joined("dp", "cp")
    attention = context_parallel(cp, CPU)
    model = context.parallelize(megatron_tp.layers.parallelize(GPT(SIZES), tp), attention)
    materialize(model, SEED, CPU, torch.float64)
    stage = STAGES[kind](model, every, optimizer_of, None, torch.float64, 1000)
    losses, norms, gradients = [], [], []

    def mine(x: Tensor) -> Tensor:
        return context.part(x.chunk(dp.size)[dp.index], attention)

    for step in range(STEPS):
        stage.zero_grad()
        inputs, targets = (mine(t) for t in Text(None, 24).batch(SEED, step, SAMPLES))
        loss = megatron_tp.loss.token_loss(model(inputs), targets, SAMPLES * 24, tp, SIZES.vocabulary)
        stage.backward(loss)
        gradients = stage.gradients()
        share = loss.detach() * (tp.index == 0)
        norm, total = stage.clip_and_total(CLIP, share, [tp], lambda p: tp.index == 0 or not is_whole(p))
        losses.append(total)
        norms.append(norm)
        stage.step()
    attention.close()
    return losses, norms, gradients, stage.states()


@pytest.mark.parametrize(
    ("kind", "tp", "cp", "dp"),
    [(kind, 1, 2, 2) for kind in STAGES] + [("ddp", 1, 4, 1), ("zero1", 2, 2, 2), ("zero3", 2, 2, 2)],
)
def test_zero(pool: Pool, kind: str, tp: int, cp: int, dp: int) -> None:
    oracle = Oracle(SIZES, SEED, CPU, torch.float64, optimizer_of, CLIP)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(oracle.step(*Text(None, 24).batch(SEED, step, SAMPLES), step))
        norms.append(oracle.norm)
    results = pool.run(tp * cp * dp, zero, kind, tp, cp, dp)
    for rank in results:
        assert rank[0] == pytest.approx(losses, rel=1e-10)
        assert rank[1] == pytest.approx(norms, rel=1e-10)
    for i, reference in ((2, oracle.gradients), (3, oracle.states())):
        assert worst_difference(full_tensors(piece for rank in results for piece in rank[i]), reference) < 1e-10
