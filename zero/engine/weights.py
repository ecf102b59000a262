"""Where the weights are: replicated on every rank (data parallelism, ZeRO-1 and 2), or gathered when needed (ZeRO-3).

What it adds to the plain version of ZeRO-3: a layer computes while the weights of the next one arrive, and while the
gradients of the one before leave. Nothing is recomputed: what is freed is the storage behind the weights that autograd
has saved, and it is filled again before their backward.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.shards import LocalTensor, shard_of
from zero.engine.buckets import Bucket

Named = Sequence[tuple[str, nn.Parameter]]


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


class Unit:
    """What is gathered and freed together: a layer, or all that is in no layer."""

    def __init__(self, named: Named, axis: Axis):
        self.axis = axis
        trained = [(n, p) for n, p in named if p.requires_grad and p.numel()]
        frozen = [(n, p) for n, p in named if not p.requires_grad and p.numel()]
        self.trained = Bucket(trained, axis.size) if trained else None
        buckets = [self.trained, Bucket(frozen, axis.size) if frozen else None]
        self.buckets = [bucket for bucket in buckets if bucket]
        self.full = [bucket.flatten_weights() for bucket in self.buckets]
        self.own = [f[b.shard(axis.index)].clone() for b, f in zip(self.buckets, self.full, strict=True)]
        self.in_flight: list[comm.Pending] = []
        self.free()

    def gather(self, forward: bool) -> None:
        """Start to gather the other ranks' shards. The parameters are views of the buffers that fill."""
        self.allocate()
        for bucket, flat, own in zip(self.buckets, self.full, self.own, strict=True):
            flat[bucket.shard(self.axis.index)].copy_(own)
            self.in_flight.append(comm.all_gather_in_place_async(flat, self.axis))

    def allocate(self) -> None:
        for bucket, flat in zip(self.buckets, self.full, strict=True):
            flat.untyped_storage().resize_(bucket.padded * bucket.dtype.itemsize)

    def wait(self) -> None:
        for pending in self.in_flight:
            pending.wait()
        self.in_flight.clear()

    def free(self) -> None:
        """Give the memory back. The buffers stay, without storage, and so does what autograd has saved of them."""
        self.wait()
        for flat in self.full:
            flat.untyped_storage().resize_(0)


def units_of(model: nn.Module, make_unit: Callable[[Named], Unit]) -> list[Unit]:
    """The blocks of the model, and last both its ends, which may share the tied embedding.

    Raises:
        ValueError: a parameter is in two blocks.
    """
    named = [[(f"blocks.{name}.{n}", p) for n, p in block.named_parameters()] for name, block in model.blocks.items()]
    inside = [p for parameters in named for _, p in parameters]
    if len(set(inside)) < len(inside):
        raise ValueError("two blocks share a parameter, which would be freed with the one and used by the other")
    ends = [(name, p) for name, p in model.named_parameters() if p not in set(inside)]
    return [make_unit(parameters) for parameters in [*named, ends]]


class GatheredWeights:
    """ZeRO-3: unit by unit gathered before its forward and again before its backward, and freed after.

    All ranks go through the units in one order, forward and back, whatever each of them uses: so the collectives meet
    even where a rank leaves a block out. A forward is followed by its backward: not by a second one with gradients.

    Args:
        launch: reduces the gradients of the i-th trained unit, which are complete.
    """

    def __init__(self, model: nn.Module, units: list[Unit], launch: Callable[[int], None]):
        *self.layers, self.ends = self.units = units
        self._trained = [unit for unit in units if unit.trained]
        self.own = [unit.own[0] for unit in self._trained]
        self._launch = launch
        self._next = 0  # forward: the first layer whose gathering has not begun; backward: the last that is reached
        model.register_forward_pre_hook(lambda *_: self._begin_forward())
        model.register_forward_hook(lambda *_: self._end_forward())
        _before_backward(model, self._begin_backward)
        for i, block in enumerate(model.blocks.values()):
            block.register_forward_pre_hook(lambda *_, i=i: self.forward_reaches(i))
            _before_backward(block, partial(self.backward_reaches, i))

    # Forward: layer i computes while layer i+1 arrives.

    def _begin_forward(self) -> None:
        self.ends.gather(forward=True)
        self._next = 0
        self._prefetch(1)
        self.ends.wait()

    def forward_reaches(self, i: int) -> None:
        for layer in self.layers[:i]:
            layer.free()
        self._prefetch(i + 2)
        self.layers[i].wait()

    def _end_forward(self) -> None:
        self._prefetch(len(self.layers))
        for unit in self.units:
            unit.free()

    def _prefetch(self, stop: int) -> None:
        while self._next < min(stop, len(self.layers)):
            self.layers[self._next].gather(forward=True)
            self._next += 1

    # Backward: layer i computes while layer i-1 arrives and the gradients of layer i+1 leave.

    def watch(self) -> None:
        """A backward comes."""
        self._next = -1

    def _begin_backward(self) -> None:
        if self._next >= 0:
            return
        self.ends.gather(forward=False)
        self._next = len(self.layers)
        self.layers[-1].gather(forward=False)
        self.ends.wait()

    def backward_reaches(self, i: int) -> None:
        self._begin_backward()  # unless the end of the model has: it may be this block
        while self._next > i:
            self._next -= 1
            here = self._next
            self.layers[here].wait()
            after = self.layers[here + 1] if here + 1 < len(self.layers) else None
            if after:
                after.free()
            if here:
                self.layers[here - 1].gather(forward=False)
            if after:
                self._reduce(after)

    def finish(self) -> None:
        """After the backward."""
        self.backward_reaches(0)
        self._reduce(self.layers[0])
        self._reduce(self.ends)

    def _reduce(self, unit: Unit) -> None:
        unit.free()
        if unit.trained:
            self._launch(self._trained.index(unit))

    # After the update: the next forward gathers the other ranks' shards.

    def gather(self, i: int) -> None:
        """Nothing to do."""

    def wait(self) -> None:
        """Nothing is in flight."""

    def _shards(self) -> Iterable[tuple[Unit, Bucket, Tensor]]:
        for unit in self.units:
            for bucket, own in zip(unit.buckets, unit.own, strict=True):
                yield unit, bucket, own

    def local_tensors(self) -> list[LocalTensor]:
        return [t for unit, bucket, own in self._shards() for t in bucket.local_tensors(unit.axis.index, own)]


def _before_backward(module: nn.Module, call: Callable[[], None]) -> None:
    """Call when the gradient of the module's output is there, so the backward of the module comes next."""

    def watch(_: nn.Module, __: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: call())

    module.register_forward_hook(watch)
