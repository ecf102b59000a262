"""What a rank holds: parameters, gradients, optimizer state and saved activations. Lectures 01 to 08.

Exact for `core.model.gpt` as the topics shard it, as their ledger counts (`tests/cluster/test_accounts.py`, and at
scale `cluster/dry_run.py`): parameters and their states element by element, but for the padding of ZeRO's buckets.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from cluster.planner.activations import filling, saved_at_peak, transient
from cluster.planner.counting import (
    Matrix,
    expert_matrices,
    expert_parameters,
    layer_matrices,
    layer_parameters,
    norm_parameters,
    outer_norms,
    position_parameters,
    router_parameters,
    vocabulary_shard,
)
from cluster.planner.exchanges import most_gathered
from cluster.planner.layout import Layout
from cluster.planner.stages import ends_of, layers_of
from core.model.config import ModelConfig
from zero.engine.buckets import BUCKET_ELEMENTS


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank: at the end of a backward, and the most of what comes and goes."""

    weights: float
    gradients: float  # where they are added up over the step and then scattered: full ones beside the shards
    optimizer: float
    activations: float  # saved for backward
    gathered: float  # full weights of ZeRO-3, when they are most
    working: float  # what a backward computes again or makes at a time; an estimate

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.working


@cache
def _layer_parameters(model: ModelConfig, tp: int, ep: int, etp: int) -> tuple[int, int, int]:
    """Of a layer on a rank: a dense one, one with experts but for them, and its experts."""
    experts = model.experts // ep * expert_parameters(model, etp)
    return layer_parameters(model, False, tp), layer_parameters(model, True, tp), experts


def parameters(model: ModelConfig, layout: Layout, rank: int = 0) -> tuple[int, int]:
    """Elements on rank `rank` of the pipeline, before ZeRO shards anything: of experts, and all others'."""
    others = experts = 0
    of_dense, of_moe, of_experts = _layer_parameters(model, layout.tp, layout.ep, layout.etp)
    for stage in layout.stages_of(rank):
        dense, moe = layers_of(model, layout, stage)
        others += dense * of_dense + moe * of_moe
        experts += moe * of_experts
    first, last = ends_of(layout, rank)
    table = vocabulary_shard(model, layout.tp) * model.hidden
    if first:
        others += table + position_parameters(model)
    if last:
        others += outer_norms(model) + (vocabulary_shard(model, layout.tp) if model.head_bias else 0)
    if last and not (model.tied and first):
        others += table
    return experts, others


def matrix_parameters(model: ModelConfig, layout: Layout, rank: int = 0) -> tuple[int, int]:
    """Of `parameters` those in matrices of the layers, which Muon updates: of experts, and all others."""

    def elements(matrices: list[Matrix], t: int) -> int:
        return sum(prod(matrix.shape(t)) for matrix in matrices)

    others = experts = 0
    for stage in layout.stages_of(rank):
        dense, moe = layers_of(model, layout, stage)
        others += dense * elements(layer_matrices(model, False), layout.tp)
        others += moe * (elements(layer_matrices(model, True), layout.tp) + router_parameters(model, True))
        experts += moe * model.experts // layout.ep * elements(expert_matrices(model), layout.etp)
    return experts, others


def replicated_parameters(model: ModelConfig, layout: Layout, rank: int = 0) -> int:
    """Of those, what tensor parallelism replicates: norms, biases of row-parallel layers, positions, routers."""
    found = 0
    for stage in layout.stages_of(rank):
        for layers, moe in zip(layers_of(model, layout, stage), (False, True), strict=True):
            matrices = sum(m.parameters() for m in layer_matrices(model, moe) if m.sharding == "replicate")
            row = (model.biases or model.out_bias) + (not moe) * (model.biases or model.mlp_bias)
            row_biases = row * model.hidden  # those of experts are not over tp
            found += layers * (norm_parameters(model) + row_biases + matrices + router_parameters(model, moe))
    first, last = ends_of(layout, rank)
    found += position_parameters(model) if first else 0
    return found + (outer_norms(model) if last else 0)


def state_sizes(itemsize: int) -> tuple[int, int, int]:
    """Bytes a parameter of weights, gradients and Adam; where weights have 2, of the usual policy for 16 bits."""
    return (2, 4, 12) if itemsize == 2 else (itemsize, itemsize, 2 * itemsize)


def selection_biases(model: ModelConfig, layout: Layout, rank: int) -> int:
    """Bytes of what routers add to scores to balance: not trained, in float32 and not sharded (2412.19437, 2.1.2)."""
    mixtures = sum(layers_of(model, layout, stage)[1] for stage in layout.stages_of(rank))
    return 4 * model.experts * mixtures if model.score == "sigmoid" else 0


def rank_memory(model: ModelConfig, layout: Layout, rank: int = 0, itemsize: int = 2, muon: bool = False) -> RankMemory:
    """What a rank of the pipeline holds.

    Args:
        itemsize: bytes of a weight and of an activation.
        muon: matrices have one moment, not two.
    """
    found = states(model, layout, rank, itemsize, muon)
    working = found.working + transient(model, layout, rank, itemsize)
    return replace(found, activations=saved_at_peak(model, layout, rank, itemsize), working=working)


def states(model: ModelConfig, layout: Layout, rank: int = 0, itemsize: int = 2, muon: bool = False) -> RankMemory:
    """The same without activations, and of what is working only buckets on their way."""
    weight, gradient, optimizer = state_sizes(itemsize)
    experts, others = parameters(model, layout, rank)
    full = experts + others
    shard = others / layout.data + experts / layout.edp
    moment = max(4, itemsize)
    of_experts, of_others = matrix_parameters(model, layout, rank) if muon else (0, 0)
    spared = of_others / layout.data + of_experts / layout.edp if layout.zero else of_others + of_experts
    here = 0  # elements of full weights that ZeRO-3 has gathered
    if layout.zero == 3:
        few = filling(layout.schedule, layout.pp, layout.microbatches)
        here = sum(most_gathered(model, layout, rank, of_experts, few) for of_experts in (False, True))
    added_up = full if layout.zero >= 2 and layout.reduce == "step" and layout.microbatches > 1 else 0
    return RankMemory(
        weights=weight * (shard if layout.zero == 3 else full) + selection_biases(model, layout, rank),
        gradients=gradient * (shard + added_up if layout.zero >= 2 else full),
        optimizer=optimizer * (shard if layout.zero >= 1 else full) - moment * spared,
        activations=0.0,
        gathered=weight * here,
        working=2 * min(BUCKET_ELEMENTS, full) * gradient if layout.zero >= 2 else 0.0,
    )
