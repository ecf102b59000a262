"""Lecture 06: the ways to cut a layer for long sequences, by formula: what each sends, and when it would wait.

`long_context.py` measures that the formulas hold; where nobody can measure, they calculate.

b samples, s tokens in a sample, h hidden, a heads, k heads of keys and values, c = c1 c2 ranks
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from tabulate import tabulate


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and how it is cut."""

    b: int
    s: int
    h: int
    a: int
    k: int
    c: int
    c1: int  # heads are cut over so many

    @property
    def c2(self) -> int:
        return self.c // self.c1


def ulysses_sends(z: Sizes) -> float:
    heads = z.a + lcm(z.k, z.c1)  # of Q and the output; of K and V, of which several ranks may need the same
    return 4 * z.b * z.s * z.h / z.a * heads / z.c * (z.c1 - 1) / z.c1


def ring_sends(z: Sizes) -> float:
    return 6 * z.b * z.s * z.h / z.a * lcm(z.k, z.c1) / z.c * (z.c2 - 1)


def most_inside(c: int, a: int) -> int | None:
    """c1 of the hybrid: the most that leaves a ring."""
    return max((u for u in range(2, c) if c % u == 0 and a % u == 0), default=None)


class Way(NamedTuple):
    """A way to cut a layer, and what it sends in forward and backward."""

    degree: Callable[[int, int], int | None]  # c1 for c ranks and a heads; None where it cannot be
    limit: str
    messages: Callable[[Sizes], int]
    counted: str  # the same in words
    elements: Callable[[Sizes], float]
    formula: str
    again: int  # what a rank keeps, in bsh/c, beyond a c-th of what one process keeps


WAYS = {
    "Megatron SP": Way(lambda c, a: None if a % c else c, "c divides a", lambda z: 10, "10 collectives",
                       lambda z: 10 * z.b * z.s * z.h * (z.c - 1) / z.c, "10bsh(c-1)/c", 0),
    "Ulysses": Way(lambda c, a: None if a % c else c, "c divides a", lambda z: 8, "8 all-to-alls",
                   ulysses_sends, "8bsh/c (c-1)/c", 1),
    "ring": Way(lambda c, a: 1, "2c divides s", lambda z: 3 * (z.c - 1), "3(c-1)",
                ring_sends, "6bsh/c (c-1)", 0),
    "hybrid": Way(most_inside, "c1 divides a; c and 2c2 divide s", lambda z: 8 + 3 * (z.c2 - 1), "8 + 3(c2-1)",
                  lambda z: ulysses_sends(z) + ring_sends(z), "8bsh/c (c1-1)/c1 + 6bsh/c (c2-1)", 1),
}  # fmt: skip


# ---- Calculated ------------------------------------------------------------------------------------------------------

LARGE = {"h": 8192, "a": 64, "k": 8}  # a model of 70 billion parameters
NODE, INSIDE, ACROSS, PEAK = 8, 450e9, 50e9, 989e12  # H100: NVLink 4 and NDR, bytes/s in one direction; bf16 FLOP/s


def waiting(name: str, z: Sizes) -> float:
    """Seconds that a layer's forward waits for messages, in bf16 at the peak of device and links, in no other way."""
    switched = ulysses_sends(z) / 2 * 2 / (INSIDE if z.c1 <= NODE else ACROSS)  # half of it forward, 2 bytes each
    if name == "Megatron SP":
        return 4 * z.b * z.s * z.h * (z.c - 1) / z.c * 2 / (INSIDE if z.c <= NODE else ACROSS)
    if z.c2 == 1:
        return switched
    step = ring_sends(z) / 3 / (z.c2 - 1) * 2 / (INSIDE if z.c <= NODE else ACROSS)
    computing = 2 * z.b * z.h / z.c1 * (z.s / z.c2) ** 2 / PEAK  # zigzag: half of the block's 4bnnh
    return switched + (z.c2 - 1) * max(0.0, step - computing)


def calculated() -> str:
    """A table of cases for clusters."""
    rows = []
    for s in (2**15, 2**17, 2**20):
        for c in (8, 64, 256):
            cells, waits = dict.fromkeys(WAYS, "-"), {}
            for name, way in WAYS.items():
                c1 = way.degree(c, LARGE["a"])
                if name == "hybrid":
                    c1 = NODE if c > NODE else None
                if c1 is not None:
                    z = Sizes(1, s, **LARGE, c=c, c1=c1)
                    waits[name] = waiting(name, z)
                    sent = 2 * way.elements(z) + 2 / 3 * ring_sends(z)  # a ring's sums of gradients travel in 4 bytes
                    cells[name] = f"{sent / 1e6:,.0f} / {1e3 * waits[name]:.2f}"
            rows.append((f"{s:,}", c, *cells.values(), min(waits, key=waits.get)))
    sizes = f"h {LARGE['h']}, {LARGE['a']} heads, {LARGE['k']} of keys and values, bf16, one sample"
    return (
        f"calculated, not measured: a layer of {sizes}, on H100s in nodes of {NODE};\n"
        "MB that a rank sends / ms that its forward waits for messages that no computing hides\n"
        + tabulate(rows, ("s", "c", *WAYS, "waits least"), disable_numparse=True)
    )


ADVICE = """
Megatron SP cuts the weights too: take it inside a node where they do not fit. Ulysses sends least, for up to as many
ranks as there are heads; where few heads of keys and values meet few ranks, a ring sends less. A ring has no limit of
heads, and hides what it sends once each rank has enough tokens. The hybrid keeps Ulysses' messages inside a node, and
makes fewer and larger blocks of its ring.
""".strip()
