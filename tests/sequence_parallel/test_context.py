"""A GPT whose sequence is sharded, attention included, alone and with tensor, pipeline and data parallelism."""

from functools import partial

import pytest
import torch
from torch import Tensor

import megatron_tp.engine.layers
import megatron_tp.engine.loss
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from sequence_parallel import context
from sequence_parallel.engine.ulysses import CP_KINDS, context_parallel
from tests.layouts import Layout
from tests.pool import Pool
from tests.sequence_parallel.batch import all_equal_one_process
from tests.zero.test_composition import is_whole
from tests.zero.test_engine import CPU, ENGINES, SEED

SMALL = {"sequence": 48, "hidden": 24, "layers": 2, "heads": 12}


def layout(**options: object) -> Layout:
    return Layout(**{"length": 48, "samples": 2} | options)


def test_equals_one_process(pool: Pool) -> None:
    config = GPTConfig(**SMALL)
    for cp, cases in {2: [(1, True)], 3: [(1, False)], 6: [(2, True), (3, False)]}.items():
        kinds = CP_KINDS if cp < 6 else ("ring",)
        layouts = [layout(cp=cp, ulysses=u, zigzag=zigzag, cp_kind=kind) for u, zigzag in cases for kind in kinds]
        all_equal_one_process(pool, cp, [(config, each) for each in layouts])


def test_corners(pool: Pool) -> None:
    cases = [
        ({"sequence": 60, "tied": False, "head_bias": True}, {}),  # more positions than tokens
        ({}, {"recompute": "selective"}),
        ({}, {"recompute": "full", "freeze": ("embed", "blocks.0")}),
        ({"tied": False}, {"freeze": ("embed.token", "blocks.1")}),
        ({}, {"ulysses": 4}),
        ({}, {"cp_kind": "all-gather"}),
        ({}, {"cp_kind": "all-gather", "ulysses": 1, "recompute": "full"}),
        ({}, {"cp_kind": "all-gather", "ulysses": 1, "length": 8, "samples": 1}),
        ({}, {"ulysses": 1, "length": 8, "samples": 1}),  # one token a chunk
    ]
    cases = [(GPTConfig(**SMALL | config), layout(**{"cp": 4, "ulysses": 2} | options)) for config, options in cases]
    all_equal_one_process(pool, 4, cases)


def test_with_tensor_and_pipeline_parallelism(pool: Pool) -> None:
    """Heads within, sequence across; with Megatron's sequence parallelism the rest of the layer is sharded by both."""
    config = GPTConfig(**SMALL, vocabulary=257)
    for tp, cp, ulysses in ((2, 4, 2), (3, 2, 1)):
        cases = [(config, layout(tp=tp, cp=cp, ulysses=ulysses, sequence=sequence)) for sequence in (False, True)]
        all_equal_one_process(pool, tp * cp, cases)
    config = GPTConfig(**SMALL | {"layers": 4, "hidden": 12})
    for ranks, cases in {
        4: [("1f1b", 1, 2, 2, 1), ("zb-h1", 1, 2, 2, 2), ("interleaved", 1, 2, 2, 1)],
        8: [("1f1b", 1, 4, 2, 2), ("dualpipe", 2, 2, 2, 1)],
    }.items():
        layouts = [
            layout(tp=tp, cp=cp, pp=pp, ulysses=ulysses, schedule=schedule, samples=4, microbatches=4, length=24,
                   sequence=tp > 1)
            for schedule, tp, cp, pp, ulysses in cases
        ]  # fmt: skip
        all_equal_one_process(pool, ranks, [(config, each) for each in layouts])


# ---- ZeRO: to gradients cp is data parallelism, so its axis is dp x cp

SIZES = GPTConfig(sequence=24, hidden=16, layers=2, heads=4, vocabulary=257)
SAMPLES, STEPS, CLIP = 4, 2, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def zero(kind: str, tp_size: int, cp_size: int, dp_size: int) -> tuple[list, ...]:
    mesh = Mesh("cpu", Ledger(), 30.0, tp=tp_size, cp=cp_size, dp=dp_size)
    tp, cp, dp, every = mesh["tp"], mesh["cp"], mesh["dp"], mesh.joined("dp", "cp")
    attention = context_parallel(cp, CPU)
    model = context.parallelize(megatron_tp.engine.layers.parallelize(GPT(SIZES), tp), attention)
    materialize(model, SEED, CPU, torch.float64)
    stage = ENGINES[kind](model, every, optimizer_of, None, torch.float64, 1000)
    losses, norms, gradients = [], [], []

    def mine(x: Tensor) -> Tensor:
        return context.local(x.chunk(dp.size)[dp.index], attention)

    for step in range(STEPS):
        stage.zero_grad()
        inputs, targets = (mine(t) for t in Text(None, 24).batch(SEED, step, SAMPLES))
        loss = megatron_tp.engine.loss.token_loss(model(inputs), targets, SAMPLES * 24, tp, SIZES.vocabulary)
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
    [(kind, 1, 2, 2) for kind in ENGINES] + [("ddp", 1, 4, 1), ("zero1", 2, 2, 2), ("zero3", 2, 2, 2)],
)
def test_zero(pool: Pool, kind: str, tp: int, cp: int, dp: int) -> None:
    oracle = Oracle(SIZES, SEED, CPU, optimizer_of, CLIP)
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
