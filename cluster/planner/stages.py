"""Which layers each rank of the pipeline has, and which of them the ends of the model. Lectures 07 and 08."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from cluster.planner.layout import Layout
from core.model.config import ModelConfig
from pipeline.stages import layers_in


def layers_of(model: ModelConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """The dense layers of a stage, and those with experts."""
    return _layers_of(model.layers, _kinds(model), layout.stages, layout.split)[stage]


Kinds = int | tuple[bool, ...]


def _kinds(model: ModelConfig) -> Kinds:
    """How many layers come before those with experts; where these are among the others, which have them."""
    if model.in_order:
        return min(model.dense_layers, model.layers) if model.experts else model.layers
    return tuple(map(model.has_experts, range(model.layers)))


@cache
def _layers_of(layers: int, kinds: Kinds, stages: int, split: str) -> list[tuple[int, int]]:
    """The same of every stage."""
    found = []
    for stage in range(stages):
        here = layers_in(layers, stages, stage, split)
        moe = len(here[max(kinds - here.start, 0) :]) if isinstance(kinds, int) else sum(kinds[i] for i in here)
        found.append((len(here) - moe, moe))
    return found


def recomputed_of(model: ModelConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """Of `layers_of` those that are recomputed, in whichever way."""
    if layout.recompute_every == 1:
        return layers_of(model, layout, stage)
    here, k = layers_in(model.layers, layout.stages, stage, layout.split), layout.recompute_every
    again = range(here.start - here.start % k + k - 1, here.stop, k)
    moe = sum(map(model.has_experts, again))
    return len(again) - moe, moe


def sum_of_layers(model: ModelConfig, layout: Layout, stage: int, of_layer: Callable[[Layout, bool], float]) -> float:
    """Of all layers of a stage; `of_layer(layout, moe)` is that of one, in a layout with this recomputation."""
    found, kept = 0.0, layout if layout.recompute_every == 1 else replace(layout, recompute="none", recompute_every=1)
    counts = zip(layers_of(model, layout, stage), recomputed_of(model, layout, stage), (False, True), strict=True)
    for layers, recomputed, moe in counts:
        found += recomputed * of_layer(layout, moe) if recomputed else 0.0
        found += (layers - recomputed) * of_layer(kept, moe) if layers > recomputed else 0.0
    return found


def layers_by_rank(model: ModelConfig, layout: Layout) -> list[int]:
    """How many layers each rank of the pipeline has."""
    every = _layers_of(model.layers, _kinds(model), layout.stages, layout.split)
    return [sum(sum(every[stage]) for stage in layout.stages_of(rank)) for rank in range(layout.pp)]


@cache
def met_by_rank(model: ModelConfig, schedule: str, pp: int, v: int, split: str) -> list[tuple[float, float]]:
    """Layers, dense and with experts, that a microbatch meets on each rank; with dualpipe half of them meet a rank."""
    layout, models = Layout(schedule=schedule, pp=pp, v=v, split=split), 2 if schedule == "dualpipe" else 1
    found = []
    for rank in range(pp):
        dense, moe = zip(*(layers_of(model, layout, stage) for stage in layout.stages_of(rank)), strict=True)
        found.append((sum(dense) / models, sum(moe) / models))
    return found


@cache
def stage_rank(schedule: str, pp: int, v: int, stage: int) -> int:
    """The first rank that has a stage."""
    layout = Layout(schedule=schedule, pp=pp, v=v)
    return next(rank for rank in range(pp) if stage in layout.stages_of(rank))


def distinct_ranks(model: ModelConfig, layout: Layout) -> list[int]:
    """Ranks of the pipeline of which one holds most: of those with equal stages, the first and the last."""
    return _distinct_ranks(model.layers, _kinds(model), layout.schedule, layout.pp, layout.v, layout.split)


@cache
def _distinct_ranks(layers: int, kinds: Kinds, schedule: str, pp: int, v: int, split: str) -> list[int]:
    layout, alike = Layout(schedule=schedule, pp=pp, v=v, split=split), {}
    every = _layers_of(layers, kinds, layout.stages, split)
    for rank in range(pp):
        stages = [every[stage] for stage in layout.stages_of(rank)]
        alike.setdefault((*stages, *ends_of(layout, rank)), []).append(rank)
    return sorted({rank for ranks in alike.values() for rank in (ranks[0], ranks[-1])})


def ends_of(layout: Layout, rank: int) -> tuple[bool, bool]:
    """Whether a rank of the pipeline has the embedding, and whether it has the head."""
    stages = layout.stages_of(rank)
    return 0 in stages, layout.stages - 1 in stages
