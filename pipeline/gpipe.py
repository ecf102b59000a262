"""Lecture 07: Megatron-LM pipeline parallelism, principle (Megatron-LM PP 基本原理). Second: GPipe (1811.06965).

    torchrun --nproc_per_node=8 pipeline/gpipe.py

The batch is split into m micro-batches, and a stage starts the next forward while the following stage works on the
last: all forwards, then all backwards. The bubble shrinks to (p-1)/(m+p-1) of the wall time, but every rank has the
activations of all m micro-batches when the first backward starts. `1f1b.py` has the same bubble, and fewer in flight.

read: gpipe.py:29-31; runtime.py:66-134; then engine/runtime.py
"""

import sys

from tabulate import tabulate

from core.proof.lesson import Lesson, Run
from pipeline.engine.actions import Action, Schedule
from pipeline.engine.validator import validate
from pipeline.evidence.claims import claim_bubble, claim_in_flight
from pipeline.evidence.training import add_flags, check, teach

# The course's table: stages, micro-batches, bubble over wall time to three decimals.
COURSE_GRID = [
    (4, 4, 0.429), (4, 8, 0.273), (4, 16, 0.158), (4, 32, 0.086), (4, 64, 0.045), (4, 100, 0.029),
    (8, 16, 0.304), (16, 32, 0.319), (32, 64, 0.326), (8, 32, 0.179), (16, 64, 0.190),
]  # fmt: skip


def schedule(stages: int, microbatches: int) -> Schedule:
    """Each rank: all forwards, then all backwards, in the order of the micro-batches."""
    return [[Action(r, kind, i) for kind in "FB" for i in range(microbatches)] for r in range(stages)]


def lesson(run: Run) -> None:
    p, m = run.job.world_size, run.args.microbatches
    measured = teach(run, schedule(p, m))
    if not measured:
        return
    claim_bubble(run, measured, (p - 1) / m, f"(p-1)/m = {p - 1}/{m}", f"(p-1)/(m+p-1) = {p - 1}/{m + p - 1}")
    claim_in_flight(run, measured, f"m = {m} on every rank", [m] * p)

    # 32 stages are more than a laptop runs: these schedules are carried out on virtual devices, action by action. That
    # those tell the truth is a claim above: this run's processes did every action when the virtual devices did.
    grid = [(s, n, course, validate(schedule(s, n)).bubble_of_wall) for s, n, course in COURSE_GRID]
    run.say(
        "\n"
        + tabulate(grid, ("stages", "microbatches", "course", "on virtual devices"), floatfmt=("d", "d", ".3f", ".4f"))
    )
    run.evidence.each(
        "the course's table of bubbles, on virtual devices",
        " ".join(f"{course:.3f}" for _, _, course, _ in grid),
        [(f"bubble over wall time, {s} stages, {n} microbatches", course, got) for s, n, course, got in grid],
        0.0005,
    )


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "07",
        "Megatron-LM pipeline parallelism, principle: GPipe",
        "Megatron-LM PP 基本原理",
        "All forwards, then all backwards: a small bubble, paid for with the activations of all microbatches.",
        smallest=2,
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
