"""Buckets: a few parameters in one flat buffer of N equal shards, and when each may leave in backward. Lecture 01.

What it adds to the one flat buffer of the plain versions: gradients are reduced bucket by bucket, while backward still
computes those of the layers before. Li et al. 2020 (2006.15704), section 3.2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.shards import FlatShard, LocalTensor, shard_of
from zero.engine.parts import Users

BUCKET_ELEMENTS = 2**22  # enough that a message's latency does not count, few enough that backward overlaps


@dataclass(frozen=True)
class Member:
    """A parameter of a bucket, and where it starts in the buffer."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        """This parameter in a buffer that holds the bucket."""
        return flat[self.start : self.stop].view(self.parameter.shape)


@dataclass(frozen=True)
class Segment:
    """Elements first:end of a flattened parameter, which are in one shard of its bucket."""

    member: Member
    first: int
    end: int
    at: int  # where they begin in the shard

    def of(self, shard: Tensor) -> Tensor:
        """A view of these elements."""
        return shard[self.at : self.at + self.end - self.first]

    @property
    def mark(self) -> FlatShard:
        return FlatShard(self.first, self.end, self.member.parameter.shape, shard_of(self.member.parameter))


class Bucket:
    """Parameters of one data type in one flat buffer of `count` equal shards, the last of them padded.

    Raises:
        ValueError: they differ in data type or device.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], count: int):
        self.members: list[Member] = []
        self.size = 0  # without padding
        for name, parameter in named:
            self.members.append(Member(name, parameter, self.size))
            self.size += parameter.numel()
        self.length = -(-self.size // count)  # of a shard
        self.padded = self.length * count
        kinds = {(m.parameter.dtype, m.parameter.device) for m in self.members}
        if len(kinds) > 1:
            raise ValueError(f"{self.members[0].name} and what is sent with it differ in data type or device: {kinds}")
        ((self.dtype, self.device),) = kinds
        self.gradient_dtype = self.members[0].parameter.grad_dtype  # in which gradients are added up and reduced

    def shard(self, index: int) -> slice:
        """Where shard `index` is in the buffer."""
        return slice(index * self.length, (index + 1) * self.length)

    def segments(self, index: int) -> Iterator[Segment]:
        """What shard `index` has of each parameter."""
        shard = self.shard(index)
        for member in self.members:
            first, end = max(member.start, shard.start), min(member.stop, shard.stop)
            if first < end:
                yield Segment(member, first - member.start, end - member.start, first - shard.start)

    def local_tensors(self, index: int, shard: Tensor) -> list[LocalTensor]:
        """Views of what shard `index` has, by parameter."""
        return [LocalTensor(s.member.name, s.of(shard), s.mark) for s in self.segments(index)]

    def flatten_weights(self) -> Tensor:
        """Move the parameters into one buffer, of which they become views."""
        flat = torch.zeros(self.padded, dtype=self.dtype, device=self.device)
        for member in self.members:
            member.view(flat).copy_(member.parameter.detach())
            member.parameter.data = member.view(flat)
        return flat

    def flatten_gradients(self, axis: Axis | None = None) -> Tensor:
        """One buffer for the gradients, into which autograd adds: each parameter's `.grad` becomes a view of it.

        Args:
            axis: over which it is to be scattered.
        """
        flat = self._for_gradients(axis).zero_()
        for member in self.members:
            member.parameter.grad = member.view(flat)
        return flat

    def take_gradients(self, axis: Axis | None = None) -> Tensor:
        """The gradients in a new buffer, zeros where there are none. The parameters lose theirs, one after another.

        Args:
            axis: over which it is to be scattered as it is.
        """
        flat = self._for_gradients(axis)
        flat[self.size :] = 0.0
        for member in self.members:
            gradient, member.parameter.grad = member.parameter.grad, None
            if gradient is None:
                member.view(flat).zero_()
            else:
                member.view(flat).copy_(gradient)
        return flat

    def _for_gradients(self, axis: Axis | None) -> Tensor:
        if axis is None:
            return torch.empty(self.padded, dtype=self.gradient_dtype, device=self.device)
        return comm.empty(self.padded, self.gradient_dtype, self.device, axis)


def buckets_of(named: Iterable[tuple[str, nn.Parameter]], count: int, elements: int) -> list[Bucket]:
    """The trained ones of these parameters in buckets of about `elements`, the last layer first, as backward finishes
    them.

    One without elements is left out: it has nothing to train.
    """
    named = [(n, p) for n, p in named if p.requires_grad and p.numel()]
    filled: list[list[tuple[str, nn.Parameter]]] = []
    room = 0
    for name, p in reversed(named):
        fits = filled and p.numel() <= room and p.dtype == filled[-1][0][1].dtype
        if not fits:
            filled.append([])
            room = elements
        filled[-1].append((name, p))
        room -= p.numel()
    return [Bucket(members, count) for members in filled]


class InOrder:
    """Calls `launch(i)` in backward, once the gradients of bucket i are complete and all before it are launched.

    In order, because ranks must launch the same collectives in the same order, and where a parameter is not used on
    every rank they would not complete in the same order.

    Args:
        users: of each bucket the parts of the model that use it.
        arrived: called with each parameter that gets a gradient, before its bucket is launched.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        users: Sequence[Users],
        launch: Callable[[int], None],
        arrived: Callable[[nn.Parameter], None],
    ):
        self.launch = launch
        self._arrived, self._users = arrived, users
        self._sizes = [len(bucket.members) for bucket in buckets]
        self._watched: list[int] = []  # the buckets of a backward, in the order in which they are launched
        self._missing: list[int] = []  # while it is watched: gradients still to come, of each of those
        self._next = 0
        # Weakly: Python's collector does not see that a parameter holds a hook, and would never free either.
        complete = WeakMethod(self._complete)
        for i, bucket in enumerate(buckets):
            for member in bucket.members:
                member.parameter.register_post_accumulate_grad_hook(
                    lambda p, i=i: (alive := complete()) and alive(i, p)
                )

    def watch(self, part: int | None = None) -> None:
        """A backward comes, of this part of the model, or of all of it."""
        self._watched, self._missing, self._next = self._of(part), [], 0
        self._missing = [self._sizes[i] for i in self._watched]

    def _of(self, part: int | None) -> list[int]:
        """The buckets of a part; last what others use as well, which may be at either end of it."""
        mine = [i for i, users in enumerate(self._users) if part is None or part in users]
        return sorted(mine, key=lambda i: len(self._users[i]))

    def _complete(self, i: int, parameter: nn.Parameter) -> None:
        self._arrived(parameter)
        if self._missing:
            self._missing[self._watched.index(i)] -= 1
            while self._next < len(self._missing) and not self._missing[self._next]:
                self._launch_next()

    def finish(self) -> None:
        """After the backward: launch what is left, because some of its parameters were not used."""
        while self._next < len(self._missing):
            self._launch_next()
        self._missing = []

    def reduce(self, part: int) -> None:
        """Launch all buckets of a part, whose backward came in pieces."""
        for i in self._of(part):
            self.launch(i, at_once=len(self._users))

    def _launch_next(self) -> None:
        self._next += 1
        self.launch(self._watched[self._next - 1])
