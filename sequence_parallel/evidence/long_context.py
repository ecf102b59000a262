"""What `long_context.py` measures: one layer in every way, against the formulas; and the table of large cases.

b samples, s tokens in a sample, h hidden, a heads of size d, k heads of keys and values, c = c1 c2 ranks
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import NamedTuple

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize
from core.proof.figures import bars, scatter
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from sequence_parallel.context import parallelize
from sequence_parallel.engine.layers import parallelize_block
from sequence_parallel.engine.ulysses import context_parallel

TIMES = (1, 4)  # the sequences measured, in units of --sequence
LARGE = {"h": 8192, "a": 64, "k": 8, "d": 128}  # a model of 70 billion parameters


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and of the ranks that share it."""

    b: int
    s: int
    h: int
    a: int
    k: int
    d: int
    c: int
    c1: int  # heads are sharded over so many

    @property
    def c2(self) -> int:
        return self.c // self.c1


@dataclass(frozen=True)
class Way:
    """A way to parallelize a layer, and what it sends in forward and backward."""

    degree: Callable[[int, int], int | None]  # c1 for c ranks and a heads; None where it cannot be
    limit: str
    held: str  # of keys and values while attention is computed, what is arriving included
    messages: Callable[[Sizes], int]
    counted: str  # the same in words
    elements: Callable[[Sizes], float]
    formula: str
    kind: str = "ring"  # of `context_parallel`, where c2 > 1
    keeps_output_twice: bool = False  # attention's output before the all-to-all, too: bsh/c


class Measured(NamedTuple):
    """Of one layer on one rank, forward and backward."""

    messages: int
    elements: float
    sent: float  # bytes
    kept: int  # bytes for backward
    parameters: int


Found = dict[str, list[tuple[Sizes, list[Measured]]]]  # by way; of every rank, on rank 0


def divisors(ranks: int) -> list[int]:
    return [c for c in range(2, ranks + 1) if ranks % c == 0]


def measure_ways(run: Run, config: GPTConfig, axes: Mapping[int, Axis], ways: Mapping[str, Way]) -> None:
    """Every way over every number of ranks, for sequences of several lengths: a table, and the claims."""
    a, k, d = config.heads, config.query_groups, config.head_dim
    sizes = partial(Sizes, b=run.args.batch, h=config.hidden, a=a, k=k, d=d)
    found: Found = {name: [] for name in ways}
    dense: dict[int, Measured] = {}
    for s in (times * run.args.sequence for times in TIMES):
        dense[s] = measure(run, config, axes[run.job.world_size], "one process", sizes(s=s, c=1, c1=1))
        for c, axis in axes.items():
            for name, way in ways.items():
                if (c1 := way.degree(c, config.heads)) is not None:
                    z = sizes(s=s, c=c, c1=c1)
                    found[name].append((z, run.job.gather(measure(run, config, axis, name, z, way.kind))))
    if run.job.rank == 0:
        show(run, found, dense, ways)
        for name, way in ways.items():
            claim_formulas(run, name, way, found[name], dense, not config.learned_positions)


def measure(run: Run, config: GPTConfig, axis: Axis, way: str, z: Sizes, kind: str = "ring") -> Measured:
    """The first layer of the model, parallelized in one of the ways, or in "one process"."""
    model = GPT(replace(config, layers=1, sequence=z.s))
    attention = None
    if way == "Megatron SP":
        parallelize_block(model.blocks["0"], axis)
    elif way != "one process":
        attention = context_parallel(axis, run.job.device, z.c1, kind=kind)
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


def show(run: Run, found: Found, dense: Mapping[int, Measured], ways: Mapping[str, Way]) -> None:
    rows = []
    for s, one in dense.items():
        rows.append((s, 1, "one process", "", 0, 0, one.kept / 1e3, one.parameters))
        at = sorted((z.c, name, z, ranks[0]) for name, cases in found.items() for z, ranks in cases if z.s == s)
        for c, name, z, m in at:
            split = f"{z.c1} x {z.c2}" if name == "hybrid" else ""
            rows.append((s, c, name, split, m.messages, m.sent / 1e3, m.kept / 1e3, m.parameters))
    head = ("s", "c", "way", "c1 x c2", "messages", "kB sent", "kB kept", "parameters")
    limits = [(name, way.counted, way.formula, way.held, way.limit) for name, way in ways.items()]
    run.say(tabulate(limits, ("way", "messages", "elements", "K and V held", "limit")))
    run.say("\nmeasured: one layer on one rank, forward and backward")
    run.say(tabulate(rows, head, floatfmt=",.1f", intfmt=","))
    for name, cases in found.items():
        if missing := sorted(set(divisors(run.job.world_size)) - {z.c for z, _ in cases}):
            c = " and ".join(map(str, missing))
            run.say(f"no {name} of {c} ranks: {ways[name].limit}, and there are {run.args.heads} heads")
    s, c = max(dense), run.job.world_size
    largest = {name: ranks[0] for name, cases in found.items() for z, ranks in cases if (z.s, z.c) == (s, c)}
    columns = {"forward and backward": [m.sent / 1e3 for m in largest.values()]}
    title = f"Sent by each of {c} ranks for a layer, {s} tokens", f"{c} 个 rank 中每个为一层发送的量，{s} 个 token"
    run.draw(bars(title, "kB", list(largest), columns), chart=True)
    points = [(f"{name}, {m.messages} messages", m.sent / 1e3, m.kept / 1e3, name) for name, m in largest.items()]
    title = f"Sent, against kept for backward, {s} tokens on {c} ranks", f"发送量与保存量，{c} 个 rank，{s} 个 token"
    run.draw(scatter(title, ("kB sent", "发送 kB"), ("kB kept", "保存 kB"), points))


def claim_formulas(
    run: Run,
    name: str,
    way: Way,
    cases: list[tuple[Sizes, list[Measured]]],
    dense: Mapping[int, Measured],
    rotary: bool,
) -> None:
    """Every case of one way, by its worst rank."""

    def claim(
        what: str,
        formula: str,
        expected: Callable[[Sizes], float],
        value: Callable[[Measured], float],
        tolerance: float = 0.0,
    ) -> None:
        rows = []
        for z, ranks in cases:
            right = expected(z)
            worst = max(map(value, ranks), key=lambda v: abs(v - right))
            rows.append((f"{name}: {what}, s {z.s}, c {z.c}", right, worst))
        if rows:
            run.evidence.each(f"{name}: {what}", formula, rows, tolerance)

    claim("messages of a layer", f"{way.counted}; counted", way.messages, lambda m: m.messages)
    claim("elements sent", f"{way.formula}; counted", way.elements, lambda m: m.elements, 1e-3)
    if run.job.device.type == "cpu":  # other devices' kernels keep other things
        more = [" and bsad/c: the output before the all-to-all, too"] * way.keeps_output_twice
        more += [", and all tokens' rotary angles"] * (name == "Megatron SP" and rotary)

        def kept(z: Sizes) -> float:
            again = z.a * way.keeps_output_twice + 2 * (lcm(z.k, z.c1) - z.k)  # heads, with copies of K's and V's
            angles = z.s * z.d * 4 * (1 - 1 / z.c) if more[way.keeps_output_twice :] else 0  # in float32
            return (dense[z.s].kept + again * z.b * z.s * z.d * run.dtype.itemsize) / z.c + angles

        claim("bytes kept for backward", f"1/c of one process{''.join(more)}", kept, lambda m: m.kept)


def calculated(
    ways: Mapping[str, Way],
    waiting: Callable[[str, Sizes], float],
    ring_elements: Callable[[Sizes], float],
    node: int,
) -> str:
    """A table of cases for clusters."""
    rows = []
    for s in (2**15, 2**17, 2**20):
        for c in (8, 64, 256):
            cells, waits = dict.fromkeys(ways, "-"), {}
            for name, way in ways.items():
                c1 = way.degree(c, LARGE["a"])
                if name == "hybrid":
                    c1 = node if c > node else None
                if c1 is not None:
                    z = Sizes(1, s, **LARGE, c=c, c1=c1)
                    waits[name] = waiting(name, z)
                    sent = 2 * way.elements(z) + 2 / 3 * ring_elements(z)  # a ring's sums of gradients take 4 bytes
                    cells[name] = f"{sent / 1e6:,.0f} / {1e3 * waits[name]:.2f}"
            rows.append((f"{s:,}", c, *cells.values(), min(waits, key=waits.get)))
    sizes = f"h {LARGE['h']}, {LARGE['a']} heads, {LARGE['k']} of keys and values, bf16, one sample"
    return (
        f"calculated, not measured: a layer of {sizes}, on H100s in nodes of {node};\n"
        "MB that a rank sends / ms that its forward waits for messages that no computing hides\n"
        + tabulate(rows, ("s", "c", *ways, "waits least"), disable_numparse=True)
    )
