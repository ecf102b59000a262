"""What a rank of a named program holds, and whether a device has room for it. Lectures 01, 03 and 05.

`memory.py` counts this project, tensor by tensor. Other programs keep the same parts in other types: gradients in the
type that they are added up in, attention's log-sum-exp and no scores, a gate's two halves without their product, or
what tensor parallelism has gathered. To what is held comes what the allocator loses between allocations, what NCCL
keeps for its channels, and the runtime.
"""

from dataclasses import replace
from math import inf
from typing import NamedTuple

from cluster.planner.activations import FORGETTING, filling, layer_saved, saved_at_peak, transient
from cluster.planner.counting import expert_matrices, layer_matrices, vocabulary_shard
from cluster.planner.efficiency import head_in_layers
from cluster.planner.exchanges import most_gathered
from cluster.planner.layout import Layout, alike_in
from cluster.planner.machines import Machine
from cluster.planner.memory import RankMemory, parameters, states
from cluster.planner.software import Software
from cluster.planner.stages import distinct_ranks, ends_of
from core.model.config import ModelConfig

RUNTIME = 0.7e9  # bytes of CUDA's context, of its libraries' workspaces and kernels
NCCL = 0.2e9  # of each communicator with other ranks: its channels' buffers
ITEM = 2


class Flying(NamedTuple):
    """Bytes on a rank of what comes and goes in a step, beside its states."""

    saved: float  # for backward
    working: float  # of a backward
    beside: bool = True  # whether buckets are on their way meanwhile
    least: float = 0.0  # of all that works


def held(model: ModelConfig, layout: Layout, software: Software | None, rank: int = 0) -> RankMemory:
    """Bytes on rank `rank` of the pipeline, as the program keeps them; what is allocated, without what is lost.

    Args:
        software: None: this project, as `rank_memory` counts it.
    """
    return together(layout, software, states_held(model, layout, software, rank),
                    flying(model, layout, software, rank))  # fmt: skip


def together(layout: Layout, software: Software | None, of: RankMemory, air: Flying) -> RankMemory:
    gradients = of.gradients
    if software and software.grown and layout.pp == layout.microbatches == 1:
        gradients = max(0.0, gradients - air.saved)
    working = max(air.least, air.working + (of.working if air.beside else 0.0))
    return RankMemory(of.weights, gradients, of.optimizer, air.saved, of.gathered, working)


def states_held(model: ModelConfig, layout: Layout, software: Software | None, rank: int) -> RankMemory:
    """Without activations, and of what works only buckets on their way."""
    ours = states(model, layout, rank)
    if software is None:
        return ours
    gradients, gathered = ours.gradients, ours.gathered
    if layout.zero == 3 and layout.edp == 1:  # experts that nobody else has are not sharded, nor gathered
        experts = parameters(model, layout, rank)[0]
        gathered = max(0.0, gathered - ITEM * most_gathered(model, layout, rank, True, layout.pp))
        gradients -= 4 * experts if layout.reduce == "step" else 0.0
    gradients *= software.gradient_held / 4
    optimizer = ours.optimizer * software.state_held / 12
    return replace(ours, gradients=gradients, optimizer=optimizer, gathered=gathered)


def flying(model: ModelConfig, layout: Layout, software: Software | None, rank: int) -> Flying:
    saved = saved_at_peak(model, layout, rank, ITEM)
    if software is None:
        return Flying(saved, transient(model, layout, rank, ITEM))
    moe, least = model.moe_layers > 0, 0.0
    last = ends_of(layout, rank)[1]
    in_one = replace(layout, loss_chunk=1) if last or software.keeps_gathered else layout
    if last:  # the logits by themselves: our loss saves 4 bytes, and makes 8 at a time
        logits = layout.tokens(model.sequence) * vocabulary_shard(model, layout.tp)
        saved -= 4 * logits
        of_logit = (layout.tp > 1 and software.logits_held_tp) or software.logits_held
        working = max(transient(model, in_one, rank, ITEM), of_logit * logits)
    else:
        working = transient(model, layout, rank, ITEM)
    kept = replace(layout, recompute="none") if layout.recompute == "full" and layout.recompute_every > 1 else layout
    if kept.recompute != "full":  # or of one in several layers, which are little beside what the others save
        saved *= share_saved(model, kept, software, moe) * (1 - software.again.dropped)
    elif software.keeps_gathered:
        least = transient(model, in_one, rank, ITEM) + gathered_inputs(model, layout, moe)
    return Flying(saved, working, not last, least)


def share_saved(model: ModelConfig, layout: Layout, software: Software, moe: bool) -> float:
    """Of the activations that `activations.py` counts for a layer, what the program saves."""
    of_layer = layer_saved(model, layout, moe, ITEM)
    saved = of_layer
    forgets = layout.recompute in FORGETTING  # what is left of norms and gates are their inputs
    if software.fused_gate and not forgets:
        saved -= product_of_gate(model, layout, moe)
    if software.fused_gate and moe:  # an expert's features are weighted, not its result, which nobody needs then
        saved -= ITEM * layout.tokens(model.sequence) / layout.tp * model.top_k * model.hidden
    if software.keeps_gathered and not forgets:
        saved += gathered_inputs(model, layout, moe)
    if software.saved8 and software.bits < 16 and not forgets:
        saved -= inputs_of_products(model, layout, moe) / 2
    return saved / of_layer


def inputs_of_products(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """Bytes of what a layer's matrices multiply, which are saved in 8 bits where they are multiplied in 8."""
    dense = sum(matrix.shape(layout.tp)[0] for matrix in layer_matrices(model, moe))
    routed = model.top_k * sum(matrix.inputs for matrix in expert_matrices(model)) if moe else 0
    tokens = layout.tokens(model.sequence)
    return ITEM * tokens * (dense / (1 if layout.tp == 1 else 2) + routed / layout.tp)


def product_of_gate(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """Bytes of one tensor of the features of a layer's gated MLP, or of its experts for each routed token."""
    if not model.gated:
        return 0.0
    tokens = layout.tokens(model.sequence)
    if not moe:
        return ITEM * tokens * model.feed_forward / layout.tp
    return ITEM * tokens / layout.tp * (model.top_k * model.expert_size + model.shared_feed_forward)


def gathered_inputs(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """Bytes of the inputs of attention and MLP that other ranks of tp hold, of one layer."""
    inputs = 1 if moe else 2
    return inputs * ITEM * layout.tokens(model.sequence) * model.hidden * (1 - 1 / layout.sp_ranks)


def reserved(memory: RankMemory, software: Software) -> float:
    """Bytes that a program's allocator has taken: what `torch.cuda.max_memory_reserved` says."""
    return memory.total * (1 + software.reserve)


def needed(memory: RankMemory, layout: Layout, software: Software) -> float:
    """Bytes of a device: what is reserved, the runtime and the communicators."""
    axes = sum(ranks > 1 for ranks in (layout.tp, layout.cp, layout.ep, layout.pp, layout.data))
    return reserved(memory, software) + RUNTIME + axes * NCCL


# What states and activations depend on: layouts that differ in something else share them. Of the microbatches it is
# how many fill the pipeline.
OF_STATES = ("tp", "cp", "ep", "etp", "pp", "dp", "v", "schedule", "zero", "reduce", "reshard", "split")
IN_FLIGHT = ("tp", "cp", "cp_kind", "etp", "pp", "v", "sp", "ulysses", "schedule", "microbatch", "recompute",
             "recompute_every", "loss_chunk", "split")  # fmt: skip


@alike_in(*OF_STATES)
def states_by_rank(
    model: ModelConfig, layout: Layout, microbatches: int, software: Software | None
) -> list[RankMemory]:
    layout = replace(layout, microbatches=microbatches)
    return [states_held(model, layout, software, rank) for rank in distinct_ranks(model, layout)]


@alike_in(*IN_FLIGHT)
def flying_by_rank(model: ModelConfig, layout: Layout, microbatches: int, software: Software | None) -> list[Flying]:
    layout = replace(layout, microbatches=microbatches)
    return [flying(model, layout, software, rank) for rank in distinct_ranks(model, layout)]


def largest(model: ModelConfig, layout: Layout, software: Software | None, limit: float = inf) -> RankMemory:
    """What the rank of the pipeline holds that holds most; or the first that is found to hold more than a limit."""
    if software and software.balances and layout.pp > 1 and not layout.split:
        # The first rank has layers for the last one's head.
        more = round((model.layers + head_in_layers(model)) / layout.stages) * layout.stages
        return held(replace(model, layers=more), layout, software, 0)
    few = filling(layout.schedule, layout.pp, layout.microbatches)
    own = states_by_rank(model, layout, few if layout.zero > 1 else 1, software)
    most = None
    for of_rank, air in zip(own, flying_by_rank(model, layout, few, software), strict=True):
        memory = together(layout, software, of_rank, air)
        most = memory if most is None or memory.total > most.total else most
        if most.total > limit:
            break
    return most


def has_room(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> bool:
    return needed(largest(model, layout, software), layout, software) <= machine.memory
