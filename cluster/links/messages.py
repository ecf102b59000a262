"""How long messages take, and how much of it no computation hides. Lecture 03.

Messages cost alpha + beta n, on the link that the axis crosses: ranks are ordered tp, cp, ep, dp, pp, so tp stays in a
node longest. What the topics overlap is hidden as far as there is computation to hide it: ZeRO's gradients and weights,
keys and values that go round a ring, and, where the software does not stop for them, messages between stages.
"""

from math import log2

from cluster.planner.hardware import Link, Machine
from cluster.planner.layout import Layout
from cluster.planner.software import Software
from cluster.planner.traffic import message
from core.model.config import ModelConfig

CHANNELS = 8  # over which NCCL sends to so many ranks at a time
ITEM = 2  # bytes of a weight, of a gradient and of an activation


def in_a_node(machine: Machine, ranks: int, stride: int) -> int:
    """How many of an axis's ranks, each `stride` after the one before, a node has."""
    return max(1, min(ranks, machine.node // stride))


def link(machine: Machine, ranks: int, stride: int) -> Link:
    """What a rank sees of a ring over `ranks` ranks, each `stride` after the one before.

    Those that are on one node share a ring that leaves it by all their network cards at once.
    """
    together = in_a_node(machine, ranks, stride)
    if together == ranks:
        return machine.inside
    outside = machine.beyond if machine.beyond and ranks * stride > machine.pod > 0 else machine.outside
    alpha = ((together - 1) * machine.inside.alpha + outside.alpha) / together
    return Link(alpha, max(outside.beta / together, machine.inside.beta))


def ring(
    elements: float,
    ranks: int,
    stride: int,
    machine: Machine,
    software: Software,
    messages: float = 1,
    item: int = ITEM,
) -> float:
    """Seconds to all-gather or to reduce-scatter a tensor of so many elements; an all-reduce is both."""
    if ranks == 1:
        return 0.0
    way = link(machine, ranks, stride)
    return (ranks - 1) * (messages * way.alpha + elements / ranks * item * way.beta / software.links)


def all_reduce(
    elements: float,
    ranks: int,
    stride: int,
    machine: Machine,
    software: Software,
    messages: float = 1,
    item: int = ITEM,
) -> float:
    """Seconds to sum a tensor of so many elements on all ranks: by a ring, or by a tree, whose steps are fewer.

    Or by the node's switch (NVLink SHARP): it sums what each rank sends once, and sends a rank's share of the sums to
    all. (By itself a reduce-scatter sends what a ring does, and so a gather receives.)
    """
    if ranks == 1:
        return 0.0
    way, together = link(machine, ranks, stride), in_a_node(machine, ranks, stride)
    if machine.sharp and together == ranks:
        sent = elements * item * (1 + 1 / ranks)
        switch = 4 * messages * way.alpha + sent * way.beta / software.links
        return min(switch, 2 * ring(elements, ranks, stride, machine, software, messages, item))
    steps = together - 1 + log2(max(1, ranks / together))
    tree = 2 * (messages * steps * way.alpha + elements * item * way.beta / software.links)
    return min(tree, 2 * ring(elements, ranks, stride, machine, software, messages, item))


def all_to_all(
    elements: float, ranks: int, stride: int, machine: Machine, software: Software, copies: int = 1, most: int = 0
) -> float:
    """Seconds for an even all-to-all of so many elements a rank; what leaves the node takes the rank's own card.

    Args:
        copies: of each token among the elements, to ranks by chance. A program may send one to each node only.
        most: nodes that a token's copies may go to; 0: all.
    """
    if ranks == 1:
        return 0.0
    together = in_a_node(machine, ranks, stride)
    inside, outside = (together - 1) / ranks * machine.inside.beta, (ranks - together) / ranks * machine.outside.beta
    if software.once_a_node and copies > 1:  # and to each rank once
        nodes = ranks / together
        inside *= ranks * (1 - (1 - 1 / ranks) ** copies) / copies
        reached = nodes * (1 - (1 - 1 / nodes) ** copies)  # nodes that a token's copies go to, of all, in the mean
        outside *= min(reached, most or nodes) / copies
    alpha = (machine.outside if outside else machine.inside).alpha
    rounds = max(1, ranks // CHANNELS)  # of small messages to all others
    return rounds * alpha + max(inside, outside) * elements * ITEM / software.links


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
