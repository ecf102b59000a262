"""One rank of a combined run, built: the topics put together, in the order in which they shard the model. Lecture 02.

    pipeline stages          pipeline.stages                              pp
    heads, features, rows    megatron_tp or, with sp, sequence_parallel   tp
    the sequence             sequence_parallel.context                    cp
    experts                  expert_parallel                              ep, etp
    recomputation            sequence_parallel.engine.recompute
    numbers                  core.model.gpt.materialize
    optimizer, gradients     zero                                         dp x cp, and edp for experts

Each shards what the others have left. Until `materialize` there is no memory, only shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import megatron_tp.engine.loss
import sequence_parallel.engine.loss
from cluster.planner.layout import Layout
from cluster.run.recipe import groups_of
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.loss import InHead
from core.model.loss import token_loss as loss_in_chunks
from core.model.precision import Precision
from core.model.seeded import SampleMasks
from expert_parallel.engine.capacity import Holders
from expert_parallel.engine.layers import ExpertParallelMoE, expert_parameters
from expert_parallel.engine.layers import parallelize as shard_experts
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import Spread, routers
from expert_parallel.engine.routing import MoEConfig
from megatron_tp.engine.layers import parallelize as shard_layers
from pipeline.engine.actions import stages_of_ranks
from pipeline.engine.runtime import Pipeline
from pipeline.engine.turns import Turns
from pipeline.schedules import build
from pipeline.stages import Copies, each_stage, partition
from sequence_parallel.context import SequenceAttention
from sequence_parallel.context import parallelize as shard_sequence
from sequence_parallel.engine.layers import parallelize as shard_layers_and_sequence
from sequence_parallel.engine.recompute import recompute
from zero.engine.buckets import BUCKET_ELEMENTS
from zero.engine.engine import Engine, data_parallel, zero1, zero2, zero3
from zero.engine.muon import options_of
from zero.engine.optimizer import MakeOptimizer
from zero.engine.parts import Parts
from zero.newton_schulz import MuonSettings

ENGINES = (data_parallel, zero1, zero2, zero3)  # by --zero
Loss = Callable[[Tensor, Tensor], Tensor] | InHead  # of logits and targets, this rank's share


@dataclass(frozen=True)
class TrainSpec:
    """What is trained, and how.

    Args:
        moe: None for a dense model.
        layout: one that `cluster.rules.check` accepts.
        make_optimizer: maps parameter groups to an optimizer.
        bucket: elements that ZeRO sends at once, about.
        drawn: whether the start values are drawn; else they are zeros, and weights are read into them.
        weight_decay: of what decays (`recipe.decays`); None: of everything what `make_optimizer` says.
        eos: the token that ends a document, where documents are to be kept apart.
        muon: where the optimizer is zero.engine.muon's.
    """

    config: GPTConfig
    moe: MoEConfig | None
    layout: Layout
    seed: int
    precision: Precision
    device: torch.device
    make_optimizer: MakeOptimizer
    bucket: int = BUCKET_ELEMENTS
    drawn: bool = True
    weight_decay: float | None = None
    eos: int | None = None
    muon: MuonSettings | None = None

    @property
    def tokens(self) -> int:
        """Targets of the global batch: by their number a rank's loss is divided, so the shares add up."""
        return self.layout.batch * self.config.sequence


def make_mesh(layout: Layout, device_type: str, ledger: Ledger, timeout: float) -> Mesh:
    """The groups of ranks of a layout. All ranks call it at the same time."""
    names = ("tp", "cp", "dp", "pp", "ep", "etp")
    return Mesh(device_type, ledger, timeout, **{name: getattr(layout, name) for name in names})


def stages_by_rank(layout: Layout) -> list[list[int]]:
    """The pipeline stages of each rank of pp."""
    return stages_of_ranks(build(layout.schedule, layout.pp, layout.microbatches, layout.v))


def build_model(spec: TrainSpec, mesh: Mesh, attention: SequenceAttention) -> GPT:
    """This rank's shards of the model, with their numbers."""
    layout = spec.layout
    model = GPT(spec.config)
    model = partition(model, stages_by_rank(layout)[mesh["pp"].index], layout.stages, layout.split)
    model = with_tensor_parallelism(model, layout, mesh["tp"])
    model = with_context_parallelism(model, layout, attention)
    model = with_experts(model, spec.moe, layout, mesh, attention)
    model = recompute(model, layout.recompute, layout.recompute_every)
    return materialize(model, spec.seed if spec.drawn else None, spec.device, spec.precision)


def with_tensor_parallelism(model: GPT, layout: Layout, tp: Axis) -> GPT:
    """tp: heads, features and the vocabulary; with sp, what lies between the matrix products by tokens."""
    if tp.size == 1:
        return model
    return shard_layers_and_sequence(model, tp) if layout.sp else shard_layers(model, tp)


def with_context_parallelism(model: GPT, layout: Layout, attention: SequenceAttention) -> GPT:
    """cp: each rank computes on its tokens of a sample, attention by Ulysses, a ring or both."""
    return shard_sequence(model, attention) if layout.cp > 1 else model


def with_experts(model: GPT, moe: MoEConfig | None, layout: Layout, mesh: Mesh, attention: SequenceAttention) -> GPT:
    """ep and etp: MLPs become mixtures of experts, which are spread over the ranks; tp shards what they are given."""
    if moe is None:
        return model
    tp = mesh["tp"]
    holders = Holders((tp, mesh["cp"]), partial(positions_of_ranks, attention, tp.size))
    alike = None if layout.sp or tp.size == 1 else tp
    spread = Spread((mesh["dp"], mesh["cp"], tp), holders, layout.microbatches, alike, twin(layout, mesh["pp"]))
    return shard_experts(to_moe(model, moe), mesh["ep"], mesh["etp"], spread)


def positions_of_ranks(attention: SequenceAttention, tp: int, sequence: int) -> list[Tensor]:
    """Which tokens of a sample the ranks of tp x cp have between the matrix products, tp varying fastest."""
    of_cp = (attention.positions_of(rank, sequence) for rank in range(attention.ranks))
    return [share for positions in of_cp for share in positions.tensor_split(tp)]


def loss_function(spec: TrainSpec, tp: Axis) -> Loss:
    """The cross entropy; under tp each rank has the logits of its rows of the vocabulary. Of many, chunk by chunk."""
    chunk = spec.layout.chunk_of_loss(spec.config)
    whole, chunked = token_loss, loss_in_chunks
    more = {}
    if tp.size > 1:
        topic = sequence_parallel.engine.loss if spec.layout.sp else megatron_tp.engine.loss
        whole, chunked = topic.token_loss, topic.chunked_token_loss
        more = {"axis": tp, "vocabulary": spec.config.vocabulary}
    if chunk:
        return InHead(partial(chunked, tokens=spec.tokens, chunk=chunk, **more))
    return partial(whole, tokens=spec.tokens, **more)


def shard_optimizer(model: GPT, spec: TrainSpec, mesh: Mesh, copies: Copies) -> tuple[Engine, Engine | None]:
    """ZeRO over dp x cp and, for experts, whose copies are on other ranks, a second one over edp.

    Under a pipeline each is told which stages there are, and what other ranks of it have too.
    """
    layout, data = spec.layout, mesh.joined("cp", "dp")
    options = {"make_optimizer": spec.make_optimizer, "master": spec.precision.master, "elements": spec.bucket}
    options |= {"every": layout.reduce == "microbatch", "reshard": layout.reshard == "forward"}
    options["whole"] = {router.bias for router in routers(model)}  # moved by the load, between steps
    if layout.pp > 1:
        options["parts"] = Parts(stages_here(model, layout, mesh["pp"]), copies.ranks_of)
    if spec.weight_decay is not None:
        options["groups"] = groups_of(model, spec.weight_decay)
    engine = partial(ENGINES[layout.zero], model, **options)
    muon = partial(muon_options, model, spec, mesh, options.get("groups"))
    if spec.moe is None:
        return engine(axis=data, **muon("tp", "cp", "dp")), None
    experts = set(expert_parameters(model))
    return (
        engine(axis=data, only=lambda p: p not in experts, **muon("tp", "cp", "dp")),
        engine(axis=mesh["edp"], only=lambda p: p in experts, **muon("etp", "edp")),
    )


def twin(layout: Layout, pp: Axis) -> tuple[Axis, int] | None:
    """The rank of a pipeline that has the same stages as this one, and computes other micro-batches of them."""
    return (pp, pp.size - 1 - pp.index) if layout.schedule == "dualpipe" and pp.size > 1 else None


def muon_options(
    model: GPT, spec: TrainSpec, mesh: Mesh, groups: list[dict[str, Any]] | None, inner: str, *outer: str
) -> dict[str, Any]:
    """Args: inner: the axis that shards matrices themselves; outer: those over which ZeRO does, or all have them."""
    if spec.muon is None:
        return {}
    return options_of(model, spec.muon, mesh.joined(inner, *outer), mesh[inner].size, groups)


def stages_here(model: GPT, layout: Layout, pp: Axis) -> dict[int, GPT]:
    """The stages of this rank, by number."""
    return each_stage(model, stages_by_rank(layout)[pp.index], layout.stages, layout.split)


def make_pipeline(
    model: GPT, spec: TrainSpec, pp: Axis, loss: Loss, masks: SampleMasks, engines: Sequence[Engine]
) -> Pipeline | None:
    """What runs the schedule and tells the engines of it; None for one rank, which has nobody to send to."""
    layout = spec.layout
    if pp.size == 1:
        return None
    schedule = build(layout.schedule, layout.pp, layout.microbatches, layout.v)
    here = spec.config.sequence // layout.sequence_shards  # tokens of a sample between the layers
    activations = (layout.microbatch, here, spec.config.hidden)
    mine = stages_here(model, layout, pp)
    turns = turns_of(model, spec.device) if layout.by_turns else None
    made = Pipeline(
        mine, loss, schedule, pp, activations, spec.precision.parameters, spec.device, masks, engines, turns
    )
    if made.deferred:
        made.deferred.weights_leave = layout.zero == 3 and layout.reshard == "forward"
    return made


def turns_of(model: GPT, device: torch.device) -> Turns:
    """What the experts' layers hand over while their rows are in flight."""
    turns = Turns(device)
    for module in model.modules():
        if isinstance(module, ExpertParallelMoE):
            module.flight.meanwhile = turns.give
    return turns
