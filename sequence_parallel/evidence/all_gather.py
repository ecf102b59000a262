"""What `all_gather.py` shows and claims: who computes what, what is sent, what is kept, and what is held meanwhile.

b samples, s tokens in a sample, a heads, k heads of keys and values, d head size, c ranks
"""

from collections.abc import Mapping

import torch
from tabulate import tabulate

from core.mesh import Axis
from core.model.gpt import GPTConfig
from core.proof.figures import bars, grid
from core.proof.lesson import Run
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.all_gather import EARLIER, GATHER, OWN, SCATTER
from sequence_parallel.evidence.attention import (
    Measured,
    Shape,
    claim_dense,
    claim_difference,
    claim_saved,
    measure,
    shape_of,
    spans,
    timed_part,
)
from sequence_parallel.evidence.ring import claim_summed_gradients
from sequence_parallel.evidence.training import LayerTraffic, Version, count

GATHERED, SCATTERED = ("all-gather",), ("reduce-scatter",)


def claim_traffic(run: Run, config: GPTConfig, c: int, versions: Mapping[str, Version]) -> None:
    traffic = LayerTraffic(run, config, versions)
    claim_summed_gradients(run, traffic, versions["engine"], c)
    once, one = shape_of(config, run.args).elements(0, 2) // c * (c - 1), int(c > 1)
    formula, ring = f"2b(s/c)kd(c-1) = {once:,}", "as a ring's"
    traffic.claim("all-gathers of a layer, forward", "1, K with V", one, GATHERED, what="messages")
    traffic.claim("elements of a layer, forward", f"{formula}, {ring}", once, GATHERED)
    again = {"plain": 0, "engine": once}
    formula = f"plain 0, which keeps them; engine again {once:,}, {ring}"
    traffic.claim("elements gathered in backward", formula, again, GATHERED, "backward")
    traffic.claim("reduce-scatters, backward", "1", one, SCATTERED, "backward", "messages")
    traffic.claim("elements of their gradients, backward", f"{once:,}, {ring}", once, SCATTERED, "backward")


def claim_placements(
    run: Run,
    config: GPTConfig,
    axis: Axis,
    plain: Mapping[str, SequenceAttention],
    engine: Mapping[str, SequenceAttention],
) -> None:
    """Attention by itself, with either placement of the tokens."""
    args, chosen = run.args, engine[run.args.placement]
    c, shape = axis.size, shape_of(config, args)
    found = {name: run.job.gather(measure(run, each, axis, shape, run.dtype)) for name, each in engine.items()}
    for name, each in engine.items():
        show_work(run, name, run.job.gather(spans(each.positions(args.sequence).tolist())), found[name])
    if run.job.rank == 0:
        for name, everyone in found.items():
            claim_dense(run, name, everyone, run.dtype)
        if run.job.device.type == "cpu":  # other devices' kernels keep other things
            claim_saved(run, found[args.placement], shape, c)
        if c > 1:
            claim_work(run, found, c)
    claim_held(run, chosen, axis, shape)
    for name, each in plain.items():
        claim_difference(run, f"{name}, plain", each, axis, shape, run.dtype)
    single = shape._replace(kv_heads=1)
    one = claim_difference(run, "one head of keys and values", chosen, axis, single, torch.float64)
    if one:
        expected = single.elements(0, 2) // c * (c - 1)
        sent = [count(each.forward, GATHERED) for each in one]
        run.evidence.on_ranks("elements sent then, forward", f"1/k of it = {expected:,}; counted", expected, sent)
    claim_difference(run, "bfloat16", chosen, axis, shape, torch.bfloat16)


def claim_held(run: Run, attention: SequenceAttention, axis: Axis, shape: Shape) -> None:
    """What is held of keys and values, and of the scores, while attention is computed."""
    b, a, k, _, d = shape
    c = axis.size
    if run.job.device.type != "cpu" or c == 1:  # elsewhere blocks of scores, see `engine/blocks.py`
        return
    s = 4 * d * c
    everyone = run.job.gather(measure(run, attention, axis, shape._replace(sequence=s), run.dtype))
    firsts = run.job.gather(timed_part(attention).runs(s // c)[-1][1])  # all before a rank's last run is seen by it
    if everyone:
        w = torch.promote_types(run.dtype, torch.float32).itemsize
        cases = [
            (f"largest tensor, rank {r}", b * d * w * max(2 * k * s, a * first), each.largest)
            for r, (each, first) in enumerate(zip(everyone, firsts, strict=True))
        ]
        formula = f"K and V of all tokens, or of those before for all heads; a ring's are 1/{c}"
        run.evidence.each("bytes of the largest tensor, s = 4dc", formula, cases)


# ---- Who computes what, and when -------------------------------------------------------------------------------------


def work(measured: Measured) -> tuple[float, float]:
    """What was computed in forward while the keys of others were on their way, and after."""
    cost = {label: sum(e.end[0] - e.start[0] for e in measured.ahead if e.label == label) for label in (OWN, EARLIER)}
    return cost[OWN], cost[EARLIER]


def show_work(run: Run, name: str, tokens: list[str], everyone: list[Measured]) -> None:
    rows = [(r, tokens[r], *work(each), sum(work(each))) for r, each in enumerate(everyone)]
    run.say(f"{name}: what is computed in forward, in blocks of (s/c, s/c) scores")
    head = ("rank", "tokens", "while gathering", "then", "all")
    run.say(tabulate(rows, head, floatfmt="g", colalign=("right", "left")) + "\n")
    if everyone:
        cells = [
            (f"rank {r}: {has}", [(f"{own:g}", own), (f"{then:g}", then), (f"{both:g}", None)])
            for r, has, own, then, both in rows
        ]
        title = f"{name}: blocks of scores computed in forward", f"{name}：前向中计算的分数块"
        heads = [("while gathering", "收集途中"), ("then", "之后"), ("all", "合计")]
        run.draw(grid(title, ("rank: its tokens", "rank：它的 token"), heads, cells))


def claim_work(run: Run, found: dict[str, list[Measured]], c: int) -> None:
    """The work of each rank, and what it does while messages are in flight, as recorded."""
    units = {name: [work(each) for each in everyone] for name, everyone in found.items()}
    each, evidence = run.evidence.each, run.evidence
    cases = [(f"contiguous: blocks, rank {r}", r + 0.5, sum(both)) for r, both in enumerate(units["contiguous"])]
    each("contiguous: blocks of work of a rank", "r + 1/2 on rank r", cases)
    zigzag = [sum(both) for both in units["zigzag"]]
    evidence.on_ranks("zigzag: blocks of work of a rank", f"c/2 = {c / 2:g}", c / 2, zigzag, 1e-9)
    ratio = max(map(sum, units["contiguous"])) / max(zigzag)
    evidence.claim(
        "contiguous / zigzag", f"2 - 1/c = {2 - 1 / c:g}, of the rank with most work", 2 - 1 / c, ratio, 1e-9
    )
    own = [both[0] for both in units["zigzag"]]
    evidence.on_ranks("zigzag: blocks computed while gathering", "1/4: two runs of half, half masked", 0.25, own, 1e-9)
    starts, waits = f"start {GATHER}", f"wait for {GATHER}"
    for what, orders in {
        "forward": [[e.label for e in m.ahead] for m in found["zigzag"]],
        "backward": [[e.label for e in m.back] for m in found["zigzag"]],
    }.items():
        flights = [order[order.index(starts) : order.index(waits)].count(OWN) for order in orders]
        evidence.on_ranks(f"blocks computed with the gather in flight, {what}", "both runs' own, 2", 2, flights)
    last = [int([e.label for e in m.back][-1] == SCATTER) for m in found["zigzag"]]
    evidence.on_ranks("the gradients' reduce-scatter is the end of backward", "1, and is not overlapped", 1, last)
    columns = {name: [sum(both) for both in ranks] for name, ranks in units.items()}
    unit = "blocks of (s/c, s/c)", "(s/c, s/c) 的块"
    run.draw(bars(("Forward work", "前向的计算量"), unit, [f"rank {r}" for r in range(c)], columns), chart=True)
