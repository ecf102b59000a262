"""Lecture 06: long sequences, when to use which (Megatron-LM SP 代码解析). Jacobs 2309.14509; Fang and Zhao 2405.07719.

    torchrun --nproc_per_node=8 sequence_parallel/long_context.py

One layer cut over c ranks in every way that this folder has, for several c and s: messages and bytes that a rank sends,
activations that it keeps, weights that it holds, all measured; and each way trains as one process does. Then cases too
large for a laptop, by the formulas that were measured to hold.

b samples, s tokens in a sample, h hidden, a heads, k heads of keys and values, c = c1 c2 ranks
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations
from core.proof.oracle import TOLERANCE
from core.proof.plot import bars
from core.proof.training import Comparison
from sequence_parallel.context import check, parallelize
from sequence_parallel.context_training import train_with
from sequence_parallel.hybrid import context_parallel
from sequence_parallel.layers import parallelize_block
from sequence_parallel.ways import ADVICE, WAYS, Sizes, calculated

TIMES = (1, 4)  # the sequences measured, in units of --sequence


# ---- Measured --------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Of one layer on one rank, forward and backward."""

    messages: int
    elements: float
    sent: float  # bytes
    kept: int  # bytes for backward
    parameters: int


def measure(run: Run, config: GPTConfig, axis: Axis, way: str, z: Sizes) -> Measured:
    """The first layer of the model, cut in one of WAYS, or in "one process"."""
    model = GPT(replace(config, layers=1))
    attention = None
    if way == "Megatron SP":
        parallelize_block(model.blocks["0"], axis)
    elif way != "one process":
        attention = context_parallel(axis, run.job.device, z.c1)
        parallelize(model, attention)
    block = materialize(model, run.args.seed, run.job.device, run.dtype).blocks["0"]
    x = torch.ones(z.b, z.s // z.c, z.h, dtype=run.dtype, device=run.job.device, requires_grad=True)
    sent, saved = Ledger(), SavedActivations(block.parameters())
    with axis.ledger.recording_to(sent):
        with saved:
            y = block(x)
        kept = saved.live
        y.sum().backward()
    if attention:
        attention.close()
    totals = (sum(getattr(t, what) for t in sent.traffic.values()) for what in ("messages", "elements", "bytes"))
    return Measured(*totals, kept, sum(p.numel() for p in block.parameters()))


Found = dict[str, list[tuple[Sizes, list[Measured]]]]  # by way; of every rank, on rank 0


def lesson(run: Run) -> None:
    config, args, n = configuration(run.args), run.args, run.job.world_size
    axes = {c: Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=c, dp=n // c)["cp"] for c in degrees(n)}
    sizes = partial(Sizes, b=args.batch, h=config.hidden, a=config.heads, k=config.heads)
    found: Found = {name: [] for name in WAYS}
    dense: dict[int, Measured] = {}
    for s in (times * args.sequence for times in TIMES):
        dense[s] = measure(run, config, axes[n], "one process", sizes(s=s, c=1, c1=1))
        for c, axis in axes.items():
            for name, way in WAYS.items():
                if (c1 := way.degree(c, config.heads)) is not None:
                    z = sizes(s=s, c=c, c1=c1)
                    found[name].append((z, run.job.gather(measure(run, config, axis, name, z))))
    if run.job.rank == 0:
        show(run, found, dense)
        claim_formulas(run, found, dense)
    claim_training(run, config, axes[n])
    run.say(f"\n{calculated()}\n\n{ADVICE}")


def degrees(ranks: int) -> list[int]:
    return [c for c in range(2, ranks + 1) if ranks % c == 0]


def show(run: Run, found: Found, dense: dict[int, Measured]) -> None:
    rows = []
    for s, one in dense.items():
        rows.append((s, 1, "one process", "", 0, 0, one.kept / 1e3, one.parameters))
        at = sorted((z.c, name, z, ranks[0]) for name, cases in found.items() for z, ranks in cases if z.s == s)
        for c, name, z, m in at:
            split = f"{z.c1} x {z.c2}" if name == "hybrid" else ""
            rows.append((s, c, name, split, m.messages, m.sent / 1e3, m.kept / 1e3, m.parameters))
    head = ("s", "c", "way", "c1 x c2", "messages", "kB sent", "kB kept", "parameters")
    limits = [(name, way.counted, way.formula, way.limit) for name, way in WAYS.items()]
    run.say(tabulate(limits, ("way", "messages", "elements", "limit")))
    run.say("\nmeasured: one layer on one rank, forward and backward")
    run.say(tabulate(rows, head, floatfmt=",.1f", intfmt=","))
    for name, cases in found.items():
        if missing := sorted(set(degrees(run.job.world_size)) - {z.c for z, _ in cases}):
            c = " and ".join(map(str, missing))
            run.say(f"no {name} of {c} ranks: {WAYS[name].limit}, and there are {run.args.heads} heads")
    if run.args.plot:
        s, c = max(dense), run.job.world_size
        sent = {name: [m[0].sent / 1e3 for z, m in cases if (z.s, z.c) == (s, c)]
                for name, cases in found.items()}  # fmt: skip
        names = [name for name, values in sent.items() if values]
        bars(run.args.plot, f"Sent by each of {c} ranks for a layer, {s} tokens", "kB", names,
             {"forward and backward": [sent[name][0] for name in names]})  # fmt: skip


def claim_formulas(run: Run, found: Found, dense: dict[int, Measured]) -> None:
    """Every case of every way, by its worst rank."""
    for name, cases in found.items():
        way = WAYS[name]

        def claim(
            what: str,
            formula: str,
            expected: Callable[[Sizes], float],
            value: Callable[[Measured], float],
            tolerance: float = 0.0,
            name: str = name,
            cases: list = cases,
        ) -> None:
            rows = []
            for z, ranks in cases:
                right = expected(z)
                worst = max(map(value, ranks), key=lambda v: abs(v - right))
                rows.append((f"{name}: {what}, s {z.s}, c {z.c}", right, worst))
            if rows:
                run.evidence.each(f"{name}: {what}", formula, rows, tolerance)

        claim("messages of a layer", way.counted, way.messages, lambda m: m.messages)
        claim("elements sent", way.formula, way.elements, lambda m: m.elements, 1e-3)
        if run.job.device.type == "cpu":  # other devices' kernels keep other things
            more = " and bsh/c: the output before the all-to-all, too" if way.again else ""

            def kept(z: Sizes, again: int = way.again) -> float:
                return (dense[z.s].kept + again * z.b * z.s * z.h * run.dtype.itemsize) / z.c

            claim("bytes kept for backward", f"1/c of one process{more}", kept, lambda m: m.kept)


def claim_training(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Each way over all ranks."""
    worst: dict[str, Comparison] = {}
    for name in ("Ulysses", "ring", "hybrid"):
        if (c1 := WAYS[name].degree(axis.size, config.heads)) is None:
            continue
        run.losses.clear()  # of the way before: the report has the last one's
        run.reference_losses.clear()
        run.training_seconds, run.tokens = 0.0, 0
        attention = context_parallel(axis, run.job.device, c1)
        worst[name] = train_with(run, config, attention, axis).worst
        attention.close()
    if run.job.rank == 0:
        tolerance, each = TOLERANCE[run.dtype], run.evidence.each
        for what in ("loss", "gradient", "parameter"):
            cases = [(f"{name}: {what}", 0, getattr(values, what)) for name, values in worst.items()]
            each(f"every {what} equals one process: {', '.join(worst)}", "largest relative difference 0", cases,
                 getattr(tolerance, what))  # fmt: skip


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, 1, 2 * ranks)  # the most that any way needs
    check_model(args)
    for c in degrees(ranks):
        if WAYS["Megatron SP"].degree(c, args.heads) and args.feed_forward % c:
            raise ValueError(
                f"--feed-forward {args.feed_forward}: Megatron SP cuts it over {c} ranks; use --feed-forward 0"
            )


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: when to use which",
        "Megatron-LM SP 代码解析",
        "Megatron SP, Ulysses, a ring and the hybrid side by side: messages, bytes, memory and limits, measured.",
        smallest=2,
    )
    add_model_flags(frame, heads=8, layers=2, batch=4)
    frame.parser.set_defaults(steps=5)
    sys.exit(frame.main(refuse, lesson))
