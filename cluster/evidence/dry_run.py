"""What a dry run refuses, how far ZeRO's buckets let a rank be from the planner's figures, the most of gradients.

A case of a rule has `rank` and `last`, the last of the ranks; or `name` and `missing`.
"""

from dataclasses import replace
from math import gcd
from types import SimpleNamespace

from cluster.planner.counting import vocabulary_shard
from cluster.planner.layout import Layout
from cluster.planner.memory import matrix_parameters, parameters, state_sizes
from cluster.planner.stages import ends_of
from cluster.run.worker import Worker
from core.model.config import ModelConfig
from core.proof.figures import bars
from core.proof.lesson import Run
from core.proof.rules import Rule
from zero.engine.buckets import BUCKET_ELEMENTS

RULES = (
    Rule(
        "dry run: rank", "--rank {rank}", lambda case: 0 <= case.rank <= case.last, "the ranks are 0 to {last}",
        lambda case: f"--rank {case.last}",
    ),
)  # fmt: skip
BUILT = Rule(
    "dry run: model", "--model {name}", lambda case: not case.missing,
    "core.model.gpt, which is what is trained, has no {missing}", lambda case: "--model gpt3-175b",
)  # fmt: skip

SHOWN = Layout(tp=8, sp=True, pp=16, dp=8, v=3, schedule="interleaved", zero=1, microbatches=24)
EXPERTS_SHOWN = Layout(pp=16, dp=64, ep=64, zero=1, microbatches=32)  # on half as many ranks as DeepSeek-V3


def shown(model: ModelConfig) -> Layout:
    """Where no flag says a layout; of a mixture about DeepSeek-V3's (2412.19437, section 3.2)."""
    return replace(EXPERTS_SHOWN, ep=gcd(model.experts, EXPERTS_SHOWN.dp)) if model.experts else SHOWN


def held(worker: Worker) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer, of all engines."""
    found = [engine.memory_bytes() for engine in worker.engines]
    return {kind: sum(each[kind] for each in found) for kind in found[0]}


def most_gradients(worker: Worker) -> dict[str, int]:
    """The most bytes of gradients at the begin of a forward of the model, or of an action of the pipeline, from now on.

    Full ones are there from one micro-batch to the next only where they are added up.
    """
    most = {"gradients": 0}

    def look(*_: object) -> None:
        most["gradients"] = max(most["gradients"], held(worker)["gradients"])

    worker.model.register_forward_pre_hook(look)
    if worker.pipeline:
        look_on = SimpleNamespace(begins=look, ends=lambda *_: None, done=lambda: None)
        worker.pipeline.observers = [look_on, *worker.pipeline.observers]
    return most


def bucket_padding(model: ModelConfig, layout: Layout, pp_rank: int, itemsize: int, muon: bool) -> dict[str, int]:
    """Bytes that ZeRO's equal shards of a bucket may differ by from the planner's; the last ranks have what is left."""
    if not layout.zero:
        return {}
    by_layer = model.layers + 2
    buckets = by_layer if layout.zero == 3 else sum(parameters(model, layout, pp_rank)) // BUCKET_ELEMENTS + 1
    kinds = dict(zip(("weights", "gradients", "optimizer"), state_sizes(itemsize), strict=True))
    kinds["gathered"] = kinds["weights"]
    ranks = layout.data - 1 + (layout.edp - 1) * (model.experts > 0)
    found = {kind: ranks * buckets * size for kind, size in kinds.items()}
    if muon:
        found["optimizer"] += mixed(model, layout, pp_rank) * max(4, itemsize)
    return found


def mixed(model: ModelConfig, layout: Layout, pp_rank: int) -> int:
    """Elements with two moments that share buckets with matrices, which have one; a shard may have any number of them.

    A table that is larger than a bucket has one of its own.
    """
    others, of_matrices = parameters(model, layout, pp_rank)[1], matrix_parameters(model, layout, pp_rank)[1]
    table = vocabulary_shard(model, layout.tp) * model.hidden
    first, last = ends_of(layout, pp_rank)
    tables = (first + last - (first and last and model.tied)) * table
    return others - of_matrices - (tables if table >= BUCKET_ELEMENTS else 0)


def draw(run: Run, rows: list[tuple[str, str, str, float, float, str]], rank: int) -> None:
    """What the rank holds and sends, beside the planner's figures."""
    zh = {"held": "持有", "sent in a step": "一步发送"}
    for what in ("held", "sent in a step"):
        some = [row for row in rows if row[0] == what]
        columns = {"this run": [row[3] for row in some], "planner": [row[4] for row in some]}
        title = f"Rank {rank}: {what}, GB", f"rank {rank}：{zh[what]}，GB"
        run.draw(bars(title, "GB", [row[1] for row in some], columns), chart=what == "held")
