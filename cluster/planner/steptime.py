"""How long a step takes: matrix products, memory, messages and the bubble. Lecture 03.

A device multiplies matrices tile by tile, all its processors at once, and the last wave of tiles may leave most of them
idle: so small products are less efficient. Everything between the products is bound by memory. What messages add is
in `links/messages.py`.

F forward, I dgrad, W wgrad, of all layers of a rank; m microbatches, p pipeline ranks. Where stages are not equal all
wait for the rank with most layers.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from cluster.links.messages import ITEM, all_to_all, between_stages, context, ring
from cluster.planner.activations import filling, layer_saved
from cluster.planner.efficiency import (
    CHECKPOINT,
    attention_time,
    head_time,
    layer_flop,
    operators,
    speed,
)
from cluster.planner.hardware import Machine
from cluster.planner.layout import FOLDED, Layout
from cluster.planner.memory import parameters
from cluster.planner.overlap import data_parallel
from cluster.planner.software import Software
from cluster.planner.stages import distinct_ranks, layers_by_rank
from core.model.config import ModelConfig
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
    tp = 4 * software.tp_seen * ring(elements, layout.tp, 1, machine, software)  # an all-reduce for attention, and MLP
    if moe:
        tp /= 2  # experts are not sharded over it
    cp, cp_backward = context(model, layout, attention, machine, software)
    ep = software.ep_seen * routing(model, layout, machine, software) if moe else 0.0
    forward = {"matrix products": products[0] + attention, "memory": memory, "tp": tp, "cp": cp, "ep": ep}
    dgrad = {"matrix products": products[1] + attention_backward, "memory": 2 * memory, "tp": tp, "cp": cp_backward,
             "ep": ep}  # fmt: skip
    wgrad = {"matrix products": products[2]}
    again, host = software.again, software.launch * operators(model, layout, moe, software.at_once)
    host_again = software.launch * CHECKPOINT * again.checkpoints
    if layout.recompute == "full":
        dgrad, host_again = add(dgrad, forward), host_again + host
    elif layout.recompute == "selective":
        lacks = 1 - layer_saved(model, layout, moe, ITEM, "selective") / saved
        dgrad = add(dgrad, {"matrix products": attention, "memory": lacks * memory, "cp": cp})
        host_again += software.launch * CHECKPOINT
    if any(again):
        dgrad = add(dgrad, {"matrix products": again.products * products[0], "memory": again.moved * memory})
    return Microbatch(waiting(forward, host), waiting(dgrad, host + host_again), waiting(wgrad, host))


def waiting(work: Seconds, host: float) -> Seconds:
    """With the time for which the device waits for the host, which takes so many seconds to start it all."""
    return work | {"launch": max(0.0, host - sum(work.values()))} if host else work


def routing(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Seconds in which one layer's routed tokens travel to their experts and back, in one direction of a step."""
    routed = software.imbalance * model.top_k * layout.tokens(model.sequence) * model.hidden / layout.sp_ranks
    ep = 2 * all_to_all(routed, layout.ep, layout.etp, machine, software, model.top_k,
                        model.top_groups if model.groups > 1 else 0)  # fmt: skip
    return ep + 2 * ring(layout.etp * routed, layout.etp, 1, machine, software)


# What the times of a layer depend on, so that layouts that differ in something else share them.
OF_A_LAYER = ("tp", "cp", "cp_kind", "ep", "etp", "sp", "ulysses", "microbatch", "recompute")


def rank_times(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> Microbatch:
    """Of the rank of a pipeline that has most layers; of them as many have experts as of all."""
    key = Layout(**{field: getattr(layout, field) for field in OF_A_LAYER})
    return _rank_times(model, key, most_layers(model, layout)[0], machine, software)


@cache
def _rank_times(model: ModelConfig, layout: Layout, layers: float, machine: Machine, software: Software) -> Microbatch:
    moe_layers = layers * model.moe_layers / model.layers
    kinds = [(layers - moe_layers, False), (moe_layers, True)]
    times = []
    for n, moe in kinds:
        if n:
            times.append([add(each, count=n) for each in layer_times(model, layout, moe, machine, software)])
    return Microbatch(*(add(*of_kinds) for of_kinds in zip(*times, strict=True)))


def most_layers(model: ModelConfig, layout: Layout) -> tuple[float, float]:
    """Layers that a microbatch meets on the rank of a pipeline that has most of them, and on the one with the head."""
    if model.layers % layout.stages == 0:
        return model.layers / layout.pp, model.layers / layout.pp
    models = 2 if layout.schedule == "dualpipe" else 1  # half of the microbatches meet each
    layers = layers_by_rank(model, layout)
    return max(layers) / models, layers[0 if layout.schedule in FOLDED else -1] / models


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
def _virtual(schedule: str, p: int, m: int, v: int, i: float, w: float) -> float:
    costs = {"F": 1.0, "I": i, "W": w, "B": i + w}
    return validate(build(schedule, p, m, v), costs).makespan - m * (1 + i + w)


def step(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> Step:
    """The time of a step of a layout, of which `cluster.rules.check` has found that it can run."""
    p, m = layout.pp, layout.microbatches
    microbatch = rank_times(model, layout, machine, software)
    f, i, w = (sum(seconds.values()) for seconds in microbatch)
    parts = add(*microbatch, count=m)
    parts["matrix products"] += m * head_not_hidden(model, layout, machine, software, f + i + w)
    parts["bubble"] = bubble(layout.schedule, p, m, layout.v, f, i, w)
    parts["pp"] = between_stages(model, layout, machine, software, f + i + w)
    experts, others = max((parameters(model, layout, rank) for rank in distinct_ranks(model, layout)), key=sum)
    updated = others / layout.data + experts / layout.edp if layout.zero else others + experts
    parts["optimizer"] = updated * UPDATE / machine.bandwidth
    parts["dp"] = data_parallel(model, layout, (experts, others), f, i + w, machine, software)
    return Step(parts)


def head_not_hidden(model: ModelConfig, layout: Layout, machine: Machine, software: Software, layers: float) -> float:
    """Seconds of the head in one microbatch, less those in which its rank would wait for the one with most layers.

    Args:
        layers: seconds of the layers of the rank with most of them.
    """
    head = head_time(model, layout, machine, software)
    if software.balances:
        return head / layout.pp
    most, last = most_layers(model, layout)
    return max(0.0, head - (most - last) / most * layers)
