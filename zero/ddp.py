"""Lecture 01: data parallelism, the baseline (优化器并行 ZeRO1/2/3 原理). Li et al. 2020 (2006.15704).

    torchrun --nproc_per_node=8 zero/ddp.py

Every rank has the full model, its gradients and its optimizer state, and 1/N of the batch. What must be exchanged is
the sum of the gradients: an all-reduce. With 2-byte weights and gradients and K = 12 bytes a parameter for Adam (master
weight, momentum, variance) that is (2+2+K)Ψ = 16Ψ bytes on each rank, and 2Ψ elements sent, times (N-1)/N.

read: ddp.py:29-61; flat.py:16-32; then engine/buckets.py, engine/gradients.py, engine/engine.py

Ψ parameters, N ranks, m micro-batches a step
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, token_loss
from core.proof.lesson import Lesson, Run
from zero.engine.engine import MakeOptimizer, data_parallel
from zero.evidence.training import add_flags, check, teach
from zero.flat import flatten, set_data


class DataParallel:
    """Data parallelism on one flat buffer. A step is `forward_backward` and `step`; gradients may be clipped between.

    Args:
        make_optimizer: AdamW, over the parameters that it is given.
        master: the precision of the update.
    """

    def __init__(self, model: GPT, axis: Axis, make_optimizer: MakeOptimizer, master: torch.dtype):
        self.model, self.axis = model, axis
        self.parameters = list(model.parameters())
        self.weights = flatten(self.parameters, 1)  # (Ψ,)
        set_data(self.parameters, self.weights)
        self.master = nn.Parameter(self.weights.to(master, copy=True))  # (Ψ,)
        self.optimizer = make_optimizer([self.master])

    def forward_backward(self, microbatches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        """This rank's share of the loss. `tokens`: of the global batch, so that losses and gradients are sums."""
        share = torch.zeros((), device=self.weights.device)
        for inputs, targets in microbatches:  # (B, S) each
            loss = token_loss(self.model(inputs), targets, tokens)
            loss.backward()  # adds to .grad of each parameter
            share = share + loss.detach()

        gradients = flatten([p.grad for p in self.parameters], 1)  # (Ψ,)
        self.model.zero_grad()
        comm.all_reduce(gradients, self.axis)
        self.master.grad = gradients.to(self.master.dtype)
        return share

    def step(self) -> None:
        self.optimizer.step()  # every rank makes the same update, with the same state
        self.weights.copy_(self.master)


def lesson(run: Run) -> None:
    teach(run, DataParallel, data_parallel, elements=lambda m, n: 2)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: data parallelism, the baseline",
        "优化器并行 ZeRO1/2/3 原理",
        "Gradients summed by an all-reduce, and bucket by bucket while backward goes on; 16Ψ bytes and 2Ψ elements.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
