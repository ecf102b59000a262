"""The split of a model's layers over the stages that makes the slowest rank of a pipeline fastest. Lectures 07 and 08.

Layers of a kind take equally long, and a model has its dense ones first. The head takes as long as some layers, so its
rank gets fewer; the embedding takes no time. Layer by layer each goes to the rank that is fastest with it: of jobs that
take equally long no other order ends sooner. Only which stages have the dense layers before those with experts is tried
in every way.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from heapq import heapify, heappop, heapreplace
from itertools import accumulate, combinations
from math import inf
from typing import NamedTuple

from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout
from cluster.planner.software import Software
from cluster.planner.stages import distinct_ranks
from cluster.planner.steptime import head_seconds, layer_seconds
from core.model.config import ModelConfig
from pipeline.split import layers_by_stage, notation, stages_of

FEW = 6  # dense layers before others of which every way is tried; of more those with as many in each stage
SAME = 1 + 1e-9  # times that differ by less are equal


class Work(NamedTuple):
    """Layers in their order, and seconds of a microbatch."""

    dense: int  # the first ones
    moe: int
    of_dense: float
    of_moe: float
    of_head: float

    def seconds(self, split: tuple[int, ...]) -> list[float]:
        """Of each stage."""
        ends = [*accumulate(split)]
        dense = [min(end, self.dense) - min(end - n, self.dense) for n, end in zip(split, ends, strict=True)]
        found = [d * self.of_dense + (n - d) * self.of_moe for d, n in zip(dense, split, strict=True)]
        found[-1] += self.of_head
        return found


Groups = tuple[tuple[int, ...], ...]  # the stages of each rank; two ranks that have the same are one


@cache
def groups_of(schedule: str, pp: int, v: int) -> Groups:
    return tuple(dict.fromkeys(tuple(stages_of(schedule, pp, v, rank)) for rank in range(pp)))


def slowest(work: Work, groups: Groups, split: tuple[int, ...]) -> tuple[float, float]:
    """Seconds of the slowest rank, and of the slowest stage."""
    seconds = work.seconds(split)
    return max(sum(seconds[stage] for stage in stages) for stages in groups), max(seconds)


def balance(work: Work, groups: Groups, most: Mapping[int, int] | None = None) -> tuple[int, ...] | None:
    """Layers of each stage, so that the slowest rank is as fast as can be, and then the slowest stage.

    (That not always, where dense layers come before others: no stage between theirs is left empty.) Where that leaves
    a choice the first stages are the shorter ones: they keep the most microbatches.

    Args:
        most: layers that a group may have; left out: any number.

    Returns:
        None where they do not go into the groups.
    """
    best, of_best = None, (inf, inf)
    for before, first in _dense_first(work, sum(map(len, groups))):
        found = _fill(work, groups, before, first, most or {})
        if found and (of_this := slowest(work, groups, found)) < of_best:
            best, of_best = found, of_this
    return best


def _dense_first(work: Work, stages: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Dense layers of the first stages, and the first stage that may have others too."""
    if not (work.dense and work.moe):
        yield (), 0
        return
    n = work.dense
    ways = [ends for k in range(n) for ends in combinations(range(1, n), k)]
    if n > FEW:
        ways = [tuple(range(size, n, size)) for size in range(1, n + 1)]
    for way in ways:
        sizes = tuple(b - a for a, b in zip((0, *way), (*way, n), strict=True))
        for before in (sizes, (0, *sizes)):
            if len(before) <= stages:
                yield before, len(before) - 1


def _fill(
    work: Work, groups: Groups, before: tuple[int, ...], first: int, most: Mapping[int, int]
) -> tuple[int, ...] | None:
    """The best split with these layers in the first stages, and all others in those from `first` on."""
    stages = sum(map(len, groups))
    start = [*before, *(0,) * (stages - len(before))]
    seconds = [n * work.of_dense for n in start]
    seconds[-1] += work.of_head
    count, one = (work.moe, work.of_moe) if work.moe else (work.dense, work.of_dense)

    def filled(limits: tuple[float, float]) -> tuple[int, ...] | None:
        """Where no rank, and no stage, takes longer than these seconds."""
        split, of_stage = start.copy(), seconds.copy()
        ranks = [(sum(of_stage[s] for s in group), -g) for g, group in enumerate(groups)]
        heapify(ranks)
        left = count
        while left:
            if not ranks:
                return None
            of_rank, g = ranks[0]
            group = groups[-g]
            open_ = [s for s in group if s >= first and of_stage[s] + one <= limits[1] * SAME]
            full = sum(split[s] for s in group) >= most.get(-g, inf) or of_rank + one > limits[0] * SAME
            if full or not open_:
                heappop(ranks)
                continue
            stage = min(open_, key=lambda s: (of_stage[s], -s))
            split[stage] += 1
            of_stage[stage] += one
            left -= 1
            heapreplace(ranks, (of_rank + one, g))
        return tuple(split)

    best = filled((inf, inf))
    if best is None or max(map(len, groups)) == 1:
        return best
    largest, of_stage = slowest(work, groups, best)
    ends = sorted({s + n * one for s in {*seconds} for n in range(count + 1) if max(seconds) <= s + n * one < of_stage})
    # The fewest seconds of a stage with which all layers still go in: `filled` is monotone in them.
    found = bisect_left(ends, True, key=lambda end: filled((largest, end)) is not None)
    return filled((largest, ends[found])) if found < len(ends) else best


# ---- Of a layout -----------------------------------------------------------------------------------------------------


def work_of(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> Work:
    dense = layer_seconds(model, layout, False, machine, software)
    moe = layer_seconds(model, layout, True, machine, software) if model.experts else 0.0
    # Of a stage on two ranks each runs half of the microbatches, layers and head alike.
    head = head_seconds(model, layout, machine, software) * (2 if layout.schedule == "dualpipe" else 1)
    if not model.in_order:  # alike then, as the mean of all
        mean = dense + (moe - dense) * model.moe_layers / model.layers
        return Work(0, model.layers, dense, mean, head)
    return Work(model.layers - model.moe_layers, model.moe_layers, dense, moe, head)


def could_be(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """The seconds of the slowest rank over the mean of all: no split is faster by more."""
    work, groups = work_of(model, layout, machine, software), groups_of(layout.schedule, layout.pp, layout.v)
    now, _ = slowest(work, groups, layers_by_stage(model.layers, layout.stages, layout.split))
    return now * len(groups) / sum(work.seconds((model.layers,)))


def better_split(
    model: ModelConfig, layout: Layout, machine: Machine, software: Software, has_room: Callable[[Layout, int], bool]
) -> Layout | None:
    """The layout with the split that makes it fastest; None where its own does, or no faster one fits.

    Where memory is short a rank gets fewer layers; which of its stages then has them is not searched.

    Args:
        has_room: whether this rank of the pipeline of this layout holds no more than it may.
    """
    work, groups = work_of(model, layout, machine, software), groups_of(layout.schedule, layout.pp, layout.v)
    now, _ = slowest(work, groups, layers_by_stage(model.layers, layout.stages, layout.split))
    most: dict[int, int] = {}
    while True:
        split = balance(work, groups, most)
        if split is None or slowest(work, groups, split)[0] * SAME >= now or _idle(groups, split):
            return None
        found = replace(layout, split=notation(split))
        over = [r for r in distinct_ranks(model, found) if not has_room(found, r)]
        if not over:
            return found
        for rank in over:
            g = next(g for g, stages in enumerate(groups) if [*stages] == layout.stages_of(rank))
            most[g] = sum(split[stage] for stage in groups[g]) - 1


def _idle(groups: Groups, split: tuple[int, ...]) -> bool:
    """Whether a rank has nothing: neither layers nor an end of the model."""
    ends = {0, len(split) - 1}
    return any(ends.isdisjoint(stages) and not any(split[s] for s in stages) for stages in groups)
