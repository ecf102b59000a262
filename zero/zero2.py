"""Lecture 01: ZeRO-2, gradients sharded too (优化器并行 ZeRO1/2/3 原理). Rajbhandari et al. 2019 (1910.02054).

    torchrun --nproc_per_node=8 zero/zero2.py

ZeRO-1 uses 1/N of the summed gradients and keeps all. Here a bucket is reduced and scattered as soon as backward has
its gradients, and then forgotten; what stays is this rank's part of the sum. 2Ψ + 14Ψ/N bytes, and a bucket or two on
their way. With m microbatches every one of them is reduced: mΨ + Ψ elements.

Ψ parameters, N ranks, m microbatches a step
"""

import sys

from torch import Tensor

from core import comm
from core.proof.lesson import Lesson, Run
from zero.stage import Stage
from zero.training import add_flags, check, teach


class Zero2(Stage):
    """The optimizer state and the gradients are sharded."""

    def _allocate(self) -> list[Tensor]:
        self._weights = [bucket.take_weights() for bucket in self.buckets]
        self.own_gradients = [w.new_zeros(b.length) for b, w in zip(self.buckets, self._weights, strict=True)]
        self._on_their_way: list[tuple[int, comm.Pending]] = []
        return [flat[bucket.part(self.index)] for bucket, flat in zip(self.buckets, self._weights, strict=True)]

    def zero_grad(self) -> None:
        for part in self.own_gradients:
            part.zero_()

    def before_backward(self, last: bool = True) -> None:
        self.order.watch()  # in every microbatch: there is nowhere to keep a sum of whole gradients

    def after_backward(self, last: bool = True) -> None:
        self.order.finish()
        self._arrived(0)

    def _launch(self, i: int) -> None:
        self._arrived(1)  # at most two buckets of whole gradients at a time
        self.used |= {m.parameter for m in self.buckets[i].members if m.parameter.grad is not None}
        flat = self.buckets[i].take_away_gradients()
        self._on_their_way.append((i, comm.reduce_scatter_async(flat, self.axis)))

    def _arrived(self, but: int) -> None:
        """Add to this rank's part what has been reduced, `but` for the last so many buckets."""
        while len(self._on_their_way) > but:
            i, pending = self._on_their_way.pop(0)
            self._keep(i, pending.wait())

    def _keep(self, i: int, total: Tensor) -> None:
        self.own_gradients[i] += total

    def _publish(self, i: int) -> None:
        super()._publish(i)
        self._pending.append(comm.all_gather_in_place_async(self._weights[i], self.axis))


def lesson(run: Run) -> None:
    teach(run, Zero2, elements=lambda m, n: m + 1)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: ZeRO-2",
        "优化器并行 ZeRO1/2/3 原理",
        "Each bucket of gradients is reduced and scattered in backward and then freed: 2Ψ + 14Ψ/N bytes.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
