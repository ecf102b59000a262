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
from math import ceil
from typing import NamedTuple

from cluster.links.messages import ITEM, all_to_all, between_stages, context, data_parallel, ring
from cluster.planner.activations import filling, layer_saved
from cluster.planner.counting import attention_flops, core_again, expert_matrices, layer_matrices, vocabulary_shard
from cluster.planner.hardware import Machine, Software
from cluster.planner.layout import Layout
from cluster.planner.memory import parameters
from cluster.planner.stages import distinct_ranks, ends_of, met_by_rank
from core.model.config import ModelConfig
from pipeline.engine.actions import stage_share
from pipeline.engine.validator import validate
from pipeline.schedules import build

TILE = (256, 128)  # rows and columns of the result that one processor computes at a time, of a GPU's largest kernels
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


# ---- One layer -------------------------------------------------------------------------------------------------------


def product(rows: float, inputs: float, outputs: float, machine: Machine, count: int = 1) -> float:
    """FLOP that `count` products (rows x inputs) x (inputs x outputs) keep the device busy for."""
    if machine.processors == 1:
        return 2 * rows * inputs * outputs * count
    tall, wide = TILE
    tiles = min(ceil(rows / a) * ceil(outputs / b) for a, b in ((tall, wide), (wide, tall)))
    waves = ceil(count * tiles / machine.processors)
    return 2 * waves * machine.processors * tall * wide * inputs


class LayerFlop(NamedTuple):
    """FLOP of one layer on a rank and one microbatch, as `product` counts them."""

    forward: float
    dgrad: float
    wgrad: float
    attention: float  # of the forward


@cache
def layer_flop(model: ModelConfig, layout: Layout, moe: bool, machine: Machine) -> LayerFlop:
    tokens = layout.tokens(model.sequence)
    attention = tokens * attention_flops(model) / layout.tp
    products = [(matrix.shape(layout.tp), tokens, 1) for matrix in layer_matrices(model, moe)]
    if moe:
        experts = model.experts // layout.ep  # on this rank, and the rows of each
        rows = tokens / layout.tp * layout.etp * model.top_k / experts
        products += [(matrix.shape(layout.etp), rows, experts) for matrix in expert_matrices(model)]
    forward, dgrad, wgrad = attention, 2 * attention, 0.0
    for (inputs, outputs), rows, count in products:
        forward += product(rows, inputs, outputs, machine, count)
        dgrad += product(rows, outputs, inputs, machine, count)
        wgrad += product(inputs, rows, outputs, machine, count)
    return LayerFlop(forward, dgrad, wgrad, attention)


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
    speed = machine.peak * software.gemm
    flop = layer_flop(model, layout, moe, machine)
    saved = layer_saved(model, layout, moe, ITEM, "none")
    memory = software.passes * saved / machine.bandwidth
    elements = layout.tokens(model.sequence) * model.hidden
    tp = 4 * ring(elements, layout.tp, 1, machine, software)  # an all-reduce for attention and one for the MLP
    cp, cp_backward = context(model, layout, flop.attention / speed, machine, software)
    ep = 0.0
    if moe:
        routed = model.top_k * elements / layout.tp
        ep = 2 * all_to_all(routed, layout.ep, layout.etp, machine, software)
        ep += 2 * ring(layout.etp * routed, layout.etp, 1, machine, software)
    forward = {"matrix products": flop.forward / speed, "memory": memory, "tp": tp, "cp": cp, "ep": ep}
    dgrad = {"matrix products": flop.dgrad / speed, "memory": 2 * memory, "tp": tp, "cp": cp_backward, "ep": ep}
    wgrad = {"matrix products": flop.wgrad / speed}
    if layout.recompute == "full":
        dgrad = add(dgrad, forward)
    elif layout.recompute != "none":
        lacks = 1 - layer_saved(model, layout, moe, ITEM) / saved  # what is made again
        dgrad = add(dgrad, {"memory": lacks * memory})
        if core := core_again(model, layout.recompute):
            dgrad = add(dgrad, {"matrix products": core * flop.attention / speed, "cp": cp})
    return Microbatch(forward, dgrad, wgrad)


# What the times of a layer depend on, so that layouts that differ in something else share them.
OF_A_LAYER = ("tp", "cp", "cp_kind", "ep", "etp", "sp", "ulysses", "microbatch", "recompute",
              "recompute_every")  # fmt: skip


def rank_times(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> Microbatch:
    """Of the rank of a pipeline whose layers take longest."""
    every = layers_times(model, layout, machine, software)
    return max(every, key=seconds_of)


def layers_times(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> list[Microbatch]:
    """Of the layers of each rank."""
    key = Layout(**{field: getattr(layout, field) for field in OF_A_LAYER})
    met = met_by_rank(model, layout.schedule, layout.pp, layout.v, layout.split)
    return [_rank_times(model, key, dense, moe, machine, software) for dense, moe in met]


def layer_seconds(model: ModelConfig, layout: Layout, moe: bool, machine: Machine, software: Software) -> float:
    """Of one layer, forward and backward."""
    key = Layout(**{field: getattr(layout, field) for field in OF_A_LAYER})
    return seconds_of(_rank_times(model, key, float(not moe), float(moe), machine, software))


def seconds_of(microbatch: Microbatch) -> float:
    return sum(sum(seconds.values()) for seconds in microbatch)


@cache
def _rank_times(
    model: ModelConfig, layout: Layout, dense: float, moe: float, machine: Machine, software: Software
) -> Microbatch:
    again = (model.layers // layout.recompute_every) / model.layers  # of the layers
    times = []
    for n, of_moe in ((dense, False), (moe, True)):
        for share, kind in ((again, layout.recompute), (1 - again, "none")):
            if n * share or not (dense or moe or times):  # of a rank without layers one that takes no time
                each = layer_times(model, replace(layout, recompute=kind), of_moe, machine, software)
                times.append([add(seconds, count=n * share) for seconds in each])
    return Microbatch(*(add(*of_kinds) for of_kinds in zip(*times, strict=True)))


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
    routed = model.top_k * layout.tokens(model.sequence) * model.hidden / layout.sp_ranks
    travel = mixtures * 2 * all_to_all(routed, layout.ep, layout.etp, machine, software)
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
    experts, others = max((parameters(model, layout, rank) for rank in distinct_ranks(model, layout)), key=sum)
    updated = others / layout.data + experts / layout.edp if layout.zero else others + experts
    parts["optimizer"] = updated * UPDATE / machine.bandwidth
    gather = 0.0  # one after the other: they leave by the same cards, and hide behind the same computation
    for size, ranks, stride in ((others, layout.data, layout.tp), (experts, layout.edp, layout.ep * layout.etp)):
        messages = model.layers / p if layout.zero == 3 else ceil(size / software.bucket)
        gather += ring(size, ranks, stride, machine, software, messages)
    parts["dp"] = data_parallel(layout, gather, f, i + w)
    return Step(parts)


def head_not_hidden(model: ModelConfig, layout: Layout, machine: Machine, software: Software, slowest: float) -> float:
    """Seconds of the head in one microbatch, less those in which its rank would wait for the slowest.

    Args:
        slowest: seconds of the layers of the rank whose layers take longest.
    """
    with_head = next(rank for rank in range(layout.pp) if ends_of(layout, rank)[1])
    layers = seconds_of(layers_times(model, layout, machine, software)[with_head])
    return max(0.0, layers + head_seconds(model, layout, machine, software) - slowest)


def head_seconds(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Of one microbatch, forward and backward; with dualpipe two ranks have the head, and half of them each."""
    tokens, columns = layout.tokens(model.sequence), vocabulary_shard(model, layout.tp)
    products = 4 if layout.chunk_of_loss(model) else 3
    head = products * product(tokens, model.hidden, columns, machine) / (machine.peak * software.gemm)
    return head / (2 if layout.schedule == "dualpipe" else 1)
