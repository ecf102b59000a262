"""Train the GPT in any layout of tensor, sequence, context and pipeline parallelism, against one process."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from einops import rearrange
from torch import Tensor

import megatron_tp.layers
import megatron_tp.loss
import pipeline.stages
import sequence_parallel.layers
import sequence_parallel.loss
from core.gpt import GPT, GPTConfig, materialize
from core.ledger import Ledger
from core.mesh import Mesh
from core.oracle import Oracle, worst_difference
from core.seeded import Draw
from core.shards import Piece, counted_once, join, shard_of
from core.text import Text
from core.training import clip_and_total
from pipeline.runtime import Pipeline
from pipeline.schedules import build, held, size
from sequence_parallel import context
from sequence_parallel.hybrid import context_parallel
from sequence_parallel.recompute import recompute
from tests.pool import Pool

CPU, SEED, CLIP = torch.device("cpu"), 7, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


@dataclass(frozen=True)
class Layout:
    """How to train. `freeze`: the prefixes of the parameters that are not trained."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ulysses: int = 1  # of the ranks of cp, how many neighbours exchange heads; the rest is a ring
    zigzag: bool = True
    sequence: bool = False  # Megatron's
    recompute: str = "none"
    freeze: tuple[str, ...] = ()
    samples: int = 4
    microbatches: int = 1
    schedule: str = "1f1b"
    length: int = 8
    steps: int = 2

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return Text(None, self.length).batch(SEED, step, self.samples)


def train(config: GPTConfig, layout: Layout) -> tuple[list[float], list[float], list[Piece], list[Piece]]:
    """On one rank: losses, norms, the last step's gradients, and the parameters after it."""
    mesh = Mesh("cpu", Ledger(), 30.0, tp=layout.tp, cp=layout.cp, pp=layout.pp)
    tp, cp, pp = mesh["tp"], mesh["cp"], mesh["pp"]
    topic, loss_of = megatron_tp.layers, megatron_tp.loss.token_loss
    if layout.sequence:
        topic, loss_of = sequence_parallel.layers, sequence_parallel.loss.token_loss
    m = layout.microbatches
    schedule = build(layout.schedule, pp.size, m)
    stages, everyone = size(schedule)[0], held(schedule)
    stage = topic.parallelize(pipeline.stages.cut(GPT(config), everyone[pp.index], stages), tp)
    attention = context_parallel(cp, CPU, layout.ulysses, layout.zigzag)
    if cp.size > 1:
        context.parallelize(stage, attention)
    materialize(recompute(stage, layout.recompute), SEED, CPU, torch.float64)
    for name, p in stage.named_parameters():
        p.requires_grad_(not stage.whole_name(name).startswith(layout.freeze or ("none",)))
    tokens = layout.samples * layout.length
    here = layout.length // cp.size // (tp.size if layout.sequence else 1)  # tokens of an activation on this rank
    shape = (layout.samples // m, here, config.hidden)
    loss = partial(loss_of, tokens=tokens, axis=tp, vocabulary=config.vocabulary)
    mine = pipeline.stages.each_stage(stage, everyone[pp.index], stages)
    runtime = Pipeline(mine, loss, schedule, pp, shape, torch.float64, CPU)
    copies = pipeline.stages.Copies(stage, pp, everyone)
    optimizer = optimizer_of(stage.parameters())
    losses, norms, gradients = [], [], []
    for step in range(layout.steps):
        optimizer.zero_grad()
        inputs, targets = (context.part(t, attention) for t in layout.batch(step))
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in (inputs, targets))
        share = runtime.step(inputs, targets, Draw(SEED, step, 0))
        if layout.sequence:
            sequence_parallel.layers.sum_whole_gradients(stage, tp)
        elif tp.index:
            share = torch.zeros_like(share)  # the same on all ranks of tp
        copies.sum_gradients()
        context.sum_gradients(stage.parameters(), cp)
        gradients = pieces(stage, lambda p: None if p.grad is None else p.grad.clone())
        once = {id(g) for g in counted_once(stage.parameters(), tp)}
        counted = [g for g in copies.counted_once() if id(g) in once and cp.index == 0]
        norm, total = clip_and_total(stage.parameters(), counted, [tp, cp, pp], CLIP, share)
        losses.append(total)
        norms.append(norm)
        optimizer.step()
    runtime.close()
    attention.close()
    return losses, norms, gradients, pieces(stage, lambda p: p.detach())


def pieces(stage: GPT, of: object) -> list[Piece]:
    found = [Piece(stage.whole_name(n), of(p), shard_of(p)) for n, p in stage.named_parameters()]
    return [piece for piece in found if piece.value is not None]


def equals_one_process(pool: Pool, config: GPTConfig, layout: Layout) -> None:
    """Losses, norms, every gradient and every updated parameter, to 1e-10."""
    oracle = Oracle(config, SEED, CPU, torch.float64, optimizer_of, CLIP)
    for name, p in oracle.model.named_parameters():
        p.requires_grad_(not name.startswith(layout.freeze or ("none",)))
    losses, norms = [], []
    for step in range(layout.steps):
        losses.append(oracle.step(*layout.batch(step), Draw(SEED, step, 0)))
        norms.append(oracle.norm)
    results = pool.run(layout.tp * layout.cp * layout.pp, train, config, layout)
    for rank_losses, rank_norms, _, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        assert rank_norms == pytest.approx(norms, rel=1e-10)
    assert worst_difference(join(g for r in results for g in r[2]), oracle.gradients) < 1e-10
    assert worst_difference(join(p for r in results for p in r[3]), oracle.parameters()) < 1e-10
    whole: dict[object, Tensor] = {}
    for piece in (p for r in results for p in r[3] if p.shard is None):
        assert torch.equal(whole.setdefault(piece.name, piece.value), piece.value), f"{piece.name} differs over ranks"
