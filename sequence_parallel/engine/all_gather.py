"""All-gather of keys and values that travel while a rank attends to its own. Llama 3 (2407.21783), section 3.3.2.

What it adds to the plain one of `all_gather.py`: each run of tokens attends to itself while the keys and values of the
other ranks are on their way, and then to all that is before it, without a mask; blocks by torch's kernel; and backward
gathers them again, so that a rank keeps 1/c of them. They are gathered once more where a ring sends them once more, and
their gradients take as many elements as a ring's: the same in 3 messages, of which the last is not overlapped.

B batch, A heads, K key and value heads (a divisor of A), N = S/c tokens of a rank, D head size, c ranks of the axis
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from core import comm
from core.model.documents import visible
from core.proof.clock import VirtualClock
from sequence_parallel.context import Placed
from sequence_parallel.engine.blocks import attend, attend_backward, merge
from sequence_parallel.engine.ring import BACKWARD

TOKENS = 2  # dimension of (B, A, S, D)
GATHER, OWN, EARLIER, SCATTER = "gather", "block of its own", "block of earlier", "reduce-scatter"


class OverlappedAllGather(Placed):
    """Attention of this rank's tokens, with the keys and values of all ranks of `axis`.

    Attributes:
        clock: where it is set, records what is done in which order; messages take no time there.
    """

    clock: VirtualClock | None = None

    def runs(self, tokens: int) -> list[tuple[slice, int]]:
        """The runs of neighbours among this rank's `tokens`: which of them, and where in the sample the first is."""
        chunks = self.chunks_of(self.axis.index)
        size = tokens // len(chunks)
        return [(slice(i * size, (i + 1) * size), chunk * size) for i, chunk in enumerate(chunks)]

    def gather(self, k: Tensor, v: Tensor) -> comm.Pending:
        """Keys and values of all tokens, (B, K, S, 2 D), in the order of the ranks, as one message."""
        self.note(f"start {GATHER}")
        return comm.all_gather_async(torch.cat([k, v], -1), self.axis, TOKENS)

    def arrived(self, pending: comm.Pending) -> Tensor:
        """What was gathered, in the order of the sequence."""
        self.note(f"wait for {GATHER}")
        x = pending.wait()
        return x[:, :, self.everyone(x.shape[TOKENS]).argsort().to(x.device)] if self.zigzag else x

    def scattered(self, sums: Tensor) -> Tensor:
        """This rank's tokens' share of the ranks' sums (B, K, S, 2 D), added up."""
        self.note(SCATTER)
        if self.zigzag:
            sums = sums[:, :, self.everyone(sums.shape[TOKENS]).to(sums.device)]
        return comm.reduce_scatter(sums, self.axis, TOKENS)

    def everyone(self, sequence: int) -> Tensor:
        """The tokens of all ranks, int64 (S), in the order of the ranks."""
        return torch.cat([self.positions_of(rank, sequence) for rank in range(self.ranks)])

    def seen(self, starts: Tensor | None, run: slice, first: int, own: bool) -> Tensor | None:
        """Which keys the run's queries see where documents are kept apart: of its own, or of all before it."""
        if starts is None:
            return None
        end = first + run.stop - run.start
        return visible(starts, torch.arange(first, end), torch.arange(first, end) if own else torch.arange(first))

    def computing(self, run: slice, keys: int | None, tokens: int, times: float = 1) -> AbstractContextManager:
        """In units of (N, N) scores; `keys` None: its own, of which the mask leaves half."""
        rows = run.stop - run.start
        area = rows * (rows / 2 if keys is None else keys) / tokens**2
        return self.clock.action(OWN if keys is None else EARLIER, times * area) if self.clock else nullcontext()

    def note(self, label: str) -> None:
        if self.clock:
            with self.clock.action(label, 0.0):
                pass

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        return _AllGather.apply(q, k, v, self, scale, starts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, way: OverlappedAllGather, scale: float | None, starts: Tensor | None
    ) -> Tensor:
        wide, n = torch.promote_types(q.dtype, torch.float32), q.shape[TOKENS]
        pending, runs = way.gather(k, v), way.runs(n)
        outs, lses = [], []
        for run, first in runs:  # while the others' are on their way
            with way.computing(run, None, n):
                own = (x[:, :, run] for x in (q, k, v))
                out, lse = attend(*own, True, scale, way.seen(starts, run, first, own=True))
            outs.append(out.to(wide))
            lses.append(lse.to(wide))
        # In memory a token's heads side by side, as the kernel has them: what follows keeps it too, without a copy.
        out, lse = torch.cat([x.transpose(1, 2) for x in outs], 1).transpose(1, 2), torch.cat(lses, TOKENS)
        keys, values = way.arrived(pending).split([k.shape[-1], v.shape[-1]], -1)
        for run, first in runs:
            if first:
                with way.computing(run, first, n):
                    before, which = (keys[:, :, :first], values[:, :, :first]), way.seen(starts, run, first, own=False)
                    merge(out[:, :, run], lse[:, :, run], *attend(q[:, :, run], *before, False, scale, which))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.way, ctx.scale, ctx.starts = way, scale, starts
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), way, starts = ctx.saved_tensors, ctx.way, ctx.starts
        wide, n, d = lse.dtype, q.shape[TOKENS], k.shape[-1]
        pending, runs = way.gather(k, v), way.runs(n)
        of_q = torch.zeros_like(q, dtype=wide)
        shape = (*k.shape[:TOKENS], n * way.ranks, d + v.shape[-1])
        sums = torch.zeros(shape, dtype=wide, device=q.device)  # of the gradients of all keys and values

        def add(run: slice, keys: Tensor, values: Tensor, causal: bool, place: slice, seen: Tensor | None) -> None:
            ours = [x[:, :, run] for x in (gradient, q, out, lse)]
            of_rows, of_k, of_v = attend_backward(*ours[:2], keys, values, *ours[2:], causal, ctx.scale, seen)
            of_q[:, :, run] += of_rows
            sums[:, :, place, :d] += of_k
            sums[:, :, place, d:] += of_v

        for run, first in runs:
            with way.computing(run, None, n, BACKWARD):
                here, which = slice(first, first + run.stop - run.start), way.seen(starts, run, first, own=True)
                add(run, k[:, :, run], v[:, :, run], True, here, which)
        keys, values = way.arrived(pending).split([d, v.shape[-1]], -1)
        for run, first in runs:
            if first:
                with way.computing(run, first, n, BACKWARD):
                    which = way.seen(starts, run, first, own=False)
                    add(run, keys[:, :, :first], values[:, :, :first], False, slice(first), which)
        own = way.scattered(sums)
        return of_q.to(q.dtype), own[..., :d].to(k.dtype), own[..., d:].to(v.dtype), None, None, None
