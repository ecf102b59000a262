"""What `ulysses.py` shows and claims: shapes, what is sent, what is kept, and fewer heads of keys and values.

b samples, s tokens in a sample, a heads, k heads of keys and values (with copies for c ranks), d head size, c ranks
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tabulate import tabulate
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPTConfig
from core.proof.figures import bars, grid
from core.proof.lesson import Run
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.ulysses import FullSequence
from sequence_parallel.evidence.attention import claim_difference, claim_saved, measure, shape_of
from sequence_parallel.evidence.ring import claim_summed_gradients
from sequence_parallel.evidence.training import LayerTraffic, Version, count

SWITCH = ("all-to-all",)


def show_shapes(
    run: Run,
    config: GPTConfig,
    axis: Axis,
    tokens_to_heads: Callable[[Tensor, Axis], Tensor],
    heads_to_tokens: Callable[[Tensor, Axis], Tensor],
) -> None:
    """What a rank has before and after the all-to-all, by trying it."""
    uncounted = replace(axis, ledger=Ledger())
    shape = (run.args.batch, config.heads, run.args.sequence // axis.size, config.head_dim)
    x = torch.empty(shape, device=run.job.device)
    y = tokens_to_heads(x, uncounted)
    z = heads_to_tokens(y, uncounted)
    names = ("Q, K, V of the layer", "while attention is computed", "output to the layer")
    rows = [(name, *each.shape) for name, each in zip(names, (x, y, z), strict=True)]
    run.say(tabulate(rows, ("on each rank", "samples", "heads", "tokens", "head size")) + "\n")
    if run.job.rank == 0:
        draw_switch(run, axis.size, x, y)


def draw_switch(run: Run, c: int, x: Tensor, y: Tensor) -> None:
    """Which heads of which tokens a rank has, on both sides of the all-to-all. x, y (b, heads, tokens, d)."""
    (_, all_heads, n, _), (_, heads, all_tokens, _) = x.shape, y.shape
    cells = []
    for rank in range(c):
        before = f"0-{all_heads - 1} × {rank * n}-{(rank + 1) * n - 1}"
        during = f"{rank * heads}-{(rank + 1) * heads - 1} × 0-{all_tokens - 1}"
        colour = str(rank % 8)
        cells.append((f"rank {rank}", [(before, colour), (during, colour), (before, colour)]))
    columns = [("Q, K, V of the layer", "该层的 Q、K、V"), ("while attention is computed", "计算注意力时"),
               ("output to the layer", "给该层的输出")]  # fmt: skip
    title = (
        "Heads × tokens of a rank, before and after each all-to-all",
        "每次 all-to-all 前后一个 rank 的头 × token",
    )
    run.draw(grid(title, "", columns, cells))


def claim_traffic(run: Run, config: GPTConfig, c: int, versions: Mapping[str, Version]) -> None:
    traffic = LayerTraffic(run, config, versions)
    claim_summed_gradients(run, traffic, versions["engine"], c)
    sent = shape_of(config, run.args).on_ranks(c).elements(2, 2) / c * (c - 1) / c
    four, formula = 4 if c > 1 else 0, f"2bs(a+k)d/c (c-1)/c = {sent:,.0f}"
    traffic.claim("all-to-alls of a layer, forward", "4: Q, K, V and the output", four, SWITCH, what="messages")
    traffic.claim("all-to-alls, backward", "4", four, SWITCH, "backward", "messages")
    traffic.claim("elements a layer sends, forward", f"{formula}, 1/c of Megatron SP's or less", sent, SWITCH)
    traffic.claim("elements, backward", formula, sent, SWITCH, "backward")


def claim_attention(
    run: Run, config: GPTConfig, axis: Axis, plain: SequenceAttention, engine: SequenceAttention
) -> None:
    """Attention by itself: what it keeps for backward; fewer heads of keys and values; bfloat16."""
    c, shape = axis.size, shape_of(config, run.args)
    a, k = shape.heads, shape.kv_heads
    ours = run.job.gather(measure(run, engine, axis, shape, run.dtype))
    dense = measure(run, FullSequence(), axis, shape.on_ranks(c), run.dtype).saved  # with the copies, too
    if ours and run.job.device.type == "cpu":  # other devices' kernels keep other things
        claim_saved(run, ours, shape.on_ranks(c), c)
        ratio = [dense / each.saved for each in ours]
        run.evidence.on_ranks("one process keeps how many times as much", f"c = {c}", c, ratio, 1e-9)
    claim_difference(run, "plain", plain, axis, shape, run.dtype)
    rows = []
    for kv in sorted({a, max(1, a // 2) if a % 2 == 0 else a, k, 1}, reverse=True):
        grouped, what = shape._replace(kv_heads=kv), f"{kv} heads of keys and values"
        everyone = claim_difference(run, what, engine, axis, grouped, torch.float64)
        if everyone:
            travel = grouped.on_ranks(c).kv_heads
            expected = grouped.on_ranks(c).elements(2, 2) / c * (c - 1) / c
            formula = f"2bs(a + {travel})d/c (c-1)/c = {expected:,.0f}; counted"
            sent = [count(each.forward, SWITCH) for each in everyone]
            claim = f"elements sent forward, {kv} heads of them"
            run.evidence.on_ranks(claim, formula, expected, sent, 1e-9 * expected)
            rows.append((kv, travel, travel // c, sent[0]))
    run.say("\nfewer heads of keys and values: where there are fewer than ranks, some ranks need the same")
    run.say(tabulate(rows, ("heads of K and V", "that travel", "on a rank", "elements sent, forward"), intfmt=","))
    if rows:
        names, columns = [f"{row[0]} heads of K and V" for row in rows], {"measured": [row[-1] for row in rows]}
        title = f"Sent by each of {c} ranks for a layer, forward", f"{c} 个 rank 中每个为一层前向发送的量"
        run.draw(bars(title, ("elements", "元素"), names, columns), chart=True)
    claim_difference(run, "bfloat16", engine, axis, shape, torch.bfloat16)
