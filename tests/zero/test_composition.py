"""ZeRO over the dp axis of a model that is cut by tensor or pipeline parallelism as well."""

from functools import partial

import torch

import megatron_tp.layers
import megatron_tp.loss
import sequence_parallel.layers
import sequence_parallel.loss
from core.gpt import GPT, GPTConfig, materialize
from core.ledger import Ledger
from core.mesh import Mesh
from core.seeded import Draw
from core.shards import Piece, shard_of
from core.text import Text
from tests.zero.test_stages import CPU, SEED, STAGES
from zero.stage import Stage

CONFIG = GPTConfig(sequence=8, hidden=16, layers=4, heads=4, vocabulary=257)
SAMPLES, STEPS, CLIP = 8, 2, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def whole_over_dp(stage: Stage, pieces: list[Piece], name: dict[str, str]) -> list[Piece]:
    """This rank's own pieces, as those of a parameter that tensor parallelism has cut."""
    mark = {name_: shard_of(p) for name_, p in stage.model.named_parameters()}
    return [Piece((n, mark[n]), value, segment) for n, value, segment in pieces]


def tp_and_dp(kind: str, sequence: bool) -> tuple[list[float], list[float], list[Piece], list[Piece]]:
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
        logits = model(inputs, Draw(SEED, step, dp.index * SAMPLES // 4))
        loss = loss_of(logits, targets, SAMPLES * 8, tp, CONFIG.vocabulary)
        stage.backward(loss)
        if sequence:
            stage.sum_over(tp, lambda p: shard_of(p) is None)
        share = loss.detach() if sequence or tp.index == 0 else torch.zeros_like(loss.detach())
        gradients = stage.gradients()
        counts = lambda p: shard_of(p) is not None or tp.index == 0  # noqa: E731
        norm, total = stage.clip_and_total(CLIP, share, [tp], counts)
        losses.append(total)
        norms.append(norm)
        stage.step()
    return losses, norms, whole_over_dp(stage, gradients, {}), whole_over_dp(stage, stage.states(), {})
