"""What ZeRO-3 gathers and ZeRO-2 and 3 reduce in a step, as the order of a rank's actions has it. Lectures 01 and 07.

A forward or backward of a stage goes layer by layer: one is freed, and the next but one gathered. What the next action
needs first is gathered while the last layer computes, or stays where it is there already (`zero/engine/gathered.py`).
"""

from collections import Counter
from functools import cache
from typing import NamedTuple

from cluster.planner.counting import (
    expert_parameters,
    layer_parameters,
    outer_norms,
    position_parameters,
    vocabulary_shard,
)
from cluster.planner.layout import Layout
from cluster.planner.stages import ends_of, layers_of
from core.model.config import ModelConfig
from pipeline.schedules import build

Visit = tuple[int, bool]  # a stage, and whether forward


class StageSizes(NamedTuple):
    """Elements of a stage's units on a rank."""

    ends: int  # what is in no layer
    layers: tuple[int, ...]


def stage_sizes(model: ModelConfig, layout: Layout, rank: int, experts: bool) -> tuple[dict[int, StageSizes], int]:
    """Of each stage of a rank, of its experts or of all else; and of the embedding that two of its stages have."""
    first, last = ends_of(layout, rank)
    table = vocabulary_shard(model, layout.tp) * model.hidden
    shared = table if model.tied and first and last and layout.stages > 1 and not experts else 0
    found = {}
    for stage in layout.stages_of(rank):
        dense, moe = layers_of(model, layout, stage)
        if experts:
            here = expert_parameters(model, layout.etp) * model.experts // layout.ep if model.experts else 0
            found[stage] = StageSizes(0, (0,) * dense + (here,) * moe)
            continue
        is_first, is_last = stage == 0, stage == layout.stages - 1
        ends = position_parameters(model) if is_first else 0
        if is_last:
            ends += outer_norms(model) + (vocabulary_shard(model, layout.tp) if model.head_bias else 0)
        tables = is_first + is_last - (model.tied and is_first and is_last)
        ends += 0 if shared else tables * table
        of_dense, of_moe = (layer_parameters(model, moe, layout.tp) for moe in (False, True))
        found[stage] = StageSizes(ends, (of_dense,) * dense + (of_moe,) * moe)
    return found, shared


@cache
def visits(schedule: str, pp: int, microbatches: int, v: int, rank: int) -> Counter[tuple[Visit, Visit | None]]:
    """How often a rank goes through a stage in one direction, and through which next."""
    if pp == 1:  # nobody says what comes next
        return Counter({((0, forward), None): microbatches for forward in (True, False)})
    row = [(a.stage, a.kind == "F") for a in build(schedule, pp, microbatches, v)[rank] if a.kind != "W"]
    return Counter(zip(row, [*row[1:], None], strict=True))


def _visits(layout: Layout, rank: int) -> Counter[tuple[Visit, Visit | None]]:
    return visits(layout.schedule, layout.pp, layout.microbatches, layout.v, rank)


def _stays(here: Visit, then: Visit | None, sizes: dict[int, StageSizes], shared: int, ends: set[int]) -> int:
    """Elements of what is there at the end of a visit and needed first in the next."""
    if then is None:
        return 0
    stays = shared if {here[0], then[0]} <= ends else 0
    if here[0] == then[0]:
        ends_size, layers = sizes[here[0]]
        stays += ends_size
        if layers and (here[1] != then[1] or len(layers) == 1):
            stays += layers[-1] if here[1] else layers[0]
    return stays


def gathered(model: ModelConfig, layout: Layout, rank: int, experts: bool) -> int:
    """Elements that ZeRO-3 gathers in a step."""
    sizes, shared = stage_sizes(model, layout, rank, experts)
    ends = {0, layout.stages - 1}
    if layout.reshard == "step":
        return shared + sum(size.ends + sum(size.layers) for size in sizes.values())
    total = 0
    for (here, then), times in _visits(layout, rank).items():
        whole = sizes[here[0]].ends + sum(sizes[here[0]].layers) + (shared if here[0] in ends else 0)
        total += times * (whole - _stays(here, then, sizes, shared, ends))
    return total


def reduced(model: ModelConfig, layout: Layout, rank: int, experts: bool) -> int:
    """Elements of gradients that ZeRO-2 and 3 reduce in a step: once, or after each backward of a stage."""
    sizes, shared = stage_sizes(model, layout, rank, experts)
    if layout.reduce == "step":
        return shared + sum(size.ends + sum(size.layers) for size in sizes.values())
    ends, total = {0, layout.stages - 1}, 0
    for ((stage, forward), _), times in _visits(layout, rank).items():
        if not forward:
            total += times * (sizes[stage].ends + sum(sizes[stage].layers) + (shared if stage in ends else 0))
    return total


def most_gathered(model: ModelConfig, layout: Layout, rank: int, experts: bool, microbatches: int) -> int:
    """Elements of gathered weights when they are most.

    Args:
        microbatches: so many show it.
    """
    sizes, shared = stage_sizes(model, layout, rank, experts)
    if layout.reshard == "step":
        return shared + sum(size.ends + sum(size.layers) for size in sizes.values())
    ends = {0, layout.stages - 1}
    around = {stage: size.ends + (shared if stage in ends else 0) for stage, size in sizes.items()}
    two = {
        stage: max((sum(x.layers[i : i + 2]) for i in range(len(x.layers))), default=0) for stage, x in sizes.items()
    }
    most = max(around[stage] + two[stage] for stage in sizes)
    for here, then in visits(layout.schedule, layout.pp, microbatches, layout.v, rank):
        stage, forward = here
        last = sizes[stage].layers[-1:] if forward else sizes[stage].layers[:1]
        if then is not None:
            coming = around[then[0]]
            coming += sum(sizes[then[0]].layers[:1] if then[1] else sizes[then[0]].layers[-1:])
            most = max(most, around[stage] + sum(last) + coming - _stays(here, then, sizes, shared, ends))
    return most
