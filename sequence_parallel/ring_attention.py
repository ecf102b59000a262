"""Lecture 06: ring attention (Megatron-LM SP 代码解析). Liu et al. 2023 (2310.01889).

    torchrun --nproc_per_node=8 sequence_parallel/ring_attention.py

Each rank keeps its queries. Keys and values travel round the ring of ranks; the outputs over one block of keys after
another are merged exactly, by the logarithms of the sums of their exponentials (lse). Of the (S, S) scores a rank holds
a block at a time: (S/c, S/c) a head here, none in the engine on a CPU (`engine/blocks.py`). Backward sends keys and
values round again, and with them the sums of their gradients, which end at the rank that has the keys.

A query sees no later key, so where a rank's tokens are contiguous the first rank has next to nothing to do and the last
computes every block: all wait for it. Zigzag (as in zhuzilin's ring-flash-attention) gives rank r chunk r from the
beginning and chunk r from the end, and every rank the same work in every step.

read: ring_attention.py:37-139; context.py:71-110; then engine/ring.py, engine/blocks.py

B batch (paper: b), A heads (a), S sequence (s), N = S/c tokens of a rank, D head size, H = A D hidden (h), c ranks
"""

import sys
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from core import p2p
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel.context import SequenceAttention, check_length
from sequence_parallel.engine.ring import PLACEMENTS, OverlappedRing
from sequence_parallel.evidence import ring, rules
from sequence_parallel.evidence.training import compare, context_version


def probabilities(q: Tensor, k: Tensor, causal: bool, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(QK^T / sqrt(D) - lse), (B, A, N, M), and the lse; without one, that of this block of keys by itself."""
    scores = q @ k.mT / sqrt(q.shape[-1])
    if causal:  # the diagonal block: query i sees keys 0 to i
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -inf)
    lse = scores.logsumexp(-1, keepdim=True) if lse is None else lse
    return (scores - lse).exp(), lse


def block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys: the output (B, A, N, D) and the lse (B, A, N, 1)."""
    p, lse = probabilities(q, k, causal)
    return p @ v, lse


def block_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to dQ, dK and dV. With `o` and `lse` over all keys, P is that of the full softmax."""
    p, _ = probabilities(q, k, causal, lse)
    dp = do @ v.mT
    ds = p * (dp - (do * o).sum(-1, keepdim=True)) / sqrt(q.shape[-1])
    return ds @ k, ds.mT @ q, p.mT @ do


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
    """Which of this rank's N queries see which of the N keys that have come `step` ranks far; None where none does."""
    everything, early, late = slice(0, n), slice(0, n // 2), slice(n // 2, n)
    earlier = step <= axis.index  # the keys are those of rank r - step, or, where that is negative, r - step + c
    if not zigzag:
        return (everything, everything) if earlier else None
    return (everything, early) if earlier else (late, everything)


class _Ring(torch.autograd.Function):
    """(B, A, N, D) each of Q, K and V to the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, zigzag: bool) -> Tensor:
        ctx.axis, ctx.zigzag, ctx.dtype = axis, zigzag, q.dtype
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        o, lse = block(q, k, v, causal=True)  # this rank's own keys: every query sees one, itself
        kv = torch.stack([k, v])
        for step in range(1, axis.size):
            kv = to_next(kv, axis)
            if seen := visible(axis, step, q.shape[2], zigzag):
                rows, keys = seen
                more = block(q[:, :, rows], *kv[..., keys, :], causal=False)
                o[:, :, rows], lse[:, :, rows] = merge(o[:, :, rows], lse[:, :, rows], *more)
        ctx.save_for_backward(q, k, v, o, lse)
        return o.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, o, lse), axis, do = ctx.saved_tensors, ctx.axis, do.to(ctx.saved_tensors[0].dtype)
        dq, dk, dv = block_backward(do, q, k, v, o, lse, causal=True)
        kv = torch.stack([k, v])
        dkv = torch.zeros_like(kv)  # of the keys and values that are here, the sum so far
        for step in range(1, axis.size):
            kv = to_next(kv, axis)
            if seen := visible(axis, step, q.shape[2], ctx.zigzag):
                rows, keys = seen
                of_rows = [x[:, :, rows] for x in (do, q)]
                merged = [x[:, :, rows] for x in (o, lse)]
                dq_block, dk_block, dv_block = block_backward(*of_rows, *kv[..., keys, :], *merged, causal=False)
                dq[:, :, rows] += dq_block
                dkv[..., keys, :] += torch.stack([dk_block, dv_block])
            dkv = to_next(dkv, axis)  # to where its keys and values go next; after the last step, home
        return dq.to(ctx.dtype), (dk + dkv[0]).to(ctx.dtype), (dv + dkv[1]).to(ctx.dtype), None, None


class RingAttention(SequenceAttention):
    """For `parallelize`: the ring, and which tokens a rank has."""

    def __init__(self, axis: Axis, zigzag: bool = True):
        self.axis, self.ranks, self.zigzag = axis, axis.size, zigzag and axis.size > 1
        self.multiple = 2 * axis.size if self.zigzag else axis.size

    def positions(self, sequence: int) -> Tensor:
        check_length(sequence, self.multiple)
        chunks, r = torch.arange(sequence).chunk(self.multiple), self.axis.index
        return torch.cat([chunks[r], chunks[-1 - r]]) if self.zigzag else chunks[r]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Ring.apply(q, k, v, self.axis, self.zigzag)


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
