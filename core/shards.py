"""Which shard of a full parameter a rank holds. The full tensor again from all shards: `core.proof.full`.

`Shard` is DTensor's placement `Shard(dim)` on one axis, with two things that a DTensor cannot say: the padding of a
vocabulary whose size is no multiple of the ranks is part of the local tensor, and a layout needs no process group.
`FlatShard` is ZeRO's: a range of the flattened tensor, for which DTensor has no placement at all.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.mesh import Axis


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count` equal shards of a tensor along `dim`, whose full `size` need not be a multiple.

    What is missing to a multiple is padding: zeros at the end of the last shard or shards.
    """

    dim: int  # from the front, so not negative
    index: int
    count: int
    size: int  # of the full tensor along dim, without padding
    copy: int | None = None  # which of the ranks that hold this same shard; None: only one does
    parent: "Shard | None" = None  # where that tensor is itself a shard of a larger one

    @property
    def length(self) -> int:
        """Of every shard along `dim`, padding included."""
        return -(-self.size // self.count)

    @property
    def start(self) -> int:
        """Where this shard begins in the full tensor."""
        return self.index * self.length

    @property
    def unpadded(self) -> int:
        """Length of this shard along `dim` without padding."""
        return min(max(self.size - self.start, 0), self.length)

    def full_shape(self, local: torch.Size) -> torch.Size:
        shape = torch.Size([*local[: self.dim], self.size, *local[self.dim + 1 :]])
        return self.parent.full_shape(shape) if self.parent else shape

    def local(self, full: Tensor) -> Tensor:
        """This shard of `full`, with storage of its own."""
        if self.parent:
            full = self.parent.local(full)
        here = full.narrow(self.dim, min(self.start, self.size), self.unpadded)
        shape = list(full.shape)
        shape[self.dim] = self.length - self.unpadded
        return torch.cat([here, full.new_zeros(shape)], self.dim)


def shard(parameter: nn.Parameter, dim: int, axis: Axis, count: int | None = None) -> nn.Parameter:
    """This rank's shard of `parameter` (on the meta device or not), marked so that `shard_of` knows.

    Of fewer shards than ranks, `count` of them, each is on as many neighbouring ranks.
    """
    count = min(count or axis.size, axis.size)
    assert axis.size % count == 0, f"{count} shards on {axis.size} ranks"
    index, copy = divmod(axis.index, axis.size // count)
    mark = Shard(dim, index, count, parameter.shape[dim], copy if count < axis.size else None)
    local = nn.Parameter(mark.local(parameter.detach()), parameter.requires_grad)
    local.shard = replace(mark, parent=shard_of(parameter))
    return local


def shard_of(parameter: Tensor) -> Shard | None:
    """How `parameter` is sharded; None for one that every rank holds in full."""
    return getattr(parameter, "shard", None)


def is_copied(parameter: Tensor) -> bool:
    """Whether it is a shard that other ranks hold too."""
    return getattr(shard_of(parameter), "copy", None) is not None


def is_first(parameter: Tensor, axis: Axis) -> bool:
    """Whether this is the first of the ranks of the axis that hold the same of `parameter`."""
    mark = shard_of(parameter)
    return not (axis.index if mark is None else mark.copy)


def counted_once(parameters: Iterable[nn.Parameter], axis: Axis) -> list[Tensor]:
    """The gradients this rank adds to the global norm: of what several ranks hold, the first of them."""
    return [p.grad for p in parameters if p.grad is not None and is_first(p, axis)]


@dataclass(frozen=True)
class FlatShard:
    """Elements first:end of a tensor of `shape`, flattened."""

    first: int
    end: int
    shape: torch.Size
    parent: Shard | None = None  # where that tensor is itself a shard

    def local(self, full: Tensor) -> Tensor:
        """These elements of `full`."""
        return (self.parent.local(full) if self.parent else full).flatten()[self.first : self.end]


class LocalTensor(NamedTuple):
    """What one rank holds of a parameter, its gradient or optimizer state, under the name in the full model."""

    name: Hashable
    value: Tensor
    shard: Shard | FlatShard | None
