"""Lecture 06: DeepSpeed-Ulysses (Megatron-LM SP 代码解析). Jacobs et al. 2023 (2309.14509).

    torchrun --nproc_per_node=8 sequence_parallel/ulysses.py

A rank has some tokens of all heads; for attention it wants all tokens of some heads. An all-to-all of each of Q, K and
V changes the one into the other, and one of the output changes back.
"""

import argparse
import sys
from dataclasses import replace
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.plot import bars
from sequence_parallel.context import SequenceAttention, check, check_length
from sequence_parallel.context_training import Layer, Shape, claim_difference, claim_saved, count, measure, teach

HEADS, TOKENS = 1, 2  # dimensions of (B, A, S, D)


def switch(axis: Axis, cut: int, joined: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Cut each along one dimension, give each rank its part, and join what arrives along the other.

    All travel at once: none waits until another has arrived.
    """
    equal = [1] * axis.size
    travelling = [comm.all_to_all_async(torch.stack(x.chunk(axis.size, cut)), axis, equal, equal) for x in tensors]
    return tuple(torch.cat(pending.wait().unbind(), joined) for pending in travelling)


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, cut: int, joined: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.cut, ctx.joined = axis, cut, joined
        return switch(axis, cut, joined, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *switch(ctx.axis, ctx.joined, ctx.cut, *gradients)


class Whole(SequenceAttention):
    """All tokens are here: torch's own attention."""

    ranks = pieces = 1

    def positions(self, sequence: int) -> Tensor:
        return torch.arange(sequence)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[HEADS] != k.shape[HEADS])


class Ulysses(SequenceAttention):
    """Attention of this rank's tokens, with heads in place of tokens while it is computed.

    Args:
        axis: over whose ranks the heads are cut.
        inner: computes the attention of some heads, of all tokens that the ranks of `axis` have together: all that
            there are, or (`hybrid.py`) one rank's part of a ring.
    """

    def __init__(self, axis: Axis, inner: SequenceAttention | None = None):
        self.axis, self.inner = axis, inner or Whole()
        self.ranks, self.heads_over = axis.size * self.inner.ranks, axis.size
        self.pieces = lcm(self.ranks, self.inner.pieces)

    def positions(self, sequence: int) -> Tensor:
        check_length(sequence, self.pieces)
        ours = self.inner.positions(sequence)
        return ours.chunk(self.axis.size)[self.axis.index]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.axis.size == 1:
            return self.inner(q, k, v)
        u = self.axis.size
        if q.shape[HEADS] % u:
            raise ValueError(f"{q.shape[HEADS]} heads cannot be cut into {u} equal parts; use a multiple of {u}")
        # Where there are fewer key and value heads than ranks, some ranks need the same one.
        copies = lcm(k.shape[HEADS], u) // k.shape[HEADS]
        if copies > 1:
            k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)
        q, k, v = _Switch.apply(self.axis, HEADS, TOKENS, q, k, v)
        (output,) = _Switch.apply(self.axis, TOKENS, HEADS, self.inner(q, k, v))
        return output

    def close(self) -> None:
        self.inner.close()


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    attention = Ulysses(axis)
    b, s, h, a, c = run.args.batch, run.args.sequence, config.hidden, config.heads, axis.size
    show_shapes(run, attention, (b, a, s, h // a))

    layer = Layer(run, config, teach(run, config, attention, axis))
    whole, switch = b * s * h / c * (c - 1) / c, ("all-to-all",)
    layer.claim("all-to-alls of a layer, forward", "4: Q, K, V and the output", 4 * (c > 1), switch, messages=True)
    layer.claim("all-to-alls, backward", "4", 4 * (c > 1), switch, backward=True, messages=True)
    formula = f"4bsh/c (c-1)/c = {4 * whole:,.0f}"
    layer.claim("elements a layer sends, forward", f"{formula}, 1/c of Megatron SP's", 4 * whole, switch)
    layer.claim("elements, backward", formula, 4 * whole, switch, backward=True)
    claim_attention(run, attention, Shape(b, a, a, s, h // a))


def show_shapes(run: Run, attention: Ulysses, shape: tuple[int, int, int, int]) -> None:
    """What a rank has before and after the all-to-all, by trying it."""
    b, a, s, d = shape
    uncounted = replace(attention.axis, ledger=Ledger())
    x = torch.empty(b, a, s // attention.axis.size, d, device=run.job.device)
    (y,) = switch(uncounted, HEADS, TOKENS, x)
    rows = [("Q, K, V of the layer", *x.shape), ("while attention is computed", *y.shape)]
    (z,) = switch(uncounted, TOKENS, HEADS, y)
    rows.append(("output to the layer", *z.shape))
    run.say(tabulate(rows, ("on each rank", "samples", "heads", "tokens", "head size")) + "\n")


def claim_attention(run: Run, attention: Ulysses, shape: Shape) -> None:
    """Attention by itself: what it keeps for backward; fewer heads of keys and values; bfloat16."""
    axis, c = attention.axis, attention.axis.size
    ours = run.job.gather(measure(run, attention, axis, shape, run.dtype))
    dense = measure(run, Whole(), axis, shape, run.dtype).saved
    if ours and run.job.device.type == "cpu":  # other devices' kernels keep other things
        claim_saved(run, ours, shape, c)
        ratio = [dense / each.saved for each in ours]
        run.evidence.on_ranks("one process keeps how many times as much", f"c = {c}", c, ratio, 1e-9)
    b, a, _, s, d = shape
    rows = []
    for kv in sorted({a, max(1, a // 2) if a % 2 == 0 else a, 1}, reverse=True):
        grouped, what = shape._replace(kv_heads=kv), f"{kv} heads of keys and values"
        everyone = claim_difference(run, what, attention, axis, grouped, torch.float64)
        if everyone:
            travel = lcm(kv, c) if c > 1 else kv
            expected = 2 * b * s * d / c * (c - 1) / c * (a + travel)
            formula = f"2bs(a + {travel})(h/a)/c (c-1)/c = {expected:,.0f}"
            sent = [count(each.forward, ("all-to-all",)) for each in everyone]
            claim = f"elements sent forward, {kv} heads of them"
            run.evidence.on_ranks(claim, formula, expected, sent, 1e-9 * expected)
            rows.append((kv, travel, travel // c, sent[0]))
    run.say("\nfewer heads of keys and values: where there are fewer than ranks, some ranks need the same")
    run.say(tabulate(rows, ("heads of K and V", "that travel", "on a rank", "elements sent, forward"), intfmt=","))
    if run.args.plot and rows:
        names, columns = [f"{row[0]} heads\nof K and V" for row in rows], {"measured": [row[-1] for row in rows]}
        bars(run.args.plot, f"Sent by each of {c} ranks for a layer, forward", "elements", names, columns)
    claim_difference(run, "bfloat16", attention, axis, shape, torch.bfloat16)


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks, ranks)
    check_model(args)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: DeepSpeed-Ulysses",
        "Megatron-LM SP 代码解析",
        "Attention of a sequence that is cut: an all-to-all gives each rank all tokens of some heads.",
    )
    add_model_flags(frame, heads=8, layers=4)
    frame.parser.set_defaults(steps=10)
    sys.exit(frame.main(refuse, lesson))
