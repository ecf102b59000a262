"""An explorer of memory: one offline page with a model, a layout, a ZeRO stage, recomputation, and a GPU. Lecture 03.

    python -m cluster.explore --out memory.html

What the ranks of a pipeline hold, in bars against the GPU's memory. The bytes are the planner's (`planner/memory.py`):
what depends on model, tp, cp, pp, recomputation and microbatch is counted by it when the page is made; dp, ep and ZeRO,
which only divide, are left to the page (`static/memory.js`). A test holds both equal in a browser.

Weights and activations in bfloat16, gradients in float32, AdamW; 1F1B with enough microbatches to fill the pipeline;
sequence parallelism wherever tp is more than 1.

read: explore.py:44-87; then planner/memory.py, and the page's own share in static/memory.js
"""

import sys
from importlib.resources import files
from itertools import product
from typing import Any

from cluster.planner.hardware import PRESETS
from cluster.planner.layout import Layout
from cluster.planner.memory import parameters, rank_memory, selection_biases, state_sizes
from cluster.planner.models import PUBLISHED
from cluster.planner.plans import USABLE
from cluster.planner.rulebook import Case, broken
from cluster.planner.stages import distinct_ranks
from core.model.config import ModelConfig
from core.proof.page.page import assemble, write_page
from sequence_parallel.engine.recompute import KINDS
from zero.engine.buckets import BUCKET_ELEMENTS

MODELS = ("llama3-8b", "llama3-70b", "llama3-405b", "gpt3-175b", "mixtral-8x7b", "deepseek-v3")
TP, CP, PP, MICROBATCH = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4)
DP, EP = tuple(2**i for i in range(11)), (1, 2, 4, 8, 16, 32, 64)
TWICE = {"zero": 3, "dp": 2, "ep": 2}
ITEMSIZE = 2  # bytes of a weight and of an activation
GPUS = {  # as they are sold, with what CUDA then says there is
    name: PRESETS[of].memory
    for name, of in (("A100 40 GB", "a100-40gb"), ("A100 80 GB", "dgx-a100"), ("H100 80 GB", "dgx-h100"),
                     ("H200 141 GB", "dgx-h200"), ("B200 180 GB", "dgx-b200"), ("PC 24 GB", "pc"))
}  # fmt: skip


def layout_of(tp: int, cp: int, pp: int, recompute: str, microbatch: int, **more: Any) -> Layout:
    """One of the page's."""
    m = 2 * pp if pp > 1 else 1
    return Layout(
        tp=tp, cp=cp, pp=pp, sp=tp > 1, recompute=recompute, microbatch=microbatch, microbatches=m, **more
    )  # fmt: skip


def shards(model: ModelConfig, tp: int, pp: int) -> list[list[float]]:
    """Of each rank of the pipeline of which one holds most, with dp = cp = ep = 1.

    The rank; elements of experts and of all others; bytes of gathered weights (ZeRO-3), and those of experts in them;
    bytes of the biases of selection, which are not sharded.
    """
    layout, sharded, twice = (layout_of(tp, 1, pp, "none", 1, **more) for more in ({}, {"zero": 3}, TWICE))
    found = []
    for rank in distinct_ranks(model, layout):
        gathered, experts = rank_memory(model, sharded, rank, ITEMSIZE).gathered, 0.0
        if model.experts:  # of which over twice as many ranks there are half
            experts = 2 * (gathered - rank_memory(model, twice, rank, ITEMSIZE).gathered)
        biases = selection_biases(model, layout, rank)
        found.append([rank, *parameters(model, layout, rank), gathered, experts, biases])
    return found


def activations(model: ModelConfig, tp: int, cp: int, pp: int, recompute: str, microbatch: int) -> list | str:
    """Bytes saved, and those that come and go, of the same ranks. Or why there is no such layout."""
    layout = layout_of(tp, cp, pp, recompute, microbatch)
    case = Case(layout, model, None, layout.ranks, layout.batch)
    if failing := broken(case):
        return failing[0].message(case.sizes)
    held = [rank_memory(model, layout, rank, ITEMSIZE) for rank in distinct_ranks(model, layout)]
    return [[each.activations, each.working] for each in held]


def tables() -> dict[str, Any]:
    """`shards` by model/tp/pp; `activations` by model/tp/cp/pp/recomputation/microbatch, or which of the `reasons`."""
    of_shards = {f"{name}/{tp}/{pp}": shards(PUBLISHED[name], tp, pp) for name, tp, pp in product(MODELS, TP, PP)
                 if isinstance(activations(PUBLISHED[name], tp, 1, pp, "none", 1), list)}  # fmt: skip
    saved, reasons = {}, {}
    for choice in product(MODELS, TP, CP, PP, KINDS, MICROBATCH):
        found = activations(PUBLISHED[choice[0]], *choice[1:])
        saved["/".join(map(str, choice))] = reasons.setdefault(found, len(reasons)) if isinstance(found, str) else found
    return {"shards": _short(of_shards), "saved": _short(saved), "reasons": [*reasons]}


def _short(value: Any) -> Any:
    """Without the .0 of whole numbers."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return int(value) if float(value).is_integer() else value


def page() -> str:
    """The explorer, self-contained."""
    script = (files("cluster") / "static" / "memory.js").read_text("utf-8")
    models = {name: {"experts": PUBLISHED[name].experts} for name in MODELS}
    data = {"figures": [], "models": models, "gpus": GPUS, "usable": USABLE,
            "bucket": BUCKET_ELEMENTS, "sizes": state_sizes(ITEMSIZE)} | tables()  # fmt: skip
    choices = {"model": MODELS, "gpu": list(GPUS), "tp": TP, "cp": CP, "pp": PP, "dp": DP, "ep": EP,
               "recompute": KINDS, "microbatch": MICROBATCH}  # fmt: skip
    return assemble("memory.html", data, [script], "cluster", choices=choices)


def main() -> int:
    return write_page("cluster.explore", "Write the explorer of memory.", page)


if __name__ == "__main__":
    sys.exit(main())
