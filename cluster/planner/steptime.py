"""How long a step takes: matrix products, memory, messages and the bubble. Lecture 03.

A device multiplies matrices tile by tile, all its processors at once, and the last wave of tiles may leave most of them
idle: so small products are less efficient. Everything between the products is bound by memory. What messages add is
in `links/messages.py`.

F forward, I dgrad, W wgrad, of all layers of a rank; m microbatches, p pipeline ranks. Where stages are not equal all
wait for the slowest rank.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product as product_of
from typing import NamedTuple

from cluster.links.messages import ITEM, all_reduce, all_to_all, between_stages, context, ring
from cluster.planner.activations import filling, layer_saved
from cluster.planner.counting import core_again
from cluster.planner.efficiency import (
    CHECKPOINT,
    attention_time,
    head_time,
    layer_flop,
    operators,
    speed,
)
from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout, alike_in
from cluster.planner.memory import parameters
from cluster.planner.overlap import data_parallel
from cluster.planner.software import Software
from cluster.planner.stages import distinct_ranks, met_by_rank, stage_rank
from core.model.config import ModelConfig
from pipeline.engine.actions import stage_share
from pipeline.engine.validator import validate
from pipeline.schedules import build

UPDATE = 2 + 12 + 12 + 2  # bytes a parameter that Adam moves: gradient and states read, states and weight written


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what they are spent on."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


# ---- One microbatch --------------------------------------------------------------------------------------------------

Seconds = dict[str, float]  # by cause


def add(*times: Seconds, count: float = 1.0) -> Seconds:
    """The sum of several, `count` times."""
    return {cause: count * sum(seconds[cause] for seconds in times if cause in seconds) for cause in times[0]}


class Microbatch(NamedTuple):
    """Seconds of one microbatch in the layers of a rank, by cause."""

    forward: Seconds
    dgrad: Seconds  # and what is computed again before it
    wgrad: Seconds


def layer_times(model: ModelConfig, layout: Layout, moe: bool, machine: Machine, software: Software) -> Microbatch:
    """Of one layer."""
    fast = speed(machine, software, software.bits)
    grouped = fast * software.grouped
    flop = layer_flop(model, layout, moe, machine, software.imbalance)
    attention, attention_backward = attention_time(model, flop.attention, machine, software)
    products = [dense / fast + routed / grouped for dense, routed in zip(flop[:3], flop.grouped, strict=True)]
    saved = layer_saved(model, layout, moe, ITEM, "none")
    memory = software.passes * saved / machine.bandwidth
    elements = layout.tokens(model.sequence) * model.hidden
    # An all-reduce for attention, and one for the MLP; with sp each is a reduce-scatter and a gather.
    both = 2 * ring(elements, layout.tp, 1, machine, software)
    tp = 2 * software.tp_seen * (both if layout.sp else all_reduce(elements, layout.tp, 1, machine, software))
    if moe:
        tp *= 2 / 4 if layout.sp else 3 / 4  # experts are not sharded over it; without sp their results are gathered
    cp, cp_backward = context(model, layout, attention, machine, software)
    ep = software.ep_seen * routing(model, layout, machine, software) if moe else 0.0
    forward = {"matrix products": products[0] + attention, "memory": memory, "tp": tp, "cp": cp, "ep": ep}
    dgrad = {"matrix products": products[1] + attention_backward, "memory": 2 * memory, "tp": tp, "cp": cp_backward,
             "ep": ep}  # fmt: skip
    wgrad = {"matrix products": products[2]}
    again, host = software.again, software.launch * operators(model, layout, moe, software.at_once, software.bits)
    host_again = software.launch * (CHECKPOINT * again.checkpoints + again.operators)
    if layout.recompute == "full":
        dgrad, host_again = add(dgrad, forward), host_again + host
    elif layout.recompute != "none":
        lacks = 1 - layer_saved(model, layout, moe, ITEM) / saved  # what is made again
        dgrad = add(dgrad, {"memory": lacks * memory})
        host_again += software.launch * CHECKPOINT
        if core := core_again(model, layout.recompute):
            dgrad = add(dgrad, {"matrix products": core * attention, "cp": cp})
    if any(again):
        dgrad = add(dgrad, {"matrix products": again.products * products[0], "memory": again.moved * memory})
    return Microbatch(waiting(forward, host), waiting(dgrad, host + host_again), waiting(wgrad, host))


def waiting(work: Seconds, host: float) -> Seconds:
    """With the time for which the device waits for the host, which takes so many seconds to start it all."""
    return work | {"launch": max(0.0, host - sum(work.values()))} if host else work


def routing(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Seconds in which one layer's routed tokens travel to their experts and back, in one direction of a step."""
    to_etp = 2 * ring(layout.etp * routed_elements(model, layout, software), layout.etp, 1, machine, software)
    return all_to_alls(model, layout, machine, software) + to_etp


def all_to_alls(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Of `routing` what the ranks of ep send each other."""
    return 2 * all_to_all(routed_elements(model, layout, software), layout.ep, layout.etp, machine, software,
                          model.top_k, model.top_groups if model.groups > 1 else 0)  # fmt: skip


def routed_elements(model: ModelConfig, layout: Layout, software: Software) -> float:
    """Of the tokens of one of tp's ranks, with or without sp, on the busiest."""
    return software.imbalance * model.top_k * layout.tokens(model.sequence) * model.hidden / layout.tp


# What the times of a layer depend on, so that layouts that differ in something else share them.
OF_A_LAYER = ("tp", "cp", "cp_kind", "ep", "etp", "sp", "ulysses", "microbatch", "recompute",
              "recompute_every")  # fmt: skip


def rank_times(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> Microbatch:
    """Of the rank of a pipeline whose layers take longest."""
    met = dict.fromkeys(met_by_rank(model, layout.schedule, layout.pp, layout.v, layout.split))
    return max((_rank_times(model, layout, *layers, machine, software) for layers in met), key=seconds_of)


def layer_seconds(model: ModelConfig, layout: Layout, moe: bool, machine: Machine, software: Software) -> float:
    """Of one layer, forward and backward."""
    return seconds_of(_rank_times(model, layout, float(not moe), float(moe), machine, software))


def seconds_of(microbatch: Microbatch) -> float:
    return sum(sum(seconds.values()) for seconds in microbatch)


@alike_in(*OF_A_LAYER)
def _rank_times(
    model: ModelConfig, layout: Layout, dense: float, moe: float, machine: Machine, software: Software
) -> Microbatch:
    """Of so many layers."""
    again = (model.layers // layout.recompute_every) / model.layers  # of the layers
    times = []
    for n, of_moe in ((dense, False), (moe, True)):
        for share, kind in ((again, layout.recompute), (1 - again, "none")):
            if n * share or not (dense or moe or times):  # of a rank without layers one that takes no time
                each = _layer_times(model, layout, kind, of_moe, machine, software)
                times.append([add(seconds, count=n * share) for seconds in each])
    return Microbatch(*(add(*of_kinds) for of_kinds in zip(*times, strict=True)))


@alike_in(*(name for name in OF_A_LAYER if not name.startswith("recompute")))
def _layer_times(
    model: ModelConfig, layout: Layout, recompute: str, moe: bool, machine: Machine, software: Software
) -> Microbatch:
    return layer_times(model, replace(layout, recompute=recompute), moe, machine, software)


def forget() -> None:
    """For tests that change what times are made of."""
    for kept in (_rank_times, _layer_times, layer_flop):
        kept.cache_clear()


# ---- A step ----------------------------------------------------------------------------------------------------------


def bubble(schedule: str, p: int, m: int, v: int, f: float, i: float, w: float) -> float:
    """Seconds that the pipeline adds to those of m microbatches, to the end of its last rank.

    The lessons' formulas where there are enough microbatches to fill it; any other schedule is run on virtual devices.
    """
    if p == 1:
        return 0.0
    if schedule in ("1f1b", "gpipe") or (schedule == "interleaved" and m >= p):
        return (p - 1) * (f + i + w) / v
    if schedule == "zb-h1" and m >= p and i >= f:
        return (p - 1) * (i + max(0.0, f - w))
    if schedule == "zb-v" and m >= 2 * p and i >= max(f, w):
        return (p - 1) * max(i / 2, i - w)
    if schedule == "naive":
        return m * (p - 1) * (f + i + w)
    return f * _virtual(schedule, p, filling(schedule, p, m), v, round(i / f, 1), round(w / f, 1))


@cache
def _virtual(schedule: str, p: int, m: int, v: int, i: float, w: float, hidden: float = 0.0) -> float:
    costs, rows = {"F": 1.0, "I": i, "W": w, "B": i + w}, build(schedule, p, m, v)
    share = stage_share(rows)
    in_pair = dict.fromkeys(product_of(range(round(p / share)), repeat=2), share * hidden)
    return validate(rows, costs, together=hidden > 0, hidden=in_pair).makespan - m * (1 + i + w)


def hidden_in_pair(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Seconds of all-to-alls that an F&B of all layers of a rank hides: as far as the other direction computes."""
    times = rank_times(model, layout, machine, software)
    forward, dgrad, wgrad = (seconds["matrix products"] + seconds.get("memory", 0.0) for seconds in times)
    mixtures = max(moe for _, moe in met_by_rank(model, layout.schedule, layout.pp, layout.v, layout.split))
    travel = mixtures * software.ep_seen * all_to_alls(model, layout, machine, software)
    again = 2 if layout.recompute == "full" else 1
    return min(travel, dgrad + wgrad) + min(again * travel, forward)


def of_turns(layout: Layout, hidden: float, f: float, i: float, w: float) -> tuple[float, float]:
    """Seconds of all-to-alls that the F&B of a step hide, and those of its bubble, on virtual devices.

    Args:
        hidden: of an F&B of all layers of a rank.
    """
    p, m, share = layout.pp, layout.microbatches, layout.pp / layout.stages  # of a rank's layers, in a stage
    enough = filling(layout.schedule, p, m)
    pairs = [share * (n / share - layout.stages - 1) for n in (m, enough)]  # of all layers
    relative = round(hidden / f, 1)
    rest = _virtual(layout.schedule, p, enough, layout.v, round(i / f, 1), round(w / f, 1), relative)
    return pairs[0] * hidden, f * (rest + pairs[1] * relative)


def step(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> Step:
    """The time of a step of a layout, of which `cluster.rules.check` has found that it can run."""
    p, m = layout.pp, layout.microbatches
    microbatch = rank_times(model, layout, machine, software)
    f, i, w = (sum(seconds.values()) for seconds in microbatch)
    parts = add(*microbatch, count=m)
    parts["matrix products"] += m * head_not_hidden(model, layout, machine, software, f + i + w)
    parts["bubble"] = bubble(layout.schedule, p, m, layout.v, f, i, w)
    if layout.by_turns and m >= 2 * p:
        pair = hidden_in_pair(model, layout, machine, software)
        hidden, parts["bubble"] = of_turns(layout, pair, f, i, w)
        parts["ep"] -= hidden
    parts["pp"] = between_stages(model, layout, machine, software, f + i + w)
    experts, others = most_parameters(model, layout)
    updated = others / layout.data + experts / layout.edp if layout.zero else others + experts
    parts["optimizer"] = updated * UPDATE / machine.bandwidth
    parts["dp"] = data_parallel(model, layout, (experts, others), f, i + w, machine, software)
    return Step(parts)


@alike_in("tp", "ep", "etp", "pp", "v", "schedule", "split")
def most_parameters(model: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Of the rank of the pipeline that has most: of experts, and all others."""
    return max((parameters(model, layout, rank) for rank in distinct_ranks(model, layout)), key=sum)


def head_not_hidden(model: ModelConfig, layout: Layout, machine: Machine, software: Software, slowest: float) -> float:
    """Seconds of the head in one microbatch, less those in which its rank would wait for the slowest.

    Args:
        slowest: seconds of the layers of the rank whose layers take longest.
    """
    head = head_seconds(model, layout, machine, software)
    if software.balances and not layout.split:
        return head / layout.pp
    met = met_by_rank(model, layout.schedule, layout.pp, layout.v, layout.split)
    with_head = met[stage_rank(layout.schedule, layout.pp, layout.v, layout.stages - 1)]
    layers = seconds_of(_rank_times(model, layout, *with_head, machine, software))
    return max(0.0, layers + head - slowest)


def head_seconds(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Of one microbatch, forward and backward; with dualpipe two ranks have the head, and half of them each."""
    return head_time(model, layout, machine, software) / (2 if layout.schedule == "dualpipe" else 1)
