"""Lecture 01: ZeRO-1, the optimizer state sharded (优化器并行 ZeRO1/2/3 原理). Rajbhandari et al. 2019 (1910.02054).

    torchrun --nproc_per_node=8 zero/zero1.py

In data parallelism every rank makes the same update with the same state. Here each rank keeps the state of 1/N of the
parameters, so it needs the sum of the gradients of those only: a reduce-scatter. It updates them, and an all-gather
gives all ranks all weights. 4Ψ + KΨ/N bytes, K = 12; Ψ + Ψ elements, as many as the all-reduce had.

read: zero1.py:29-61; flat.py:16-37; then engine/buckets.py, engine/gradients.py, engine/engine.py

Ψ parameters, N ranks, m micro-batches a step, K bytes of optimizer state a parameter
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, token_loss
from core.proof.lesson import Lesson, Run
from zero.engine.engine import MakeOptimizer, zero1
from zero.evidence.training import add_flags, check, teach
from zero.flat import flatten, own_shard, set_data


class Zero1:
    """ZeRO-1 on one flat buffer. A step is `forward_backward` and `step`; gradients may be clipped between.

    Args:
        make_optimizer: AdamW, over the parameters that it is given.
        master: the precision of the update.
    """

    def __init__(self, model: GPT, axis: Axis, make_optimizer: MakeOptimizer, master: torch.dtype):
        self.model, self.axis = model, axis
        self.parameters = list(model.parameters())
        self.weights = flatten(self.parameters, axis.size)  # (Ψ,)
        set_data(self.parameters, self.weights)
        self.shard = nn.Parameter(own_shard(self.weights, axis).to(master, copy=True))  # (Ψ/N,), master weights
        self.optimizer = make_optimizer([self.shard])  # its state is (Ψ/N,) too: K bytes for each

    def forward_backward(self, microbatches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        """This rank's share of the loss. `tokens`: of the global batch, so that losses and gradients are sums."""
        share = torch.zeros((), device=self.weights.device)
        for inputs, targets in microbatches:  # (B, S) each
            loss = token_loss(self.model(inputs), targets, tokens)
            loss.backward()  # adds to .grad of each parameter
            share = share + loss.detach()

        gradients = flatten([p.grad for p in self.parameters], self.axis.size)  # (Ψ,)
        self.model.zero_grad()
        self.shard.grad = comm.reduce_scatter(gradients, self.axis).to(self.shard.dtype)  # (Ψ/N,)
        return share

    def step(self) -> None:
        self.optimizer.step()  # of this rank's 1/N
        updated = self.shard.detach().to(self.weights.dtype)
        self.weights.copy_(comm.all_gather(updated, self.axis))


def lesson(run: Run) -> None:
    teach(run, Zero1, zero1, elements=lambda m, n: 2)


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
