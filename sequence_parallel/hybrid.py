"""Lecture 06: Ulysses inside, a ring across (Megatron-LM SP 代码解析). Fang and Zhao 2024 (2405.07719).

    torchrun --nproc_per_node=8 sequence_parallel/hybrid.py --ulysses 2

Ulysses sends least but needs a head for each rank; a ring has no such limit but more to send. So c = c1 c2 ranks: c1
neighbours, in a node with fast links, exchange heads for tokens, and then each has some heads of a c2-th of the
sequence; the ranks at the same place in all nodes are a ring for these heads. With c1 = 1 it is a ring, with c2 = 1
Ulysses: `context_parallel` is what a training run asks for any of them.

b samples, s tokens in a sample, h hidden, a heads, c ranks
"""

import argparse
import sys
from math import lcm

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.plot import bars
from sequence_parallel.context import check
from sequence_parallel.context_training import Layer, Shape, claim_difference, claim_saved, measure, spans, teach
from sequence_parallel.ring import GRADIENTS, KV, PLACEMENTS, RingAttention
from sequence_parallel.ulysses import Ulysses, Whole


def context_parallel(axis: Axis, device: torch.device, ulysses: int = 1, zigzag: bool = True) -> Ulysses:
    """Attention for `sequence_parallel.context.parallelize`.

    All ranks of the axis must call it at the same time.

    Args:
        axis: over whose ranks the sequence is cut.
        ulysses: how many neighbouring ranks share heads; the rest of the axis is a ring. 1: only a ring.
        zigzag: how the ring places tokens.

    Raises:
        ValueError: `ulysses` does not divide the ranks.
    """
    inner, outer = axis.split(ulysses)
    return Ulysses(inner, RingAttention(outer, device, zigzag) if outer.size > 1 else Whole())


def pieces_of(ranks: int, ulysses: int, zigzag: bool = True, heads: int = 0) -> int:
    """What a sequence must be a multiple of; to be known before there is any process group.

    Args:
        heads: where they are known, a refusal names only degrees that divide them.

    Raises:
        ValueError: `ulysses` does not divide the ranks.
    """
    if ulysses < 1 or ranks % ulysses:
        usable = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0 == heads % n)
        raise ValueError(
            f"--ulysses {ulysses}: the {ranks} ranks are a ring of groups of so many; use --ulysses one of {usable}"
        )
    ring = ranks // ulysses
    return lcm(ranks, 2 * ring) if zigzag and ring > 1 else ranks


# ---- The lesson ------------------------------------------------------------------------------------------------------


def degree(args: argparse.Namespace, ranks: int) -> int:
    """c1: `--ulysses`, or the largest that heads and ranks allow and that leaves a ring, where there is one."""
    fitting = [u for u in range(1, ranks // 2 + 1) if ranks % u == 0 and args.heads % u == 0]
    return args.ulysses or max(fitting, default=1)


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    c, c1 = axis.size, degree(run.args, axis.size)
    c2 = c // c1
    attention = context_parallel(axis, run.job.device, c1, run.args.placement == "zigzag")
    b, s, h, a = run.args.batch, run.args.sequence, config.hidden, config.heads
    show_ranks(run, attention)

    layer = Layer(run, config, teach(run, config, attention, axis))
    part, switch, kv, gradients = b * s * h / c, ("all-to-all",), (f"send {KV}",), (f"send {GRADIENTS}",)
    inside, across = 4 * part * (c1 - 1) / c1, 2 * part * (c2 - 1)
    layer.claim("all-to-alls of a layer, forward", "4 where c1 > 1", 4 * (c1 > 1), switch, messages=True)
    layer.claim("messages of a layer, forward", f"c2-1 = {c2 - 1}", c2 - 1, kv, messages=True)
    formula = f"4bsh/c (c1-1)/c1 = {inside:,.0f}"
    sent = [layer.claim("elements sent inside, forward", formula, inside, switch)]
    sent.append(layer.claim("elements sent inside, backward", formula, inside, switch, backward=True))
    formula = f"2bsh/c (c2-1) = {across:,.0f}, a ring of all sends {2 * part * (c - 1):,.0f}"
    sent.append(layer.claim("elements sent across, forward", formula, across, kv))
    twice = f"twice as many = {2 * across:,.0f}"
    sent.append(layer.claim("elements sent across, backward", twice, 2 * across, kv + gradients, backward=True))
    if run.args.plot and run.job.rank == 0:
        columns = {name: [each[0] for each in sent[i::2]] for i, name in enumerate(("forward", "backward"))}
        bars(run.args.plot, f"Sent by each of {c1} x {c2} ranks for a layer", "elements", ("inside", "across"), columns)

    shape = Shape(b, a, a, s, h // a)
    alone = run.job.gather(measure(run, attention, axis, shape, run.dtype))
    if alone and run.job.device.type == "cpu":  # other devices' kernels keep other things
        claim_saved(run, alone, shape, c)
    fewer = shape._replace(kv_heads=1)
    claim_difference(run, "one head of keys and values", attention, axis, fewer, torch.float64)
    claim_difference(run, "bfloat16", attention, axis, shape, torch.bfloat16)
    attention.close()


def show_ranks(run: Run, attention: Ulysses) -> None:
    """Who is with whom, and has which tokens."""
    inner, ring = attention.axis, attention.inner
    with_whom = ring.axis.ranks if isinstance(ring, RingAttention) else (run.job.rank,)
    everyone = run.job.gather((inner.ranks, with_whom, spans(attention.positions(run.args.sequence))))
    rows = [
        (rank, " ".join(map(str, ulysses)), " ".join(map(str, ring)), tokens)
        for rank, (ulysses, ring, tokens) in enumerate(everyone)
    ]
    run.say(tabulate(rows, ("rank", "heads exchanged with", "in a ring with", "tokens"), disable_numparse=True) + "\n")


def refuse(args: argparse.Namespace, ranks: int) -> None:
    ulysses = degree(args, ranks)
    check(args, ulysses, pieces_of(ranks, ulysses, args.placement == "zigzag", max(args.heads, 0)))
    check_model(args)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: Ulysses inside, a ring across",
        "Megatron-LM SP 代码解析",
        "c1 ranks exchange heads for tokens, and c2 such groups are a ring: degrees that neither reaches alone.",
    )
    add_model_flags(frame, heads=8, layers=4)
    frame.parser.set_defaults(steps=10)
    flag = frame.parser.add_argument
    flag("--ulysses", type=int, default=0, help="c1 (default: the largest that heads allow and that leaves a ring)")
    flag("--placement", choices=PLACEMENTS, default=PLACEMENTS[0], help="of tokens on the ring (default %(default)s)")
    sys.exit(frame.main(refuse, lesson))
