"""Lecture 01: ZeRO-3, parameters sharded too (优化器并行 ZeRO1/2/3 原理). Rajbhandari et al. 2019 (1910.02054).

    torchrun --nproc_per_node=8 zero/zero3.py

Each rank keeps 1/N of everything. The weights of a layer are gathered just before its forward, and again before its
backward, while the layer before computes; they are freed as soon as it is done, and its gradients are reduced and
scattered as in ZeRO-2. 16Ψ/N bytes and the live layers; 3Ψ elements, 3mΨ with m microbatches.

Ψ parameters, N ranks, m microbatches a step
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.proof.lesson import Lesson, Run
from core.shards import LocalTensor
from zero.flat import Bucket
from zero.stage import Stage
from zero.training import add_flags, check, teach
from zero.zero2 import Zero2


class Unit:
    """What is gathered and freed together: a layer, or all that is in no layer."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], axis: Axis):
        self.axis = axis
        trained = [(n, p) for n, p in named if p.requires_grad and p.numel()]
        frozen = [(n, p) for n, p in named if not p.requires_grad and p.numel()]
        self.trained = Bucket(trained, axis.size) if trained else None
        buckets = [self.trained, Bucket(frozen, axis.size) if frozen else None]
        self.buckets = [bucket for bucket in buckets if bucket]
        self._flat = [bucket.take_weights() for bucket in self.buckets]
        self.own = [f[b.part(axis.index)].clone() for b, f in zip(self.buckets, self._flat, strict=True)]
        self._arriving: list[comm.Pending] = []
        self.free()

    def gather(self, forward: bool) -> None:
        """Start to bring the other ranks' parts. The parameters are views of the buffers that fill."""
        for bucket, flat, own in zip(self.buckets, self._flat, self.own, strict=True):
            flat.untyped_storage().resize_(bucket.padded * bucket.dtype.itemsize)
            flat[bucket.part(self.axis.index)].copy_(own)
            self._arriving.append(comm.all_gather_in_place_async(flat, self.axis))

    def wait(self) -> None:
        for pending in self._arriving:
            pending.wait()
        self._arriving.clear()

    def free(self) -> None:
        """Give the memory back. The buffers stay, without storage, and so does what autograd has saved of them."""
        self.wait()
        for flat in self._flat:
            flat.untyped_storage().resize_(0)


class Zero3(Zero2):
    """Optimizer state, gradients and parameters are sharded; the units are the blocks of the GPT, and the rest.

    All ranks go through the units in one order, forward and back, whatever each of them uses: so the collectives meet
    even where a rank leaves a block out. A forward is followed by its backward: not by a second one with gradients.

    Raises:
        ValueError: a parameter is in two blocks.
    """

    def _make_buckets(self, elements: int) -> list[Bucket]:
        blocks = list(self.model.blocks.items())
        named = [[(f"blocks.{name}.{n}", p) for n, p in block.named_parameters()] for name, block in blocks]
        inside = [p for parameters in named for _, p in parameters]
        if len(set(inside)) < len(inside):
            raise ValueError("two blocks share a parameter, which would be freed with the one and used by the other")
        rest = [(name, p) for name, p in self.model.named_parameters() if p not in set(inside)]
        self._units = [self._unit(parameters) for parameters in named]
        self._rest = self._unit(rest)  # both ends of the model, which may share the tied embedding
        self._next = 0  # forward: the first unit whose gathering has not begun; backward: the last that is reached
        self.model.register_forward_pre_hook(lambda *_: self._begin_forward())
        self.model.register_forward_hook(lambda *_: self._end_forward())
        _before_backward(self.model, self._begin_backward)
        for i, (_, block) in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._forward_reaches(i))
            _before_backward(block, partial(self._backward_reaches, i))
        return [unit.trained for unit in (*self._units, self._rest) if unit.trained]

    def _unit(self, named: Sequence[tuple[str, nn.Parameter]]) -> Unit:
        return Unit(named, self.axis)

    def _allocate(self) -> list[Tensor]:
        own = [unit.own[0] for unit in (*self._units, self._rest) if unit.trained]
        self.own_gradients = [torch.zeros_like(part) for part in own]
        self._on_their_way = []
        return own

    # Forward: unit i computes while unit i+1 arrives.

    def _begin_forward(self) -> None:
        self._rest.gather(forward=True)
        self._next = 0
        self._gather_until(1)
        self._rest.wait()

    def _forward_reaches(self, i: int) -> None:
        for unit in self._units[:i]:
            unit.free()
        self._gather_until(i + 2)
        self._units[i].wait()

    def _end_forward(self) -> None:
        self._gather_until(len(self._units))
        for unit in (*self._units, self._rest):
            unit.free()

    def _gather_until(self, stop: int) -> None:
        while self._next < min(stop, len(self._units)):
            self._units[self._next].gather(forward=True)
            self._next += 1

    # Backward: unit i computes while unit i-1 arrives and the gradients of unit i+1 leave.

    def before_backward(self, last: bool = True) -> None:
        self._next = -1

    def after_backward(self, last: bool = True) -> None:
        self._backward_reaches(0)
        self._leave(self._units[0])
        self._leave(self._rest)
        self._arrived(0)

    def _begin_backward(self) -> None:
        if self._next >= 0:
            return
        self._rest.gather(forward=False)
        self._next = len(self._units)
        self._units[-1].gather(forward=False)
        self._rest.wait()

    def _backward_reaches(self, i: int) -> None:
        self._begin_backward()  # unless the end of the model has: it may be this block
        while self._next > i:
            self._next -= 1
            here = self._next
            self._units[here].wait()
            after = self._units[here + 1] if here + 1 < len(self._units) else None
            if after:
                after.free()
            if here:
                self._units[here - 1].gather(forward=False)
            if after:
                self._leave(after)

    def _leave(self, unit: Unit) -> None:
        unit.free()
        if unit.trained:
            self._launch(self.buckets.index(unit.trained))

    def _publish(self, i: int) -> None:
        Stage._publish(self, i)  # the next forward gathers the others'

    def load_frozen(self, read: Callable[[str, torch.Size], Tensor]) -> None:
        for unit in (*self._units, self._rest):
            for bucket, own in zip(unit.buckets, unit.own, strict=True):
                if bucket is not unit.trained:
                    for m, first, end, at in bucket.in_part(self.index):
                        own[at : at + end - first] = read(m.name, m.parameter.shape).flatten()[first:end]

    def weights(self) -> list[LocalTensor]:
        """This rank's part."""
        units = (*self._units, self._rest)
        return self._segments([b for unit in units for b in unit.buckets], [own for unit in units for own in unit.own])


def _before_backward(module: nn.Module, call: Callable[[], None]) -> None:
    """Call when the gradient of the module's output is there, so the backward of the module comes next."""

    def watch(_: nn.Module, __: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: call())

    module.register_forward_hook(watch)


def lesson(run: Run) -> None:
    teach(run, Zero3, elements=lambda m, n: 3 * m)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: ZeRO-3",
        "优化器并行 ZeRO1/2/3 原理",
        "Weights gathered layer by layer, forward and back, and freed: 16Ψ/N bytes and the live layers, 3Ψ elements.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
