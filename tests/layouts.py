"""Train the GPT in any layout of tp, sp, cp, ep, dp and pp on real ranks, against one process."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from einops import rearrange
from torch import Tensor

import expert_parallel.layers as experts
import megatron_tp.layers
import megatron_tp.loss
import pipeline.stages
import sequence_parallel.layers
import sequence_parallel.loss
from core.gradients import clip_and_total, sum_gradients
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor, counted_once, full_tensors, shard_of
from expert_parallel.gating import Spread, count_ahead, end_step, routers
from expert_parallel.moe import MoEConfig, to_moe
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
    dp: int = 1
    pp: int = 1
    cp: int = 1
    ulysses: int = 1  # of the ranks of cp, how many neighbours exchange heads; the rest is a ring
    zigzag: bool = True
    ep: int = 1
    etp: int = 1
    moe: MoEConfig | None = None
    dispatch: str = "all-to-all"
    bias: tuple[float, ...] = ()  # of the routers, at the start
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


def train(config: GPTConfig, layout: Layout) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor]]:
    """On one rank: losses, norms, the last step's gradients, and the parameters after it."""
    mesh = Mesh(
        "cpu", Ledger(), 30.0, tp=layout.tp, cp=layout.cp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp
    )
    tp, cp, dp, pp, edp, etp = (mesh[name] for name in ("tp", "cp", "dp", "pp", "edp", "etp"))
    data = mesh.joined("cp", "dp")
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
    if layout.moe:
        spread = Spread((dp, cp, tp), tp, m) if layout.sequence else Spread((dp, cp), None, m)
        stage = experts.parallelize(to_moe(stage, layout.moe), mesh["ep"], etp, spread, layout.dispatch)
    materialize(recompute(stage, layout.recompute), SEED, CPU, torch.float64)
    for name, p in stage.named_parameters():
        if stage.full_name(name).startswith(layout.freeze or ("none",)):
            p.requires_grad_(False)
    skew(stage, layout)
    tokens = layout.samples * layout.length
    mine_of = layout.samples // layout.dp
    here = layout.length // cp.size // (tp.size if layout.sequence else 1)  # tokens of an activation on this rank
    shape = (mine_of // m, here, config.hidden)
    loss = partial(loss_of, tokens=tokens, axis=tp, vocabulary=config.vocabulary)
    masks = use_masks(stage, SampleMasks(SEED))
    mine = pipeline.stages.each_stage(stage, everyone[pp.index], stages)
    runtime = Pipeline(mine, loss, schedule, pp, shape, torch.float64, CPU, masks)
    copies = pipeline.stages.Copies(stage, pp, everyone)
    optimizer = optimizer_of(stage.parameters())
    losses, norms, gradients = [], [], []
    for step in range(layout.steps):
        optimizer.zero_grad()
        batch = (context.part(t.chunk(layout.dp)[dp.index], attention) for t in layout.batch(step))
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch)
        masks.seek(step, dp.index * mine_of)
        if layout.moe and layout.moe.routing.aux and m > 1:
            runtime.forward(inputs, targets)
            count_ahead(stage)
        share = runtime.step(inputs, targets)
        if layout.sequence:
            sequence_parallel.layers.sum_whole_gradients(stage, tp)
        elif tp.index:
            share = torch.zeros_like(share)  # the same on all ranks of tp
        copies.sum_gradients()
        of_experts = {*experts.expert_parameters(stage)}
        rest = [p for p in stage.parameters() if p not in of_experts]
        sum_gradients(rest, data)
        experts.sum_expert_gradients(stage, edp, etp)
        gradients = pieces(stage, lambda p: None if p.grad is None else p.grad.clone())
        once = {id(g) for g in counted_once(rest, tp) if dp.index == cp.index == 0}
        once |= {id(g) for g in experts.counted_once(stage, edp, etp)}
        counted = [g for g in copies.counted_once() if id(g) in once]
        norm, total = clip_and_total(stage.parameters(), counted, [tp, cp, dp, pp], CLIP, share)
        losses.append(total)
        norms.append(norm)
        optimizer.step()
        if layout.moe:
            end_step(stage)
    runtime.close()
    attention.close()
    return losses, norms, gradients, pieces(stage, lambda p: p.detach())


def skew(model: GPT, layout: Layout) -> None:
    for router in routers(model) if layout.bias else ():
        router.bias.data.copy_(torch.tensor(layout.bias))


def pieces(stage: GPT, of: object) -> list[LocalTensor]:
    found = [LocalTensor(stage.full_name(n), of(p), shard_of(p)) for n, p in stage.named_parameters()]
    return [piece for piece in found if piece.value is not None]


def equals_one_process(pool: Pool, config: GPTConfig, layout: Layout) -> None:
    """Losses, norms, every gradient and every updated parameter, to 1e-10."""
    make = (lambda config: to_moe(GPT(config), layout.moe)) if layout.moe else GPT
    oracle = Oracle(config, SEED, CPU, torch.float64, optimizer_of, CLIP, make)
    skew(oracle.model, layout)
    for name, p in oracle.model.named_parameters():
        if name.startswith(layout.freeze or ("none",)):
            p.requires_grad_(False)
    losses, norms = [], []
    for step in range(layout.steps):
        losses.append(oracle.step(*layout.batch(step), step))
        norms.append(oracle.norm)
        if layout.moe:
            end_step(oracle.model)
    results = pool.run(layout.tp * layout.cp * layout.dp * layout.pp, train, config, layout)
    for rank_losses, rank_norms, _, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        assert rank_norms == pytest.approx(norms, rel=1e-10)
    assert worst_difference(full_tensors(g for r in results for g in r[2]), oracle.gradients) < 1e-10
    assert worst_difference(full_tensors(p for r in results for p in r[3]), oracle.parameters()) < 1e-10
    whole: dict[object, Tensor] = {}
    for piece in (p for r in results for p in r[3] if p.shard is None):
        assert torch.equal(whole.setdefault(piece.name, piece.value), piece.value), f"{piece.name} differs over ranks"
