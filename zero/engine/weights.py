"""Full weights on every rank: data parallelism, ZeRO-1 and 2. Lecture 01. Those of ZeRO-3 are in `gathered.py`."""

from collections.abc import Sequence

from core import comm
from core.mesh import Axis
from core.shards import LocalTensor, shard_of
from zero.engine.buckets import Bucket
from zero.engine.parts import Action, Named


class ReplicatedWeights:
    """Full weights on every rank, in one buffer a bucket.

    Args:
        named: these parameters, trained or not.
        sharded: whether each rank updates a shard only, so that an update must be gathered.
    """

    def __init__(self, named: Named, buckets: list[Bucket], axis: Axis, sharded: bool):
        self.named, self.buckets, self.axis, self.sharded = named, buckets, axis, sharded
        self._full = [bucket.flatten_weights() for bucket in buckets]
        index = axis.index if sharded else 0
        self.own = [flat[bucket.shard(index)] for bucket, flat in zip(buckets, self._full, strict=True)]
        self.in_flight: list[comm.Pending] = []

    def gather(self, i: int) -> None:
        """Start to gather the other ranks' shards of bucket i, of which this rank's is updated."""
        if self.sharded:
            self.in_flight.append(comm.all_gather_in_place_async(self._full[i], self.axis))

    def wait(self) -> None:
        for pending in self.in_flight:
            pending.wait()
        self.in_flight.clear()

    def local_tensors(self) -> list[LocalTensor]:
        return [LocalTensor(name, p.detach(), shard_of(p)) for name, p in self.named]

    # Under a pipeline there is nothing to do: the weights are here.

    def begin_forward(self, part: int, then: Sequence[Action]) -> None: ...

    def end_forward(self) -> None: ...

    def begin_backward(self, part: int, then: Sequence[Action]) -> None: ...

    def end_backward(self) -> None: ...

    def release(self) -> None: ...
