"""What `hybrid.py` shows and claims: who is with whom, and what is sent inside the groups and across.

b samples, s tokens in a sample, a heads, k heads of keys and values (with copies for c1 ranks), d head size,
c = c1 c2 ranks
"""

from collections.abc import Mapping

import torch
from tabulate import tabulate
from torch import Tensor

from core.mesh import Axis
from core.model.gpt import GPTConfig
from core.proof.figures import bars, grid
from core.proof.lesson import Run
from sequence_parallel.context import SequenceAttention
from sequence_parallel.evidence.attention import claim_difference, claim_saved, measure, shape_of, spans
from sequence_parallel.evidence.ring import SEND, SEND_GRADIENTS, SEND_KV, claim_summed_gradients
from sequence_parallel.evidence.training import LayerTraffic, Version
from sequence_parallel.evidence.ulysses import SWITCH


def show_ranks(run: Run, inner: Axis, outer: Axis, positions: Tensor) -> None:
    """Who is with whom, and has which tokens."""
    everyone = run.job.gather((inner.ranks, outer.ranks, spans(positions.tolist())))
    rows = [
        (rank, " ".join(map(str, heads)), " ".join(map(str, ring)), tokens)
        for rank, (heads, ring, tokens) in enumerate(everyone)
    ]
    run.say(tabulate(rows, ("rank", "heads exchanged with", "in a ring with", "tokens"), disable_numparse=True) + "\n")
    if everyone:
        inside, across = ([*dict.fromkeys(each[i] for each in everyone)] for i in (0, 1))
        cells = [
            (f"rank {rank}", [(heads, str(inside.index(h) % 8)), (ring, str(across.index(r) % 8)), (tokens, None)])
            for (rank, heads, ring, tokens), (h, r, _) in zip(rows, everyone, strict=True)
        ]
        heads = [("heads exchanged with", "与谁交换头"), ("in a ring with", "与谁成环"), ("tokens", "token")]
        run.draw(grid(("Who is with whom", "谁与谁一组"), "rank", heads, cells))


def claim_traffic(run: Run, config: GPTConfig, c1: int, c2: int, versions: Mapping[str, Version]) -> None:
    c, traffic = c1 * c2, LayerTraffic(run, config, versions)
    claim_summed_gradients(run, traffic, versions["engine"], c)
    shape, kv = shape_of(config, run.args).on_ranks(c1), (SEND, SEND_KV)
    inside, across = shape.elements(2, 2) / c * (c1 - 1) / c1, shape.elements(0, 2) / c * (c2 - 1)
    all_in_a_ring = shape_of(config, run.args).elements(0, 2) / c * (c - 1)
    four = 4 if c1 > 1 else 0
    traffic.claim("all-to-alls of a layer, forward", "4 where c1 > 1", four, SWITCH, what="messages")
    traffic.claim("messages of a layer, forward", f"c2-1 = {c2 - 1}", c2 - 1, kv, what="messages")
    formula = f"2bs(a+k)d/c (c1-1)/c1 = {inside:,.0f}"
    sent = [traffic.claim("elements sent inside, forward", formula, inside, SWITCH)]
    sent.append(traffic.claim("elements sent inside, backward", formula, inside, SWITCH, "backward"))
    formula = f"2bskd/c (c2-1) = {across:,.0f}, a ring of all sends {all_in_a_ring:,.0f}"
    sent.append(traffic.claim("elements sent across, forward", formula, across, kv))
    twice, everything = f"twice as many = {2 * across:,.0f}", (*kv, SEND_GRADIENTS)
    sent.append(traffic.claim("elements sent across, backward", twice, 2 * across, everything, "backward"))
    if run.job.rank == 0:
        columns = {name: [each[0] for each in sent[i::2]] for i, name in enumerate(("forward", "backward"))}
        title = f"Sent by each of {c1} x {c2} ranks for a layer", f"{c1} x {c2} 个 rank 中每个为一层发送的量"
        places = [("inside", "组内"), ("across", "组间")]
        run.draw(bars(title, ("elements", "元素"), places, columns), chart=True)


def claim_attention(
    run: Run, config: GPTConfig, axis: Axis, plain: SequenceAttention, engine: SequenceAttention
) -> None:
    """Attention by itself."""
    shape = shape_of(config, run.args)
    alone = run.job.gather(measure(run, engine, axis, shape, run.dtype))
    if alone and run.job.device.type == "cpu":  # other devices' kernels keep other things
        claim_saved(run, alone, shape.on_ranks(engine.heads_over), axis.size)
    claim_difference(run, "plain", plain, axis, shape, run.dtype)
    fewer = shape._replace(kv_heads=1)
    claim_difference(run, "one head of keys and values", engine, axis, fewer, torch.float64)
    claim_difference(run, "bfloat16", engine, axis, shape, torch.bfloat16)
