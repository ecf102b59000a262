"""Lecture 08, further: zero-bubble pipelines (流水并行 1F1B/1F1B Interleaved 原理). Qi et al. 2023 (2401.10241).

    torchrun --nproc_per_node=8 pipeline/zero_bubble.py --schedule zb-v

A backward computes two things: the gradient of the stage's input (I), for which the rank before waits, and those of the
weights (W), for which nobody does. Cut in two (`core/model/linear.py` does it layer by layer), the W fill the bubbles.

    zb-h1   1F1B's memory: bubble (p-1)(F+I-W)
    zb-h2   2p-1 microbatches in flight, nearly twice the memory: (p-1)(F+I-2W), none if all three cost the same
    zb-v    two stages a rank, down the ranks and up again, so that the last stage is on the first rank: none at equal
            costs either, with 1F1B's memory

What is a bubble? Idle time between a rank's first and last action. Ranks of zb-h2 and zb-v start one after another and
end one after another, so the next step fits in without a gap, if nothing makes ranks wait for each other between steps.
The global gradient norm does. The paper's optimizer updates first and takes the step back in the rare case that it was
to be clipped; ours, as one process would, waits for the norm, and then the first rank's early end is lost. Both
numbers are shown: within the step, and with that wait.

p ranks, m microbatches, F, I and W the times of a forward and the two halves of a backward
"""

import argparse
import sys

from core.proof.lesson import Lesson, Run
from pipeline.evidence import claim_in_flight, claim_own_bubble
from pipeline.schedules import Action, Row, Schedule, build
from pipeline.training import add_flags, teach
from pipeline.training import check as check_stages


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """1F1B's warm-up; on rank r the W wait r microbatches, so that every rank holds p."""
    return [one_rank(r, ranks - r, r, microbatches) for r in range(ranks)]


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """A warm-up long enough that the first backward finds every rank still busy."""
    return [one_rank(r, 2 * (ranks - r) - 1, 2 * r, microbatches) for r in range(ranks)]


def one_rank(rank: int, warm_up: int, delay: int, microbatches: int) -> list[Action]:
    """The order of one rank's F, I and W, of which it holds warm_up + delay microbatches."""
    actions = [Action(rank, "F", i) for i in range(min(warm_up, microbatches))]
    for i in range(microbatches):
        actions.append(Action(rank, "I", i))
        if i >= delay:
            actions.append(Action(rank, "W", i - delay))
        if i + warm_up < microbatches:
            actions.append(Action(rank, "F", i + warm_up))
    return actions + [Action(rank, "W", i) for i in range(max(0, microbatches - delay), microbatches)]


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """Rank r holds stage r and stage 2p-1-r; the order is that of at least 2p-1 microbatches, less those too many."""
    rows = [one_rank_v(r, ranks, max(microbatches, 2 * ranks - 1)) for r in range(ranks)]
    return [[action for action in row if action.microbatch < microbatches] for row in rows]


def one_rank_v(rank: int, ranks: int, microbatches: int) -> Row:
    row = Row((rank, 0), (2 * ranks - 1 - rank, 0))
    down, up = 0, 1  # the two stages

    # Warm-up: forwards on the way down, until the first comes up again; then both in turn.
    for _ in range(2 * (ranks - rank) - 1):
        row.forward(down)
    for _ in range(rank):
        row.forward(up)
        row.forward(down)
    for _ in range(ranks - rank):
        row.forward(up)
        row.backward(up, split=True)
        row.weights(up)

    # Steady state: F I W on the one, F I W on the other.
    while row.started(up) < microbatches:
        if row.started(down) < microbatches:
            row.forward(down)
        row.backward(down, split=True)
        row.weights(down)
        row.forward(up)
        row.backward(up, split=True)
        row.weights(up)

    # Cool-down: the input gradients as they arrive, the weights' in between and at the end.
    for _ in range(rank):
        row.backward(down, split=True)
        row.backward(up, split=True)
    for _ in range(ranks - rank):
        row.backward(down, split=True)
        row.weights(down)
    row.all_weights(up)
    row.all_weights(down)
    return row


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model cannot be cut into the schedule's stages, or another flag does not fit."""
    chunks = 2 if args.schedule == "zb-v" else 1
    check_stages(args, ranks * chunks, chunks)


def lesson(run: Run) -> None:
    name, p, m = run.args.schedule, run.job.world_size, run.args.microbatches
    measured = teach(run, build(name, p, m))
    if not measured:
        return
    formula, bubble, in_flight, most = {
        "zb-h1": ("(p-1)(F+I-W)", p - 1, "min(m, p)", p),
        "zb-h2": ("(p-1)(F+I-2W)", 0, "min(m, 2p-1)", 2 * p - 1),
        "zb-v": ("0", 0, "2p stages of half the size, at most 2m", 2 * p),
    }[name]
    enough = p if name == "zb-h1" else 2 * p - 1  # microbatches, for the warm-up
    if m >= enough:
        claim_own_bubble(run, measured, f"{formula} = {bubble}, where F = I = W = 1", bubble)
        claim_in_flight(run, measured, f"{in_flight} = {most}", [most] * p)
    else:
        run.say(f"with fewer than {enough} microbatches {name} has another bubble: try --microbatches {enough}")


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: zero bubble",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "Backward in two parts, of which only one is waited for: the other fills the bubbles.",
        smallest=2,
    )
    add_flags(frame, microbatches=16)
    frame.parser.add_argument(
        "--schedule", choices=("zb-h1", "zb-h2", "zb-v"), default="zb-v", help="default %(default)s"
    )
    frame.parser.set_defaults(layers=16)
    sys.exit(frame.main(check, lesson))
