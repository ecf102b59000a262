"""Which part of a whole parameter a rank holds, and the whole again from all parts."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.mesh import Axis


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of a tensor along `dim`, whose whole `size` need not be a multiple.

    What is missing to a multiple is padding: zeros at the end of the last part or parts.
    """

    dim: int  # from the front, so not negative
    index: int
    count: int
    size: int  # of the whole along dim, without padding
    within: "Shard | None" = None  # where that whole is itself a part

    @property
    def length(self) -> int:
        """Of every part along `dim`, padding included."""
        return -(-self.size // self.count)

    @property
    def start(self) -> int:
        """The place of this part in the whole."""
        return self.index * self.length

    @property
    def held(self) -> int:
        """Of this part along `dim`, without padding."""
        return min(max(self.size - self.start, 0), self.length)

    def whole_shape(self, part: torch.Size) -> torch.Size:
        shape = torch.Size([*part[: self.dim], self.size, *part[self.dim + 1 :]])
        return self.within.whole_shape(shape) if self.within else shape

    def part(self, whole: Tensor) -> Tensor:
        """This part of `whole`, with storage of its own."""
        if self.within:
            whole = self.within.part(whole)
        here = whole.narrow(self.dim, min(self.start, self.size), self.held)
        shape = list(whole.shape)
        shape[self.dim] = self.length - self.held
        return torch.cat([here, whole.new_zeros(shape)], self.dim)


def shard(parameter: nn.Parameter, dim: int, axis: Axis) -> nn.Parameter:
    """This rank's part of `parameter` (on the meta device or not), marked so that `shard_of` knows."""
    mark = Shard(dim, axis.index, axis.size, parameter.shape[dim])
    part = nn.Parameter(mark.part(parameter.detach()), parameter.requires_grad)
    part.shard = replace(mark, within=shard_of(parameter))
    return part


def shard_of(parameter: Tensor) -> Shard | None:
    """How `parameter` was cut; None for one that every rank holds whole."""
    return getattr(parameter, "shard", None)


def counted_once(parameters: Iterable[nn.Parameter], axis: Axis) -> list[Tensor]:
    """The gradients this rank adds to the global norm: its parts, and on the first rank also what all ranks hold."""
    return [p.grad for p in parameters if p.grad is not None and (shard_of(p) or axis.index == 0)]


@dataclass(frozen=True)
class Segment:
    """Elements first:end of a tensor of `shape`, flattened."""

    first: int
    end: int
    shape: torch.Size
    within: Shard | None = None  # where that tensor is itself a part


class Piece(NamedTuple):
    """What one rank holds of a parameter, or of its gradient or optimizer state, under the name in the whole model."""

    name: Hashable
    value: Tensor
    shard: Shard | Segment | None


def join(pieces: Iterable[Piece]) -> Iterator[tuple[Hashable, Tensor]]:
    """The whole tensors. What several ranks hold comes several times; what lacks a part does not come at all."""
    parts: dict[tuple[Hashable, Shard], list[list[Tensor]]] = {}  # by what they are parts of
    segments: dict[tuple[Hashable, Shard | None], list[Piece]] = {}
    for piece in pieces:
        name, value, mark = piece
        if mark is None:
            yield name, value
        elif isinstance(mark, Segment):
            segments.setdefault((name, mark.within), []).append(piece)
        else:
            fellows = parts.setdefault((name, replace(mark, index=0)), [[] for _ in range(mark.count)])
            fellows[mark.index].append(value)
    larger: list[Piece] = []
    for (name, mark), copies in parts.items():
        for whole in zip(*copies):  # noqa: B905  a part without its fellows is left out
            larger.append(Piece(name, torch.cat(whole, mark.dim).narrow(mark.dim, 0, mark.size), mark.within))
    for (name, within), found in segments.items():
        starts: dict[int, list[Piece]] = {}
        for piece in found:
            starts.setdefault(piece.shard.first, []).append(piece)
        shape = found[0].shard.shape
        while starts.get(0):  # one copy after another, which need not be cut at the same places
            copy, at = [], 0
            while starts.get(at):
                copy.append(starts[at].pop())
                at = copy[-1].shard.end
            if at == shape.numel():
                larger.append(Piece(name, torch.cat([piece.value.flatten() for piece in copy]).view(shape), within))
    if larger:
        yield from join(larger)
