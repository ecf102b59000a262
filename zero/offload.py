"""Lecture 01: ZeRO-Offload, the optimizer in host memory (优化器并行 ZeRO1/2/3 原理). Ren et al. 2021 (2101.06840).

    torchrun --nproc_per_node=8 zero/offload.py

ZeRO-2 whose optimizer lives on the host. As backward finishes a bucket, this rank's part of its gradient goes down to
the host, while backward goes on; the host updates its 4-byte weights, and each bucket goes up again while the host
updates the next. The device keeps the weights, 2Ψ bytes, and nothing else; mΨ/N elements go down in a step, Ψ/N up.

On a CPU the host is the device, and the copies are made and counted all the same.

Ψ parameters, N ranks, m microbatches a step
"""

import sys

import torch
from torch import Tensor

from core.proof.lesson import Lesson, Run
from zero.training import add_flags, check, teach
from zero.zero2 import Zero2


class Offload(Zero2):
    """The optimizer state and this rank's part of the gradients are in host memory."""

    host = torch.device("cpu")

    def _allocate(self) -> list[Tensor]:
        own = super()._allocate()
        self.own_gradients = [torch.zeros(part.shape, dtype=part.dtype, device=self.host) for part in own]
        self._landing: list[tuple[int, Tensor, torch.Event | None]] = []
        # Down beside backward, not in its stream, where what is computed next would wait for the copy.
        self._downwards = torch.Stream(own[0].device) if own[0].is_cuda else None
        return own

    def after_backward(self, last: bool = True) -> None:
        super().after_backward(last)
        self._land(0)

    def _keep(self, i: int, total: Tensor) -> None:
        """Send a part down to the host, and add it there once it has arrived."""
        self._land(1)
        arriving = torch.empty(total.shape, dtype=total.dtype, device=self.host, pin_memory=total.is_cuda)
        arrived = None
        if self._downwards is None:
            arriving.copy_(total)
        else:
            self._downwards.wait_stream(torch.accelerator.current_stream())
            with self._downwards:
                arriving.copy_(total, non_blocking=True)
            total.record_stream(self._downwards)
            arrived = self._downwards.record_event()
        self._landing.append((i, arriving, arrived))
        self._count("to the host", total)

    def _land(self, but: int) -> None:
        while len(self._landing) > but:
            i, part, arrived = self._landing.pop(0)
            if arrived is not None:
                arrived.synchronize()
            self.own_gradients[i] += part

    def _publish(self, i: int) -> None:
        super()._publish(i)
        self._count("to the device", self._own_weights[i])

    def _count(self, direction: str, part: Tensor) -> None:
        self.axis.ledger.record(direction, "host", part.numel(), part.element_size())


def lesson(run: Run) -> None:
    stage, m = teach(run, Offload, elements=lambda m, n: m + 1), run.args.microbatches
    held = stage.held()
    traffic = stage.axis.ledger.traffic
    moved = [traffic[way, "host"].elements / run.args.steps for way in ("to the host", "to the device")]
    everyone = run.job.gather((*moved, held["weights"], held["gradients"] + held["optimizer"]))
    if not everyone:
        return
    size = sum(bucket.padded for bucket in stage.buckets)
    part = size // stage.axis.size
    bytes_, master = run.dtype.itemsize, 4 if run.dtype == torch.bfloat16 else run.dtype.itemsize
    host = part * (bytes_ + 3 * master + (bytes_ if master != bytes_ else 0))
    down, up, weights, rest = zip(*everyone, strict=True)
    on_ranks = run.evidence.on_ranks
    on_ranks("elements to the host in a step", f"mΨ/N = {m * part:,}", m * part, down)
    on_ranks("elements to the device in a step", f"Ψ/N = {part:,}", part, up)
    on_ranks("bytes on the device: weights", f"{bytes_}Ψ = {bytes_ * size:,}", bytes_ * size, weights)
    on_ranks("bytes on the host", f"gradients, weights, Adam / N: {host:,}, within 1 %", host, rest, 0.01 * host)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: ZeRO-Offload",
        "优化器并行 ZeRO1/2/3 原理",
        "Gradients and optimizer in host memory: the device keeps 2Ψ bytes, mΨ/N elements go down and Ψ/N up.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
