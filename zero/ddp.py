"""Lecture 01: data parallelism, the baseline (优化器并行 ZeRO1/2/3 原理). Li et al. 2020 (2006.15704).

    torchrun --nproc_per_node=8 zero/ddp.py

Every rank has the whole model, its gradients and its optimizer state, and a part of the batch. What must be exchanged
is the gradients' sum: one all-reduce a bucket, sent while backward still computes the layers before it. With 2-byte
weights and gradients and Adam in 4 bytes that is 16Ψ bytes on each rank, and 2Ψ elements sent, times (N-1)/N.

Ψ parameters, N ranks, m microbatches a step
"""

import sys

from torch import Tensor

from core import comm
from core.proof.lesson import Lesson, Run
from zero.stage import Stage
from zero.training import add_flags, check, teach


class DataParallel(Stage):
    """Nothing is sharded."""

    shards_optimizer = False

    def _allocate(self) -> list[Tensor]:
        self._gradients = [bucket.take_gradients() for bucket in self.buckets]
        return [bucket.take_weights() for bucket in self.buckets]

    def zero_grad(self) -> None:
        for flat in self._gradients:
            flat.zero_()

    def before_backward(self, last: bool = True) -> None:
        if last:  # its gradients are the last: a bucket leaves as soon as it is complete
            self.order.watch()

    def after_backward(self, last: bool = True) -> None:
        if last:
            self._finish()

    def reduce(self) -> None:
        """Sum what others have added to the gradients, a pipeline for example, in place of the last `backward`."""
        self.before_backward()
        self.after_backward()

    def _finish(self) -> None:
        self.order.finish()
        self.own_gradients = self._wait()

    def _launch(self, i: int) -> None:
        self._pending.append(comm.all_reduce_async(self._gradients[i], self.axis))


def lesson(run: Run) -> None:
    teach(run, DataParallel, elements=lambda m, n: 2)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: data parallelism, the baseline",
        "优化器并行 ZeRO1/2/3 原理",
        "Gradients summed bucket by bucket while backward goes on; 16Ψ bytes and 2Ψ elements.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
