"""Elements that a rank sends in a step, by axis, as the topics' ledger counts them. Lectures 01, 04 to 09.

Exact for `core.model.gpt` over tp, cp, pp and dp (`tests/cluster/test_accounts.py`), but for the few numbers of the
global norm and the padding of ZeRO's buckets. Over ep the mean of all ranks, if tokens choose evenly.
"""

from collections import Counter
from functools import partial

from cluster.planner.counting import keys_and_values, parameters_of_shares, read_by_heads, vocabulary_shard
from cluster.planner.exchanges import gathered, reduced
from cluster.planner.layout import FOLDED, Layout
from cluster.planner.memory import parameters, replicated_parameters
from cluster.planner.stages import ends_of, layers_by_rank, layers_of, sum_of_layers
from core.model.config import ModelConfig
from core.model.sharding import copied_parameters, heads_norm_parameters
from pipeline.schedules import build


def ring_share(n: int) -> float:
    """Of a tensor, what each of n ranks sends in a ring's all-gather or reduce-scatter; an all-reduce is both."""
    return (n - 1) / n


def message(model: ModelConfig, layout: Layout) -> float:
    """Elements of an activation that travels from stage to stage."""
    return layout.microbatch * model.sequence * model.hidden / layout.sequence_shards


def microbatches_a_rank(layout: Layout) -> float:
    """Microbatches of a step that one rank of the pipeline runs through each of its stages."""
    return layout.microbatches / 2 if layout.schedule == "dualpipe" else layout.microbatches  # a stage is on two ranks


def sent(model: ModelConfig, layout: Layout, rank: int = 0) -> dict[str, float]:
    """Elements that rank `rank` of the pipeline sends in a step over each axis: tp, cp, ep, etp, pp, dp and edp.

    dp is the axis of all ranks that sum gradients, dp x cp.
    """
    found: Counter[str] = Counter()
    m = microbatches_a_rank(layout)
    for stage in layout.stages_of(rank):
        for axis, of_layer in (("tp", layer_tp), ("cp", layer_cp), ("ep", layer_ep), ("etp", layer_etp)):
            found[axis] += m * sum_of_layers(model, layout, stage, partial(of_layer, model))
        found["tp"] += m * ends_tp(model, layout, stage)
    found["tp"] += summed_over_tp(model, layout, rank) + gathered_for_head(model, layout, rank)
    found["etp"] += summed_over_etp(model, layout, rank)
    found["pp"] = messages(layout, rank) * message(model, layout) + exchanged(model, layout, rank)
    for axis, ranks, experts in (("dp", layout.data, False), ("edp", layout.edp, True)):
        exchanged_over_data = gradients_reduced(model, layout, rank, experts) + gathers(model, layout, rank, experts)
        found[axis] = exchanged_over_data * ring_share(ranks)
    return {axis: elements for axis, elements in found.items() if elements}


def sent_bytes(model: ModelConfig, layout: Layout, rank: int = 0, itemsize: int = 2) -> dict[str, float]:
    """The same in bytes, where an element has `itemsize`; but gradients of weights, and what is `wide`, 4 or more."""
    found = {axis: itemsize * elements for axis, elements in sent(model, layout, rank).items()}
    for axis, elements in counts_sent(model, layout, rank).items():
        found[axis] += elements * (8 - itemsize)  # int64
    for axis, elements in wide(model, layout, rank).items():
        found[axis] += elements * (max(4, itemsize) - itemsize)
    return found


def wide(model: ModelConfig, layout: Layout, rank: int) -> dict[str, float]:
    """The elements of `sent` that are added up in float32 at least: gradients of weights, a ring's, and the losses."""
    m, last = microbatches_a_rank(layout), ends_of(layout, rank)[1]
    found = {"pp": exchanged(model, layout, rank), "tp": summed_over_tp(model, layout, rank)}
    if last:
        found["tp"] += m * layout.tokens(model.sequence) * loss_tp(layout) * ring_share(layout.tp)
    found["cp"] = m * layers_by_rank(model, layout)[rank] * around_ring(model, layout)
    found["dp"] = gradients_reduced(model, layout, rank, False) * ring_share(layout.data)
    found["etp"] = summed_over_etp(model, layout, rank)
    found["edp"] = gradients_reduced(model, layout, rank, True) * ring_share(layout.edp)
    return {axis: elements for axis, elements in found.items() if elements}


# ---- tp --------------------------------------------------------------------------------------------------------------


def layer_tp(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """Of one layer and microbatch, forward and backward (lectures 05 and 06), and what is computed again.

    An all-reduce is a reduce-scatter and a gather; under sp each of them is by itself.
    """
    h, read, again = model.hidden, read_by_heads(model), layout.recompute == "full"
    mlp = 0 if moe else h  # experts are not sharded over tp
    a_token = 2 * read + 2 * h + 4 * mlp
    if not layout.sp:
        # Of a mixture results are gathered, and in backward gradients; that again only where a mask is saved after it.
        a_token += 2 * (h + mlp) * again + moe * h * (2 + (again and bool(model.dropout)))
    else:
        a_token += mlp + (0 if model.latent else h)  # inputs are gathered again for wgrad, but what is compressed
        # Computed again is what was not saved. Nothing after the MLP's reduce-scatter is saved but a dropout's mask, so
        # without one the forward that is computed again ends before it.
        a_token += (read + h + (2 if model.dropout else 1) * mlp) * again
    return layout.tokens(model.sequence) * a_token * ring_share(layout.tp)


def ends_tp(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Of the embedding, and of the head and the loss, for one microbatch."""
    a_token = 0
    if stage == 0:
        a_token += 2 * model.hidden  # all-reduced forward; or reduce-scattered, and gathered backward
    if stage == layout.stages - 1:
        a_token += (3 if layout.sp else 2) * model.hidden + loss_tp(layout)
    return layout.tokens(model.sequence) * a_token * ring_share(layout.tp)


def loss_tp(layout: Layout) -> int:
    """Of the loss of one token."""
    return 4 if layout.sp else 6


def gathered_for_head(model: ModelConfig, layout: Layout, rank: int) -> float:
    """The head's input, gathered once more under sp where dgrad and wgrad each compute the chunks' logits again."""
    if not layout.sp or not layout.chunk_of_loss(model):
        return 0.0
    actions = build(layout.schedule, layout.pp, layout.microbatches, layout.v)[rank] if layout.pp > 1 else []
    dgrads = sum(action.kind == "I" and action.stage == layout.stages - 1 for action in actions)
    return dgrads * layout.tokens(model.sequence) * model.hidden * ring_share(layout.tp)


def summed_over_tp(model: ModelConfig, layout: Layout, rank: int) -> float:
    """Gradients of what sequence parallelism replicates, and of what ranks have with other heads: norms, keys, values.

    Each rank sums its shard of what dp has summed.
    """
    layers, copies = layers_by_rank(model, layout)[rank], model.kv_copies(layout.tp)
    norms = replicated_parameters(model, layout, rank) if layout.sp else layers * heads_norm_parameters(model)
    if not layout.sp and layout.tp > 1:
        norms += mixtures_of(model, layout, rank) * parameters_of_shares(model)
    copied = ring_share(copies) * layers * copied_parameters(model, layout.tp)
    return 2 * (ring_share(layout.tp) * norms + copied) / (layout.data if layout.zero else 1)


# ---- cp --------------------------------------------------------------------------------------------------------------


def layer_cp(model: ModelConfig, layout: Layout, moe: bool = False) -> float:
    """Of one layer and microbatch (lecture 06). Ring: keys and values go round, and in backward their gradients too.

    All-gather: as much; gathered, in backward gathered again, and their gradients reduce-scattered.
    Ulysses: an all-to-all of q, k, v and of the result, and the same backward.
    """
    shard = layout.tokens(model.sequence) * ring_share(layout.ulysses)
    ring, inputs = around_ring(model, layout), shard * (model.query_size / layout.tp + keys_and_values(model, layout))
    result = shard * model.value_size / layout.tp
    recomputed = {"selective": ring + inputs, "full": ring + inputs + result}.get(layout.recompute, 0.0)
    return 3 * ring + 2 * (inputs + result) + recomputed


def around_ring(model: ModelConfig, layout: Layout) -> float:
    """Keys and values that a rank passes on around its ring, or that it gathers; or, in backward, their gradients."""
    hops = layout.cp // layout.ulysses - 1
    return layout.tokens(model.sequence) * keys_and_values(model, layout) * hops


# ---- Experts ---------------------------------------------------------------------------------------------------------


def rows(model: ModelConfig, layout: Layout) -> float:
    """Routed tokens of a rank, each once for every expert it chooses; as many arrive, if they choose evenly."""
    return model.top_k * layout.tokens(model.sequence) / layout.tp


def layer_ep(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """Of one layer with experts and microbatch (CODE 04): k rows a token there and back, and the same backward."""
    if not moe:
        return 0.0
    forwards = 2 if layout.recompute == "full" else 1
    return ((2 * forwards + 2) * rows(model, layout) * model.hidden + layer_counts(model, layout)) * ring_share(
        layout.ep
    )


def layer_etp(model: ModelConfig, layout: Layout, moe: bool) -> float:
    """Where ranks shard an expert's features each gathers the rows of the others, and reduce-scatters the results."""
    if not moe:
        return 0.0
    forwards = 2 if layout.recompute == "full" else 1
    return ((2 * forwards + 2) * rows(model, layout) * model.hidden + layer_counts(model, layout)) * (layout.etp - 1)


def layer_counts(model: ModelConfig, layout: Layout) -> int:
    """How many rows come for each expert, sent before them."""
    return model.experts * (2 if layout.recompute == "full" else 1)


def mixtures_of(model: ModelConfig, layout: Layout, rank: int) -> int:
    """Layers with experts on a rank of the pipeline."""
    return sum(layers_of(model, layout, stage)[1] for stage in layout.stages_of(rank))


def counts_sent(model: ModelConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Of `sent` what are whole numbers."""
    times = microbatches_a_rank(layout) * mixtures_of(model, layout, rank) * layer_counts(model, layout)
    found = {"ep": times * ring_share(layout.ep), "etp": times * (layout.etp - 1)}
    return {axis: elements for axis, elements in found.items() if elements}


def summed_over_etp(model: ModelConfig, layout: Layout, rank: int) -> float:
    """Gradients of the experts' last biases, which the ranks of etp have alike, each of its own tokens."""
    experts = mixtures_of(model, layout, rank) * model.experts // layout.ep
    biases = (model.biases or model.expert_bias) * experts * model.hidden
    return 2 * ring_share(layout.etp) * biases / (layout.edp if layout.zero else 1)


# ---- pp and dp -------------------------------------------------------------------------------------------------------


def messages(layout: Layout, rank: int) -> int:
    """That a rank sends to its neighbours in a step: an activation to the one, a gradient to the other."""
    if layout.pp == 1:
        return 0
    own = layout.stages_of(rank)
    neighbours = [n for stage in own for n in (stage - 1, stage + 1) if 0 <= n < layout.stages]
    if layout.schedule in FOLDED:  # the two stages at the fold are on one rank
        neighbours = [n for n in neighbours if n not in own]
    return int(len(neighbours) * microbatches_a_rank(layout))


def exchanged(model: ModelConfig, layout: Layout, rank: int) -> float:
    """Gradients of what two ranks of the pipeline replicate: the tied embedding; with dualpipe everything.

    After the data ranks have summed them: with ZeRO a shard of them.
    """
    if layout.schedule == "dualpipe":
        experts, others = parameters(model, layout, rank)
        return others / layout.data + experts / layout.edp if layout.zero else others + experts
    first, last = ends_of(layout, rank)
    tied = vocabulary_shard(model, layout.tp) * model.hidden if model.tied and first != last else 0
    return tied / layout.data if layout.zero else tied


def gradients_reduced(model: ModelConfig, layout: Layout, rank: int, experts: bool) -> float:
    """Elements of gradients, of experts or of all else, that the data ranks sum, each sent (N-1)/N times: lecture 01.

    An all-reduce counts twice.
    """
    if layout.zero >= 2:
        return reduced(model, layout, rank, experts)
    return (2, 1)[layout.zero] * parameters(model, layout, rank)[0 if experts else 1]


def gathers(model: ModelConfig, layout: Layout, rank: int, experts: bool) -> float:
    """Elements of weights that they gather: ZeRO-1 and 2 after the update, ZeRO-3 before each use."""
    if layout.zero == 3:
        return gathered(model, layout, rank, experts)
    return bool(layout.zero) * parameters(model, layout, rank)[0 if experts else 1]
