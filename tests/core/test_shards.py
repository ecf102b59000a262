"""Shards of which several ranks hold the same one, as a Llama's heads of keys and values."""

import pytest
import torch
from torch import nn

from core.ledger import Ledger
from core.mesh import Axis
from core.proof.full import full_tensors
from core.shards import FlatShard, LocalTensor, counted_once, is_copied, is_first, shard, shard_of


def ranks(parameter: nn.Parameter, count: int, size: int) -> list[tuple[nn.Parameter, Axis]]:
    axes = [Axis("tp", (*range(size),), index, None, Ledger(), None) for index in range(size)]
    return [(shard(parameter, 0, axis, count), axis) for axis in axes]


@pytest.mark.parametrize(("count", "size", "rows"), [(1, 4, 6), (2, 4, 6), (2, 6, 5), (4, 4, 6), (9, 3, 9)])
def test_neighbours_hold_the_same(count: int, size: int, rows: int) -> None:
    """5 rows in 2 shards: the second has a row of padding. More shards than ranks are as many as ranks."""
    full = nn.Parameter(torch.arange(3.0 * rows).view(rows, 3))
    held = ranks(full, count, size)
    shards = min(count, size)
    for rank, (p, axis) in enumerate(held):
        mark = shard_of(p)
        assert (mark.index, mark.count) == (rank * shards // size, shards)
        assert torch.equal(p, mark.local(full))
        assert mark.full_shape(p.shape) == full.shape
        assert is_copied(p) == (shards < size)
        assert is_first(p, axis) == (rank % (size // shards) == 0)
        p.grad = p.detach().clone()
    square = sum(g.square().sum() for p, axis in held for g in counted_once([p], axis))
    assert square == full.square().sum(), "each number once"
    found = list(full_tensors(LocalTensor("k", p.detach(), shard_of(p)) for p, _ in held))
    assert len(found) == size // shards, "each copy"
    assert all(torch.equal(value, full) for _, value in found)


def test_copies_that_zero_has_sharded() -> None:
    """Each rank's shard flat, in two halves: the copies are put together one by one."""
    full = nn.Parameter(torch.arange(12.0).view(4, 3))
    pieces = []
    for p, _ in ranks(full, 2, 4):
        for first, end in ((0, 2), (2, 6)):
            value = p.detach().flatten()[first:end]
            pieces.append(LocalTensor("k", value, FlatShard(first, end, p.shape, shard_of(p))))
    found = list(full_tensors(pieces))
    assert len(found) == 2
    assert all(torch.equal(value, full) for _, value in found)
    assert not list(full_tensors(pieces[:2])), "a shard without the others"
