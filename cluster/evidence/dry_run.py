"""What a dry run refuses, and the most that it finds of gradients.

A case of a rule has `experts`, `rank` and `last`, the last of the ranks; or `name` and `missing`.
"""

from types import SimpleNamespace

from cluster.run.worker import Worker
from core.proof.rules import Rule

RULES = (
    Rule(
        "dry run: experts", "--experts", lambda case: not case.experts,
        "which rank a token is sent to depends on its numbers, and a dry run has none",
        lambda case: "python -m cluster.plan, which takes tokens to choose evenly, or leave out the flags of experts",
    ),
    Rule(
        "dry run: rank", "--rank {rank}", lambda case: 0 <= case.rank <= case.last, "the ranks are 0 to {last}",
        lambda case: f"--rank {case.last}",
    ),
)  # fmt: skip
BUILT = Rule(
    "dry run: model", "--model {name}", lambda case: not case.missing,
    "core.model.gpt, which is what is trained, has no {missing}", lambda case: "--model gpt3-175b",
)  # fmt: skip


def most_gradients(worker: Worker) -> dict[str, int]:
    """The most bytes of gradients at the begin of a forward of the model, or of an action of the pipeline, from now on.

    Full ones are there from one micro-batch to the next only where they are added up.
    """
    most = {"gradients": 0}

    def look(*_: object) -> None:
        most["gradients"] = max(most["gradients"], worker.dense_engine.memory_bytes()["gradients"])

    worker.model.register_forward_pre_hook(look)
    if worker.pipeline:
        look_on = SimpleNamespace(begins=look, ends=lambda *_: None, done=lambda: None)
        worker.pipeline.observers = [look_on, *worker.pipeline.observers]
    return most
