"""Attention over a sharded sequence in bfloat16 is as near to float64 as one process's in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Mesh
from sequence_parallel import ring_attention
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.blocks import attend, attend_backward, merge
from sequence_parallel.engine.ring import GRADIENTS, KV, OverlappedRing
from sequence_parallel.engine.ulysses import context_parallel
from sequence_parallel.hybrid import Hybrid
from sequence_parallel.ring_attention import RingAttention
from sequence_parallel.ulysses import Ulysses
from tests.pool import Pool

CPU = torch.device("cpu")
B, A, S, D = 2, 4, 256, 16
MOST = 1.5  # times one process's error


def inputs(alike: bool) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, each a number that bfloat16 has.

    Args:
        alike: the terms of every sum have one sign and size. What a kernel rounds in each of them then cancels out in
            their sum, and what is left is how the sum itself is rounded.
    """
    q, k, v, gradient = (torch.randn(B, A, S, D, generator=torch.Generator().manual_seed(i)) for i in range(4))
    if alike:
        direction = torch.linspace(0.5, 1.5, D) / D**0.5
        q, gradient = (direction + 0.02 * x for x in (q, gradient))
        k = v = k[..., :1] * direction + 0.02 * v
    return [x.bfloat16() for x in (q, k, v, gradient)]


def dense(alike: bool, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k and v in one process."""
    *qkv, gradient = (x.to(dtype) for x in inputs(alike))
    leaves = [x.requires_grad_() for x in qkv]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def errors(alike: bool, found: list[Tensor], here: Tensor | slice = slice(None)) -> list[float]:
    """Of output and gradients, each against float64's, in units of one process's in bfloat16, of these tokens."""
    exact, usual = ([x[:, :, here].double() for x in dense(alike, dtype)] for dtype in (torch.float64, torch.bfloat16))
    return [((f - e).norm() / (u - e).norm()).item() for f, e, u in zip(found, exact, usual, strict=True)]


def sharded(alike: bool, attention: SequenceAttention) -> list[float]:
    here = attention.positions(S)
    *qkv, gradient = (x[:, :, here] for x in inputs(alike))
    leaves = [x.contiguous().requires_grad_() for x in qkv]
    out = attention(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
    assert all(x.dtype == torch.bfloat16 for x in found)
    return errors(alike, found, here)


def every_way(alike: bool) -> dict[str, list[float]]:
    axis = Mesh("cpu", Ledger(), 30.0, cp=4)["cp"]
    ways: dict[str, SequenceAttention] = {"Ulysses": Ulysses(axis)}
    for zigzag in (True, False):
        placement = "zigzag" if zigzag else "contiguous"
        ways[f"ring, {placement}"] = RingAttention(axis, zigzag)
        ways[f"overlapped ring, {placement}"] = OverlappedRing(axis, CPU, zigzag)
        ways[f"hybrid, {placement}"] = Hybrid(axis, 2, zigzag)
        ways[f"engine's hybrid, {placement}"] = context_parallel(axis, CPU, 2, zigzag)
    found = {name: sharded(alike, attention) for name, attention in ways.items()}
    for attention in ways.values():
        getattr(attention, "close", lambda: None)()
    return found


@pytest.mark.parametrize("alike", [False, True])
def test_sharding_the_sequence_adds_no_error(pool: Pool, alike: bool) -> None:
    """The bug: blocks are joined, or gradients of keys and values summed round the ring, in bfloat16."""
    for rank, ways in enumerate(pool.run(4, every_way, alike)):
        for way, found in ways.items():
            assert max(found) < MOST, f"{way} on rank {rank}: out, dq, dk, dv {found} times one process's error"


@pytest.mark.parametrize("blocks", [4, 16])
def test_joining_many_blocks_adds_no_error(blocks: int) -> None:
    """As a ring of so many ranks joins them: what is kept between the blocks is float32."""
    q, k, v, gradient = inputs(False)
    n, joined, plainly = S // blocks, [], []
    for i in range(blocks):  # of the queries
        rows = slice(n * i, n * (i + 1))
        first = attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], True)
        out, lse = (x.float() for x in first)
        plain = out.clone(), lse.clone().unsqueeze(-1)
        for j in range(i):  # of earlier keys
            columns = slice(n * j, n * (j + 1))
            more = attend(q[:, :, rows], k[:, :, columns], v[:, :, columns], False)
            assert more[1].dtype == torch.float32
            merge(out, lse, *more)
            plain = ring_attention.merge(*plain, more[0], more[1].unsqueeze(-1))
        assert out.dtype == plain[0].dtype == torch.float32
        joined.append((out, lse))
        plainly.append(plain[0])
    full = [torch.cat(x, 2) for x in zip(*joined, strict=True)]
    of_q, of_k, of_v = (torch.zeros(B, A, S, D) for _ in range(3))
    for j in range(blocks):
        columns, later = slice(n * j, n * (j + 1)), slice(n * (j + 1), S)
        for rows, causal in ((columns, True), (later, False)):
            if rows.start < S:
                mine = (gradient[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns])
                found = attend_backward(*mine, full[0][:, :, rows].bfloat16(), full[1][:, :, rows], causal)
                of_q[:, :, rows] += found[0]
                of_k[:, :, columns] += found[1]
                of_v[:, :, columns] += found[2]
    found = [full[0].bfloat16(), of_q.bfloat16(), of_k.bfloat16(), of_v.bfloat16()]
    assert max(errors(False, found)) < MOST
    assert max(errors(False, [torch.cat(plainly, 2).bfloat16(), *found[1:]])) < MOST


def types_that_travel() -> tuple[set, set]:
    """Of keys and values, and of the sums of their gradients, in the overlapped ring."""
    ring = OverlappedRing(Mesh("cpu", Ledger(), 30.0, cp=3)["cp"], CPU)
    travel, types = ring.pass_on, {KV: set(), GRADIENTS: set()}

    def noting(x: Tensor, kind: str, step: int) -> object:
        types[kind].add(x.dtype)
        return travel(x, kind, step)

    ring.pass_on = noting
    q, k, v, gradient = (x[:, :, :6] for x in inputs(False))
    ring(*(x.clone().requires_grad_() for x in (q, k, v))).backward(gradient)
    ring.close()
    return types[KV], types[GRADIENTS]


def test_sums_of_gradients_travel_in_32_bits(pool: Pool) -> None:
    """On four ranks the error of sums in 16 bits is about that of torch's kernel: it could hide beneath it."""
    assert pool.run(3, types_that_travel) == [({torch.bfloat16}, {torch.float32})] * 3
