"""Lecture 06: long sequences, when to use which (Megatron-LM SP 代码解析). Jacobs 2309.14509; Fang and Zhao 2405.07719.

    torchrun --nproc_per_node=8 sequence_parallel/long_context.py

One layer over c ranks in every way of this folder, for several c and s: messages and elements that a rank sends,
activations that it keeps, weights that it has. The formulas stand here, and are measured to hold; each way trains as
one process does. Then cases too large for a laptop, calculated by the same formulas.

read: long_context.py:28-131; then megatron_sp.py, ulysses.py, ring_attention.py, all_gather.py, hybrid.py

b samples, s tokens in a sample, h hidden, a heads of size d, k heads of keys and values (where c1 is no divisor of it
lcm(k, c1), with copies), c = c1 c2 ranks
"""

import sys
from math import lcm

from core.ledger import Ledger
from core.mesh import Mesh
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel.engine.ulysses import context_parallel
from sequence_parallel.evidence import long_context, rules
from sequence_parallel.evidence.long_context import Sizes, Way
from sequence_parallel.evidence.training import compare, context_version


def megatron_elements(z: Sizes) -> float:
    """4 times g or its backward, 4 times g-bar, and the input gathered again for 2 weights' gradients."""
    return 10 * z.b * z.s * z.h * (z.c - 1) / z.c


def ulysses_elements(z: Sizes) -> float:
    """An all-to-all each of Q, K, V and the output among c1 ranks, and one of each gradient."""
    of_a_head = z.b * z.s * z.d / z.c  # on a rank
    heads_of_k = lcm(z.k, z.c1)  # where there are fewer than ranks, several need the same
    return 2 * of_a_head * (2 * z.a + 2 * heads_of_k) * (z.c1 - 1) / z.c1


def ring_elements(z: Sizes) -> float:
    """K and V pass c2 - 1 times forward and backward, their gradients as often; with all-gather, as much at once."""
    of_a_head = z.b * z.s * z.d / z.c
    return 3 * 2 * of_a_head * lcm(z.k, z.c1) * (z.c2 - 1)


def every_rank_a_head(c: int, a: int) -> int | None:
    return c if a % c == 0 else None


def most_inside(c: int, a: int) -> int | None:
    """c1 of the hybrid: the most that leaves a ring."""
    return max((u for u in range(2, c) if c % u == 0 and a % u == 0), default=None)


WAYS = {
    "Megatron SP": Way(
        degree=every_rank_a_head,
        limit="c divides a",
        held="2bskd/c",
        messages=lambda z: 10,
        counted="10 collectives",
        elements=megatron_elements,
        formula="10bsh(c-1)/c",
    ),
    "Ulysses": Way(
        degree=every_rank_a_head,
        limit="c divides a",
        held="2bskd/c",
        messages=lambda z: 8,
        counted="8 all-to-alls",
        elements=ulysses_elements,
        formula="4bs(a+k)d/c (c-1)/c",
        keeps_output_twice=True,
    ),
    "ring": Way(
        degree=lambda c, a: 1,
        limit="2c divides s",
        held="4bskd/c",
        messages=lambda z: 3 * (z.c - 1),
        counted="3(c-1)",
        elements=ring_elements,
        formula="6bskd/c (c-1)",
    ),
    "all-gather": Way(
        degree=lambda c, a: 1,
        limit="2c divides s",
        held="2bskd",
        messages=lambda z: 3,
        counted="3 collectives",
        elements=ring_elements,
        formula="6bskd/c (c-1)",
        kind="all-gather",
    ),
    "hybrid": Way(
        degree=most_inside,
        limit="c1 divides a; c and 2c2 divide s",
        held="4bskd/c",
        messages=lambda z: 8 + 3 * (z.c2 - 1),
        counted="8 + 3(c2-1)",
        elements=lambda z: ulysses_elements(z) + ring_elements(z),
        formula="4bs(a+k)d/c (c1-1)/c1 + 6bskd/c (c2-1)",
        keeps_output_twice=True,
    ),
}


NODE, INSIDE, ACROSS, PEAK = 8, 450e9, 50e9, 989e12  # H100: NVLink 4 and NDR, bytes/s in one direction; bf16 FLOP/s


def waiting(name: str, z: Sizes) -> float:
    """Seconds that a layer's forward waits for messages, in bf16 at the peak of device and links, in no other way."""
    link = INSIDE if z.c <= NODE else ACROSS
    if name == "Megatron SP":
        return 4 * z.b * z.s * z.h * (z.c - 1) / z.c * 2 / link  # the forward's, 2 bytes each
    switched = ulysses_elements(z) / 2 * 2 / (INSIDE if z.c1 <= NODE else ACROSS)  # half of it forward, 2 bytes each
    if z.c2 == 1:
        return switched
    step = ring_elements(z) / 3 / (z.c2 - 1) * 2 / link
    if name == "all-gather":  # hidden by what a rank's two runs have to do with themselves
        return max(0.0, (z.c2 - 1) * step - z.b * z.a * z.d * (z.s / z.c) ** 2 / PEAK)
    computing = 2 * z.b * z.a * z.d / z.c1 * (z.s / z.c2) ** 2 / PEAK  # zigzag: half of a block's 4bnnad
    return switched + (z.c2 - 1) * max(0.0, step - computing)


ADVICE = """
Megatron SP shards the weights too: take it inside a node where they do not fit. Ulysses sends least, for up to as many
ranks as there are heads; where few heads of keys and values meet few ranks, a ring sends less. A ring has no limit of
heads, and hides what it sends once each rank has enough tokens. The hybrid keeps Ulysses' messages inside a node, and
makes fewer and larger blocks of its ring. All-gather sends what a ring sends, in 3 messages and with any mask, but
waits for it, and holds a layer's keys and values of all tokens meanwhile: little where there are few heads of them.
""".strip()


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config, device, n = configuration(run.args), run.job.device, run.job.world_size
    axes = {c: Mesh(device.type, Ledger(), run.job.timeout, cp=c, dp=n // c)["cp"] for c in long_context.divisors(n)}
    long_context.measure_ways(run, config, axes, WAYS)
    axis = axes[n]
    degrees = {name: WAYS[name].degree(n, config.heads) for name in ("Ulysses", "ring", "all-gather", "hybrid")}
    attentions = {name: context_parallel(axis, device, c1, kind=WAYS[name].kind) for name, c1 in degrees.items() if c1}
    versions = {name: context_version(run, config, attention, axis) for name, attention in attentions.items()}
    compare(run, config, axis, versions)
    for attention in attentions.values():
        attention.close()
    run.say(f"\n{long_context.calculated(WAYS, waiting, ring_elements, NODE)}\n\n{ADVICE}")


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: when to use which",
        "Megatron-LM SP 代码解析",
        "Megatron SP, Ulysses, a ring, all-gather and both side by side: messages, bytes, memory and limits, measured.",
        smallest=2,
    )
    add_model_flags(frame, layers=2, batch=3)
    frame.parser.set_defaults(steps=3)
    sys.exit(frame.main(rules.long_context, lesson))
