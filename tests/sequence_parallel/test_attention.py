"""Attention over a sharded sequence by itself: blocks, Ulysses, the ring and both, against dense attention."""

import argparse
import re
from datetime import timedelta
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig
from core.proof.oracle import worst_difference
from sequence_parallel import ring_attention
from sequence_parallel.all_gather import AllGather
from sequence_parallel.context import SequenceAttention, local, parallelize
from sequence_parallel.engine.all_gather import OverlappedAllGather
from sequence_parallel.engine.blocks import attend, attend_backward, attend_in_products, backward_in_products, merge
from sequence_parallel.engine.ring import OverlappedRing
from sequence_parallel.engine.ulysses import FullSequence, context_parallel
from sequence_parallel.evidence.rules import check_context
from sequence_parallel.hybrid import Hybrid
from sequence_parallel.ring_attention import RingAttention
from sequence_parallel.ulysses import Ulysses
from tests.pool import Pool

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Blocks


@pytest.mark.parametrize(("queries", "keys", "causal"), [(5, 5, True), (5, 5, False), (3, 7, False), (1, 1, True)])
def test_the_kernel_the_products_and_the_plain_block_agree(queries: int, keys: int, causal: bool) -> None:
    q, gradient = random(2, 3, queries, 4), random(2, 3, queries, 4, seed=1)
    k, v = random(2, 3, keys, 4, seed=2), random(2, 3, keys, 4, seed=3)
    out, lse = attend(q, k, v, causal)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    one = [x.unsqueeze(2) for x in (q, k, v)]  # a query head has a key and value head
    plain_out, plain_lse = ring_attention.block(*one, 0.5, seen)
    for found in (attend_in_products(q, k, v, causal), (plain_out.squeeze(2), plain_lse.squeeze((2, -1)))):
        for ours, right in zip(found, (out, lse), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)
    expected = attend_backward(gradient, q, k, v, out, lse, causal)
    in_products = backward_in_products(gradient, q, k, v, out, lse, causal)
    outs = gradient.unsqueeze(2), out.unsqueeze(2), lse[:, :, None, :, None]
    plain = ring_attention.block_backward(outs[0], *one, *outs[1:], 0.5, seen)
    for found in (in_products, [x.squeeze(2) for x in plain]):
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)


def test_the_layout_in_memory_does_not_matter() -> None:
    """The kernel reads D numbers from one place, wherever they are."""
    q, k, v, gradient = (random(2, 3, 5, 4, seed=i) for i in range(4))
    out, lse = attend(q, k, v, True)
    expected = (out, lse, *attend_backward(gradient, q, k, v, out, lse, True))
    q, k, v, gradient, across = (x.mT.contiguous().mT for x in (q, k, v, gradient, out))
    found = (*attend(q, k, v, True), *attend_backward(gradient, q, k, v, across, lse, True))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("heads", "shared"), [(6, 4), (2, 4)])
def test_heads_that_cannot_be_shared_are_refused(heads: int, shared: int) -> None:
    """The kernel would read beyond the keys, or divide by zero and end the process."""
    k = random(1, shared, 3, 4)
    with pytest.raises(ValueError, match=f"{heads} heads cannot share {shared} .* use a divisor of {heads}"):
        attend(random(1, heads, 3, 4), k, k, True)


@pytest.mark.parametrize("scale", [1.0, 300.0])  # scores of several hundred: their exponentials overflow
def test_blocks_of_keys_merge(scale: float) -> None:
    q, k, v = random(1, 4, 6, 8), scale * random(1, 2, 15, 8, seed=1), random(1, 2, 15, 8, seed=2)
    gradient = random(1, 4, 6, 8, seed=3)
    out, lse = attend(q, k[:, :, :4], v[:, :, :4], False)
    for columns in (slice(4, 5), slice(5, 15)):
        merge(out, lse, *attend(q, k[:, :, columns], v[:, :, columns], False))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves, enable_gqa=True)
    expected.backward(gradient)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    grouped = q.unflatten(1, (2, 2))
    two = [ring_attention.block(grouped, k[:, :, None, c], v[:, :, None, c], 8**-0.5, None)
           for c in (slice(0, 4), slice(4, 15))]  # fmt: skip
    merged = ring_attention.merge(*two[0], *two[1])[0].flatten(1, 2)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-13)
    found = [attend_backward(gradient, q, k[:, :, c], v[:, :, c], out, lse, False)
             for c in (slice(0, 7), slice(7, 15))]  # fmt: skip
    of_q, of_k, of_v = zip(*found, strict=True)
    for ours, leaf in zip((sum(of_q), torch.cat(of_k, 2), torch.cat(of_v, 2)), leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-10, atol=1e-12 * scale)


CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}

# ---- All ways to shard a sequence

SIZES = [  # samples, heads, key and value heads, tokens, head size
    (2, 16, 4, 48, 4),
    (1, 10, 2, 80, 5),
    (1, 14, 7, 56, 6),
    (1, 12, 12, 240, 3),
    (1, 24, 1, 112, 1),
]


@cache
def dense_attention(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Queries, keys, values and the output's gradient; and what one process makes of them: the same for all ways."""
    b, a, kv, s, d = sizes
    q, k, v, gradient = (random(b, n, s, d, seed=i).to(dtype) for i, n in enumerate((a, kv, kv, a)))
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*full, is_causal=True, enable_gqa=a != kv)
    dense.backward(gradient)
    return [q, k, v, gradient], {"out": dense.detach()} | {n: x.grad for n, x in zip("qkv", full, strict=True)}


def differences(attention: SequenceAttention, dtype: torch.dtype) -> list[float]:
    """From dense attention of the same type, for each of SIZES that has equal shards."""
    found = []
    for b, a, kv, s, d in SIZES:
        if s % attention.multiple or a % attention.heads_over:
            continue
        if dtype == torch.bfloat16 and d == 1:
            continue  # 24 roundings a token, and no average over them: dense attention is off by 0.015, too
        (q, k, v, gradient), right = dense_attention((b, a, kv, s, d), dtype)
        here = attention.positions(s)
        mine = [x.transpose(1, 2)[:, here].transpose(1, 2).requires_grad_() for x in (q, k, v)]  # not contiguous
        out = attention(*mine)
        out.backward(gradient[:, :, here])
        ours = {"out": out.detach()} | {name: x.grad for name, x in zip("qkv", mine, strict=True)}
        found.append(worst_difference(ours.items(), {name: x[:, :, here] for name, x in right.items()}))
    return found


TOLERANCE = {torch.float64: 1e-10, torch.bfloat16: 2e-2}
WAYS = {
    c: [(u, zigzag) for u in range(1, c + 1) if c % u == 0 for zigzag in ((True, False) if u < c else (True,))]
    for c in (1, 2, 3, 4, 6, 8)
}


def least_sequence(c: int, u: int, zigzag: bool) -> int:
    """What the lesson suggests for a sample without tokens."""
    args = argparse.Namespace(heads=u, hidden=u, sequence=0, attention="sdpa")
    with pytest.raises(ValueError, match="use --sequence ") as refusal:
        check_context(args, c, u, "zigzag" if zigzag else "contiguous")
    return int(str(refusal.value).split()[-1])


def all_ways(c: int) -> dict[tuple, list[float]]:
    axis, found = Mesh("cpu", Ledger(), 30.0, cp=c)["cp"], {}
    for u, zigzag in WAYS[c]:
        engine, plain = context_parallel(axis, CPU, u, zigzag), Hybrid(axis, u, zigzag)
        gathering = [context_parallel(axis, CPU, u, zigzag, "all-gather")] + [AllGather(axis, zigzag)] * (u == 1)
        alone = {1: RingAttention(axis, zigzag), c: Ulysses(axis)}
        assert {each.multiple for each in gathering} == {plain.multiple}
        assert engine.multiple == plain.multiple == least_sequence(c, u, zigzag)
        for dtype in TOLERANCE:
            found[u, zigzag, dtype] = differences(engine, dtype)
            for each in (plain, alone.get(u), *gathering):
                found[u, zigzag, dtype] += differences(each, dtype) if each else []
        engine.close()
    return found


@pytest.mark.parametrize("c", WAYS)
def test_equals_dense_attention(pool: Pool, c: int) -> None:
    for rank in pool.run(c, all_ways, c):
        for (u, zigzag, dtype), found in rank.items():
            assert found, f"no size for Ulysses {u} of {c}"
            assert all(x < TOLERANCE[dtype] for x in found), (u, zigzag, dtype, found)


def test_one_rank_is_the_identity() -> None:
    """Not even a bit changes."""
    axis = Axis("cp", (0,), 0, None, Ledger(), timedelta(seconds=5))
    q, k, v = (random(2, 4, 6, 8, seed=i) for i in range(3))
    expected = FullSequence()(q, k, v)
    for attention in (context_parallel(axis, CPU), OverlappedRing(axis, CPU), Ulysses(axis), OverlappedAllGather(axis)):
        assert torch.equal(attention(q, k, v), expected)
        assert torch.equal(local(q, attention), q)


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("c", [1, 2, 3, 5, 8])
def test_the_ring_computes_what_is_causal_once_and_nothing_else(c: int, zigzag: bool) -> None:
    s = 6 * c
    rings = [OverlappedRing(Axis("cp", (*range(c),), r, None, Ledger(), timedelta(seconds=5)), CPU, zigzag)
             for r in range(c)]  # fmt: skip
    computed = torch.zeros(s, s, dtype=torch.int64)
    for r, ring in enumerate(rings):
        for step in range(c):
            if tile := ring.tile(step, s // c):
                queries = ring.positions(s)[tile.rows]
                keys = rings[(r - step) % c].positions(s)[tile.columns]
                block = torch.ones(len(queries), len(keys), dtype=torch.int64)
                computed[queries.unsqueeze(-1), keys] += block.tril() if tile.causal else block
                seen = ring_attention.visible(ring.axis, step, s // c, ring.zigzag)
                assert step == 0 or [len(range(s // c)[x]) for x in seen] == [len(queries), len(keys)]
                assert tile.area(s // c) == len(queries) * len(keys) / (s // c) ** 2 / (2 if tile.causal else 1)
    assert torch.equal(computed, torch.ones(s, s, dtype=torch.int64).tril())


def with_wide_values(c: int, value: int) -> dict[tuple, float]:
    """Latent attention's: values of another size than keys, and a scale of its own."""
    axis, found = Mesh("cpu", Ledger(), 30.0, cp=c)["cp"], {}
    b, a, kv, s, d, scale = 2, 4, 2, 8 * c, 6, 0.3
    for u, zigzag in WAYS[c]:
        for name, make in {
            "plain": Hybrid,
            "engine": lambda axis, u, z: context_parallel(axis, CPU, u, z),
            "gathered, plain": lambda axis, u, z: AllGather(axis, z),
            "gathered": lambda axis, u, z: context_parallel(axis, CPU, u, z, "all-gather"),
        }.items():
            attention = make(axis, u, zigzag)
            if a % u:
                continue
            sizes = (a, d), (kv, d), (kv, value), (a, value)
            *full, gradient = (random(b, n, s, size, seed=i) for i, (n, size) in enumerate(sizes))
            here = attention.positions(s)
            mine = [x[:, :, here].requires_grad_() for x in full]
            out = attention(*mine, scale=scale)
            out.backward(gradient[:, :, here])
            full = [x.requires_grad_() for x in full]
            dense = F.scaled_dot_product_attention(*full, is_causal=True, enable_gqa=True, scale=scale)
            dense.backward(gradient)
            ours = {"out": out.detach()} | {name: x.grad for name, x in zip("qkv", mine, strict=True)}
            right = {"out": dense.detach()} | {name: x.grad for name, x in zip("qkv", full, strict=True)}
            right = {name: x[:, :, here] for name, x in right.items()}
            found[name, u, zigzag] = worst_difference(ours.items(), right)
            attention.close()
    return found


@pytest.mark.parametrize("value", [3, 6, 9])
@pytest.mark.parametrize("c", [1, 2, 4])
def test_values_of_another_size_and_another_scale(pool: Pool, c: int, value: int) -> None:
    for rank in pool.run(c, with_wide_values, c, value):
        assert rank
        assert all(worst < 1e-10 for worst in rank.values()), rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_which_a_query_sees_no_key(dtype: torch.dtype) -> None:
    """More keys than a tile of the kernel has: rows that see none, none of a tile, one, and all."""
    q, k, v, gradient = (random(2, 4, n, 8, seed=i).to(dtype) for i, n in enumerate((5, 1300, 1300, 5)))
    seen = torch.zeros(2, 1, 5, 1300, dtype=torch.bool)
    seen[:, :, 1, 700:], seen[:, :, 2, 1299], seen[:, :, 3], seen[1, :, 4, :3] = True, True, True, True
    out, lse = attend(q, k, v, False, 0.5, seen)
    exact_out, exact_lse = attend_in_products(q.double(), k.double(), v.double(), False, 0.5, seen)
    close = partial(torch.testing.assert_close, check_dtype=False, **CLOSE[dtype])
    close(out, exact_out)
    close(lse, exact_lse)
    assert lse[:, :, 0].isneginf().all()
    assert not out[:, :, 0].any()
    assert not lse[:, :, 1:4].isinf().any()
    finite = lse.masked_fill(lse.isneginf(), 3.0)  # what other blocks have found
    found = attend_backward(gradient, q, k, v, out, finite, False, 0.5, seen)
    wide = (x.double() for x in (gradient, q, k, v, out, finite))
    for ours, right in zip(found, backward_in_products(*wide, False, 0.5, seen), strict=True):
        close(ours, right)
    assert not found[0][:, :, 0].any()


def tokens(zigzag: bool) -> list[list[int]]:
    axis = Mesh("cpu", Ledger(), 30.0, cp=dist.get_world_size())["cp"]
    rings = RingAttention(axis, zigzag), OverlappedRing(axis, CPU, zigzag)
    return [local(torch.arange(16)[None], ring)[0].tolist() for ring in rings]


def test_the_courses_example(pool: Pool) -> None:
    """16 tokens on 4 ranks."""
    zigzag = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    contiguous = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    for placement, expected in ((True, zigzag), (False, contiguous)):
        assert pool.run(4, tokens, placement) == [[each, each] for each in expected]


# ---- Refusals


def alone(**sizes: int) -> OverlappedRing:
    ring = OverlappedRing(Axis("cp", (0,), 0, None, Ledger(), timedelta(seconds=5)), CPU)
    for name, value in sizes.items():
        setattr(ring, name, value)
    return ring


def test_what_has_no_equal_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="--sequence 60: must be a multiple of 8, .* use --sequence 56$"):
        local(torch.zeros(1, 60), alone(multiple=8))
    with pytest.raises(ValueError, match="use --sequence 8$"):
        local(torch.zeros(1, 5), alone(multiple=8))
    with pytest.raises(ValueError, match="6 heads have no 4 equal shards; use a multiple of 4"):
        parallelize(GPT(GPTConfig(hidden=24, heads=6)), alone(heads_over=4))
    with pytest.raises(ValueError, match="--attention softmax: .* use --attention sdpa --dropout 0"):
        parallelize(GPT(GPTConfig(attention="softmax")), alone())
    args = argparse.Namespace(heads=8, hidden=8, sequence=8, attention="sdpa")
    with pytest.raises(ValueError, match="--ulysses 3: .* use --ulysses one of 1, 2, 4, 8$"):
        check_context(args, 8, 3)


def order() -> str:
    """What Ulysses starts (s) and waits for (w), forward and backward."""
    attention, log = context_parallel(Mesh("cpu", Ledger(), 30.0, cp=2)["cp"], CPU, ulysses=2), []
    start, wait = comm.all_to_all_async, comm.Pending.wait
    q, k, v = (random(1, 2, 4, 4, seed=i).requires_grad_() for i in range(3))
    with (
        patch.object(comm, "all_to_all_async", lambda *a: log.append("s") or start(*a)),
        patch.object(comm.Pending, "wait", lambda self: log.append("w") or wait(self)),
    ):
        attention(q, k, v).sum().backward()
    return "".join(log)


def test_queries_keys_and_values_travel_at_once(pool: Pool) -> None:
    assert pool.run(2, order) == ["ssswww" + "sw" + "sw" + "ssswww"] * 2


@pytest.mark.parametrize(
    ("flags", "cp", "ulysses", "message"),
    [
        ({"sequence": 60}, 8, 4, "--sequence 60: .* use --sequence 56$"),
        ({"sequence": 6}, 8, 4, "use --sequence 8$"),
        ({"heads": 4}, 8, 8, "--heads 4: .* use --heads 8$"),
        ({"heads": 4, "sequence": 60}, 8, 8, "--heads 4 --sequence 60: .* use --heads 8 --sequence 56$"),
        ({"hidden": 60, "heads": 7}, 4, 1, "--heads 7: .* use --heads 6$"),
        ({"hidden": 20, "sequence": 60}, 6, 6, "--heads 8 --hidden 20: .* use --heads 6 --hidden 18$"),
        ({"sequence": 0}, 3, 1, "--sequence 0: .* use --sequence 6$"),
        ({"sequence": -1, "heads": 0}, 5, 5, "--heads 0 --hidden 64 .* use --heads 5 --hidden 65 --sequence 5$"),
        ({"hidden": 0, "sequence": 60}, 5, 5, "--heads 8 --hidden 0: .* use --heads 5 --hidden 5$"),
        ({"hidden": -2, "heads": 4}, 1, 1, "--heads 4 --hidden -2: heads must divide --hidden and .* --hidden 1$"),
        ({"attention": "softmax"}, 1, 1, "use --attention sdpa --dropout 0$"),
    ],
)
def test_the_flags_of_a_lesson(flags: dict, cp: int, ulysses: int, message: str) -> None:
    args = argparse.Namespace(**{"heads": 8, "hidden": 64, "sequence": 64, "attention": "sdpa"} | flags)
    with pytest.raises(ValueError, match=message) as refusal:
        check_context(args, cp, ulysses, "zigzag")
    for name, value in re.findall(r"--(heads|hidden|sequence) (\d+)", str(refusal.value).partition("use ")[2]):
        setattr(args, name, int(value))
    args.attention = "sdpa"
    check_context(args, cp, ulysses, "zigzag")
    GPTConfig(hidden=args.hidden, heads=args.heads, sequence=args.sequence)
