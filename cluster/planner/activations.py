"""What autograd saves for backward on a rank, by the lessons' formulas. Lectures 05 to 08.

As autograd saves it on a CPU, each storage once. Other models than `core.model.gpt` are counted the same way, tensor by
tensor: a gated MLP saves four tensors of f where ours saves two, grouped keys and values are narrower, experts get k
copies of a token, spread evenly.

h hidden, f feed-forward; t = tp; q ranks that shard what lies between the matrix products, t under sp, else 1;
w bytes of an element. Of a pipeline's backward I is dgrad, W wgrad, B both.
"""

from functools import cache, lru_cache
from math import lcm

from cluster.planner.counting import (
    attention_matrices,
    core_again,
    expert_matrices,
    keys_and_values,
    layer_matrices,
    read_by_heads,
    vocabulary_shard,
)
from cluster.planner.layout import Layout
from cluster.planner.stages import ends_of, layers_of, recomputed_of, sum_of_layers
from core.model.config import ModelConfig
from pipeline.schedules import build

FORGETTING = ("pointwise", "operators")  # what norms and the MLP's nonlinearity make


def norm_saved(model: ModelConfig, w: int) -> int:
    """Bytes a token that a norm saves besides its input and output: mean and deviation, or RMSNorm's one scale."""
    return (1 if model.norm == "rms" else 2) * max(4, w)


def angles_saved(model: ModelConfig, layout: Layout, rank: int) -> float:
    """Bytes of the cosines and sines, which the layers of a rank and all its microbatches have in common."""
    rotated_again = layout.recompute == "full" or (layout.recompute == "operators" and model.qk_norm)
    stages = layout.stages_of(rank)
    empty = not any(any(layers_of(model, layout, s)) for s in stages)
    kept = [layers_of(model, layout, s) != recomputed_of(model, layout, s) for s in stages]
    if model.learned_positions or empty or (rotated_again and not any(kept)):
        return 0.0
    return 4 * model.sequence / layout.cp * model.rotary_dim


def attention_saved(model: ModelConfig, layout: Layout, w: int, kind: str) -> float:
    """Bytes a token that attention saves: its inputs, its result, and without recomputation what it makes of them."""
    if model.latent:
        return latent_saved(model, layout, w, kind)
    t = layout.tp
    heads = model.heads / t
    qkv = sum(m.shape(t)[1] for m in attention_matrices(model) if m.sharding == "column")
    groups = model.query_groups * model.kv_copies(t) / t
    if model.qk_norm and kind != "operators":  # before the norms too, and a scale each
        qkv += (heads + groups) * (model.head_dim + max(4, w) / w)
    elif model.qk_norm and layout.ulysses > 1:  # they were sent after the norms
        qkv += (heads + groups) * model.head_dim
    kind = "selective" if core_again(model, kind) else "none"
    scores = 0.0
    if kind == "none" and model.attention == "softmax":
        softmax, dropout = w, 1 + w if model.dropout else 0  # of dropout its mask and its result
        scores = heads * model.sequence * (softmax + dropout)
        qkv += (heads - groups) * 2 * model.head_dim  # keys and values, repeated for each head
    elif kind == "none":
        scores = heads * max(w, 4)  # logarithms of the sums of exponentials
        if layout.ulysses > 1:  # copies of keys and values; the result before it is sent, and after
            qkv += (lcm(int(groups), layout.ulysses) - groups) * 2 * model.head_dim + model.value_size / t
    return (qkv + model.value_size / t) * w + scores


def latent_saved(model: ModelConfig, layout: Layout, w: int, kind: str) -> float:
    """The same of latent attention: what is compressed, before and after its norms, and what heads make of it."""
    assert model.latent
    kind = "selective" if core_again(model, kind) else "none"
    t, heads, d, value = layout.tp, model.heads / layout.tp, model.head_dim, model.value_dim
    q_rank, kv_rank, rope = model.latent.q_rank or 0, model.latent.kv_rank, model.latent.rope
    norms = 2 if q_rank else 1
    product = model.latent.nope + value  # of a head's values, which are a view of it, and of parts of its keys
    before = (q_rank + kv_rank + rope) * w + norms * max(4, w)
    after = read_by_heads(model) if t > 1 else q_rank + kv_rank  # put together to be sent
    made = heads * 2 * d + model.value_size / t  # queries, keys and results
    scores = 0.0
    if model.attention == "softmax":
        made += heads * value  # values, copied out of that product
        if kind == "none":
            softmax, dropout = w, 1 + w if model.dropout else 0
            scores = heads * model.sequence * (softmax + dropout)
    elif kind == "none":
        across, exchanged = layout.cp > layout.ulysses, layout.ulysses > 1
        kept, result = max(d, value), max(d, value)  # values and results, as wide as keys
        if across and layout.cp_kind == "all-gather":
            kept, result = (value, value) if exchanged else (product, 0)  # the result is what the next layer keeps
        elif across and not exchanged:
            kept = product
        made += heads * (kept + result)
        scores = heads * max(w, 4)
    else:
        made += heads * product
    return before / layout.sp_ranks + (after + made) * w + scores


def mlp_saved(model: ModelConfig, layout: Layout, moe: bool, w: int, kind: str = "none") -> float:
    """Bytes a token that the MLP saves, or the router and the experts."""
    h, t, etp = model.hidden, layout.tp, layout.etp
    tensors = 4 if model.gated else 2  # of f features each
    if kind in FORGETTING:  # what the products make
        tensors //= 2
    if not moe:
        return tensors * model.feed_forward / t * w
    # An expert's ranks have the rows of all of them; their results go back to each of them, to be weighted.
    of_copy = etp * (h + tensors * model.expert_size / etp) + h
    of_experts = (model.top_k * of_copy + tensors * model.shared_feed_forward) * w
    return (of_experts + router_saved(model, w)) / t + mixture_input(model, layout, w)


def router_saved(model: ModelConfig, w: int) -> int:
    """Bytes a token that the router saves, which computes in 4 at least: its input where that has fewer, and scores."""
    k, wide = model.top_k, max(4, w)
    scores = model.experts + {"topk-softmax": k, "sigmoid": (k + 1) * (k > 1)}.get(model.score, 0)
    choices = k * (w + 3 * 8)  # their weights; which they are, and in which order
    return (model.hidden * wide if w < wide else 0) + scores * wide + choices


def mixture_input(model: ModelConfig, layout: Layout, w: int) -> float:
    """Bytes a token that the input of a mixture is more than a norm's output, which everything else reads as it is.

    Where the ranks of tp have it alike a mixture reads a copy of a share; with few bits the router reads another copy.
    """
    alike, read = layout.tp > 1 and not layout.sp, w >= 4 or model.shared_feed_forward > 0
    share = read / layout.tp if alike else read / layout.sp_ranks
    return model.hidden * w * (share - 1 / layout.sp_ranks)


@lru_cache(256)  # of a layout, for each of its stages
def layer_saved(model: ModelConfig, layout: Layout, moe: bool, itemsize: int = 2, kind: str | None = None) -> float:
    """Bytes that one layer saves of one microbatch. 2205.05198, table 2, where attention is "softmax" with dropout.

    Args:
        kind: of recomputation; None: the layout's.
    """
    h, q, w = model.hidden, layout.sp_ranks, itemsize
    kind = kind or layout.recompute
    tokens = layout.tokens(model.sequence)
    if kind == "full":
        return tokens * h * w / q  # its input
    inputs = 2 * h * w / q  # of the norms
    outputs = 0.0 if kind in FORGETTING else 2 * (h * w + norm_saved(model, w)) / q
    masks = 2 * h / q if model.dropout and kind != "operators" else 0.0  # a byte an element
    inside = attention_saved(model, layout, w, kind) + mlp_saved(model, layout, moe, w, kind)
    router = 4 * model.experts * h if moe and w < 4 else 0  # its weight, in float32
    return tokens * (inputs + outputs + masks + inside) + router


def stage_saved(model: ModelConfig, layout: Layout, stage: int, itemsize: int = 2) -> float:
    """Bytes that a stage saves of one microbatch: its layers, and the ends of the model."""
    h, t, q, w = model.hidden, layout.tp, layout.sp_ranks, itemsize
    tokens = layout.tokens(model.sequence)
    saved = sum_of_layers(model, layout, stage, lambda x, moe: layer_saved(model, x, moe, w))
    lookup = 9 * tokens if t > 1 else 0.0  # of a sharded table: each token's row, and whether it is here
    if stage == 0:
        positions = 8 * model.sequence / layout.cp if model.learned_positions else 0.0
        mask = tokens * h / q if model.dropout else 0.0
        saved += lookup + positions + mask
    if stage == layout.stages - 1:
        wide = max(4, w)  # in which the loss is computed
        norm_and_head = tokens * (2 * h * w + norm_saved(model, w)) / q
        saved += norm_and_head + (0.0 if layout.chunk_of_loss(model) else lookup) + loss_saved(model, layout, wide)
    return saved


def loss_saved(model: ModelConfig, layout: Layout, w: int) -> float:
    """Bytes of the loss: log-probabilities, or chunk by chunk two numbers a token; and under tp what is of all ranks.

    That is under sp a shard of the tokens' losses; on one rank it is their sum.
    """
    tokens, t = layout.tokens(model.sequence), layout.tp
    if layout.chunk_of_loss(model):
        return tokens * w * (2 + (1 / layout.sp_ranks if t > 1 else 0))
    losses = tokens / t if layout.sp else float(t == 1)
    return (tokens * vocabulary_shard(model, t) + losses) * w


@lru_cache(256)
def layer_kept_for_wgrad(model: ModelConfig, layout: Layout, moe: bool, itemsize: int = 2) -> float:
    """Bytes that one layer keeps of a microbatch from dgrad to wgrad: of each matrix its input and output's gradient.

    Recomputation changes nothing here: dgrad has computed the inputs again.
    """
    t, q, etp = layout.tp, layout.sp_ranks, layout.etp
    kept = 0.0
    for matrix in layer_matrices(model, moe):
        if matrix.sharding == "row":  # the full gradient of its output has been gathered for dgrad
            kept += matrix.inputs / t + matrix.outputs
        elif matrix.sharding == "column":  # its input is gathered again, but what is compressed
            kept += matrix.inputs / (1 if matrix.name in ("q up", "kv up") else q) + matrix.shape(t)[1]
        else:  # what is compressed is before sp's gather; a shared expert has a share of the tokens with or without sp
            kept += (matrix.inputs + matrix.outputs) / (q if matrix.name in ("q down", "kv down") else t)
    if model.latent and t > 1:
        kept += model.latent.rope  # the key of all heads has been sent with what is compressed
    if moe:
        if itemsize >= 4 and not model.shared_feed_forward:  # the router's input, which a shared expert has too
            kept += model.hidden / t
        kept += model.experts / t if itemsize >= 4 else 0  # with fewer bits the router's wgrad is not left for later
        kept += model.top_k * etp / t * sum(sum(matrix.shape(etp)) for matrix in expert_matrices(model))
    return layout.tokens(model.sequence) * kept * itemsize


def stage_kept_for_wgrad(model: ModelConfig, layout: Layout, stage: int, itemsize: int = 2) -> float:
    """The same of a stage: its layers, and the head."""
    kept = sum_of_layers(model, layout, stage, lambda x, moe: layer_kept_for_wgrad(model, x, moe, itemsize))
    if stage == layout.stages - 1:
        of_logits = vocabulary_shard(model, layout.tp) * itemsize
        if layout.chunk_of_loss(model):  # computed again of what is kept of the loss, two numbers, and their gradients
            of_logits = 4 * max(4, itemsize)
        kept += layout.tokens(model.sequence) * (model.hidden / layout.sp_ranks * itemsize + of_logits)
    return kept


# ---- In flight -------------------------------------------------------------------------------------------------------

SAVED = {"F": 1, "B": -1, "I": -1, "W": 0}  # microbatches between forward and backward: what an action changes
DEFERRED = {"F": 0, "B": 0, "I": 1, "W": -1}  # and between dgrad and wgrad


@cache
def in_flight(schedule: str, pp: int, microbatches: int, v: int) -> list[set[tuple[int, ...]]]:
    """For each rank how many microbatches its stages keep, wherever a number is about to fall.

    First for each stage those between forward and backward, then for each those between dgrad (I) and wgrad (W); then 1
    where this is at the end of a dgrad, whose last layer has its own input still; then 1 where a dgrad begins, and its
    first matrix keeps the gradient of its output, before anything falls. (Of a head that is as large as what falls.)
    """
    found, head = [], pp * v - 1
    for row in build(schedule, pp, microbatches, v):
        stages = sorted({action.stage for action in row})
        saved, deferred = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
        peaks, before = set(), ""
        for action in row:
            begins = action.kind == "I" and action.stage != head
            if before == "I" or begins or (before == "F" and action.kind != "F"):
                peaks.add((*saved.values(), *deferred.values(), int(before == "I"), int(begins)))
            before = action.kind
            saved[action.stage] += SAVED[action.kind]
            deferred[action.stage] += DEFERRED[action.kind]
        found.append(largest_of(peaks))
    return found


def largest_of(peaks: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Of counts those that others do not exceed or equal in everything: whatever the sizes are, one of them is most."""
    kept: list[tuple[int, ...]] = []
    for counts in sorted(peaks, key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(other, counts, strict=True)) for other in kept):
            kept.append(counts)
    return set(kept)


def filling(schedule: str, pp: int, microbatches: int) -> int:
    """How many of the microbatches fill the pipeline: all after them find it full, and add the same."""
    if schedule == "gpipe" or (schedule == "interleaved" and microbatches % pp):
        return microbatches  # which are all in flight; in groups of unequal size
    even = pp + pp % 2 if schedule == "dualpipe" else pp
    return min(microbatches, 2 * even)


def saved_at_peak(model: ModelConfig, layout: Layout, rank: int, itemsize: int = 2) -> float:
    """Bytes of activations that a rank of the pipeline holds when it holds most."""
    if layout.stages == 1:  # without a pipeline a microbatch's backward follows its forward
        return stage_saved(model, layout, 0, itemsize) + angles_saved(model, layout, 0)
    stages = layout.stages_of(rank)
    alike: dict[tuple, float] = {}  # of stages with equal layers
    sizes = []
    for stage in stages:
        key = (layers_of(model, layout, stage), recomputed_of(model, layout, stage), stage == 0,
               stage == layout.stages - 1)  # fmt: skip
        if key not in alike:
            alike[key] = stage_saved(model, layout, stage, itemsize)
        sizes.append(alike[key])
    microbatches = filling(layout.schedule, layout.pp, layout.microbatches)
    peaks = in_flight(layout.schedule, layout.pp, microbatches, layout.v)[rank]
    kept = any(any(counts[len(stages) : 2 * len(stages)]) for counts in peaks)  # of a schedule that splits backward
    sizes += [stage_kept_for_wgrad(model, layout, stage, itemsize) if kept else 0.0 for stage in stages]
    last_input = layout.microbatch * model.sequence * model.hidden / layout.sequence_shards * itemsize
    if layout.recompute in FORGETTING and layout.recompute_every == 1:
        last_input = 0.0  # its norm is computed again before, and then has it in place of it
    # A mixture begins by freeing what it weighted.
    sizes += [last_input, 0 if model.moe_layers else layout.tokens(model.sequence) * model.hidden * itemsize]
    empty = not any(sum(layers) for layers, *_ in alike)
    if empty and not ends_of(layout, rank)[1]:  # no matrix has an input or an output
        sizes[-2:] = 0.0, 0.0
    most = max(sum(n * size for n, size in zip(counts, sizes, strict=True)) for counts in peaks)
    return most + angles_saved(model, layout, rank)


def transient(model: ModelConfig, layout: Layout, rank: int, itemsize: int) -> float:
    """Bytes that live for a while in a backward: what is computed again of a layer, or the gradients of the logits."""
    moe = model.moe_layers > 0
    tokens, t = layout.tokens(model.sequence), layout.tp
    recomputed = 0.0
    if layout.recompute != "none":
        saved = layer_saved(model, layout, moe, itemsize)
        recomputed = layer_saved(model, layout, moe, itemsize, "none") - saved
    features = 2 * model.feed_forward if model.gated else model.feed_forward  # of a gradient inside the MLP
    at_a_time = layout.chunk_of_loss(model) or tokens
    logits = 2 * at_a_time * vocabulary_shard(model, t) * max(4, itemsize) if ends_of(layout, rank)[1] else 0.0
    gathered = 0.0
    if layout.cp_kind == "all-gather" and layout.cp > layout.ulysses:  # of all tokens, and the sums of their gradients
        of_all = tokens * layout.cp / layout.ulysses * keys_and_values(model, layout)
        gathered = of_all * (itemsize + max(4, itemsize))
    return max(recomputed + max(tokens * features / t * itemsize, gathered), logits)
