"""The ring whose messages travel while blocks are computed. Liu et al. 2023 (2310.01889).

What it adds to the plain ring of `ring_attention.py`: the next block is on its way while the attention over the present
one is computed, and in backward the sums of the gradients one step behind it; blocks by torch's kernel; and a virtual
clock, which shows who computes what, and when.

B batch, A heads, K key and value heads (a divisor of A), N = S/c tokens of a rank, D head size, c ranks of the axis
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.mesh import Axis
from core.model.documents import visible
from core.p2p import PointToPoint
from core.proof.clock import VirtualClock
from sequence_parallel.context import Placed
from sequence_parallel.engine.blocks import attend, attend_backward, merge

PLACEMENTS = ("zigzag", "contiguous")
KV, GRADIENTS = "KV", "dKV"  # what travels
BACKWARD = 2.5  # five matrix products for a forward's two


class Tile(NamedTuple):
    """The queries and the keys of a step that attend to each other."""

    rows: slice
    columns: slice
    causal: bool  # by their order here; otherwise every query sees every key

    def area(self, tokens: int) -> float:
        """In units of (N, N)."""
        rows, columns = (len(range(tokens)[each]) for each in self[:2])
        return rows * columns / tokens**2 / (2 if self.causal else 1)


class OverlappedRing(Placed):
    """Attention of this rank's tokens, with keys and values that travel round the ranks of `axis`.

    Attributes:
        clock: where it is set, records what is done in which order.
    """

    clock: VirtualClock | None = None

    def __init__(self, axis: Axis, device: torch.device, zigzag: bool = True):
        super().__init__(axis, zigzag)
        routes = [(rank, (rank + 1) % axis.size, kind) for rank in range(axis.size) for kind in (KV, GRADIENTS)]
        self.messages = PointToPoint(axis, routes, device) if axis.size > 1 else None

    def tile(self, step: int, tokens: int) -> Tile | None:
        """What to compute of rank r's queries and rank (r - step)'s keys, `tokens` each; None: all keys are later."""
        everything, early, late = slice(None), slice(tokens // 2), slice(tokens // 2, None)
        owner = (self.axis.index - step) % self.axis.size
        if step == 0:
            return Tile(everything, everything, causal=True)
        if owner < self.axis.index:  # zigzag: its second chunk is later than both of ours
            return Tile(everything, early if self.zigzag else everything, causal=False)
        return Tile(late, everything, causal=False) if self.zigzag else None  # only our second is later than theirs

    def seen(self, step: int, tile: Tile, starts: Tensor | None) -> Tensor | None:
        """Which keys of the tile its queries see, where documents are kept apart: bool (B, 1, rows, columns)."""
        if starts is None:
            return None
        sequence, owner = starts.shape[1], (self.axis.index - step) % self.axis.size
        return visible(starts, self.positions(sequence)[tile.rows], self.positions_of(owner, sequence)[tile.columns])

    def pass_on(self, x: Tensor, kind: str, step: int) -> Callable[[], Tensor]:
        """Post the send of contiguous `x` to the next rank, and the receive of the previous rank's.

        Call the result to wait, and get what has arrived.
        """
        before, after = (self.axis.index - 1) % self.ranks, (self.axis.index + 1) % self.ranks
        tag = 4 * step + 2 * (kind == GRADIENTS)  # and the clock's, one more
        arrive = self.messages.receive(torch.empty_like(x), before, kind, tag)
        self.messages.send(x, after, kind, tag)
        return self._traced(arrive, f"{kind} {step}", before, after, tag + 1) if self.clock else arrive

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        return _OverlappedRing.apply(q, k, v, self, scale, starts)

    def close(self) -> None:
        if self.messages is not None:
            self.messages.close()

    def computing(self, step: int, cost: float) -> AbstractContextManager:
        return self.clock.action(f"block {step}", cost) if self.clock else nullcontext()

    def _traced(
        self, arrive: Callable[[], Tensor], what: str, before: int, after: int, tag: int
    ) -> Callable[[], Tensor]:
        stamp = self.messages.receive(self.clock.stamp(), before, "clock", tag)
        self.messages.send(self.clock.stamp(), after, "clock", tag)
        self._note(f"send {what}")

        def wait() -> Tensor:
            self._note(f"wait for {what}")
            self.clock.receive(stamp())
            return arrive()

        return wait

    def _note(self, label: str) -> None:
        with self.clock.action(label, 0.0):
            pass


def _one_message(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([k.flatten(), v.flatten()])


def _two(message: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a message in the shapes of k and v: each contiguous, as the kernel likes them."""
    keys, values = message.split([k.numel(), v.numel()])
    return keys.view(k.shape), values.view(v.shape)


class _OverlappedRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: OverlappedRing, scale: float | None, starts: Tensor | None
    ) -> Tensor:
        last, wide = ring.ranks - 1, torch.promote_types(q.dtype, torch.float32)
        block = _one_message(k, v)
        for step in range(ring.ranks):
            arriving = ring.pass_on(block, KV, step) if step < last else None
            if tile := ring.tile(step, q.shape[2]):
                rows, columns, causal = tile
                keys, values = (x[:, :, columns] for x in _two(block, k, v))
                with ring.computing(step, tile.area(q.shape[2])):
                    found = attend(q[:, :, rows], keys, values, causal, scale, ring.seen(step, tile, starts))
                    if step == 0:  # every query sees a key: itself
                        out, lse = (x.to(wide) for x in found)
                    else:
                        merge(out[:, :, rows], lse[:, :, rows], *found)
            if arriving:
                block = arriving()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scale, ctx.starts = ring, scale, starts
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, last, wide = ctx.ring, ctx.ring.ranks - 1, lse.dtype
        block = _one_message(k, v)
        travelling = None  # the sums of a block's gradients, one step behind the block
        for step in range(ring.ranks):
            arriving = ring.pass_on(block, KV, step) if step < last else None
            if tile := ring.tile(step, q.shape[2]):
                rows, columns, causal = tile
                ours, merged = (gradient[:, :, rows], q[:, :, rows]), (out[:, :, rows], lse[:, :, rows])
                theirs, which = (x[:, :, columns] for x in _two(block, k, v)), ring.seen(step, tile, ctx.starts)
                with ring.computing(step, BACKWARD * tile.area(q.shape[2])):
                    of_rows, of_k, of_v = attend_backward(*ours, *theirs, *merged, causal, ctx.scale, which)
                    if step == 0:  # of all queries, and all keys
                        of_q = of_rows.to(wide)
                    else:
                        of_q[:, :, rows] += of_rows
            if step == 0:
                sums = own = _one_message(of_k.to(wide), of_v.to(wide))  # stay here; the others' terms come at the end
            else:
                sums = travelling() if travelling else torch.zeros_like(block, dtype=wide)
                if tile:
                    for total, term in zip(_two(sums, k, v), (of_k, of_v), strict=True):
                        total[:, :, columns] += term
                travelling = ring.pass_on(sums, GRADIENTS, step)
            if arriving:
                block = arriving()
        if travelling:
            own += travelling()
        of_k, of_v = _two(own, k, v)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None, None
