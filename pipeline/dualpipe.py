"""Lecture 08, further: DualPipe and DualPipeV (流水并行 1F1B/1F1B Interleaved 原理). DeepSeek-V3 (2412.19437), 3.2.1.

    torchrun --nproc_per_node=8 pipeline/dualpipe.py --schedule dualpipe

Half of the micro-batches enter at the first rank and go down, half enter at the last and go up. So each rank has two
stages, r and p-1-r, every stage is on two ranks, and the gradients of its two copies are summed. Where the streams
meet, a rank has a forward of one and a backward of the other to do at the same time: F&B, of which on GPUs the one
computes while the other communicates. Here there is nothing to hide, F&B = F+B; with experts, `engine/turns.py`.

DualPipeV folds the picture in the middle: half of the ranks, the same two stages on each, one copy. For the same model
each has twice as much.

            bubble                  parameters a rank    micro-batches in flight
    1F1B    (P-1)(F+B)              1                    P
    both    (P/2-1)(F&B+B-3W)       2                    P+1

read: dualpipe.py:39-112; engine/actions.py:38-85; then runtime.py, zero_bubble.py

P stages as the paper counts: p ranks of DualPipe, 2p stages on p ranks of DualPipeV; B a full backward, as in the paper
(I and W in `zero_bubble.py`), W the part of the weights, F a forward, each of one stage
"""

import argparse
import sys

from core.model.gpt import GPT, materialize
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import live_bytes
from pipeline.engine.actions import Row, Schedule, ScheduleError
from pipeline.engine.validator import validate
from pipeline.evidence.claims import claim_in_flight, claim_own_bubble
from pipeline.evidence.rules import DUALPIPE, DUALPIPE_MICROBATCHES, DUALPIPE_RANKS, DUALPIPEV_MICROBATCHES
from pipeline.evidence.training import add_flags, teach
from pipeline.evidence.training import check as check_stages
from pipeline.zero_bubble import defer_wgrads


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Raises ScheduleError unless there are as many ranks and micro-batches for each direction, and 2p or more."""
    if ranks % 2:
        raise ScheduleError(f"{ranks} ranks: {DUALPIPE_RANKS}")
    if microbatches % 2 or microbatches < 2 * ranks:
        raise ScheduleError(f"{microbatches} microbatches: {DUALPIPE_MICROBATCHES.format(twice=2 * ranks)}")
    half, rows = microbatches // 2, []
    for rank in range(ranks):
        down, up = (rank, 0), (ranks - 1 - rank, half)  # stage and first micro-batch
        near, far = (down, up) if rank < ranks // 2 else (up, down)  # near: of the stream that enters on this side
        rows.append(one_rank(Row(near, far), min(rank, ranks - 1 - rank), ranks // 2, half))
    return rows


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """Raises ScheduleError where there are less than 2p micro-batches."""
    if microbatches < 2 * ranks:
        raise ScheduleError(f"{microbatches} microbatches: {DUALPIPEV_MICROBATCHES.format(twice=2 * ranks)}")
    stages = [((rank, 0), (2 * ranks - 1 - rank, 0)) for rank in range(ranks)]
    return [one_rank(Row(*stages[rank]), rank, ranks, microbatches) for rank in range(ranks)]


def one_rank(row: Row, rank: int, ranks: int, microbatches: int) -> Row:
    """The order of one rank that is number `rank` of the `ranks` between the end where a stream enters and the middle.

    Args:
        microbatches: of each stream.
    """
    near, far = 0, 1  # of its two stages, the one nearer to the entry of its micro-batches, and the one far from it
    to_middle = ranks - rank - 1

    # 1. Forwards of the near stream only.
    for _ in range(2 * to_middle):
        row.forward(near)

    # 2. The far stream has arrived: forwards of both.
    for _ in range(rank + 1):
        row.forward(near)
        row.forward(far)

    # 3. The far stream turns round: its backward, in two parts, the second while others still wait for theirs.
    for _ in range(to_middle):
        row.backward(far, split=True)
        row.weights()
        row.forward(far)

    # 4. Steady state: a forward of the one with a backward of the other, F&B.
    for i in range(microbatches - 2 * ranks + rank + 1):
        if i == 0 and to_middle == 0:  # the far stream turns round here: the next rank waits for this forward
            row.forward(near)
            row.backward(far)
        else:
            row.together(forward=near, backward=far)
        row.together(forward=far, backward=near)

    # 5. No more forwards of the near stream.
    for _ in range(to_middle):
        row.backward(far)
        row.together(forward=far, backward=near)

    # 6. No more forwards. From the middle of this phase on, weights can wait: the others need the input's gradient.
    switch = rank + 1  # of the 2(rank+1) backwards, the first that is split
    for i in range(2 * (rank + 1)):
        row.backward(near if i % 2 else far, split=i >= switch)

    # 7. Input gradients as they arrive, with a weight gradient in between.
    for _ in range(to_middle):
        row.weights()
        row.backward(near, split=True)

    # 8. What is left.
    for _ in range(rank + 1):
        row.weights()
    return row


SCHEDULES = {"dualpipe": dualpipe, "dualpipev": dualpipev}


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model cannot be split into the schedule's stages, or another flag does not fit."""
    check_stages(args, ranks, 2 if args.schedule == "dualpipev" else 1, DUALPIPE)


def lesson(run: Run) -> None:
    name, p, m = run.args.schedule, run.job.world_size, run.args.microbatches
    schedule = SCHEDULES[name](p, m)
    measured = teach(run, schedule, defer_wgrads)
    if not measured:
        return
    stages, cost = (p, 1) if name == "dualpipe" else (2 * p, 1 / 2)  # of a forward on one of them
    idle = (stages / 2 - 1) * cost
    claim_own_bubble(run, measured, f"(P/2-1)(F+B-2W) = {idle:g}, where F = W = {cost:g}, B = {2 * cost:g}", idle)
    # The paper's figure is for F&B as one thing, whose two results are there at its end.
    wall = validate(schedule, together=True).makespan
    paper = f"(P/2-1)(F&B+B-3W) = {2 * idle:g}, F&B = F+B"
    run.evidence.claim("the same on virtual devices, F&B one block", paper, 2 * idle, wall - 3 * m, 1e-9)
    claim_in_flight(run, measured, f"P+1 = {stages + 1}, P = {stages} stages", [stages + 1] * p)
    model = materialize(GPT(configuration(run.args)), 0, run.job.device, run.dtype)
    all_ranks = sum(each.parameter_bytes for each in measured) / live_bytes(model.parameters())
    copies = 2 if name == "dualpipe" else 1
    run.evidence.claim("parameters on all ranks, in models", f"{copies}", copies, all_ranks, 1e-9)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: DualPipe and DualPipeV",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "Micro-batches from both ends at once, so that a forward and a backward can overlap.",
        smallest=2,
    )
    add_flags(frame, microbatches=16)
    frame.parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="dualpipe", help="default %(default)s")
    frame.parser.set_defaults(layers=16)
    sys.exit(frame.main(check, lesson))
