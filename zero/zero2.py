"""Lecture 01: ZeRO-2, gradients sharded too (优化器并行 ZeRO1/2/3 原理). Rajbhandari et al. 2019 (1910.02054).

    torchrun --nproc_per_node=8 zero/zero2.py

ZeRO-1 keeps full gradients, of whose sum it uses 1/N. Here every micro-batch reduces and scatters its gradients and
frees them; what stays is this rank's shard of the sum. 2Ψ + (2+K)Ψ/N bytes, K = 12, and what is in flight: all of one
micro-batch's gradients in the plain version, two buckets in the engine. mΨ + Ψ elements with m micro-batches.

read: zero2.py:30-64; flat.py:16-37; then engine/buckets.py, engine/gradients.py, engine/engine.py

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
from zero.engine.engine import MakeOptimizer, zero2
from zero.evidence.events import Order
from zero.evidence.training import add_flags, check, teach
from zero.flat import flatten, own_shard, set_data


class Zero2:
    """ZeRO-2 on one flat buffer. A step is `forward_backward` and `step`; gradients may be clipped between.

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
        self.shard.grad = torch.zeros_like(self.shard)  # (Ψ/N,)
        for inputs, targets in microbatches:  # (B, S) each
            loss = token_loss(self.model(inputs), targets, tokens)
            loss.backward()
            share = share + loss.detach()

            gradients = flatten([p.grad for p in self.parameters], self.axis.size)  # (Ψ,)
            self.model.zero_grad()
            self.shard.grad += comm.reduce_scatter(gradients, self.axis)
            del gradients
        return share

    def step(self) -> None:
        self.optimizer.step()  # of this rank's 1/N
        updated = self.shard.detach().to(self.weights.dtype)
        self.weights.copy_(comm.all_gather(updated, self.axis))


def lesson(run: Run) -> None:
    order = Order()
    teach(run, Zero2, zero2, elements=lambda m, n: m + 1, observe=order.watch)
    order.claim_gradients(run)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: ZeRO-2",
        "优化器并行 ZeRO1/2/3 原理",
        "Gradients reduced and scattered in every backward and then freed: 2Ψ + 14Ψ/N bytes, (m+1)Ψ elements.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
