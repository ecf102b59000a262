"""ZeRO-3: weights gathered when they are needed, unit by unit. Lecture 01.

What it adds to the plain version: a layer computes while the weights of the next one arrive, and while the gradients of
the one before leave. Nothing is recomputed: what is freed is the storage behind the weights that autograd has saved,
and it is filled again before their backward. Under a pipeline the next one may be a layer of another stage.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.shards import LocalTensor, shard_of
from zero.engine.buckets import Bucket
from zero.engine.parts import Action, Named, Parts, Users


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

    @property
    def full_bytes(self) -> int:
        """Of its weights, where they are gathered."""
        return sum(bucket.padded * bucket.dtype.itemsize for bucket in self.buckets)

    def wait(self) -> None:
        for pending in self.in_flight:
            pending.wait()
        self.in_flight.clear()

    def free(self) -> None:
        """Give the memory back. The buffers stay, without storage, and so does what autograd has saved of them."""
        self.wait()
        for flat in self.full:
            flat.untyped_storage().resize_(0)


class Walk(NamedTuple):
    """The units of a part of the model: its layers in the order of a forward, and what is in no layer."""

    ends: list[Unit]
    layers: list[Unit]

    def first(self, forward: bool) -> list[Unit]:
        """What a forward or a backward needs first."""
        return [*self.ends, *(self.layers[:1] if forward else self.layers[-1:])]


@dataclass
class Way:
    """How far a forward, or a backward, is on its walk. A pipeline may do one of each by turns, on other parts."""

    walk: Walk
    soon: list[tuple[Unit, bool]] = field(default_factory=list)  # what is needed first after it, and if in a forward
    active: bool = False
    next: int = 0  # forward: the first layer whose gathering has not begun; backward: the last that is reached

    def wait_for_ends(self) -> None:
        for unit in self.walk.ends:
            unit.wait()


def units_of(
    parts: Parts, named: Named, make_unit: Callable[[Named], Unit]
) -> tuple[dict[Unit, Users], dict[int, Walk]]:
    """The blocks of each part, and last its ends: all units with the parts that use them, and the way through each.

    The ends of a whole model, which may share the tied embedding, are one. The stages of a pipeline share it too: it is
    a unit by itself.

    Raises:
        ValueError: a parameter is in two blocks.
    """
    names = {p: name for name, p in named}
    units: dict[Unit, Users] = {}
    walks: dict[int, Walk] = {}
    inside: set[nn.Parameter] = set()
    for number, model in parts.models.items():
        walks[number] = Walk([], [])
        for block in model.blocks.values():
            here = [(names[p], p) for p in block.parameters() if p in names]
            if not inside.isdisjoint(p for _, p in here):
                raise ValueError(
                    "two blocks share a parameter, which would be freed with the one and used by the other"
                )
            inside |= {p for _, p in here}
            walks[number].layers.append(make_unit(here))
            units[walks[number].layers[-1]] = (number,)
    for users, ends in parts.groups([(name, p) for name, p in named if p not in inside]):
        unit = make_unit(ends)
        units[unit] = users
        for number in users:
            walks[number].ends.append(unit)
    return units, walks


class GatheredWeights:
    """ZeRO-3: unit by unit gathered before its forward and again before its backward, and freed after.

    All ranks go through the units in one order, forward and back, whatever each of them uses: so the collectives meet
    even where a rank leaves a block out. Where no pipeline says what comes, a forward is followed by its backward.

    Args:
        launch: reduces the gradients of the i-th trained unit, which are complete.
        whole: parameters that are not sharded.
        keep: what has been gathered stays until the end of the step.
    """

    def __init__(
        self,
        parts: Parts,
        units: list[Unit],
        walks: dict[int, Walk],
        launch: Callable[..., None],
        whole: Named = (),
        keep: bool = False,
    ):
        self.units, self.walks = units, walks
        self._trained = [unit for unit in self.units if unit.trained]
        self.own = [unit.own[0] for unit in self._trained]
        self._launch, self._whole, self._keep = launch, whole, keep
        self._forward, self._backward = (Way(next(iter(walks.values()))) for _ in range(2))
        self._held: set[Unit] = set()  # gathered, or on its way
        self.most = 0  # bytes of those, when they were most
        self._keeping = False
        self._reducing = False  # whether a backward completes gradients
        for number, model in parts.models.items():
            if parts.whole_model:
                model.register_forward_pre_hook(lambda *_, number=number: self.begin_forward(number))
                model.register_forward_hook(lambda *_: self.end_forward())
                _before_backward(model, self._begin_backward)
            for i, block in enumerate(model.blocks.values()):
                block.register_forward_pre_hook(lambda *_, i=i: self.forward_reaches(i))
                _before_backward(block, partial(self.backward_reaches, i))

    def _enter(self, way: Way, part: int, then: Sequence[Action]) -> None:
        way.walk, way.active = self.walks[part], True
        way.soon = [(unit, a.kind == "F") for a in then for unit in self.walks[a.stage].first(a.kind == "F")]

    def _gather(self, units: Iterable[Unit], forward: bool) -> None:
        for unit in units:
            if unit not in self._held:
                unit.gather(forward)
                self._held.add(unit)
        self.most = max(self.most, sum(unit.full_bytes for unit in self._held))

    def _free(self, units: Iterable[Unit]) -> None:
        for unit in units:
            if not self._keeping:
                unit.free()
                self._held.discard(unit)

    def _gather_soon(self, way: Way) -> None:
        for unit, forward in way.soon:
            self._gather([unit], forward)

    def _leave(self, way: Way, units: Iterable[Unit]) -> None:
        """Free what is needed neither first by the next action nor by the one that goes on beside this."""
        other = self._backward if way is self._forward else self._forward
        needed = {unit for unit, _ in way.soon} | set(other.walk.ends if other.active else ())
        self._free(unit for unit in units if unit not in needed)

    def _end(self, way: Way) -> None:
        self._leave(way, [*way.walk.layers, *way.walk.ends])
        way.active = False

    def release(self) -> None:
        """Free all of them: the step is done."""
        self._keeping = False
        for way in (self._forward, self._backward):
            way.soon, way.active = [], False
        self._free(self._held.copy())

    # Forward: layer i computes while layer i+1 arrives; the last one while the first of what comes next arrives.

    def begin_forward(self, part: int, then: Sequence[Action] = ()) -> None:
        way = self._forward
        self._enter(way, part, then)
        self._keeping = self._keep and torch.is_grad_enabled()
        self._gather(way.walk.ends, forward=True)
        way.next = 0
        self._prefetch(1)
        way.wait_for_ends()

    def forward_reaches(self, i: int) -> None:
        layers = self._forward.walk.layers
        self._free(layers[:i])
        self._prefetch(i + 2)
        layers[i].wait()

    def end_forward(self) -> None:
        self._prefetch(len(self._forward.walk.layers))
        self._end(self._forward)

    def _prefetch(self, stop: int) -> None:
        way = self._forward
        self._gather(way.walk.layers[way.next : stop], forward=True)
        way.next = max(way.next, min(stop, len(way.walk.layers)))
        if stop > len(way.walk.layers):
            self._gather_soon(way)

    # Backward: layer i computes while layer i-1 arrives and the gradients of layer i+1 leave.

    def watch(self, part: int | None = None) -> None:
        """A backward comes, which completes gradients."""
        self._backward.next, self._reducing = -1, True

    def begin_backward(self, part: int, then: Sequence[Action]) -> None:
        """A backward comes, with gradients of weights or without."""
        self._enter(self._backward, part, then)
        self._backward.next = -1
        self._begin_backward()

    def _begin_backward(self) -> None:
        way = self._backward
        if way.next >= 0:
            return
        self._gather(way.walk.first(forward=False), forward=False)
        way.next = len(way.walk.layers)
        way.wait_for_ends()
        if not way.walk.layers:
            self._gather_soon(way)

    def backward_reaches(self, i: int) -> None:
        self._begin_backward()  # unless the end of the model has: it may be this block
        way, layers = self._backward, self._backward.walk.layers
        while way.next > i:
            way.next -= 1
            here = way.next
            layers[here].wait()
            after = layers[here + 1 : here + 2]
            self._free(after)
            if here:
                self._gather(layers[here - 1 : here], forward=False)
            else:
                self._gather_soon(way)
            self._reduce(after)

    def finish(self) -> None:
        """After a backward that completes gradients."""
        self.backward_reaches(0)
        way = self._backward
        for unit in [*way.walk.layers[:1], *way.walk.ends]:
            self._leave(way, [unit])
            self._reduce([unit])
        self._reducing = False

    def end_backward(self) -> None:
        """After any."""
        self.backward_reaches(0)
        self._end(self._backward)

    def reduce(self, part: int) -> None:
        """Launch the gradients of all units of a part, whose backward came in pieces."""
        walk = self.walks[part]
        for unit in [*walk.layers[::-1], *walk.ends]:
            if unit.trained:
                self._launch(self._trained.index(unit), at_once=len(self.units))

    def _reduce(self, units: Iterable[Unit]) -> None:
        for unit in units:
            if self._reducing and unit.trained:
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
        sharded = [t for unit, bucket, own in self._shards() for t in bucket.local_tensors(unit.axis.index, own)]
        return sharded + [LocalTensor(name, p.detach(), shard_of(p)) for name, p in self._whole]


def _before_backward(module: nn.Module, call: Callable[[], None]) -> None:
    """Call when the gradient of the module's output is there, so the backward of the module comes next."""

    def watch(_: nn.Module, __: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: call())

    module.register_forward_hook(watch)
