"""Lecture 08: pipeline parallelism, 1F1B (流水并行 1F1B/1F1B Interleaved 原理). Narayanan et al. 2021 (2104.04473).

    torchrun --nproc_per_node=8 pipeline/1f1b.py

GPipe's bubble, at a fraction of its memory: a rank starts backwards as soon as it can, so it never has more than
p-r micro-batches in flight, whatever m is. Three phases on rank r of p:

    warm-up       p-r-1 forwards, as many as there are stages after this one, at most m
    steady state  one forward, one backward, in turn: one more in flight, one less
    cool-down     the backwards of what the warm-up left

How a rank carries out such a list, and where its messages come from, is lecture 09: `runtime.py`.

p ranks, each with one stage, so that rank r has stage r; m micro-batches

read: 1f1b.py:27-54; runtime.py:66-134; then engine/runtime.py
"""

import sys

from core.proof.lesson import Lesson, Run
from pipeline.engine.actions import Action, Schedule
from pipeline.evidence.claims import claim_bubble, claim_in_flight, forwards_before_backward
from pipeline.evidence.training import add_flags, check, teach


def schedule(stages: int, microbatches: int) -> Schedule:
    """The order of every rank's forwards (F) and backwards (B)."""
    return [one_rank(rank, stages, microbatches) for rank in range(stages)]


def one_rank(rank: int, stages: int, microbatches: int) -> list[Action]:
    actions = []
    forward = backward = 0  # the next micro-batch of each kind

    # Warm-up: the last rank has none.
    warm_up = min(stages - rank - 1, microbatches)
    for _ in range(warm_up):
        actions.append(Action(rank, "F", forward))
        forward += 1

    # Steady state: 1F1B.
    for _ in range(microbatches - warm_up):
        actions.append(Action(rank, "F", forward))
        actions.append(Action(rank, "B", backward))
        forward += 1
        backward += 1

    # Cool-down: as many backwards as there were warm-up forwards.
    for _ in range(warm_up):
        actions.append(Action(rank, "B", backward))
        backward += 1

    return actions


def lesson(run: Run) -> None:
    p, m = run.job.world_size, run.args.microbatches
    measured = teach(run, schedule(p, m))
    if not measured:
        return
    warm_up = [forwards_before_backward(each) - 1 for each in measured]  # the last one is of the first F-B pair
    cases = [(f"warm-up forwards on rank {r}", min(p - r, m) - 1, warm_up[r]) for r in range(p)]
    run.evidence.each("warm-up forwards, before the first F-B pair", "p-r-1 on rank r, at most m-1", cases)
    claim_in_flight(run, measured, "min(m, p-r) on rank r", [min(m, p - r) for r in range(p)])
    claim_bubble(run, measured, (p - 1) / m, f"(p-1)/m = {p - 1}/{m}", f"(p-1)/(m+p-1) = {p - 1}/{m + p - 1}")


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: 1F1B",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "One forward, one backward: GPipe's bubble with at most p-r microbatches in flight on rank r.",
        smallest=2,
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
