"""ZeRO over the dp axis of a model that is cut by tensor or pipeline parallelism as well."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from einops import rearrange
from torch import nn

import megatron_tp.layers
import megatron_tp.loss
import pipeline.stages
import sequence_parallel.layers
import sequence_parallel.loss
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor, full_tensors, shard_of
from pipeline.runtime import Pipeline
from pipeline.schedules import build, held, size
from tests.pool import Pool
from tests.zero.test_stages import CPU, SEED, STAGES

CONFIG = GPTConfig(sequence=8, hidden=16, layers=4, heads=4, vocabulary=257)
SAMPLES, STEPS, CLIP = 16, 2, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def is_whole(p: nn.Parameter) -> bool:
    return shard_of(p) is None


def tp_and_dp(
    kind: str, sequence: bool
) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor]]:
    mesh = Mesh("cpu", Ledger(), 30.0, tp=2, dp=4)
    tp, dp = mesh["tp"], mesh["dp"]
    topic, loss_of = megatron_tp.layers, megatron_tp.loss.token_loss
    if sequence:
        topic, loss_of = sequence_parallel.layers, sequence_parallel.loss.token_loss
    model = materialize(topic.parallelize(GPT(CONFIG), tp), SEED, CPU, torch.float64)
    stage = STAGES[kind](model, dp, optimizer_of, None, torch.float64, 1000)
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        stage.zero_grad()
        inputs, targets = (t.chunk(4)[dp.index] for t in Text(None, 8).batch(SEED, step, SAMPLES))
        logits = model(inputs)
        loss = loss_of(logits, targets, SAMPLES * 8, tp, CONFIG.vocabulary)
        stage.backward(loss)
        if sequence:
            stage.sum_over(tp, is_whole)
        gradients = stage.gradients()
        share = loss.detach() * (sequence or tp.index == 0)
        norm, total = stage.clip_and_total(CLIP, share, [tp], lambda p: tp.index == 0 or not is_whole(p))
        losses.append(total)
        norms.append(norm)
        stage.step()
    return losses, norms, gradients, stage.weights(), stage.states()


def pp_and_dp(name: str) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor]]:
    """ZeRO-1 over a pipeline: the runtime accumulates the microbatches, and the stage reduces once at the end."""
    mesh = Mesh("cpu", Ledger(), 30.0, dp=2, pp=4)
    dp, pp = mesh["dp"], mesh["pp"]
    m = 8 if name == "dualpipe" else 4
    schedule = build(name, 4, m)
    stages, everyone = size(schedule)[0], held(schedule)
    config = replace(CONFIG, layers=stages)
    model = materialize(pipeline.stages.cut(GPT(config), everyone[pp.index], stages), SEED, CPU, torch.float64)
    stage = STAGES["zero1"](model, dp, optimizer_of, None, torch.float64, 1000)
    loss = partial(token_loss, tokens=SAMPLES * 8)
    mine = pipeline.stages.each_stage(model, everyone[pp.index], stages)
    runtime = Pipeline(mine, loss, schedule, pp, (SAMPLES // 2 // m, 8, CONFIG.hidden), torch.float64, CPU)
    copies = pipeline.stages.Copies(model, pp, everyone)
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        stage.zero_grad()
        batch = (t.chunk(2)[dp.index] for t in Text(None, 8).batch(SEED, step, SAMPLES))
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch)
        share = runtime.step(inputs, targets)
        copies.sum_gradients()
        stage.reduce()
        gradients = stage.gradients()
        norm, total = stage.clip_and_total(CLIP, share, [pp], copies.counted_here)
        losses.append(total)
        norms.append(norm)
        stage.step()
    runtime.close()
    found = [
        [LocalTensor(model.full_name(piece.name), *piece[1:]) for piece in pieces]
        for pieces in (gradients, stage.weights())
    ]
    states = [LocalTensor((model.full_name(n), key), *rest) for (n, key), *rest in stage.states()]
    return losses, norms, *found, states


def one_process(layers: int = 4) -> tuple[list[float], list[float], Oracle]:
    oracle = Oracle(replace(CONFIG, layers=layers), SEED, CPU, torch.float64, optimizer_of, CLIP)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(oracle.step(*Text(None, 8).batch(SEED, step, SAMPLES), step))
        norms.append(oracle.norm)
    return losses, norms, oracle


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("sequence", [False, True])
def test_with_tensor_parallelism(pool: Pool, kind: str, sequence: bool) -> None:
    losses, norms, oracle = one_process()
    results = pool.run(8, tp_and_dp, kind, sequence)
    for rank in results:
        assert rank[0] == pytest.approx(losses, rel=1e-10)
        assert rank[1] == pytest.approx(norms, rel=1e-10)
    for i, reference in ((2, oracle.gradients), (3, oracle.parameters()), (4, oracle.states())):
        assert worst_difference(full_tensors(piece for rank in results for piece in rank[i]), reference) < 1e-10


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h2", "zb-v", "dualpipe"])
def test_zero1_with_a_pipeline(pool: Pool, name: str) -> None:
    losses, norms, oracle = one_process(layers=8 if name in ("interleaved", "zb-v") else 4)
    results = pool.run(8, pp_and_dp, name)
    for rank in results:
        assert rank[0] == pytest.approx(losses, rel=1e-10)
        assert rank[1] == pytest.approx(norms, rel=1e-10)
    for i, reference in ((2, oracle.gradients), (3, oracle.parameters()), (4, oracle.states())):
        assert worst_difference(full_tensors(p for rank in results for p in rank[i]), reference) < 1e-10
