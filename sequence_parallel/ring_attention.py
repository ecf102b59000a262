"""Lecture 06: ring attention (Megatron-LM SP 代码解析). Liu et al. 2023 (2310.01889).

    torchrun --nproc_per_node=8 sequence_parallel/ring_attention.py

Each rank keeps its queries. Keys (already rotated, by their own positions) and values travel round the ring of ranks: K
heads, and not the A of the queries. The outputs over one block of keys after another are merged exactly, by
the logarithms of the sums of their exponentials (lse). Of the (S, S) scores a rank holds a block at a time: (S/c, S/c)
a head here, none in the engine on a CPU (`engine/blocks.py`). Backward sends keys and values round again, and with them
the sums of their gradients, which end at the rank that has the keys.

A query sees no later key, so where a rank's tokens are contiguous the first rank has next to nothing to do and the last
computes every block: all wait for it. Zigzag (as in zhuzilin's ring-flash-attention) gives rank r chunk r from the
beginning and chunk r from the end, and every rank the same work in every step.

read: ring_attention.py:42-161; context.py:80-102; then engine/ring.py, engine/blocks.py

B batch (paper: b), A heads (a), K of keys and values, S sequence (s), N = S/c tokens of a rank, M of a block of keys,
D head size, c ranks
"""

import sys
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from core import p2p
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model import documents
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel.context import Placed
from sequence_parallel.engine.ring import PLACEMENTS, OverlappedRing
from sequence_parallel.evidence import ring, rules
from sequence_parallel.evidence.training import compare, context_version

ALL = slice(None)


def probabilities(
    q: Tensor, k: Tensor, scale: float, seen: Tensor | None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """exp(scale QK^T - lse), (B, K, A/K, N, M), and the lse; without one, that of this block of keys by itself.

    Args:
        seen: bool, (N, M) or (B, 1, 1, N, M): the keys that a query sees; None: all.
    """
    scores = q @ k.mT * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, -inf)
    if lse is None:  # the largest negative number, and not -inf, where a query sees none: its exponentials are 0
        lse = scores.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    return (scores - lse).exp(), lse


def block(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys: the output (B, K, A/K, N, D) and the lse (B, K, A/K, N, 1)."""
    p, lse = probabilities(q, k, scale, seen)
    return p @ v, lse


def block_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to dQ, dK and dV. With `o` and `lse` over all keys, P is that of the full softmax."""
    p, _ = probabilities(q, k, scale, seen, lse)
    dp = do @ v.mT
    ds = p * (dp - (do * o).sum(-1, keepdim=True)) * scale
    dk, dv = (x.sum(2, keepdim=True) for x in (ds.mT @ q, p.mT @ do))  # A/K query heads share a key
    return ds @ k, dk, dv


def merge(o: Tensor, lse: Tensor, o_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    """The output and lse over the keys so far and those of one more block: the online softmax."""
    total = torch.logaddexp(lse, lse_block)
    return (lse - total).exp() * o + (lse_block - total).exp() * o_block, total


def to_next(x: Tensor, axis: Axis) -> Tensor:
    """Send to the next rank of the ring, and receive what the previous one sends."""
    following, previous = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    received = torch.empty_like(x)
    if axis.index % 2 == 0:  # not all send first: a rank that sends waits for one that receives
        p2p.send(x, axis, following)
        return p2p.receive(received, axis, previous)
    p2p.receive(received, axis, previous)
    p2p.send(x, axis, following)
    return received


def visible(axis: Axis, step: int, n: int, zigzag: bool) -> tuple[slice, slice] | None:
    """Which of this rank's N queries see which of the N keys that have come from `step` ranks before; None: none."""
    everything, early, late = slice(0, n), slice(0, n // 2), slice(n // 2, n)
    earlier = step <= axis.index  # the keys are those of rank r - step, or, where that is negative, r - step + c
    if not zigzag:
        return (everything, everything) if earlier else None
    return (everything, early) if earlier else (late, everything)


class _Ring(torch.autograd.Function):
    """Q (B, A, N, D), K and V (B, K, N, D) to the output (B, A, N, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: "RingAttention", scale: float, starts: Tensor | None
    ) -> Tensor:
        ctx.ring, ctx.scale, ctx.starts, ctx.dtype = ring, scale, starts, q.dtype
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        q, k, v = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)  # (B, K, A/K or 1, N, D)
        o, lse = block(q, k, v, scale, ring.seen(0, q, starts))  # this rank's own keys: every query sees one, itself
        kv = torch.cat([k, v], -1)  # one message
        for step in range(1, ring.ranks):
            kv = to_next(kv, ring.axis)
            if tile := visible(ring.axis, step, q.shape[-2], ring.zigzag):
                rows, keys = (..., tile[0], ALL), (..., tile[1], ALL)
                k_block, v_block = kv[keys].split([k.shape[-1], v.shape[-1]], -1)
                more = block(q[rows], k_block, v_block, scale, ring.seen(step, q, starts, *tile))
                o[rows], lse[rows] = merge(o[rows], lse[rows], *more)
        ctx.save_for_backward(q, k, v, o, lse)
        return o.flatten(1, 2).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, o, lse), ring, scale, starts = ctx.saved_tensors, ctx.ring, ctx.scale, ctx.starts
        do, sizes = do.to(q.dtype).unflatten(1, q.shape[1:3]), [k.shape[-1], v.shape[-1]]
        dq, dk, dv = block_backward(do, q, k, v, o, lse, scale, ring.seen(0, q, starts))
        kv = torch.cat([k, v], -1)
        dkv = torch.zeros_like(kv)  # of the keys and values that are here, the sum so far
        for step in range(1, ring.ranks):
            kv = to_next(kv, ring.axis)
            if tile := visible(ring.axis, step, q.shape[-2], ring.zigzag):
                rows, keys = (..., tile[0], ALL), (..., tile[1], ALL)
                k_block, v_block = kv[keys].split(sizes, -1)
                seen = ring.seen(step, q, starts, *tile)
                more = block_backward(do[rows], q[rows], k_block, v_block, o[rows], lse[rows], scale, seen)
                dq[rows] += more[0]
                dkv[keys] += torch.cat(more[1:], -1)
            dkv = to_next(dkv, ring.axis)  # to where its keys and values go next; after the last step, home
        dk, dv = (x.squeeze(2).to(ctx.dtype) for x in (torch.cat([dk, dv], -1) + dkv).split(sizes, -1))
        return dq.flatten(1, 2).to(ctx.dtype), dk, dv, None, None, None


class RingAttention(Placed):
    """For `parallelize`: the ring; rank r has the r-th S/c tokens, or with zigzag the r-th S/2c from either end."""

    def seen(self, step: int, q: Tensor, starts: Tensor | None, rows: slice = ALL, keys: slice = ALL) -> Tensor | None:
        """Which of the `keys` that have come `step` ranks far the queries `rows` see; None: all."""
        if starts is None:
            if step:
                return None
            starts = torch.zeros(1, self.ranks * q.shape[-2], dtype=torch.int64, device=q.device)  # one document
        sequence, owner = starts.shape[1], (self.axis.index - step) % self.ranks
        mine, theirs = self.positions(sequence)[rows], self.positions_of(owner, sequence)[keys]
        return documents.visible(starts, mine, theirs).unsqueeze(1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        return _Ring.apply(q, k, v, self, scale or 1.0 / sqrt(q.shape[-1]), starts)


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config, args = configuration(run.args), run.args
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    plain = {name: RingAttention(axis, name == "zigzag") for name in PLACEMENTS}
    engine = {name: OverlappedRing(axis, run.job.device, name == "zigzag") for name in PLACEMENTS}
    ring.claim_placements(run, config, plain, engine)
    pair = {"plain": plain[args.placement], "engine": engine[args.placement]}
    versions = {name: context_version(run, config, attention, axis) for name, attention in pair.items()}
    compare(run, config, axis, versions)
    ring.claim_traffic(run, config, axis.size, versions)
    for each in engine.values():
        each.close()


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: ring attention",
        "Megatron-LM SP 代码解析",
        "Attention over a sharded sequence: keys and values travel round the ranks while blocks are computed.",
    )
    add_model_flags(frame, layers=2, batch=3)
    frame.parser.set_defaults(steps=10)
    flag = frame.parser.add_argument
    flag("--placement", choices=PLACEMENTS, default=PLACEMENTS[0], help="of tokens in training (default %(default)s)")
    sys.exit(frame.main(rules.ring_attention, lesson))
