"""An ordinary optimizer over a part of the parameters: what ZeRO-1 shards, and all that it needs. Lecture 01."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zero.flat import Bucket, Member

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Owned:
    """Elements first:end of a parameter, flattened, that this rank updates, as a parameter of the optimizer."""

    member: Member
    first: int
    end: int
    at: int  # where they are in this rank's part of the bucket
    piece: nn.Parameter  # in master precision


class PartOptimizer:
    """`make_optimizer` over this rank's part of each bucket.

    Any optimizer that treats each element by itself works: SGD, Adam, Lion; not one that looks at a whole matrix.

    Args:
        index: the part of each bucket.
        weights: that part of each bucket's weights, in the model's precision.
        make_optimizer: maps parameter groups to an optimizer.
        groups: as torch.optim takes them, of the model's parameters; None for one group of all.
        master: the precision of the update. Where it is not the model's, the optimizer has a copy of the weights.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        index: int,
        weights: Sequence[Tensor],
        make_optimizer: MakeOptimizer,
        groups: Sequence[dict[str, Any]] | None,
        master: torch.dtype,
    ):
        self._weights = weights
        self._master = [part if part.dtype == master else part.to(master) for part in weights]
        groups = groups or [{"params": [member.parameter for bucket in buckets for member in bucket.members]}]
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        owned: list[list[Owned]] = []
        for bucket, flat in zip(buckets, self._master, strict=True):
            owned.append([
                Owned(member, first, end, at, nn.Parameter(flat[at : at + end - first]))
                for member, first, end, at in bucket.in_part(index)
            ])  # fmt: skip
        self._owned = owned
        pieces: list[list[nn.Parameter]] = [[] for _ in groups]
        for each in self.owned():
            pieces[group_of[each.member.parameter]].append(each.piece)
        self.optimizer = make_optimizer([group | {"params": own} for group, own in zip(groups, pieces, strict=True)])

    def owned(self) -> Iterator[Owned]:
        return (each for bucket in self._owned for each in bucket)

    @property
    def pieces(self) -> list[nn.Parameter]:
        return [each.piece for each in self.owned()]

    def take_gradients(self, parts: Sequence[Tensor]) -> None:
        """Give the optimizer this rank's part of each bucket's gradients."""
        for owned, part in zip(self._owned, parts, strict=True):
            for each in owned:
                each.piece.grad = part[each.at : each.at + each.end - each.first].to(each.piece.dtype)

    def drop(self, unused: set[nn.Parameter]) -> None:
        """Take the gradients of these parameters of the model away again."""
        for each in self.owned():
            if each.member.parameter in unused:
                each.piece.grad = None

    def tensors(self) -> list[Tensor]:
        """What the optimizer holds besides the model's weights: its copy of them, if it has one, and its state."""
        copies = [own for own, weights in zip(self._master, self._weights, strict=True) if own is not weights]
        return copies + [value for state in self.optimizer.state.values() for value in state.values() if value.dim()]

    def step(self) -> None:
        """Update, and round to the model's precision. The other ranks' weights are theirs to bring."""
        self.optimizer.step()
        for weights, master in zip(self._weights, self._master, strict=True):
            if weights is not master:
                weights.copy_(master)
        for piece in self.pieces:
            piece.grad = None
