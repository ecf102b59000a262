"""Lecture 06: ring attention (Megatron-LM SP 代码解析). Liu et al. 2023 (2310.01889).

    torchrun --nproc_per_node=8 sequence_parallel/ring_attention.py

The ring itself is `ring.py`, the blocks that it joins `blocks.py`. This lesson trains with it, shows who computes what
in which step, with neighbouring tokens on a rank and in zigzag (as zhuzilin's ring-flash-attention places them), and
proves what is sent, what is kept, and what is computed meanwhile.

b samples, s tokens in a sample, h hidden, a heads, c ranks
"""

import argparse
import sys

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Mesh
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.clock import Event
from core.proof.lesson import Lesson, Run
from core.proof.plot import bars
from sequence_parallel.context import check
from sequence_parallel.context_training import (
    Layer,
    Measured,
    Shape,
    claim_dense,
    claim_difference,
    claim_saved,
    count,
    measure,
    spans,
    teach,
)
from sequence_parallel.ring import BACKWARD, GRADIENTS, KV, PLACEMENTS, RingAttention


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    rings = {name: RingAttention(axis, run.job.device, zigzag=name == "zigzag") for name in PLACEMENTS}
    ring = rings[run.args.placement]
    b, s, h, a, c = run.args.batch, run.args.sequence, config.hidden, config.heads, axis.size
    shape = Shape(b, a, a, s, h // a)
    found = {name: run.job.gather(measure(run, each, axis, shape, run.dtype)) for name, each in rings.items()}
    for name, each in rings.items():
        show_work(run, name, run.job.gather(spans(each.positions(s))), found[name])

    layer = Layer(run, config, teach(run, config, ring, axis))
    once, kv, gradients = 2 * b * s // c * h * (c - 1), (f"send {KV}",), (f"send {GRADIENTS}",)
    formula = f"2b(s/c)h(c-1) = {once:,}"
    layer.claim("messages of a layer, forward", f"c-1 = {c - 1}, K with V", c - 1, kv, messages=True)
    layer.claim("messages, backward", f"2(c-1) = {2 * (c - 1)}", 2 * (c - 1), kv + gradients, True, messages=True)
    layer.claim("elements of a layer, forward", formula, once, kv)
    layer.claim("elements of K and V, backward", formula, once, kv, backward=True)
    layer.claim("elements of their gradients, backward", formula, once, gradients, backward=True)
    if run.job.rank == 0:
        for name, everyone in found.items():
            claim_dense(run, name, everyone, run.dtype)
        claim_memory(run, found[run.args.placement], shape, c)
        claim_work(run, found, c)
        claim_overlap(run, found["zigzag"], c)
    fewer = shape._replace(kv_heads=1)
    one = claim_difference(run, "one head of keys and values", ring, axis, fewer, torch.float64)
    if one:
        sent = [count(each.forward, kv) for each in one]
        run.evidence.on_ranks("elements sent then, forward", f"1/a of it = {once // a:,}", once // a, sent)
    claim_difference(run, "bfloat16", ring, axis, shape, torch.bfloat16)
    for each in rings.values():
        each.close()


def claim_memory(run: Run, everyone: list[Measured], shape: Shape, c: int) -> None:
    claim_saved(run, everyone, shape, c)
    b, a, _, s, d = shape
    expected = 2 * b * s // c * a * d
    if run.job.device.type != "cpu":  # a block of scores too: see `blocks.attend`
        expected = max(expected, b * a * (s // c) ** 2)
    formula = f"K and V of a block = {expected:,}; all scores would be bas^2 = {b * a * s * s:,}"
    run.evidence.on_ranks("elements of the largest tensor", formula, expected, [each.largest for each in everyone])


# ---- Who computes what, and when -------------------------------------------------------------------------------------


def work(measured: Measured, c: int) -> list[float]:
    """What was computed in each step of the forward."""
    blocks = [event for event in measured.ahead if event.label.startswith("block")]
    costs = {int(event.label.split()[1]): event.end[0] - event.start[0] for event in blocks}
    return [costs.get(step, 0.0) for step in range(c)]


def show_work(run: Run, name: str, tokens: list[str], everyone: list[Measured]) -> None:
    c = len(everyone)
    ranks = [work(each, c) for each in everyone]
    rows = [(r, tokens[r], *steps, sum(steps)) for r, steps in enumerate(ranks)]
    head = ("rank", "tokens", *(f"step {step}" for step in range(c)), "all")
    run.say(f"{name}: what is computed in forward, in blocks of (s/c, s/c) scores; the mask halves the first")
    run.say(tabulate(rows, head, floatfmt="g", colalign=("right", "left")) + "\n")


def claim_work(run: Run, found: dict[str, list[Measured]], c: int) -> None:
    """The work of each rank in each step, as recorded, and how long all of it takes where messages take no time."""
    units = {name: [work(each, c) for each in everyone] for name, everyone in found.items()}
    ends = {name: max(event.end[0] for each in everyone for event in each.ahead + each.back)
            for name, everyone in found.items()}  # fmt: skip
    each, claim = run.evidence.each, run.evidence.claim
    cases = [(f"contiguous: blocks, rank {r}", r + 0.5, sum(steps)) for r, steps in enumerate(units["contiguous"])]
    each("contiguous: blocks of work of a rank", "r + 1/2 on rank r", cases)
    steps = [blocks for steps in units["zigzag"] for blocks in steps]
    claim("zigzag: blocks of work, least of any rank and step", "1/2", 0.5, min(steps))
    claim("zigzag: blocks of work, most of any rank and step", "1/2", 0.5, max(steps))
    for name, formula, blocks in (("contiguous", "c - 1/2", c - 0.5), ("zigzag", "c/2", c / 2)):
        expected = (1 + BACKWARD) * blocks
        formula = f"(1 + {BACKWARD})({formula}) = {expected:g}"
        claim(f"{name}: virtual time, messages free", formula, expected, ends[name], 1e-9)
    claim("contiguous / zigzag", f"2 - 1/c = {2 - 1 / c:g}", 2 - 1 / c, ends["contiguous"] / ends["zigzag"], 1e-9)
    if run.args.plot:
        columns = {name: [sum(steps) for steps in ranks] for name, ranks in units.items()}
        bars(run.args.plot, "Forward work", "blocks of (s/c, s/c)", [f"rank {r}" for r in range(c)], columns)


def overlapped(events: list[Event]) -> int:
    """Messages whose sending and receiving began before a block was computed, and were waited for after it."""
    computed: dict[str, int] = {}
    count = 0
    for event in events:
        if event.label.startswith("send"):
            computed[event.label.removeprefix("send ")] = 0
        elif event.label.startswith("block"):
            computed = {message: n + 1 for message, n in computed.items()}
        else:
            count += computed.pop(event.label.removeprefix("wait for ")) > 0
    return count


def claim_overlap(run: Run, everyone: list[Measured], c: int) -> None:
    """In the order in which it was done. The last gradients have nothing left to be computed meanwhile."""
    ahead = [overlapped(each.ahead) for each in everyone]
    back = [overlapped(each.back) for each in everyone]
    on_ranks = run.evidence.on_ranks
    on_ranks("messages in flight while a block is computed", f"all c-1 = {c - 1}, forward", c - 1, ahead)
    last = max(2 * (c - 1) - 1, 0)
    on_ranks("and backward", f"all but the last, 2(c-1) - 1 = {last}", last, back)


def refuse(args: argparse.Namespace, ranks: int) -> None:
    # Both placements are shown, so a sample must be fit for zigzag.
    check(args, 1, 2 * ranks if ranks > 1 else 1)
    check_model(args)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: ring attention",
        "Megatron-LM SP 代码解析",
        "Attention of a sequence that is cut: keys and values travel round the ranks while blocks are computed.",
    )
    add_model_flags(frame, heads=8, layers=4)
    frame.parser.set_defaults(steps=10)
    flag = frame.parser.add_argument
    flag("--placement", choices=PLACEMENTS, default=PLACEMENTS[0], help="of tokens in training (default %(default)s)")
    sys.exit(frame.main(refuse, lesson))
