"""Lecture 07: Megatron-LM pipeline parallelism, principle (Megatron-LM PP 基本原理). First: the naive pipeline.

    torchrun --nproc_per_node=8 pipeline/naive.py

The model is split into p stages, one a rank, and each micro-batch goes all the way forward and all the way back before
the next begins. The model fits where it did not fit before, but only one rank computes at any time: the others are
idle for (p-1)/p of it, however many micro-batches there are. `gpipe.py` is the first answer.

read: naive.py:21-23; runtime.py:66-134; then stages.py
"""

import sys

from core.proof.lesson import Lesson, Run
from pipeline.engine.actions import Action, Schedule
from pipeline.engine.validator import bubble
from pipeline.evidence.claims import claim_in_flight, timeline_of
from pipeline.evidence.training import add_flags, check, teach


def schedule(stages: int, microbatches: int) -> Schedule:
    """Each rank: the forward and the backward of one micro-batch, then of the next."""
    return [[Action(r, kind, i) for i in range(microbatches) for kind in "FB"] for r in range(stages)]


def lesson(run: Run) -> None:
    p, m = run.job.world_size, run.args.microbatches
    measured = teach(run, schedule(p, m))
    if not measured:
        return
    idle, _ = bubble(timeline_of(measured))
    run.evidence.claim(
        "idle share of the time of all ranks", f"(p-1)/p = {p - 1}/{p}, virtual time", (p - 1) / p, idle, 1e-12
    )
    claim_in_flight(run, measured, "1 on every rank", [1] * p)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "07",
        "Megatron-LM pipeline parallelism, principle: the naive pipeline",
        "Megatron-LM PP 基本原理",
        "A model split into stages, one microbatch at a time: right, and idle for (p-1)/p of the time.",
        smallest=2,
    )
    add_flags(frame, microbatches=2)
    sys.exit(frame.main(check, lesson))
