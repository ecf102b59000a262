"""An explorer of memory: one offline page with a model, a layout, a ZeRO stage, recomputation, and a GPU. Lecture 03.

    python -m cluster.explore --out memory.html

What the ranks of a pipeline hold, in bars against the GPU's memory. The bytes are the planner's (`planner/memory.py`),
which counts, when the page is made, what a layer, the ends of the model and each schedule's ranks contribute; the page
adds up and divides (`static/memory.js`), so that every combination can be asked for. A test holds both equal in a
browser.

Weights and activations in bfloat16, gradients in float32, AdamW; sequence parallelism wherever tp is more than 1, and
2 x pp microbatches in a pipeline.

read: explore.py:86-167; then planner/memory.py, and the page's own share in static/memory.js
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import files
from itertools import product
from typing import Any

from cluster.planner.activations import (
    filling,
    in_flight,
    layer_kept_for_wgrad,
    layer_saved,
    stage_kept_for_wgrad,
    stage_saved,
    transient,
)
from cluster.planner.counting import expert_parameters
from cluster.planner.exchanges import most_gathered
from cluster.planner.hardware import PRESETS
from cluster.planner.layout import Layout
from cluster.planner.memory import parameters, selection_biases, state_sizes
from cluster.planner.models import PUBLISHED
from cluster.planner.plans import USABLE
from cluster.planner.rulebook import Case, broken
from cluster.planner.stages import distinct_ranks, layers_of, sum_of_layers
from core.model.config import ModelConfig
from core.proof.page.page import assemble, write_page
from pipeline.schedules import SCHEDULES
from sequence_parallel.engine.recompute import KINDS
from zero.engine.buckets import BUCKET_ELEMENTS

MODELS = tuple(PUBLISHED)
TP, CP, PP, MICROBATCH = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4)
DP, EP, ETP = tuple(2**i for i in range(11)), (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)
CHUNKS = {"interleaved": (2, 4), "zb-v": (2,), "dualpipev": (2,)}  # stages of a rank; of the others one
NAMES = {f"{name}, v = {v}" if name == "interleaved" else name: (name, v)
         for name in SCHEDULES for v in CHUNKS.get(name, (1,))}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer", "activations", "gathered", "working")
ITEMSIZE = 2  # bytes of a weight and of an activation
GPUS = {  # as they are sold, with what CUDA then says there is
    name: PRESETS[of].memory
    for name, of in (("A100 40 GB", "a100-40gb"), ("A100 80 GB", "dgx-a100"), ("H100 80 GB", "dgx-h100"),
                     ("H200 141 GB", "dgx-h200"), ("B200 180 GB", "dgx-b200"), ("PC 24 GB", "pc"))
}  # fmt: skip


def layout_of(
    tp: int, cp: int, pp: int, recompute: str, microbatch: int, schedule: str = "1f1b", **more: Any
) -> Layout:
    """One of the page's; without a pipeline its schedule means nothing."""
    name, v = NAMES[schedule] if pp > 1 else ("1f1b", 1)
    return Layout(tp=tp, cp=cp, pp=pp, v=v, sp=tp > 1, schedule=name, recompute=recompute, microbatch=microbatch,
                  microbatches=2 * pp if pp > 1 else 1, **more)  # fmt: skip


def refused(model: ModelConfig, layout: Layout) -> str:
    """The rule that a layout breaks, or nothing."""
    case = Case(layout, model, None, layout.ranks, layout.batch)
    failing = broken(case)
    return failing[0].message(case.sizes) if failing else ""


def table(*choices: Iterable[Any], of: Any) -> dict[str, Any]:
    """`of(...)` of each combination, by what is chosen, with / between."""
    return {"/".join(map(str, choice)): of(*choice) for choice in product(*choices)}


# ---- What a schedule makes of a rank ---------------------------------------------------------------------------------


def of_schedule(name: str, pp: int) -> dict[str, Any]:
    """The stages of each rank, and how many microbatches of each it keeps where it may hold most (`in_flight`)."""
    layout = layout_of(1, 1, pp, "none", 1, name)
    microbatches = filling(layout.schedule, pp, layout.microbatches)
    peaks = in_flight(layout.schedule, pp, microbatches, layout.v)
    return {"stages": [layout.stages_of(rank) for rank in range(pp)], "peaks": [*map(largest, peaks)]}


def largest(counts: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of which no other has as much of everything: whatever things weigh, one of them weighs most."""
    found = [*counts]
    return [
        one
        for one in found
        if not any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in found)
    ]


# ---- What a model is made of -----------------------------------------------------------------------------------------


def of_tp(model: ModelConfig, tp: int) -> list[int]:
    """Elements of a dense layer; of one with experts, without them; of the first and of the last stage's ends.

    And of the table that both have, if they share it.
    """
    first, last = (sum_of_ends(model, Layout(tp=tp, pp=2), rank) for rank in range(2))
    both = sum_of_ends(model, Layout(tp=tp), 0)
    dense, moe = layer_elements(model, tp)
    return [dense, moe, first, last, first + last - both]


def layer_elements(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Of a dense layer, and of one with experts but for them."""
    few = [replace(model, layers=n, dense_layers=d) for n, d in ((2, 1), (3, 2), (3, 1))] if model.experts else []
    if not few:
        one, two = (parameters(replace(model, layers=n), Layout(tp=tp))[1] for n in (1, 2))
        return two - one, 0
    base, dense, moe = (parameters(each, Layout(tp=tp))[1] for each in few)
    return dense - base, moe - base


def sum_of_ends(model: ModelConfig, layout: Layout, rank: int) -> int:
    """Elements of a rank that are in no layer."""
    _, others = parameters(model, layout, rank)
    dense, moe = layer_elements(model, layout.tp)
    for stage in layout.stages_of(rank):
        of_dense, of_moe = layers_of(model, layout, stage)
        others -= of_dense * dense + of_moe * moe
    return others


def of_layer(model: ModelConfig, tp: int, cp: int, etp: int, kind: str) -> list[list[float]]:
    """Bytes that a dense layer and one with experts save: for each token of a microbatch, and besides."""
    found = []
    for moe in (False, True):
        one, two = (layer_saved(model, layout_of(tp, cp, 1, kind, b, etp=etp), moe, ITEMSIZE) for b in (1, 2))
        found.append([(two - one) / (model.sequence / cp), 2 * one - two])
    return found if model.experts else found[:1]


def of_wgrad(model: ModelConfig, tp: int, etp: int) -> list[float]:
    """Bytes a token that a dense layer and one with experts keep from dgrad to wgrad."""
    layout = layout_of(tp, 1, 1, "none", 1, etp=etp)
    kinds = (False, True) if model.experts else (False,)
    return [layer_kept_for_wgrad(model, layout, moe, ITEMSIZE) / model.sequence for moe in kinds]


def of_ends(model: ModelConfig, tp: int, cp: int, microbatch: int) -> list[float]:
    """Bytes of a microbatch that are in no layer: saved by the first and by the last stage, kept by the last's wgrad.

    And what comes and goes there.
    """
    layout = layout_of(tp, cp, 2, "none", microbatch)

    def without(of_stage: Any, of_layer: Any, stage: int) -> float:
        layers = sum_of_layers(model, layout, stage, lambda x, moe: of_layer(model, x, moe, ITEMSIZE))
        return of_stage(model, layout, stage, ITEMSIZE) - layers

    first, last = (without(stage_saved, layer_saved, stage) for stage in (0, 1))
    kept = without(stage_kept_for_wgrad, layer_kept_for_wgrad, 1)
    return [first, last, kept, transient(model, layout, 1, ITEMSIZE)]


def of_pipeline(model: ModelConfig, tp: int, name: str, pp: int) -> dict[int, list[float]]:
    """What ZeRO-3 has gathered when it is most, of each rank of which one holds most: elements, and layers of experts.

    And bytes of the biases of selection, which are not sharded.
    """
    layout = layout_of(tp, 1, pp, "none", 1, name, zero=3)
    here = model.experts * expert_parameters(model, 1) if model.experts else 1
    found = {}
    for rank in distinct_ranks(model, layout):
        few = filling(layout.schedule, pp, layout.microbatches)
        others, experts = (most_gathered(model, layout, rank, of_experts, few) for of_experts in (False, True))
        found[rank] = [others, experts // here, selection_biases(model, layout, rank)]
    return found


def model_tables(model: ModelConfig) -> dict[str, Any]:
    """All that the page knows of a model."""
    pipelines = [(name, pp) for name, pp in product(NAMES, PP) if pp > 1 or name == "1f1b"]
    why = {f"{name}/{pp}": refused(model, layout_of(1, 1, pp, "none", 1, name)) for name, pp in pipelines}
    fine = [(name, pp) for name, pp in pipelines if not why[f"{name}/{pp}"]]
    stages = {pp * NAMES[name][1]: layout_of(1, 1, pp, "none", 1, name) for name, pp in fine}
    etp = ETP if model.experts else (1,)
    return {
        "experts": model.experts, "expertSize": model.expert_size if model.experts else 0,
        "tokens": model.sequence, "hidden": model.hidden, "moe": model.moe_layers,
        "features": 2 * model.feed_forward if model.gated else model.feed_forward,
        "rotary": 0 if model.learned_positions else model.rotary_dim, "qkNorm": model.qk_norm,
        "why": {key: reason for key, reason in (why | table(TP, CP, of=lambda tp, cp: refused(
            model, layout_of(tp, cp, 1, "none", 1)))).items() if reason},
        "layers": {count: [layers_of(model, layout, stage) for stage in range(count)]
                   for count, layout in stages.items()},
        "tp": table(TP, of=lambda tp: of_tp(model, tp)),
        "expert": table(etp, of=lambda etp: expert_parameters(model, etp) if model.experts else 0),
        "layer": table(TP, (1, 2), etp, KINDS, of=lambda *x: of_layer(model, *x)),
        "wgrad": table(TP, etp, of=lambda *x: of_wgrad(model, *x)),
        "ends": table(TP, CP, MICROBATCH, of=lambda *x: of_ends(model, *x)),
        "ranks": {f"{tp}/{name}/{pp}": of_pipeline(model, tp, name, pp) for tp in TP for name, pp in fine},
    }  # fmt: skip


def _short(value: Any) -> Any:
    """Without the .0 of whole numbers."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def page() -> str:
    """The explorer, self-contained."""
    script = (files("cluster") / "static" / "memory.js").read_text("utf-8")
    models = {name: _short(model_tables(PUBLISHED[name])) for name in MODELS}
    schedules = {f"{name}/{pp}": of_schedule(name, pp) for name, pp in product(NAMES, PP) if pp > 1}
    data = {"figures": [], "names": PARTS, "models": models, "schedules": schedules, "gpus": GPUS, "usable": USABLE,
            "bucket": BUCKET_ELEMENTS, "sizes": state_sizes(ITEMSIZE)}  # fmt: skip
    choices = {"model": MODELS, "gpu": list(GPUS), "tp": TP, "cp": CP, "pp": PP, "dp": DP, "ep": EP, "etp": ETP,
               "schedule": list(NAMES), "recompute": KINDS, "microbatch": MICROBATCH}  # fmt: skip
    return assemble("memory.html", data, [script], "cluster", choices=choices)


def main() -> int:
    return write_page("cluster.explore", "Write the explorer of memory.", page)


if __name__ == "__main__":
    sys.exit(main())
