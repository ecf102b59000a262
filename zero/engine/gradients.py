"""Where gradients are added up, and how they are summed over the ranks: full, or this rank's shard only. Lecture 01."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from zero.engine.buckets import Bucket
from zero.engine.parts import Users


class Gradients:
    """When a bucket is to be summed over the ranks.

    Args:
        users: of each bucket the parts of the model that use it.
        every: in every micro-batch; or once, when no part that uses it will add to it.
    """

    def __init__(self, users: Sequence[Users], every: bool):
        self.users, self.every = users, every
        self.finishing: set[int] = set()  # the parts whose last backward of this step goes on, or is done
        self.used: set[nn.Parameter] = set()  # what got a gradient in this step
        self.in_flight: list[tuple[int, comm.Pending]] = []

    def zero(self) -> None:
        """A step begins. What one that failed has left in flight arrives first, and all of it is forgotten."""
        for _, pending in self.in_flight:
            pending.wait()
        self.in_flight.clear()
        self.finishing, self.used = set(), set()

    def complete(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter has been added to, in backward."""
        self.used.add(parameter)

    def due(self, i: int) -> bool:
        return self.every or self.finishing.issuperset(self.users[i])


class FullGradients(Gradients):
    """Data parallelism and ZeRO-1: full gradients, added up over the micro-batches; the last one reduces the sum.

    Args:
        scatter: reduce-scatter and keep this rank's shard, in place of an all-reduce.
        first: whether the first gradient of a step is copied, and not added to zeros: where it is told of each one.
    """

    def __init__(self, buckets: list[Bucket], users: Sequence[Users], axis: Axis, scatter: bool, first: bool):
        super().__init__(users, every=False)
        self.axis, self.scatter, self.first, self.buckets = axis, scatter, first, buckets
        self._full = [bucket.flatten_gradients(axis if scatter else None) for bucket in buckets]
        self.own = self._full  # after the last micro-batch: summed over the ranks
        if scatter:
            self.own = [flat[bucket.shard(axis.index)] for bucket, flat in zip(buckets, self._full, strict=True)]
        self._views = {m.parameter: m.parameter.grad for bucket in buckets for m in bucket.members}

    def zero(self) -> None:
        super().zero()
        for flat in self._full if self.scatter else ():
            comm.wait_until_read(flat, self.axis)
        if self.first:
            for parameter in self._views:
                parameter.grad = None
        else:
            for flat in self._full:
                flat.zero_()

    def complete(self, parameter: nn.Parameter) -> None:
        super().complete(parameter)
        view = self._views[parameter]
        if parameter.grad is None:  # put off: a split backward adds it later
            parameter.grad = view.zero_()
        elif parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)

    def launch(self, i: int, at_once: int = 0) -> None:
        """Start to sum bucket i, if its gradients are complete, over the ranks."""
        if self.due(i):
            for member in self.buckets[i].members:
                if member.parameter.grad is None:  # not used
                    member.parameter.grad = self._views[member.parameter].zero_()
            start = comm.reduce_scatter_async if self.scatter else partial(comm.all_reduce_async, in_order=True)
            self.in_flight.append((i, start(self._full[i], self.axis)))

    def make_room(self) -> None:
        """They have memory of their own."""

    def wait(self) -> None:
        """Until all that was launched is in `own`."""
        for i, pending in self.in_flight:
            self.own[i].copy_(pending.wait())
        self.in_flight.clear()


class Shards(Protocol):
    """Where this rank's shards of the gradients are added up."""

    @property
    def own(self) -> list[Tensor]: ...

    def zero(self) -> None: ...

    def add(self, i: int, gradient: Tensor) -> None: ...

    def wait(self) -> None: ...


class DeviceShards:
    """Beside the model. There is none before the first sum of a step, which becomes it: forward has the memory."""

    def __init__(self, buckets: list[Bucket]):
        self._buckets = buckets
        self._own: list[Tensor | None] = [None] * len(buckets)

    @property
    def own(self) -> list[Tensor]:
        """Zeros where nothing has been added in this step."""
        for i, bucket in enumerate(self._buckets):
            if self._own[i] is None:
                self._own[i] = torch.zeros(bucket.length, dtype=bucket.gradient_dtype, device=bucket.device)
        return self._own

    def zero(self) -> None:
        self._own = [None] * len(self._buckets)

    def add(self, i: int, gradient: Tensor) -> None:
        if self._own[i] is None:
            self._own[i] = gradient
        else:
            self._own[i] += gradient

    def wait(self) -> None:
        """Nothing is in flight."""


def reduce_scatter(flat: Tensor, axis: Axis) -> comm.Pending:
    return comm.reduce_scatter_async(flat, axis)


class ShardedGradients(Gradients):
    """ZeRO-2 and 3: each bucket is reduced, scattered and freed; this rank's shard stays.

    Args:
        shards: where they are added up.
        every: in every micro-batch; or once a step, until which autograd adds up full gradients.
        reduce: how a bucket is reduced; ZeRO++ does it otherwise.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        users: Sequence[Users],
        axis: Axis,
        shards: Shards,
        every: bool = True,
        reduce: Callable[[Tensor, Axis], comm.Pending] = reduce_scatter,
    ):
        super().__init__(users, every)
        self.buckets, self.axis, self.shards, self.reduce = buckets, axis, shards, reduce

    @property
    def own(self) -> list[Tensor]:
        return self.shards.own

    def zero(self) -> None:
        super().zero()
        for bucket in self.buckets:
            for member in bucket.members:
                member.parameter.grad = None
        self.shards.zero()

    def launch(self, i: int, at_once: int = 2) -> None:
        """Start to sum bucket i, if its gradients are complete, over the ranks; the parameters lose theirs.

        Args:
            at_once: the most buckets of full gradients in flight.
        """
        if not self.due(i):
            return
        self._arrived(but=at_once - 1)
        self.used |= {m.parameter for m in self.buckets[i].members if m.parameter.grad is not None}
        flat = self.buckets[i].take_gradients(self.axis if self.reduce is reduce_scatter else None)
        self.in_flight.append((i, self.reduce(flat, self.axis)))

    def make_room(self) -> None:
        """Before many buckets are launched at once: what is in flight arrives, lest full gradients pile up."""
        if self.every:
            self._arrived(but=0)

    def wait(self) -> None:
        """Until all that was launched is in `own`."""
        self._arrived(but=0)
        self.shards.wait()

    def _arrived(self, but: int) -> None:
        """Add to this rank's shards what has been reduced, `but` for the last so many buckets."""
        while len(self.in_flight) > but:
            i, pending = self.in_flight.pop(0)
            self.shards.add(i, pending.wait())
