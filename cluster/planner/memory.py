"""What a rank holds: parameters, gradients, optimizer state and saved activations, by the lessons' formulas.

Exact for `core.model.gpt` as the topics cut it, as their ledger counts (`tests/cluster/test_accounts.py`, and at scale
`cluster/dry_run.py`): parameters and their states element by element, but for the padding of ZeRO's buckets;
activations as autograd saves them on a CPU, each storage once. Other models are counted the same way, tensor by tensor:
a gated MLP saves four tensors of f where ours saves two, grouped keys and values are narrower, experts get k copies of
a token, dealt out evenly.

h hidden, f feed-forward, V vocabulary, t = tp, q: parts of what lies between the matrix products, t under sp, else 1
"""

from dataclasses import dataclass
from functools import cache

from cluster.planner.layout import Layout
from cluster.planner.models import Model
from pipeline.schedules import build
from pipeline.stages import layers_in
from zero.flat import BUCKET_ELEMENTS


@dataclass(frozen=True)
class Held:
    """Bytes on one rank: at the end of a backward, and the most of activations."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # saved for backward
    working: float  # what a backward computes again or makes at a time, and gathers at a time; an estimate

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def layers_of(model: Model, layout: Layout, stage: int) -> tuple[int, int]:
    """The dense layers of a stage, and those with experts."""
    here = layers_in(model.layers, layout.stages, stage)
    dense = min(max(model.layers - model.moe_layers - here.start, 0), len(here))
    return dense, len(here) - dense


def layers_by_rank(model: Model, layout: Layout) -> list[int]:
    """How many layers each rank of the pipeline has."""
    return _layers_by_rank(model.layers, Layout(pp=layout.pp, v=layout.v, schedule=layout.schedule))


@cache
def _layers_by_rank(layers: int, layout: Layout) -> list[int]:
    return [sum(len(layers_in(layers, layout.stages, s)) for s in layout.held(rank)) for rank in range(layout.pp)]


def telling(model: Model, layout: Layout) -> list[int]:
    """Ranks of the pipeline of which one holds most: of those with equal stages, the first and the last."""
    return _telling(model.layers, model.moe_layers, Layout(pp=layout.pp, v=layout.v, schedule=layout.schedule))


@cache
def _telling(layers: int, moe_layers: int, layout: Layout) -> list[int]:
    alike: dict[tuple, list[int]] = {}
    for rank in range(layout.pp):
        parts = [layers_in(layers, layout.stages, stage) for stage in layout.held(rank)]
        moe = [sum(layer >= layers - moe_layers for layer in part) for part in parts]
        alike.setdefault((*map(len, parts), *moe, *ends_of(layout, rank)), []).append(rank)
    return sorted({rank for ranks in alike.values() for rank in (ranks[0], ranks[-1])})


def ends_of(layout: Layout, rank: int) -> tuple[bool, bool]:
    """Whether a rank of the pipeline has the embedding, and whether it has the head."""
    held = layout.held(rank)
    last = (layout.pp if layout.schedule == "dualpipe" else layout.stages) - 1
    return 0 in held, last in held


def vocabulary_part(model: Model, t: int) -> int:
    """Rows of a rank's part of the embedding, padding included."""
    return -(-model.vocabulary // t)


@cache
def _layer_parameters(model: Model, tp: int, ep: int, etp: int) -> tuple[int, int, int]:
    """Of a layer on a rank: a dense one, one with experts but for them, and its experts."""
    experts = model.experts // ep * model.expert_parameters(etp)
    return model.dense_parameters(False, tp), model.dense_parameters(True, tp), experts


def parameters(model: Model, layout: Layout, rank: int = 0) -> tuple[int, int]:
    """Elements on rank `rank` of the pipeline, before ZeRO cuts anything: of experts, and all others'."""
    others = experts = 0
    for stage in layout.held(rank):
        dense, moe = layers_of(model, layout, stage)
        of_dense, of_moe, of_experts = _layer_parameters(model, layout.tp, layout.ep, layout.etp)
        others += dense * of_dense + moe * of_moe
        experts += moe * of_experts
    first, last = ends_of(layout, rank)
    rows = vocabulary_part(model, layout.tp) * model.hidden
    if first:
        others += rows + (model.sequence * model.hidden if model.learned_positions else 0)
    if last:
        others += (1 + model.biases) * model.hidden + (0 if model.tied and first else rows)
    return experts, others


def whole_parameters(model: Model, layout: Layout, rank: int = 0) -> int:
    """Of those, what tensor parallelism leaves whole: norms, biases of row-parallel layers, positions, routers."""
    found = 0
    for stage in layout.held(rank):
        for count, moe in zip(layers_of(model, layout, stage), (False, True), strict=True):
            found += count * (
                model.norm_parameters() + model.biases * 2 * model.hidden + moe * model.experts * model.hidden
            )
    first, last = ends_of(layout, rank)
    return found + (first * model.learned_positions * model.sequence + last * (1 + model.biases)) * model.hidden


def state_sizes(itemsize: int) -> tuple[int, int, int]:
    """Bytes a parameter of weights, gradients and Adam: mixed precision where weights have 2, else all in one type."""
    return (2, 2, 12) if itemsize == 2 else (itemsize, itemsize, 2 * itemsize)


# ---- Activations -----------------------------------------------------------------------------------------------------


def layer_saved(model: Model, layout: Layout, moe: bool, itemsize: int = 2, kind: str | None = None) -> float:
    """Bytes that one layer saves of one microbatch. 2205.05198, table 2, where attention is "softmax" with dropout.

    Args:
        kind: of recomputation; None: the layout's.
    """
    h, t, q, w = model.hidden, layout.tp, layout.tp if layout.sp else 1, itemsize
    kind = kind or layout.recompute
    tokens = layout.microbatch * model.sequence / layout.cp
    if kind == "full":
        return tokens * h * w / q
    norms = 2 * (2 * h + 2) * w / q + 2 * h / q * model.dropout  # input, output, mean and deviation; masks of a byte
    qkv = sum(m.outputs for m in model.attention_matrices() if m.cut == "column") / t
    if model.latent:  # compressed, before and after their norms; and the keys put together
        qkv += 2 * (model.latent.q_rank + model.latent.kv_rank) + model.latent.rope
        qkv += model.heads * (model.latent.nope + model.latent.rope) / t
    core = (qkv + model.value_size / t) * w
    if kind == "none" and model.attention == "softmax":  # the softmax; of dropout its mask and its result
        core += model.heads / t * model.sequence * (w + model.dropout * (1 + w))
    elif kind == "none":
        core += model.heads / t * max(w, 4)  # logarithms of the sums of exponentials
    inside = 4 if model.gated else 2
    if not moe:
        return tokens * (norms + core + inside * model.feed_forward / t * w)
    f = model.expert_feed_forward
    # An expert's ranks have the rows of all of them; their results go back to each of them, to be weighted.
    routed = model.top_k * (layout.etp * (h + inside * f / layout.etp) + h) / q + 2 * model.experts / q
    return tokens * (norms + core + (routed + inside * model.shared_feed_forward / t) * w)


def stage_saved(model: Model, layout: Layout, stage: int, itemsize: int = 2) -> float:
    """Bytes that a stage saves of one microbatch: its layers, and the ends of the model."""
    h, t, q, w = model.hidden, layout.tp, layout.tp if layout.sp else 1, itemsize
    tokens = layout.microbatch * model.sequence / layout.cp
    dense, moe = layers_of(model, layout, stage)
    saved = dense * layer_saved(model, layout, False, w) + (moe and moe * layer_saved(model, layout, True, w))
    rows = tokens * 9 * (t > 1)  # of a cut table: each token's row, and whether it is here
    if stage == 0:
        positions = 8 * model.sequence / layout.cp * model.learned_positions
        saved += rows + positions + tokens * h / q * model.dropout
    if stage == layout.stages - 1:
        saved += tokens * (2 * h + 2) * w / q + tokens * vocabulary_part(model, t) * w + rows
        saved += tokens * w / t if layout.sp else (w if t == 1 else 0)  # the loss's own
    return saved


def layer_owed(model: Model, layout: Layout, moe: bool, itemsize: int = 2) -> float:
    """Bytes that one layer keeps of a microbatch between I and W: of each matrix its input and its output's gradient.

    Recomputation changes nothing here: I has computed the inputs again.
    """
    t, q = layout.tp, layout.tp if layout.sp else 1
    matrices = model.attention_matrices()
    if not moe:
        matrices += model.mlp_matrices(model.feed_forward)
    elif model.shared_feed_forward:
        matrices += model.mlp_matrices(model.shared_feed_forward)
    # Of a matrix cut by columns the input is gathered again; that of rows has had the whole gradient gathered for I.
    kept = sum(
        m.inputs / t + m.outputs if m.cut == "row" else m.inputs / q + m.outputs / (t if m.cut == "column" else q)
        for m in matrices
    )
    if moe:
        kept += (
            model.top_k
            * layout.etp
            / q
            * sum(sum(m.shape(layout.etp)) for m in model.mlp_matrices(model.expert_feed_forward))
        )
    return layout.microbatch * model.sequence / layout.cp * kept * itemsize


def stage_owed(model: Model, layout: Layout, stage: int, itemsize: int = 2) -> float:
    """The same of a stage: its layers, and the head."""
    dense, moe = layers_of(model, layout, stage)
    owed = dense * layer_owed(model, layout, False, itemsize) + (
        moe and moe * layer_owed(model, layout, True, itemsize)
    )
    if stage == layout.stages - 1:
        head = model.hidden / (layout.tp if layout.sp else 1) + vocabulary_part(model, layout.tp)
        owed += layout.microbatch * model.sequence / layout.cp * head * itemsize
    return owed


@cache
def in_flight(schedule: str, pp: int, microbatches: int, v: int) -> list[set[tuple[int, ...]]]:
    """For each rank how many microbatches its stages keep, wherever a number is about to fall.

    First for each stage those between forward and backward, then for each those between I and W; then 1 where this is
    at the end of an I, whose last layer has its own input still.
    """
    found = []
    for row in build(schedule, pp, microbatches, v):
        stages = sorted({action.stage for action in row})
        saved, owed, peaks, before = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0), set(), ""
        for action in row:
            if before == "I" or (before == "F" and action.kind != "F"):
                peaks.add((*saved.values(), *owed.values(), int(before == "I")))
            before = action.kind
            saved[action.stage] += {"F": 1, "B": -1, "I": -1, "W": 0}[action.kind]
            owed[action.stage] += {"F": 0, "B": 0, "I": 1, "W": -1}[action.kind]
        found.append(peaks)
    return found


def filling(schedule: str, pp: int, microbatches: int) -> int:
    """How many of the microbatches fill the pipeline: all after them find it full, and add the same."""
    if schedule == "interleaved" and microbatches % pp:
        return microbatches  # in groups of unequal size
    return min(microbatches, 2 * (pp + (schedule == "dualpipe" and pp % 2)))


def saved_at_peak(model: Model, layout: Layout, rank: int, itemsize: int = 2, quick: bool = False) -> float:
    """Bytes of activations that a rank of the pipeline holds when it holds most.

    Args:
        quick: of many microbatches count the first ones, which fill the pipeline.
    """
    p, m = layout.pp, layout.microbatches
    if p * layout.v == 1:  # without a pipeline a microbatch's backward follows its forward
        return stage_saved(model, layout, 0, itemsize)
    if quick:
        m = filling(layout.schedule, p, m)
    each = [of(model, layout, stage, itemsize) for of in (stage_saved, stage_owed) for stage in layout.held(rank)]
    each.append(layout.microbatch * model.sequence * model.hidden / layout.sequence_parts * itemsize)
    peaks = in_flight(layout.schedule, p, m, layout.v)[rank]
    return max(sum(n * b for n, b in zip(counts, each, strict=True)) for counts in peaks)


def held(model: Model, layout: Layout, rank: int = 0, itemsize: int = 2, quick: bool = False) -> Held:
    """What a rank of the pipeline holds.

    Args:
        itemsize: bytes of a weight and of an activation.
    """
    weight, gradient, optimizer = state_sizes(itemsize)
    experts, others = parameters(model, layout, rank)
    own = others / layout.data + experts / layout.edp if layout.zero else others + experts
    gradients = own if layout.zero >= 2 else others + experts
    weights = own if layout.zero == 3 else others + experts
    working = transient(model, layout, rank, itemsize)
    if layout.zero >= 2:
        working += 2 * min(BUCKET_ELEMENTS, others + experts) * gradient  # buckets on their way
    if layout.zero == 3:  # both ends and two layers
        ends = vocabulary_part(model, layout.tp) * model.hidden * (1 if model.tied else 2)
        working += (ends + 2 * (others + experts - ends) / layers_by_rank(model, layout)[rank]) * weight
    saved = saved_at_peak(model, layout, rank, itemsize, quick)
    return Held(weights * weight, gradients * gradient, own * optimizer, saved, working)


def transient(model: Model, layout: Layout, rank: int, itemsize: int) -> float:
    """Bytes that live for a while in a backward: what is computed again of a layer, or the gradients of the logits."""
    moe = model.moe_layers > 0
    everything = layer_saved(model, layout, moe, itemsize, "none")
    again = 0.0 if layout.recompute == "none" else everything - layer_saved(model, layout, moe, itemsize)
    tokens = layout.microbatch * model.sequence / layout.cp
    wide = tokens * (1 + model.gated) * model.feed_forward / layout.tp * itemsize  # a gradient inside the MLP
    logits = 2 * tokens * vocabulary_part(model, layout.tp) * itemsize if ends_of(layout, rank)[1] else 0.0
    return max(again + wide, logits)
