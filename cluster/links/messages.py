"""How long messages take, and how much of it no computation hides. Lecture 03.

Messages cost alpha + beta n, on the link that the axis crosses: ranks are ordered tp, cp, ep, dp, pp, so tp stays in a
node longest. What the topics overlap is hidden as far as there is computation to hide it: ZeRO's gradients and weights,
keys and values that go round a ring, and, where the software does not stop for them, messages between stages.
"""

from cluster.planner.hardware import Link, Machine, Software
from cluster.planner.layout import Layout
from cluster.planner.traffic import message
from core.model.config import ModelConfig

ITEM = 2  # bytes of a weight, of a gradient and of an activation


def link(machine: Machine, ranks: int, stride: int) -> Link:
    """What a rank sees of a ring over `ranks` ranks, each `stride` after the one before.

    Those that are on one node share a ring that leaves it by all their network cards at once.
    """
    together = max(1, min(ranks, machine.node // stride))
    if together == ranks:
        return machine.inside
    alpha = ((together - 1) * machine.inside.alpha + machine.outside.alpha) / together
    return Link(alpha, max(machine.outside.beta / together, machine.inside.beta))


def ring(elements: float, ranks: int, stride: int, machine: Machine, software: Software, messages: float = 1) -> float:
    """Seconds to all-gather or to reduce-scatter a tensor of so many elements; an all-reduce is both."""
    if ranks == 1:
        return 0.0
    way = link(machine, ranks, stride)
    return (ranks - 1) * (messages * way.alpha + elements / ranks * ITEM * way.beta / software.links)


def all_to_all(elements: float, ranks: int, stride: int, machine: Machine, software: Software) -> float:
    """Seconds for an even all-to-all of so many elements a rank; what leaves the node takes the rank's own card."""
    if ranks == 1:
        return 0.0
    together = max(1, min(ranks, machine.node // stride))
    inside, outside = (together - 1) / ranks * machine.inside.beta, (ranks - together) / ranks * machine.outside.beta
    alpha = (machine.outside if outside else machine.inside).alpha
    return alpha + max(inside, outside) * elements * ITEM / software.links


# ---- What is not hidden ----------------------------------------------------------------------------------------------


def context(
    model: ModelConfig, layout: Layout, attention: float, machine: Machine, software: Software
) -> tuple[float, float]:
    """Seconds of one layer's context parallelism, forward and backward, that computing attention does not hide.

    Args:
        attention: seconds that it takes a rank forward.
    """
    if layout.cp == 1:
        return 0.0, 0.0
    t, inner, ring_size = layout.tp, layout.ulysses, layout.cp // layout.ulysses
    tokens = layout.microbatch * model.sequence / layout.cp
    keys = tokens * model.key_value_size / t
    switch = all_to_all(tokens * (model.query_size + model.value_size) / t + keys, inner, t, machine, software)
    if layout.cp_kind == "all-gather":  # while a rank attends to its own tokens; the gradients' sums after all else
        own = attention / (2 * ring_size)  # with zigzag two of the ring's blocks of a quarter, half of them masked
        travels = ring(keys * ring_size, ring_size, inner * t, machine, software)
        return switch + max(0.0, travels - own), switch + max(0.0, travels - 2 * own) + travels
    way = machine.inside if layout.cp * t <= machine.node else machine.outside
    hop = way.alpha + keys * ITEM * way.beta / software.links
    hidden = attention / ring_size  # of each step round the ring
    forward, backward = max(0.0, hop - hidden), max(0.0, 2 * hop - 2 * hidden)
    return switch + (ring_size - 1) * forward, switch + (ring_size - 1) * backward


def between_stages(model: ModelConfig, layout: Layout, machine: Machine, software: Software, busy: float) -> float:
    """Seconds for which messages between stages hold the pipeline up; `busy`: a micro-batch's on a rank."""
    p, m, v = layout.pp, layout.microbatches, layout.v
    if p == 1:
        return 0.0
    stride = layout.tp * layout.cp * layout.dp
    way = machine.inside if stride * p <= machine.node else machine.outside
    shards = layout.tp if software.scattered and not layout.sp else 1
    hop = way.alpha + message(model, layout) / shards * ITEM * way.beta / software.links
    if software.blocking:
        return 2 * m * v * hop
    return 2 * (p - 1) * hop + m * v * max(0.0, 2 * hop - busy / v)  # to fill and to empty it, and what is not hidden


def data_parallel(layout: Layout, way: float, f: float, b: float) -> float:
    """Seconds of gradients and weights that travel and that no computation hides.

    Args:
        way: seconds to gather all weights of a rank, or to reduce and scatter their gradients.
        f, b: seconds of a micro-batch's forward and backward.
    """
    m = layout.microbatches
    if layout.pp > 1 and layout.zero < 2:  # of most ranks after the pipeline
        return 2 * way
    if layout.zero == 0:
        return max(0.0, 2 * way - b)
    if layout.zero == 1:
        return max(0.0, way - b) + way
    reduces, again = layout.reduce == "microbatch", layout.reshard == "forward"  # in every microbatch
    once = 0.0 if reduces else max(0.0, way - b)
    if layout.zero == 2:
        return m * reduces * max(0.0, way - b) + once + way
    once += 0.0 if again else way
    return m * (max(0.0, again * way - f) + max(0.0, (again + reduces) * way - b)) + once
