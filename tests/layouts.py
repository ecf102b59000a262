"""Train the GPT in any layout of tp, sp, cp, ep, dp and pp on real ranks, against one process."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from einops import rearrange
from torch import Tensor

import expert_parallel.engine.layers as experts
import megatron_tp.engine.layers
import sequence_parallel.engine.layers
from cluster.planner.layout import FOLDED
from cluster.planner.layout import Layout as Planned
from cluster.run.build import TrainSpec, build_model, loss_function, make_mesh, stages_by_rank
from core.gradients import clip_and_total, sum_gradients
from core.ledger import Ledger
from core.model.gpt import GPT, GPTConfig, use_masks
from core.model.precision import POLICIES
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor, counted_once, shard_of
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import count_ahead, end_step, routers
from expert_parallel.engine.routing import MoEConfig
from pipeline.engine.runtime import Pipeline
from pipeline.schedules import build
from pipeline.stages import Copies, each_stage
from sequence_parallel import context
from sequence_parallel.engine.ulysses import context_parallel
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
    cp_kind: str = "ring"
    ep: int = 1
    etp: int = 1
    moe: MoEConfig | None = None
    dispatch: str = "all-to-all"
    bias: tuple[float, ...] = ()  # of the routers, at the start
    sequence: bool = False  # Megatron's
    recompute: str = "none"
    every: int = 1
    freeze: tuple[str, ...] = ()
    samples: int = 4
    microbatches: int = 1
    schedule: str = "1f1b"
    length: int = 8
    steps: int = 2
    split: str = ""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return Text(None, self.length).batch(SEED, step, self.samples)


def train(config: GPTConfig, layout: Layout) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor]]:
    """On one rank: losses, norms, the last step's gradients, and the parameters after it."""
    m = layout.microbatches
    planned = Planned(
        tp=layout.tp,
        sp=layout.sequence,
        cp=layout.cp,
        ulysses=layout.ulysses,
        cp_kind=layout.cp_kind,
        ep=layout.ep,
        etp=layout.etp,
        dp=layout.dp,
        pp=layout.pp,
        v=2 if layout.schedule in (*FOLDED, "interleaved") else 1,
        schedule=layout.schedule,
        microbatches=m,
        microbatch=layout.samples // (layout.dp * m),
        recompute=layout.recompute,
        recompute_every=layout.every,
        split=layout.split,
    )
    spec = TrainSpec(config, layout.moe, planned, SEED, POLICIES["float64"], CPU, optimizer_of)
    mesh = make_mesh(planned, "cpu", Ledger(), 30.0)
    tp, cp, dp, pp, edp, etp = (mesh[name] for name in ("tp", "cp", "dp", "pp", "edp", "etp"))
    data = mesh.joined("cp", "dp")
    same_heads, _ = tp.split(config.kv_copies(tp.size))
    attention = context_parallel(cp, CPU, layout.ulysses, layout.zigzag, layout.cp_kind)
    stage = build_model(spec, mesh, attention)
    for module in stage.modules():
        if isinstance(module, experts.ExpertParallelMoE):
            module.dispatch = layout.dispatch
    for name, p in stage.named_parameters():
        if stage.full_name(name).startswith(layout.freeze or ("none",)):
            p.requires_grad_(False)
    skew(stage, layout)
    mine_of = layout.samples // layout.dp
    here = layout.length // planned.sequence_shards  # tokens of an activation on this rank
    masks = use_masks(stage, SampleMasks(SEED))
    loss = partial(loss_function(spec, tp), tokens=layout.samples * layout.length)  # a sample may be a short one
    mine = each_stage(stage, stages_by_rank(planned)[pp.index], planned.stages, planned.split)
    schedule = build(layout.schedule, pp.size, m)
    runtime = Pipeline(mine, loss, schedule, pp, (mine_of // m, here, config.hidden), torch.float64, CPU, masks)
    copies = Copies(stage, pp, stages_by_rank(planned), planned.split)
    optimizer = optimizer_of(stage.parameters())
    losses, norms, gradients = [], [], []
    for step in range(layout.steps):
        optimizer.zero_grad()
        batch = (context.local(t.chunk(layout.dp)[dp.index], attention) for t in layout.batch(step))
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch)
        masks.seek(step, dp.index * mine_of)
        if layout.moe and layout.moe.routing.aux and m > 1:
            runtime.forward(inputs, targets)
            count_ahead(stage)
        share = runtime.step(inputs, targets)
        if layout.sequence:
            sequence_parallel.engine.layers.sum_replicated_gradients(stage, tp, same_heads)
        else:
            megatron_tp.engine.layers.sum_partial_gradients(stage, tp, same_heads)
            sum_gradients(experts.parameters_of_shares(stage), tp)
            share = share if tp.index == 0 else torch.zeros_like(share)  # the same on all ranks of tp
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
    oracle = Oracle(config, SEED, CPU, optimizer_of, CLIP, make)
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
    # The ends of a pipeline sum the tied weight over cp and dp in buffers of their own: the last bit may differ.
    apart = {"embed.token.weight"} if layout.pp > 1 else set()
    for piece in (p for r in results for p in r[3] if p.shard is None and p.name not in apart):
        assert torch.equal(whole.setdefault(piece.name, piece.value), piece.value), f"{piece.name} differs over ranks"
