"""Lecture 08, further: zero-bubble pipelines (流水并行 1F1B/1F1B Interleaved 原理). Qi et al. 2023 (2401.10241).

    torchrun --nproc_per_node=8 pipeline/zero_bubble.py --schedule zb-v

A backward computes two things: the gradient of the stage's input (I, dgrad), for which the rank before waits, and those
of the weights (W, wgrad), for which nobody does. Split in two, layer by layer, the W fill the bubbles. The letters: the
paper's B, the input gradient only, is our I; its W is our W; our B, as in lecture 08 and DualPipe, is both.

    zb-h1   1F1B's peak, that of rank 0, on every rank: bubble (p-1)(F+I-W)
    zb-h2   2p-1 micro-batches in flight, nearly twice the memory: (p-1)(F+I-2W), none if all three cost the same
    zb-v    two stages a rank, down the ranks and up again, so that the last stage is on the first rank: none at equal
            costs either, with 1F1B's memory

What is a bubble? Idle time between a rank's first and last action. Ranks of zb-h2 and zb-v start one after another and
end one after another, so the next step fits in without a gap, if nothing makes ranks wait for each other between steps.
The global gradient norm does. The paper's optimizer updates first and takes the step back in the rare case that it was
to be clipped; ours, as one process would, waits for the norm, and then the first rank's early end is lost. Both
numbers are shown: within the step, and with that wait.

read: zero_bubble.py:41-110; runtime.py:66-134; then core/model/linear.py

p ranks, m micro-batches, F, I and W the times of a forward and the two halves of a backward
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.proof.lesson import Lesson, Run
from pipeline.engine.actions import Action, Row, Schedule
from pipeline.evidence.claims import claim_in_flight, claim_own_bubble
from pipeline.evidence.training import add_flags, teach
from pipeline.evidence.training import check as check_stages


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """As many forwards before the first I as 1F1B. On rank r the W wait r micro-batches: every rank has p in flight."""
    return [one_rank(r, ranks - r, r, microbatches) for r in range(ranks)]


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """A warm-up long enough that the first backward finds every rank still busy."""
    return [one_rank(r, 2 * (ranks - r) - 1, 2 * r, microbatches) for r in range(ranks)]


def one_rank(rank: int, warm_up: int, delay: int, microbatches: int) -> list[Action]:
    """The order of one rank's F, I and W, with warm_up + delay micro-batches in flight."""
    actions = []

    # Warm-up: forwards only.
    for i in range(min(warm_up, microbatches)):
        actions.append(Action(rank, "F", i))

    # Steady state: I as soon as its gradient is there, then the W of a micro-batch before, then the next F.
    for i in range(microbatches):
        actions.append(Action(rank, "I", i))
        if i >= delay:
            actions.append(Action(rank, "W", i - delay))
        if i + warm_up < microbatches:
            actions.append(Action(rank, "F", i + warm_up))

    # What is left: nobody waits for it.
    for i in range(max(0, microbatches - delay), microbatches):
        actions.append(Action(rank, "W", i))
    return actions


class SplitLinear(torch.autograd.Function):
    """y = x W^T + b, x (B, S, in), W (out, in), whose backward is I alone and leaves W on the list `wgrads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, wgrads: list[Callable], weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.wgrads = layer, wgrads
        return x @ weight.T if bias is None else x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.wgrads.append(partial(add_wgrad, ctx.layer, *ctx.saved_tensors, dy))
        return dy @ ctx.layer.weight, None, None, None, None  # I: dx = dy W


@torch.no_grad()
def add_wgrad(layer: nn.Linear, x: Tensor, dy: Tensor) -> None:
    """W: dW = dy^T x and db = sum dy, over all tokens."""
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    add(layer.weight, dy.T @ x)
    if layer.bias is not None:
        add(layer.bias, dy.sum(0))


def add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.grad_dtype)
    else:
        parameter.grad += gradient


def defer_wgrads(model: nn.Module) -> list[Callable]:
    """Make every linear layer leave its W on the list that is returned, which `runtime.py` empties at the W's turn."""
    wgrads: list[Callable] = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = lambda x, layer=layer: SplitLinear.apply(x, layer, wgrads, layer.weight, layer.bias)
    return wgrads


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """Rank r has stage r and stage 2p-1-r; the order is that of at least 2p-1 micro-batches, less those too many."""
    rows = [one_rank_v(r, ranks, max(microbatches, 2 * ranks - 1)) for r in range(ranks)]
    return [[action for action in row if action.microbatch < microbatches] for row in rows]


def one_rank_v(rank: int, ranks: int, microbatches: int) -> Row:
    row = Row((rank, 0), (2 * ranks - 1 - rank, 0))
    down, up = 0, 1  # the two stages

    # Warm-up: forwards on the way down, until the first comes up again; then both in turn; then F I W on the way up.
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
    while row.next_forward(up) < microbatches:
        if row.next_forward(down) < microbatches:
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


SCHEDULES = {"zb-h1": zb_h1, "zb-h2": zb_h2, "zb-v": zb_v}


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model cannot be split into the schedule's stages, or another flag does not fit."""
    check_stages(args, ranks, per_rank=2 if args.schedule == "zb-v" else 1)


def lesson(run: Run) -> None:
    name, p, m = run.args.schedule, run.job.world_size, run.args.microbatches
    run.say("I, the input gradient (dgrad), is B in the paper (2401.10241); W is W; our B is both, I and W.\n")
    measured = teach(run, SCHEDULES[name](p, m), defer_wgrads)
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
    frame.parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="zb-v", help="default %(default)s")
    frame.parser.set_defaults(layers=16)
    sys.exit(frame.main(check, lesson))
