"""ZeRO over the dp axis of a model that is sharded by tensor or pipeline parallelism as well."""

from functools import partial

import pytest
import torch
from einops import rearrange
from torch import nn

import megatron_tp.engine.layers
import megatron_tp.engine.loss
import pipeline.stages
import sequence_parallel.engine.layers
import sequence_parallel.engine.loss
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor, shard_of
from pipeline.engine.actions import size, stages_of_ranks
from pipeline.engine.runtime import Pipeline
from pipeline.schedules import build
from tests.pool import Pool
from tests.zero.test_engine import CPU, ENGINES, SEED

CONFIG = GPTConfig(sequence=8, hidden=16, layers=4, heads=4, vocabulary=257)
SAMPLES, STEPS, CLIP = 16, 2, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def is_whole(p: nn.Parameter) -> bool:
    return shard_of(p) is None


def tp_and_dp(
    kind: str, sequence: bool
) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor]]:
    mesh = Mesh("cpu", Ledger(), 30.0, tp=2, dp=2)
    tp, dp = mesh["tp"], mesh["dp"]
    topic, loss_of = megatron_tp.engine.layers, megatron_tp.engine.loss.token_loss
    if sequence:
        topic, loss_of = sequence_parallel.engine.layers, sequence_parallel.engine.loss.token_loss
    model = materialize(topic.parallelize(GPT(CONFIG), tp), SEED, CPU, torch.float64)
    engine = ENGINES[kind](model, dp, optimizer_of, None, torch.float64, 1000)
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        engine.zero_grad()
        inputs, targets = (t.chunk(2)[dp.index] for t in Text(None, 8).batch(SEED, step, SAMPLES))
        logits = model(inputs)
        loss = loss_of(logits, targets, SAMPLES * 8, tp, CONFIG.vocabulary)
        engine.backward(loss)
        if sequence:
            engine.sum_over(tp, is_whole)
        gradients = engine.gradients()
        share = loss.detach() * (sequence or tp.index == 0)
        norm, total = engine.clip_and_total(CLIP, share, [tp], lambda p: tp.index == 0 or not is_whole(p))
        losses.append(total)
        norms.append(norm)
        engine.step()
    return losses, norms, gradients, engine.weights(), engine.states()


def pp_and_dp(name: str) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor]]:
    """ZeRO-1 over a pipeline: the runtime accumulates the micro-batches, and the engine reduces once at the end."""
    mesh = Mesh("cpu", Ledger(), 30.0, dp=2, pp=2)
    dp, pp = mesh["dp"], mesh["pp"]
    m = 4
    schedule = build(name, 2, m)
    stages, everyone = size(schedule)[0], stages_of_ranks(schedule)
    model = materialize(pipeline.stages.partition(GPT(CONFIG), everyone[pp.index], stages), SEED, CPU, torch.float64)
    engine = ENGINES["zero1"](model, dp, optimizer_of, None, torch.float64, 1000)
    loss = partial(token_loss, tokens=SAMPLES * 8)
    mine = pipeline.stages.each_stage(model, everyone[pp.index], stages)
    runtime = Pipeline(mine, loss, schedule, pp, (SAMPLES // 2 // m, 8, CONFIG.hidden), torch.float64, CPU)
    copies = pipeline.stages.Copies(model, pp, everyone)
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        engine.zero_grad()
        batch = (t.chunk(2)[dp.index] for t in Text(None, 8).batch(SEED, step, SAMPLES))
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch)
        share = runtime.step(inputs, targets)
        copies.sum_gradients()
        engine.reduce()
        gradients = engine.gradients()
        norm, total = engine.clip_and_total(CLIP, share, [pp], copies.counted_here)
        losses.append(total)
        norms.append(norm)
        engine.step()
    runtime.close()
    found = [
        [LocalTensor(model.full_name(tensor.name), *tensor[1:]) for tensor in tensors]
        for tensors in (gradients, engine.weights())
    ]
    states = [LocalTensor((model.full_name(n), key), *rest) for (n, key), *rest in engine.states()]
    return losses, norms, *found, states


def one_process() -> tuple[list[float], list[float], Oracle]:
    oracle = Oracle(CONFIG, SEED, CPU, optimizer_of, CLIP)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(oracle.step(*Text(None, 8).batch(SEED, step, SAMPLES), step))
        norms.append(oracle.norm)
    return losses, norms, oracle


def all_with_tp(sequence: bool) -> list[tuple]:
    return [tp_and_dp(kind, sequence) for kind in ENGINES]


def equal(results: list[tuple], expected: tuple[list[float], list[float], Oracle], what: str) -> None:
    losses, norms, oracle = expected
    for rank in results:
        assert rank[0] == pytest.approx(losses, rel=1e-10), what
        assert rank[1] == pytest.approx(norms, rel=1e-10), what
    for i, reference in ((2, oracle.gradients), (3, oracle.parameters()), (4, oracle.states())):
        found = full_tensors(tensor for rank in results for tensor in rank[i])
        assert worst_difference(found, reference) < 1e-10, what


@pytest.mark.parametrize("sequence", [False, True])
def test_with_tensor_parallelism(pool: Pool, sequence: bool) -> None:
    expected = one_process()
    for kind, results in zip(ENGINES, zip(*pool.run(4, all_with_tp, sequence), strict=True), strict=True):
        equal(list(results), expected, kind)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h2", "zb-v", "dualpipe"])
def test_zero1_with_a_pipeline(pool: Pool, name: str) -> None:
    equal(pool.run(4, pp_and_dp, name), one_process(), name)
