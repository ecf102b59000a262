"""How long a step takes: matrix products, memory, messages and the bubble. Lecture 03.

A device multiplies matrices tile by tile, all its processors at once, and the last wave of tiles may leave most of them
idle: so small products are less efficient. Everything between the products is bound by memory. What messages add is
in `messages.py`.

F forward, I and W backward of inputs and of weights, of all layers that a rank holds; m microbatches, p pipeline
ranks. Where stages are not equal all wait for the rank with most layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil

from cluster.links.messages import ITEM, all_to_all, between_stages, context, data_parallel, ring
from cluster.planner.hardware import Machine, Software
from cluster.planner.layout import FOLDED, Layout
from cluster.planner.memory import filling, layer_saved, layers_by_rank, parameters, telling
from cluster.planner.models import Matrix, Model
from pipeline.schedules import build
from pipeline.validator import validate

TILE = (256, 128)  # rows and columns of the result that one processor computes at a time, of a GPU's largest kernels


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


@cache
def layer_flop(model: Model, layout: Layout, moe: bool, machine: Machine) -> tuple[float, float, float, float]:
    """Of one layer on a rank and one microbatch: F, I and W, as `product` counts, and attention's share of F."""
    tokens = layout.microbatch * model.sequence / layout.cp
    keys = model.heads * (model.latent.nope + model.latent.rope if model.latent else model.head_size)
    attention = 2 * tokens * model.sequence * (keys + model.value_size) / layout.tp
    found = [attention, 2 * attention, 0.0]

    def add(matrices: Iterable[Matrix], rows: float, t: int, count: int = 1) -> None:
        for inputs, outputs in (matrix.shape(t) for matrix in matrices):
            found[0] += product(rows, inputs, outputs, machine, count)
            found[1] += product(rows, outputs, inputs, machine, count)
            found[2] += product(inputs, rows, outputs, machine, count)

    add(model.attention_matrices(), tokens, layout.tp)
    if not moe:
        add(model.mlp_matrices(model.feed_forward), tokens, layout.tp)
    else:
        if model.shared_feed_forward:
            add(model.mlp_matrices(model.shared_feed_forward), tokens, layout.tp)
        here = model.experts // layout.ep
        rows = tokens / (layout.tp if layout.sp else 1) * layout.etp * model.top_k / here  # of each expert here
        add(model.mlp_matrices(model.expert_feed_forward), rows, layout.etp, here)
    return (*found, attention)


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


def step(model: Model, layout: Layout, machine: Machine, software: Software) -> Step:
    """The time of a step of a layout, of which `cluster.rules.check` has found that it can run."""
    p, m = layout.pp, layout.microbatches
    causes, f, i, w = rank_times(model, layout, machine, software)
    head = 3 * product(
        layout.microbatch * model.sequence / layout.cp, model.hidden, -(-model.vocabulary // layout.tp), machine
    )
    parts = {cause: m * seconds for cause, seconds in causes.items()}
    most, last = most_layers(model, layout)
    waits = (most - last) / most * (f + i + w)  # the rank with the head, for the one with most layers
    parts["matrix products"] += m * max(0.0, head / (machine.peak * software.gemm) - waits)
    parts["bubble"] = bubble(layout.schedule, p, m, layout.v, f, i, w)
    parts["pp"] = between_stages(model, layout, machine, software, f + i + w)
    experts, others = max((parameters(model, layout, rank) for rank in telling(model, layout)), key=sum)
    updated = others / layout.data + experts / layout.edp if layout.zero else others + experts
    parts["optimizer"] = updated * 28 / machine.bandwidth  # 2 + 12 bytes read and 12 + 2 written
    way = 0.0  # one after the other: they leave by the same cards, and hide behind the same computation
    for size, ranks, stride in ((others, layout.data, layout.tp), (experts, layout.edp, layout.ep * layout.etp)):
        messages = model.layers / p if layout.zero == 3 else ceil(size / software.bucket)
        way += ring(size, ranks, stride, machine, software, messages)
    parts["dp"] = data_parallel(layout, way, f, i + w)
    return Step(parts)


def most_layers(model: Model, layout: Layout) -> tuple[float, float]:
    """Layers that a microbatch meets on the rank of a pipeline that has most of them, and on the one with the head."""
    if model.layers % layout.stages == 0:
        return model.layers / layout.pp, model.layers / layout.pp
    models = 2 if layout.schedule == "dualpipe" else 1  # half of the microbatches meet each
    layers = layers_by_rank(model, layout)
    return max(layers) / models, layers[0 if layout.schedule in FOLDED else -1] / models


def rank_times(
    model: Model, layout: Layout, machine: Machine, software: Software
) -> tuple[dict[str, float], float, float, float]:
    """Seconds of one microbatch in the layers of a rank: by cause, and by F, I and W.

    Of the rank of a pipeline that has most layers; of them as many have experts as of all.
    """
    key = Layout(
        layout.tp, layout.cp, layout.ep, layout.etp, sp=layout.sp, ulysses=layout.ulysses, microbatch=layout.microbatch,
        recompute=layout.recompute,
    )  # fmt: skip
    return _rank_times(model, key, most_layers(model, layout)[0], machine, software)


@cache
def _rank_times(
    model: Model, layout: Layout, layers: float, machine: Machine, software: Software
) -> tuple[dict[str, float], float, float, float]:
    speed = machine.peak * software.gemm
    tokens = layout.microbatch * model.sequence / layout.cp
    whole = tokens * model.hidden
    moe_layers = layers * model.moe_layers / model.layers
    causes = dict.fromkeys(("matrix products", "memory", "tp", "cp", "ep"), 0.0)
    f = i = w = 0.0
    for count, moe in ((layers - moe_layers, False), (moe_layers, True)):
        if not count:
            continue
        forward, of_inputs, of_weights, attention = layer_flop(model, layout, moe, machine)
        moved = layer_saved(model, layout, moe, ITEM, "none")
        again = {"none": 0.0, "full": 1.0, "selective": 1 - layer_saved(model, layout, moe, ITEM, "selective") / moved}
        memory = software.passes * moved / machine.bandwidth
        tp = 4 * ring(whole, layout.tp, 1, machine, software)  # an all-reduce for attention and one for the MLP
        cp, cp_back = context(model, layout, attention / speed, machine, software)
        routed = model.top_k * whole / (layout.tp if layout.sp else 1)
        ep = 2 * all_to_all(routed, layout.ep, layout.etp, machine, software)
        ep = moe * (ep + 2 * ring(layout.etp * routed, layout.etp, 1, machine, software))
        full = layout.recompute == "full"
        repeated = forward if full else attention * (layout.recompute == "selective")
        f += count * (forward / speed + memory + tp + cp + ep)
        i += count * ((of_inputs + repeated) / speed + (2 + again[layout.recompute]) * memory
                      + (1 + full) * (tp + ep) + cp_back + bool(repeated) * cp)  # fmt: skip
        w += count * of_weights / speed
        causes["matrix products"] += count * (forward + of_inputs + of_weights + repeated) / speed
        causes["memory"] += count * (3 + again[layout.recompute]) * memory
        causes["tp"] += count * (2 + full) * tp
        causes["cp"] += count * ((1 + bool(repeated)) * cp + cp_back)
        causes["ep"] += count * (2 + full) * ep
    return causes, f, i, w
