"""Lecture 01: ZeRO-1, the optimizer state sharded (优化器并行 ZeRO1/2/3 原理). Rajbhandari et al. 2019 (1910.02054).

    torchrun --nproc_per_node=8 zero/zero1.py

In data parallelism every rank makes the same update with the same state. Here each rank keeps the state of 1/N of the
parameters, so it needs the sum of the gradients of those only: a reduce-scatter. It updates them, and an all-gather
brings all weights to all ranks. 4Ψ + 12Ψ/N bytes; Ψ + Ψ elements, as many as the all-reduce had.

Ψ parameters, N ranks, m microbatches a step
"""

import sys

from torch import Tensor

from core import comm
from core.proof.lesson import Lesson, Run
from zero.ddp import DataParallel
from zero.training import add_flags, check, teach


class Zero1(DataParallel):
    """The optimizer state is sharded: data parallelism but for what is kept, reduced and brought."""

    shards_optimizer = True

    def _allocate(self) -> list[Tensor]:
        self._gradients = [bucket.take_gradients() for bucket in self.buckets]
        self._weights = [bucket.take_weights() for bucket in self.buckets]
        parts = [bucket.part(self.index) for bucket in self.buckets]
        self.own_gradients = [flat[part] for flat, part in zip(self._gradients, parts, strict=True)]
        return [flat[part] for flat, part in zip(self._weights, parts, strict=True)]

    def _finish(self) -> None:
        self.order.finish()
        for own, total in zip(self.own_gradients, self._wait(), strict=True):
            own.copy_(total)

    def _launch(self, i: int) -> None:
        self._pending.append(comm.reduce_scatter_async(self._gradients[i], self.axis))

    def _publish(self, i: int) -> None:
        super()._publish(i)
        self._pending.append(comm.all_gather_in_place_async(self._weights[i], self.axis))


def lesson(run: Run) -> None:
    teach(run, Zero1, elements=lambda m, n: 2)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: ZeRO-1",
        "优化器并行 ZeRO1/2/3 原理",
        "Reduce-scatter, update of 1/N of the parameters, all-gather: 4Ψ + 12Ψ/N bytes and 2Ψ elements.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
