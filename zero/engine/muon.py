"""Muon for shards of any kind: ZeRO's, tensor parallelism's and experts' at once. Lecture 01; 2502.16982, section 2.3.

What it adds to the plain version in `muon.py`: buckets; weights that tp or etp have sharded along rows or columns, or
that all ranks hold (data parallelism, routers), or each shard of which several hold (keys and values, of fewer heads
than ranks); and experts, of whose stacked weights each is a matrix of its own. All ranks that hold elements of a layer,
tp x cp x dp of them (for experts etp x edp), are one group, over which the matrices are dealt: one all-to-all takes
every update to its owner, one takes every direction back. What several ranks hold, the one sends to the owner that
differs from it in nothing else.

O and I rows and columns of a full matrix, T ranks of the group that shard a matrix itself, D shards of a bucket
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT
from core.shards import shard_of
from zero.engine.buckets import Bucket, Member
from zero.engine.optimizer import Owned, ShardOptimizer
from zero.newton_schulz import MuonSettings, deal, direction, flops, is_matrix


class Muon(torch.optim.AdamW):
    """AdamW, and for groups with `muon` a step along the gradients, which have been made directions by `Matrices`."""

    def __init__(self, groups: Sequence[dict[str, Any]], momentum: float = MuonSettings().momentum, **adamw: Any):
        super().__init__(groups, **adamw)
        for group in self.param_groups:
            if group.setdefault("muon", False):
                group.setdefault("momentum", momentum)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For `load_state_dict`. AdamW's own looks for a count of steps in every state, to mend those of old torch."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def nesterov(self) -> dict[nn.Parameter, Tensor]:
        """The update of every shard of a matrix that has a gradient; counts that in its momentum."""
        found = {}
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    found[p] = p.grad.lerp(state["momentum_buffer"], group["momentum"])
        return found

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad, alpha=group["lr"])
                    p.grad = None  # not for AdamW
        super().step(closure)


def split_groups(model: nn.Module, groups: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Parameter groups as they are, each as two: Muon's matrices, and the rest."""
    names = {p: name for name, p in model.named_parameters()}
    found = []
    for group in groups or [{"params": list(names)}]:
        for muon in (True, False):
            params = [p for p in group["params"] if is_matrix(names[p], p) == muon]
            found.append(group | {"params": params, "muon": muon})
    return found


def options_of(
    model: GPT, settings: MuonSettings, group: Axis, inner: int = 1, groups: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """What an `Engine` over an optimizer `Muon` needs. `group`, `inner`: see `Matrices`; `groups`: to be split."""
    make = partial(Matrices, group=group, inner=inner, head_size=model.config.head_dim, settings=settings)
    return {"groups": split_groups(model, groups), "before_update": make}


@dataclass(frozen=True)
class Matrix:
    """What is orthogonalised by itself: a weight, or one expert's of a stack; here, this rank's shard of it."""

    bucket: Bucket
    member: Member
    start: int  # in the bucket's buffer
    shape: tuple[int, int]  # of the shard that tp leaves, (O, I/C), (O/C, I) or (O, I)
    dim: int  # along which the T ranks shard it
    count: int  # C, of their different shards: T, or 1 where they all hold it, or between
    head_size: int  # of fused queries, keys and values, else 0

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def held(self, shard: int) -> tuple[int, int]:
        """Which elements, first and end, of the flattened matrix a shard of the bucket has."""
        length = self.bucket.length
        first, end = (min(max(at, self.start), self.start + self.size) for at in (shard * length, (shard + 1) * length))
        return first - self.start, end - self.start


def matrices_of(bucket: Bucket, inner: int, head_size: int) -> list[Matrix]:
    """Args: inner: T. head_size: of the model's attention."""
    found = []
    for member in bucket.members:
        if not is_matrix(member.name, member.parameter):
            continue
        *stacked, rows, columns = member.parameter.shape
        mark = shard_of(member.parameter) if inner > 1 else None
        dim, count = (0, 1) if mark is None else (mark.dim - len(stacked), mark.count)
        assert mark is None or (inner % count == 0 and mark.length * count == mark.size), f"{member.name}: {mark}"
        d = head_size if member.name.endswith("qkv.weight") else 0
        for k in range(stacked[0] if stacked else 1):
            found.append(Matrix(bucket, member, member.start + k * rows * columns, (rows, columns), dim, count, d))
    return found


class Matrices:
    """Makes of the gradients of Muon's shards their part of the full matrices' directions.

    Args:
        group: all ranks that hold elements of these matrices; those that shard a matrix itself are neighbours in it.
        inner: T, their number.
        sharded: whether the other ranks have different shards of each bucket, or all the same.
        head_size: of the model's attention.
    """

    def __init__(
        self, optimizers: Sequence[ShardOptimizer], buckets: Sequence[Bucket], sharded: bool, *,
        group: Axis, inner: int, head_size: int, settings: MuonSettings,
    ):  # fmt: skip
        self.group, self.inner, self.sharded, self.settings = replace(group, name="muon"), inner, sharded, settings
        self.optimizers = optimizers
        self.shards: dict[str, Owned] = {each.member.name: each for o in optimizers for each in o.owned}
        matrices = [m for bucket in buckets for m in matrices_of(bucket, inner, head_size)]
        owners = deal([flops(self.full_shape(m), m.head_size, settings.steps) for m in matrices], group.size)
        self.owned = [[m for m, owner in zip(matrices, owners, strict=True) if owner == r] for r in range(group.size)]

    def full_shape(self, matrix: Matrix) -> tuple[int, int]:
        rows, columns = matrix.shape
        return (rows * matrix.count, columns) if matrix.dim == 0 else (rows, columns * matrix.count)

    def place(self, matrix: Matrix, rank: int) -> tuple[int, int]:
        """Which shard of the matrix a rank of the group has of tp, and which copy of that: neighbours have the same."""
        return divmod(rank % self.inner, self.inner // matrix.count)

    def held(self, matrix: Matrix, rank: int) -> tuple[int, int]:
        """Which elements of the shard of tp a rank of the group has."""
        return matrix.held(rank // self.inner if self.sharded else 0)

    def sent(self, matrix: Matrix, rank: int, owner: int) -> int:
        """How many elements a rank sends to the owner: none, where another has the same and is nearer to it."""
        same_copy = self.place(matrix, rank)[1] == self.place(matrix, owner)[1]
        same_outer = rank // self.inner == owner // self.inner
        first, end = self.held(matrix, rank)
        return (end - first) * (same_copy and (self.sharded or same_outer))

    @torch.no_grad()
    def __call__(self) -> None:
        """Between the gradients and the optimizers' steps. All ranks of the group call it."""
        if not any(self.owned):
            return
        updates: dict[nn.Parameter, Tensor] = {}
        for optimizer in self.optimizers:
            updates |= optimizer.optimizer.nesterov()
        full = self.to_owners(updates)
        self.to_shards([direction(each, m.head_size, self.settings) for each, m in zip(full, self.mine, strict=True)])

    @property
    def mine(self) -> list[Matrix]:
        return self.owned[self.group.index]

    def to_owners(self, updates: dict[nn.Parameter, Tensor]) -> list[Tensor]:
        """The full updates of this rank's matrices, (O, I) each; zeros where there was no gradient."""
        me, ranks = self.group.index, range(self.group.size)
        pieces = [self.optimizers[0].empty]
        for owner in ranks:
            pieces += [self.piece(m, updates) for m in self.owned[owner] if self.sent(m, me, owner)]
        send = [sum(self.sent(m, me, owner) for m in self.owned[owner]) for owner in ranks]
        sizes = [[self.sent(m, rank, me) for m in self.mine] for rank in ranks]
        received = comm.all_to_all(torch.cat(pieces), self.group, send, [sum(each) for each in sizes])
        parts = received.split([n for each in sizes for n in each])
        return [self.full(m, parts[k :: len(self.mine)]) for k, m in enumerate(self.mine)]

    def full(self, matrix: Matrix, parts: Sequence[Tensor]) -> Tensor:
        """A matrix from what each rank of the group has sent of it: D parts of each of C flat shards, or nothing."""
        by_shard: list[list[Tensor]] = [[] for _ in range(matrix.count)]
        for rank, part in enumerate(parts):
            by_shard[self.place(matrix, rank)[0]].append(part)
        return torch.cat([torch.cat(each).view(matrix.shape) for each in by_shard], matrix.dim)

    def to_shards(self, directions: Sequence[Tensor]) -> None:
        """Into the gradients of all ranks' shards."""
        me, ranks = self.group.index, range(self.group.size)
        shards = [full.chunk(m.count, m.dim) for m, full in zip(self.mine, directions, strict=True)]
        flat = [[shard.flatten() for shard in each] for each in shards]
        pieces = [self.optimizers[0].empty]
        for rank in ranks:  # to every copy
            pieces += [
                of[self.place(m, rank)[0]][slice(*self.held(m, rank))] for m, of in zip(self.mine, flat, strict=True)
            ]
        send = [sum(self.count(m, rank) for m in self.mine) for rank in ranks]
        sizes = [[self.count(m, me) for m in each] for each in self.owned]
        received = comm.all_to_all(torch.cat(pieces), self.group, send, [sum(each) for each in sizes])
        parts = iter(received.split([n for each in sizes for n in each]))
        for m in (m for each in self.owned for m in each):
            part = next(parts)
            if len(part) and (shard := self.shards[m.member.name].shard).grad is not None:
                shard.grad[self.where(m)] = part

    def count(self, matrix: Matrix, rank: int) -> int:
        first, end = self.held(matrix, rank)
        return end - first

    def where(self, matrix: Matrix) -> slice:
        """Where this rank's elements of a matrix are in its shard of the weight."""
        offset = matrix.start - matrix.member.start - self.shards[matrix.member.name].first
        first, end = self.held(matrix, self.group.index)
        return slice(first + offset, end + offset)

    def piece(self, matrix: Matrix, updates: dict[nn.Parameter, Tensor]) -> Tensor:
        shard = self.shards[matrix.member.name].shard
        return (updates[shard] if shard in updates else torch.zeros_like(shard))[self.where(matrix)]
