"""An ordinary optimizer over this rank's shard of a bucket: what ZeRO-1 shards, and all that it needs. Lecture 01."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.shards import LocalTensor
from zero.engine.buckets import Bucket, Segment

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Owned(Segment):
    """What this rank updates of one parameter: `shard` is a parameter of the optimizer, in master precision."""

    shard: nn.Parameter


class ShardOptimizer:
    """`make_optimizer` over one shard of a bucket.

    Any optimizer that treats each element by itself works: SGD, Adam, Lion. One that looks at full matrices needs more:
    see `muon.py`.

    Args:
        index: of the shard.
        weights: that shard of the bucket's weights, in the model's precision.
        make_optimizer: maps parameter groups to an optimizer.
        groups: as torch.optim takes them, of the model's parameters; None for one group of all.
        master: the precision of the update. Where it is not the model's, the optimizer has a copy: master weights.
        host: where the update is made, if not where the weights are; then too it has a copy.

    Raises:
        ValueError: a parameter is in no group.
    """

    def __init__(
        self,
        bucket: Bucket,
        index: int,
        weights: Tensor,
        make_optimizer: MakeOptimizer,
        groups: Sequence[dict[str, Any]] | None,
        master: torch.dtype,
        host: torch.device | None,
    ):
        self._weights = weights
        same = weights.dtype == master and host is None
        self._master = weights if same else weights.to(host or weights.device, master, copy=True)
        self.empty = self._master.new_empty(0)  # as the shards are
        self._rounded: Tensor | None = None  # on the host, in the model's precision: what goes back
        if host is not None:
            if weights.is_cuda:  # only from pinned memory does a copy go on by itself
                self._master = self._master.pin_memory()
            self._rounded = self._master
            if weights.dtype != master:
                self._rounded = torch.empty(weights.shape, dtype=weights.dtype, device=host, pin_memory=weights.is_cuda)
        self.owned = [
            Owned(s.member, s.first, s.end, s.at, nn.Parameter(s.of(self._master))) for s in bucket.segments(index)
        ]
        groups = groups or [{"params": [member.parameter for member in bucket.members]}]
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        if lacking := [member.name for member in bucket.members if member.parameter not in group_of]:
            raise ValueError(f"{lacking[0]} is trained, but in no parameter group; give every trained parameter one")
        shards: list[list[nn.Parameter]] = [[] for _ in groups]
        for each in self.owned:
            shards[group_of[each.member.parameter]].append(each.shard)
        self.optimizer = make_optimizer([group | {"params": own} for group, own in zip(groups, shards, strict=True)])
        if self._master.element_size() >= 4:
            fuse(self.optimizer)

    def set_gradient(self, gradient: Tensor, unused: Iterable[nn.Parameter] = ()) -> None:
        """Give the optimizer the bucket's gradient, this shard of it, but none for parameters that nothing has used."""
        for each in self.owned:
            each.shard.grad = None if each.member.parameter in unused else each.of(gradient).to(each.shard.dtype)

    def step(self) -> None:
        """Update this shard."""
        self.optimizer.step()
        for each in self.owned:
            each.shard.grad = None

    def publish(self) -> None:
        """Round this shard to the model's precision, into the model."""
        if self._rounded is not None:
            if self._rounded is not self._master:
                self._rounded.copy_(self._master)
            self._weights.copy_(self._rounded, non_blocking=True)
        elif self._weights is not self._master:
            self._weights.copy_(self._master)

    def master_weights(self) -> list[LocalTensor]:
        return [LocalTensor(each.member.name, each.shard.detach(), each.mark) for each in self.owned]

    def states(self) -> list[LocalTensor]:
        """Named (parameter, key)."""
        return [
            LocalTensor((each.member.name, key), value, each.mark if value.dim() else None)
            for each in self.owned
            for key, value in self.optimizer.state[each.shard].items()
        ]

    def tensors(self) -> list[Tensor]:
        """What it holds besides the model's weights: its copy of them, if it has one, and its state."""
        copies = [c for c in (self._master, self._rounded) if c is not None and c is not self._weights]
        return copies + [value for state in self.optimizer.state.values() for value in state.values() if value.dim()]


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Where torch has a fused update of this kind and was left the choice, take it: one pass over memory, not ten."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            continue  # its fused form knows no parameter that is first used in a later step
        left = "fused" in group and group["fused"] is None and group.get("foreach") is None
        if left and not group.get("differentiable"):
            group["fused"] = True
