"""Elements that a rank sends in a step, by axis, as the topics' ledger counts them. Lectures 01, 04 to 09.

Exact for `core.model.gpt` over tp, cp, pp and dp (`tests/cluster/test_accounts.py`), but for the few numbers of the
global norm and the padding of ZeRO's buckets. Over ep the mean of all ranks, if tokens choose evenly.

b samples in a microbatch, s sequence, h hidden, t = tp
"""

from collections import Counter

from cluster.planner.layout import FOLDED, Layout
from cluster.planner.memory import ends_of, layers_by_rank, layers_of, parameters, vocabulary_part, whole_parameters
from cluster.planner.models import Model


def message(model: Model, layout: Layout) -> float:
    """Elements of an activation that travels from stage to stage."""
    return layout.microbatch * model.sequence * model.hidden / layout.sequence_parts


def sent(model: Model, layout: Layout, rank: int = 0) -> dict[str, float]:
    """Elements that rank `rank` of the pipeline sends in a step over each axis: tp, cp, ep, etp, pp, dp and edp.

    dp is the axis of all ranks that sum gradients, dp x cp.
    """
    found: Counter[str] = Counter()
    m = layout.microbatches * (0.5 if layout.schedule == "dualpipe" else 1)  # each stage is on two ranks
    for stage in layout.held(rank):
        dense, moe = layers_of(model, layout, stage)
        found["tp"] += m * (dense + moe) * layer_tp(model, layout)
        found["cp"] += m * (dense + moe) * layer_cp(model, layout)
        found["ep"] += m * moe * layer_ep(model, layout)
        found["etp"] += m * moe * layer_etp(model, layout)
        found["tp"] += m * ends_tp(model, layout, stage)
    if layout.sp:
        own = layout.data if layout.zero else 1  # each rank adds up its part of what dp has summed
        found["tp"] += 2 * _others(layout.tp) * whole_parameters(model, layout, rank) / own
    found["pp"] = messages(layout, rank) * message(model, layout) + exchanged(model, layout, rank)
    experts, others = parameters(model, layout, rank)
    found["dp"] = times_reduced(layout) * others * _others(layout.data)
    found["edp"] = times_reduced(layout) * experts * _others(layout.edp)
    return {axis: elements for axis, elements in found.items() if elements}


def sent_bytes(model: Model, layout: Layout, rank: int = 0, itemsize: int = 2) -> dict[str, float]:
    """The same in bytes, where an element has `itemsize`; but a ring adds up gradients in 4 bytes or more."""
    found = {axis: itemsize * elements for axis, elements in sent(model, layout, rank).items()}
    if "cp" in found:
        m = layout.microbatches * (0.5 if layout.schedule == "dualpipe" else 1)
        found["cp"] += m * layers_by_rank(model, layout)[rank] * around(model, layout) * (max(4, itemsize) - itemsize)
    return found


def _others(n: int) -> float:
    return (n - 1) / n


def layer_tp(model: Model, layout: Layout) -> float:
    """Of one layer and microbatch, forward and backward (lectures 05 and 06), and what is computed again."""
    unit = layout.microbatch * model.sequence / layout.cp * model.hidden * _others(layout.tp)
    again = layout.recompute == "full"
    if not layout.sp:
        return (8 + 4 * again) * unit
    # Gathered again is what was not saved. Nothing after the last scatter is saved but a dropout's mask, so without
    # one the forward that is computed again ends before it.
    return (8 + 2 + again * (3 + model.dropout)) * unit


def ends_tp(model: Model, layout: Layout, stage: int) -> float:
    """Of the embedding, and of the head and the loss, for one microbatch."""
    t, tokens = layout.tp, layout.microbatch * model.sequence / layout.cp
    found = 0.0
    if stage == 0:
        found += 2 * tokens * model.hidden  # summed forward; or scattered, and gathered backward
    if stage == layout.stages - 1:
        found += tokens * ((3 if layout.sp else 2) * model.hidden + (4 if layout.sp else 6))
    return found * _others(t)


def layer_cp(model: Model, layout: Layout) -> float:
    """Of one layer and microbatch (lecture 06). Ring: keys and values go round, and in backward their gradients too.

    Ulysses: an all-to-all of q, k, v and of the result, and the same backward.
    """
    inner = layout.ulysses
    tokens = layout.microbatch * model.sequence / layout.cp
    ring = around(model, layout)
    there = tokens * (model.query_size + model.key_value_size) / layout.tp * _others(inner)
    back = tokens * model.value_size / layout.tp * _others(inner)
    again = {"none": 0.0, "selective": ring + there, "full": ring + there + back}[layout.recompute]
    return 3 * ring + 2 * (there + back) + again


def around(model: Model, layout: Layout) -> float:
    """Keys and values that a rank passes on around its ring; or, in backward, their gradients."""
    tokens = layout.microbatch * model.sequence / layout.cp
    return tokens * model.key_value_size / layout.tp * (layout.cp // layout.ulysses - 1)


def layer_ep(model: Model, layout: Layout) -> float:
    """Of one layer with experts and microbatch (CODE 04): k rows a token there and back, and the same backward."""
    again = layout.recompute == "full"
    counts = (1 + again) * model.experts  # that are told before
    return ((4 + 2 * again) * rows(model, layout) * model.hidden + counts) * _others(layout.ep)


def layer_etp(model: Model, layout: Layout) -> float:
    """Where ranks share an expert's features each needs the rows of the others, and gives them what it made of them."""
    again = layout.recompute == "full"
    return (4 + 2 * again) * rows(model, layout) * model.hidden * (layout.etp - 1)


def rows(model: Model, layout: Layout) -> float:
    """Tokens of a rank, each once for every expert it chooses; as many arrive, if they choose evenly."""
    return model.top_k * layout.microbatch * model.sequence / layout.sequence_parts


def messages(layout: Layout, rank: int) -> int:
    """That a rank sends to its neighbours in a step: an activation to the one, a gradient to the other."""
    if layout.pp == 1:
        return 0
    last, count = (layout.pp if layout.schedule == "dualpipe" else layout.stages) - 1, 0
    for stage in layout.held(rank):
        for neighbour in (stage - 1, stage + 1):
            count += 0 <= neighbour <= last and not (layout.schedule in FOLDED and neighbour in layout.held(rank))
    return count * layout.microbatches // (2 if layout.schedule == "dualpipe" else 1)


def exchanged(model: Model, layout: Layout, rank: int) -> float:
    """Gradients of what two ranks of the pipeline hold: the tied embedding; with dualpipe everything."""
    if layout.schedule == "dualpipe":
        return sum(parameters(model, layout, rank))
    first, last = ends_of(layout, rank)
    return vocabulary_part(model, layout.tp) * model.hidden if model.tied and first != last else 0


def times_reduced(layout: Layout) -> int:
    """How often each parameter's worth is sent, times (N-1)/N: lecture 01. A pipeline reduces once, at its end."""
    m = layout.microbatches if layout.pp == 1 else 1
    return (2, 2, m + 1, 3 * m)[layout.zero]
