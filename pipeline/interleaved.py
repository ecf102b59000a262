"""Lecture 08: pipeline parallelism, interleaved 1F1B (流水并行 1F1B/1F1B Interleaved 原理). 2104.04473, section 2.2.

    torchrun --nproc_per_node=8 pipeline/interleaved.py --chunks 2

A rank has v small stages instead of one large one: chunk k of rank r is stage kp+r, so a micro-batch goes round the
ranks v times. The pipeline fills after (p-1) small forwards, which makes the bubble v times smaller. The price is
(pv-1)/(p-1) times the messages, a little more than v, and a little memory: 1 + (p-1)/(pv) of 1F1B's.

Micro-batches go in groups of p: a rank runs a group through its first chunk, the same group through its second, and so
on, which is just when they come round again. As in 1F1B there are three phases on rank r:

    warm-up       2(p-r-1) + (v-1)p forwards of a chunk
    steady state  one forward, one backward, in turn
    cool-down     the backwards of what the warm-up left

read: interleaved.py:32-61; runtime.py:66-134; then split.py, engine/runtime.py

p ranks, v chunks a rank, m micro-batches
"""

import argparse
import sys

from core.proof.lesson import Lesson, Run
from pipeline.engine.actions import Action, Schedule
from pipeline.evidence.claims import claim_bubble, claim_in_flight, forwards_before_backward
from pipeline.evidence.rules import CHUNKS
from pipeline.evidence.training import add_flags, teach
from pipeline.evidence.training import check as check_stages


def schedule(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """The order of every rank's forwards (F) and backwards (B).

    Any number of micro-batches: where p does not divide it, groups are larger than p, and by one at most unequal.
    """
    groups = groups_of(ranks, microbatches)
    order = []  # (chunk, micro-batch), the same on all ranks
    for group in groups:
        for chunk in range(chunks):
            order += [(chunk, i) for i in group]
    return [one_rank(rank, ranks, chunks, order, len(groups[0])) for rank in range(ranks)]


def groups_of(ranks: int, microbatches: int) -> list[range]:
    """The micro-batches of each group, the larger groups first."""
    count = max(1, microbatches // ranks)
    size, larger = divmod(microbatches, count)
    ends = [(g + 1) * size + min(g + 1, larger) for g in range(count)]
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def one_rank(rank: int, ranks: int, chunks: int, order: list[tuple[int, int]], group: int) -> list[Action]:
    forwards = [Action(chunk * ranks + rank, "F", i) for chunk, i in order]
    backwards = [Action((chunks - 1 - chunk) * ranks + rank, "B", i) for chunk, i in order]  # the last chunk first

    warm_up = min(2 * (ranks - rank - 1) + (chunks - 1) * group, len(order))
    actions = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):  # steady state: 1F1B
        actions += [forward, backward]
    return actions + backwards[len(order) - warm_up :]  # cool-down


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model cannot be split into v stages a rank, or another flag does not fit."""
    check_stages(args, ranks, args.chunks, (CHUNKS,))


def lesson(run: Run) -> None:
    p, m, v = run.job.world_size, run.args.microbatches, run.args.chunks
    measured = teach(run, schedule(p, m, v))
    if not measured:
        return
    group = len(groups_of(p, m)[0])
    warm_up = [min(2 * (p - r - 1) + (v - 1) * group, m * v) for r in range(p)]
    rule = f"2(p-r-1)+(v-1)p on rank r{'' if group == p else f', groups of {group} for p'}; at most mv, one in the pair"
    cases = []
    for r, w in enumerate(warm_up):
        cases.append((f"warm-up forwards on rank {r}", min(w, m * v - 1), forwards_before_backward(measured[r]) - 1))
    run.evidence.each("warm-up forwards, before the first F-B pair", rule, cases)
    claim_in_flight(run, measured, "a chunk more than the warm-up, at most mv", [min(w + 1, m * v) for w in warm_up])
    if m % p == 0:
        of_ideal, of_wall = f"(p-1)/(vm) = {p - 1}/{v * m}", f"(p-1)/(vm+p-1) = {p - 1}/{v * m + p - 1}"
        claim_bubble(run, measured, (p - 1) / (v * m), of_ideal, of_wall)
    if m % p == 0 and m > p:
        penalty, memory = 1 + (p - 1) / (p * v), measured[0].in_flight / v
        what = "rank 0's memory over 1F1B's p microbatches"
        run.evidence.claim(what, f"1+(p-1)/(pv) = {penalty:.4g}", penalty, memory / p, 1e-12)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "08",
        "Pipeline parallelism: interleaved 1F1B",
        "流水并行 1F1B/1F1B Interleaved 原理",
        "v small stages a rank: a bubble v times smaller, for a little more than v times the messages.",
        smallest=2,
    )
    add_flags(frame)
    frame.parser.add_argument("--chunks", type=int, default=2, help="stages a rank (default %(default)s)")
    frame.parser.set_defaults(layers=16)
    sys.exit(frame.main(check, lesson))
