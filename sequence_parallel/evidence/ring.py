"""What `ring_attention.py` shows and claims: who computes what and when, what is sent and what is kept.

b samples, s tokens in a sample, a heads, k heads of keys and values, d head size, c ranks
"""

from collections.abc import Mapping

import torch
from tabulate import tabulate

from core.mesh import Axis
from core.model.gpt import GPTConfig
from core.proof.clock import Event
from core.proof.figures import bars, grid
from core.proof.lesson import Run
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.ring import BACKWARD, GRADIENTS, KV, OverlappedRing
from sequence_parallel.evidence.attention import (
    Measured,
    Shape,
    claim_dense,
    claim_difference,
    claim_saved,
    measure,
    shape_of,
    spans,
)
from sequence_parallel.evidence.training import LayerTraffic, Version, count

SEND_KV, SEND_GRADIENTS, SEND = f"send {KV}", f"send {GRADIENTS}", "send"  # the last is the plain ring's


def claim_traffic(run: Run, config: GPTConfig, c: int, versions: Mapping[str, Version]) -> None:
    traffic = LayerTraffic(run, config, versions)
    claim_summed_gradients(run, traffic, versions["engine"], c)
    once = shape_of(config, run.args).elements(0, 2) // c * (c - 1)
    formula = f"2b(s/c)kd(c-1) = {once:,}"
    everything, kv, back = (SEND, SEND_KV, SEND_GRADIENTS), (SEND, SEND_KV), ("backward", "elements")
    traffic.claim("messages of a layer, forward", f"c-1 = {c - 1}, K with V", c - 1, kv, what="messages")
    twice = f"2(c-1) = {2 * (c - 1)}"
    traffic.claim("messages, backward", twice, 2 * (c - 1), everything, "backward", "messages")
    traffic.claim("elements of a layer, forward", formula, once, kv)
    traffic.claim("elements of a layer, backward", f"twice as many = {2 * once:,}", 2 * once, everything, *back)
    traffic.claim("elements of K and V, backward", formula, {"engine": once}, kv, *back)
    traffic.claim("elements of their gradients, backward", formula, {"engine": once}, (SEND_GRADIENTS,), *back)


def claim_summed_gradients(run: Run, traffic: LayerTraffic, version: Version, c: int) -> None:
    """All parameters' gradients are summed over the ranks of cp."""
    size = sum(p.numel() for p in version.model.parameters())
    expected = 2 * (c - 1) / c * size
    formula = f"2Ψ(c-1)/c = {expected:,.0f}, Ψ = {size:,}"
    claim = "elements sent to sum all gradients, a step"
    traffic.claim(claim, formula, expected, ("all-reduce",), "both", label="gradients")


def claim_placements(
    run: Run, config: GPTConfig, plain: Mapping[str, SequenceAttention], engine: Mapping[str, OverlappedRing]
) -> None:
    """Attention by itself, with either placement of the tokens."""
    args, chosen, axis = run.args, engine[run.args.placement], engine["zigzag"].axis
    c, shape = axis.size, shape_of(config, args)
    found = {name: run.job.gather(measure(run, each, axis, shape, run.dtype)) for name, each in engine.items()}
    for name, each in engine.items():
        show_work(run, name, run.job.gather(spans(each.positions(args.sequence).tolist())), found[name])
    if run.job.rank == 0:
        for name, everyone in found.items():
            claim_dense(run, name, everyone, run.dtype)
        claim_saved(run, found[args.placement], shape, c)
        claim_work(run, found, c)
        claim_overlap(run, found["zigzag"], c)
    claim_scores(run, {"plain": plain[args.placement], "engine": chosen}, axis, shape)
    for name, each in plain.items():
        claim_difference(run, f"{name}, plain", each, axis, shape, run.dtype)
    single = shape._replace(kv_heads=1)
    one = claim_difference(run, "one head of keys and values", chosen, axis, single, torch.float64)
    if one:
        expected = single.elements(0, 2) // c * (c - 1)
        sent = [count(each.forward, (SEND_KV,)) for each in one]
        run.evidence.on_ranks("elements sent then, forward", f"1/k of it = {expected:,}; counted", expected, sent)
    claim_difference(run, "bfloat16", chosen, axis, shape, torch.bfloat16)


def claim_scores(run: Run, versions: Mapping[str, SequenceAttention], axis: Axis, shape: Shape) -> None:
    """What is held of the scores: with s/c = 4d tokens a rank a block of them is larger than its keys and values."""
    b, a, k, _, d = shape
    c, n, w = axis.size, 4 * d, torch.promote_types(run.dtype, torch.float32).itemsize
    block, kv = b * a * n * n * w, b * n * max(2 * k, a) * d * w
    fused = run.job.device.type == "cpu"  # see `engine/blocks.py`
    explicit = f"a block of scores, ba(s/c)^2 = {block:,}; all are ba s^2 = {block * c * c:,}"
    expected = {
        "plain": (block, explicit),
        "engine": (kv, f"K and V of a block, or one for all heads = {kv:,}") if fused else (block, explicit),
    }
    for name, attention in versions.items():
        everyone = run.job.gather(measure(run, attention, axis, shape._replace(sequence=n * c), run.dtype))
        if everyone:
            nbytes, formula = expected[name]
            claim = f"bytes of the largest tensor, s = 4dc, {name}"
            run.evidence.on_ranks(claim, formula, nbytes, [each.largest for each in everyone])


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
    if everyone:
        cells = [
            (f"rank {r}: {tokens[r]}", [(f"K, V of {(r - step) % c}: {n:g}", n) for step, n in enumerate(steps)])
            for r, steps in enumerate(ranks)
        ]
        title = (
            f"{name}: whose keys and values a rank has in each step, and how many blocks of scores it computes",
            f"{name}：每一步中各 rank 手上是谁的 K、V，以及它计算多少块分数",
        )
        run.draw(grid(title, ("rank: its tokens", "rank：它的 token"), head[2:-1], cells))


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
        formula = f"(1 + {BACKWARD})({formula}) = {expected:g}, in virtual time"
        claim(f"{name}: virtual time, messages free", formula, expected, ends[name], 1e-9)
    formula, ratio = f"2 - 1/c = {2 - 1 / c:g}, in virtual time", ends["contiguous"] / ends["zigzag"]
    claim("contiguous / zigzag", formula, 2 - 1 / c, ratio, 1e-9)
    columns = {name: [sum(steps) for steps in ranks] for name, ranks in units.items()}
    unit = "blocks of (s/c, s/c)", "(s/c, s/c) 的块"
    run.draw(bars(("Forward work", "前向的计算量"), unit, [f"rank {r}" for r in range(c)], columns), chart=True)


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
