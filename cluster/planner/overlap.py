"""What of dp's messages computation hides, and what it loses by them. Lectures 01 and 03.

Gradients and weights travel layer by layer while other layers compute. What stays to be seen is what takes longer than
they do, the first piece of weights and the last of gradients; and computation beside messages is slower, for they take
processors and memory bandwidth of the device.
"""

from math import ceil
from typing import NamedTuple

from cluster.links.messages import all_reduce, ring
from cluster.planner.layout import Layout
from cluster.planner.machines import Machine
from cluster.planner.software import Software
from core.model.config import ModelConfig


class Ways(NamedTuple):
    """Seconds to gather all weights of a rank, and to reduce and scatter their gradients, or all-reduce them."""

    gather: float
    reduce: float


def ways(model: ModelConfig, layout: Layout, sizes: tuple[int, int], machine: Machine, software: Software) -> Ways:
    """One after the other: they leave by the same cards, and hide behind the same computation.

    Args:
        sizes: parameters of the rank: of experts, and all others.
    """
    experts, others = sizes
    gather = reduce = 0.0
    for size, ranks, stride in ((others, layout.data, layout.tp), (experts, layout.edp, layout.ep * layout.etp)):
        messages = messages_of(model, layout, size, ranks, software)
        if layout.zero == 0:
            reduce += all_reduce(size, ranks, stride, machine, software, messages, software.gradient)
            continue
        gather += ring(size, ranks, stride, machine, software, messages)
        reduce += ring(size, ranks, stride, machine, software, messages, software.gradient)
    return Ways(gather, reduce)


def messages_of(model: ModelConfig, layout: Layout, size: int, ranks: int, software: Software) -> float:
    """In which so many parameters travel: by layers, or by buckets."""
    if layout.zero == 3 or software.pieces:
        return model.layers / layout.pp * max(1, software.pieces)
    return ceil(size / max(software.bucket, software.bucket_a_rank * ranks))


def data_parallel(
    model: ModelConfig, layout: Layout, sizes: tuple[int, int], f: float, b: float, machine: Machine, software: Software
) -> float:
    """Seconds that dp's messages add to a step.

    Args:
        f, b: seconds of a microbatch's forward and backward.
    """
    gather, reduce = ways(model, layout, sizes, machine, software)
    seen, sent = not_hidden(layout, gather, reduce, f, b, software)
    if software.slowdown:
        seen += ends(model, layout, gather, reduce)
    return seen + software.slowdown * max(0.0, sent - seen)


def ends(model: ModelConfig, layout: Layout, gather: float, reduce: float) -> float:
    """Of the first layer's weights and the last one's gradients: nothing is computed beside them."""
    return (gather + reduce) * layout.pp / model.layers


def not_hidden(
    layout: Layout, gather: float, reduce: float, f: float, b: float, software: Software
) -> tuple[float, float]:
    """Seconds that no computation hides, and those that messages take in all."""
    m, zero = layout.microbatches, layout.zero
    behind = software.overlapped or software.pieces > 0  # weights are gathered beside the first forward
    # Of a pipeline's rank all stages but the one at the end compute beside them, at its first and last microbatch.
    hidden = (layout.v - 1) / layout.v if layout.pp > 1 else 1.0
    gathers = max(0.0, gather - f * hidden) if behind else gather
    reduces = max(0.0, reduce - b * hidden)
    if layout.pp > 1 and zero < 2:
        return (gathers + reduces if behind else gather + reduce), gather + reduce
    if zero == 0:
        return max(0.0, gather + reduce - b), gather + reduce
    if zero == 1:
        return reduces + gathers, gather + reduce
    each, again = layout.reduce == "microbatch", layout.reshard == "forward"  # whether in every microbatch
    if zero == 2:
        return each * (m - 1) * max(0.0, reduce - b) + reduces + gathers, (m if each else 1) * reduce + gather
    seen = m * (max(0.0, again * gather - f) + max(0.0, again * gather + each * reduce - b))
    seen += (0.0 if each else reduces) + (0.0 if again else gather)
    return seen, m * (2 * gather if again else 0) + (m if each else 1) * reduce + (0 if again else gather)
