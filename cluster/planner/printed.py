"""What the words of `published_runs.csv` mean: policies of recomputation, and what a program was told to do.

Lecture 03.
"""

import re

from cluster.planner.activations import layer_saved
from cluster.planner.efficiency import ROUTER
from cluster.planner.layout import Layout
from cluster.planner.software import NOTHING_AGAIN, Again
from core.model.config import ModelConfig

RECOMPUTED = {  # the table's words; what is not here is a policy of several parts, see `recomputation`
    "none": "none", "full": "full", "full + CPU offload": "full",
}  # fmt: skip


def recomputation(words: str) -> str:
    """The kind of recomputation that the table's words say, as `Layout` has it."""
    return RECOMPUTED.get(words, "selective" if "attn" in words else "none")


# Policies of several parts: Megatron-Core's `--recompute-modules`, and torchtitan's `every_second`.
PARTS = {
    "norm": Again(0.0, 0.25, 0.15, 2, 2),
    "act": Again(0.0, 0.3, 0.2, 1, 2),
    "mla_up_proj": Again(0.1, 0.1, 0.1, 1, 12),  # two products, splits, rotations, and what puts them together
    "moe": Again(0.7, 0.6, 0.6, 1, ROUTER),
}


def every_second(model: ModelConfig) -> Again:
    """Of a layer's products in their order the second, fourth and so on are computed again, and all that is between.

    Saved are the others, attention's result and the layer's input.
    """
    h, keys = model.hidden, model.key_value_size // 2
    products = [(h, model.query_size), (h, keys), (h, keys), (model.value_size, h)]
    products += [(h, model.feed_forward)] * (2 if model.gated else 1) + [(model.feed_forward, h)]
    flop = [inputs * outputs for inputs, outputs in products]
    saved = h + model.value_size + sum(outputs for _, outputs in products[::2])
    all_saved = layer_saved(model, Layout(), False) / model.sequence / 2  # numbers a token
    all_saved -= model.feed_forward if model.gated else 0  # the product of a gate is not saved by itself
    return Again(sum(flop[1::2]) / sum(flop), 1.0, 1 - saved / all_saved)


def again_of(words: str, model: ModelConfig) -> Again:
    """What the table's words say that is computed again beside the layout's kind."""
    said = set(re.split(r"[+()]", words.replace("layernorm", "norm").replace("moe_act", "act")))
    parts = [PARTS[word] for word in PARTS if word in said]
    if "per-op" in said:
        parts.append(every_second(model))
    if "mlp" in said:
        parts.append(Again(0.0, 0.0, 0.0, 1) if model.experts else Again(0.7, 0.5, 0.5, 1))
    return Again(*map(sum, zip(*parts, strict=True))) if parts else NOTHING_AGAIN


FEATURES = {  # what a program was told to do, as notes say it
    "async-tp": r"async ?tp", "ep-overlap": r"(EP|A2A) overlap(?!.*without)|with EP overlap", "graphs": r"CUDA graphs",
    "deepep": r"DeepEP|HybridEP", "eager": r"bf16 eager|eager;", "balanced": r"balance",
    "regathers": r"TP sweep at the largest",
}  # fmt: skip


def features_of(notes: str, source: str, experts: bool) -> tuple[str, ...]:
    """The words of FEATURES that notes say, or that follow from the source."""
    found = {feature for feature, said in FEATURES.items() if re.search(said, notes, re.IGNORECASE)}
    if "without EP overlap" in notes:
        found.discard("ep-overlap")
    if "matched A/B" in notes:  # of the page's program, which has these
        found |= {"graphs", "deepep"}
    if experts and "Megatron-Bridge docs/performance-summary" in source:
        found.add("deepep")  # or HybridEP, as the performance recipes have it
    return tuple(sorted(found))
