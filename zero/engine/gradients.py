"""Where gradients are added up, and how they are summed over the ranks: full, or this rank's shard only. Lecture 01."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from zero.engine.buckets import Bucket


class FullGradients:
    """Data parallelism and ZeRO-1: full gradients, added up over the micro-batches; the last one reduces the sum.

    Args:
        scatter: reduce-scatter and keep this rank's shard, in place of an all-reduce.
    """

    every_microbatch = False  # only the last one launches collectives

    def __init__(self, buckets: list[Bucket], axis: Axis, scatter: bool):
        self.axis, self.scatter = axis, scatter
        self.used: set[nn.Parameter] = set()  # what got a gradient in this step
        self._full = [bucket.flatten_gradients() for bucket in buckets]
        self.own = self._full  # after the last micro-batch: summed over the ranks
        if scatter:
            self.own = [flat[bucket.shard(axis.index)] for bucket, flat in zip(buckets, self._full, strict=True)]
        self._in_flight: list[comm.Pending] = []

    def zero(self) -> None:
        for flat in self._full:
            flat.zero_()

    def launch(self, i: int) -> None:
        """Start to sum bucket i, whose gradients are complete, over the ranks."""
        start = comm.reduce_scatter_async if self.scatter else comm.all_reduce_async
        self._in_flight.append(start(self._full[i], self.axis))

    def wait(self) -> None:
        """Until all that was launched is in `own`."""
        for own, pending in zip(self.own, self._in_flight, strict=True):
            own.copy_(pending.wait())
        self._in_flight.clear()


class Shards(Protocol):
    """Where this rank's shards of the gradients are added up."""

    own: list[Tensor]

    def add(self, i: int, gradient: Tensor) -> None: ...

    def wait(self) -> None: ...


class DeviceShards:
    """Beside the model."""

    def __init__(self, buckets: list[Bucket]):
        self.own = [torch.zeros(bucket.length, dtype=bucket.gradient_dtype, device=bucket.device) for bucket in buckets]

    def add(self, i: int, gradient: Tensor) -> None:
        self.own[i] += gradient

    def wait(self) -> None:
        """Nothing is in flight."""


def reduce_scatter(flat: Tensor, axis: Axis) -> comm.Pending:
    return comm.reduce_scatter_async(flat, axis)


class ShardedGradients:
    """ZeRO-2 and 3: every micro-batch reduces and scatters each bucket, and frees it; this rank's shard stays.

    Args:
        shards: where they are added up.
        reduce: how a bucket is reduced; ZeRO++ does it otherwise.
    """

    every_microbatch = True  # there is nowhere to keep a sum of full gradients

    def __init__(
        self,
        buckets: list[Bucket],
        axis: Axis,
        shards: Shards,
        reduce: Callable[[Tensor, Axis], comm.Pending] = reduce_scatter,
    ):
        self.buckets, self.axis, self.shards, self.reduce = buckets, axis, shards, reduce
        self.used: set[nn.Parameter] = set()
        self.own = shards.own
        self._in_flight: list[tuple[int, comm.Pending]] = []

    def zero(self) -> None:
        for shard in self.own:
            shard.zero_()

    def launch(self, i: int) -> None:
        """Start to sum bucket i, whose gradients are complete, over the ranks; the parameters lose theirs."""
        self._arrived(but=1)  # at most two buckets of full gradients at a time
        self.used |= {m.parameter for m in self.buckets[i].members if m.parameter.grad is not None}
        flat = self.buckets[i].take_gradients()
        self._in_flight.append((i, self.reduce(flat, self.axis)))

    def wait(self) -> None:
        """Until all that was launched is in `own`."""
        self._arrived(but=0)
        self.shards.wait()

    def _arrived(self, but: int) -> None:
        """Add to this rank's shards what has been reduced, `but` for the last so many buckets."""
        while len(self._in_flight) > but:
            i, pending = self._in_flight.pop(0)
            self.shards.add(i, pending.wait())
