"""The full tensors again from the shards of all ranks."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from core.shards import FlatShard, LocalTensor, Shard


def full_tensors(tensors: Iterable[LocalTensor]) -> Iterator[tuple[Hashable, Tensor]]:
    """The full tensors. What several ranks hold comes several times; what lacks a shard does not come at all."""
    shards: dict[tuple[Hashable, Shard], list[list[Tensor]]] = {}  # by the tensor that they are shards of
    flat: dict[tuple[Hashable, Shard | None], list[LocalTensor]] = {}
    for each in tensors:
        name, value, mark = each
        if mark is None:
            yield name, value
        elif isinstance(mark, FlatShard):
            flat.setdefault((name, mark.parent), []).append(each)
        else:
            by_index = shards.setdefault((name, replace(mark, index=0, copy=None)), [[] for _ in range(mark.count)])
            by_index[mark.index].append(value)
    larger: list[LocalTensor] = []
    for (name, mark), copies in shards.items():
        for complete in zip(*copies):  # noqa: B905  a shard without the others is left out
            full = torch.cat(complete, mark.dim).narrow(mark.dim, 0, mark.size)
            larger.append(LocalTensor(name, full, mark.parent))
    for (name, parent), found in flat.items():
        starts: dict[int, list[LocalTensor]] = {}
        for each in found:
            starts.setdefault(each.shard.first, []).append(each)
        shape = found[0].shard.shape
        while starts.get(0):  # one copy after another, which need not be sharded at the same places
            copy, at = [], 0
            while starts.get(at):
                copy.append(starts[at].pop())
                at = copy[-1].shard.end
            if at == shape.numel():
                full = torch.cat([each.value.flatten() for each in copy]).view(shape)
                larger.append(LocalTensor(name, full, parent))
    if larger:
        yield from full_tensors(larger)
