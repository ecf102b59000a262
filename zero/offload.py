"""Lecture 01: ZeRO-Offload, the optimizer in host memory (优化器并行 ZeRO1/2/3 原理). Ren et al. 2021 (2101.06840).

    torchrun --nproc_per_node=8 zero/offload.py

ZeRO-2 whose optimizer lives on the host: this rank's shard of the gradients goes down to the host, which updates its
4-byte weights, and the updated shard goes up again. The device keeps the weights, 2Ψ bytes, and nothing else; mΨ/N
elements go down in a step, Ψ/N up. On a CPU the host is the device, and the copies are made and counted all the same.

read: offload.py:30-73; flat.py:16-37; then engine/offload.py, which copies while backward goes on

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
from zero.engine.engine import MakeOptimizer
from zero.engine.offload import zero_offload
from zero.evidence.offload import claim_offload
from zero.evidence.training import add_flags, check, teach
from zero.flat import flatten, own_shard, set_data

HOST = torch.device("cpu")


class Offload:
    """ZeRO-Offload on one flat buffer. A step is `forward_backward` and `step`; gradients may be clipped between.

    Args:
        make_optimizer: AdamW, over the parameters that it is given.
        master: the precision of the update.
    """

    def __init__(self, model: GPT, axis: Axis, make_optimizer: MakeOptimizer, master: torch.dtype):
        self.model, self.axis = model, axis
        self.parameters = list(model.parameters())
        self.weights = flatten(self.parameters, axis.size)  # (Ψ,), on the device
        set_data(self.parameters, self.weights)
        self.shard = nn.Parameter(own_shard(self.weights, axis).to(HOST, master, copy=True))  # (Ψ/N,), master weights
        self.optimizer = make_optimizer([self.shard])  # its state is on the host too

    def forward_backward(self, microbatches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        """This rank's share of the loss. `tokens`: of the global batch, so that losses and gradients are sums."""
        share = torch.zeros((), device=self.weights.device)
        self.shard.grad = torch.zeros_like(self.shard)  # (Ψ/N,), on the host
        for inputs, targets in microbatches:  # (B, S) each
            loss = token_loss(self.model(inputs), targets, tokens)
            loss.backward()
            share = share + loss.detach()

            gradients = flatten([p.grad for p in self.parameters], self.axis.size)  # (Ψ,)
            self.model.zero_grad()
            self.shard.grad += self.moved("to the host", comm.reduce_scatter(gradients, self.axis), HOST)
            del gradients
        return share

    def step(self) -> None:
        self.optimizer.step()  # on the host, of this rank's 1/N
        updated = self.shard.detach().to(self.weights.dtype)
        updated = self.moved("to the device", updated, self.weights.device)
        self.weights.copy_(comm.all_gather(updated, self.axis))

    def moved(self, direction: str, x: Tensor, device: torch.device) -> Tensor:
        """A copy on `device`, counted."""
        self.axis.ledger.record(direction, "host", x.numel(), x.element_size())
        return x.to(device, copy=True)


def lesson(run: Run) -> None:
    claim_offload(run, teach(run, Offload, zero_offload, elements=lambda m, n: m + 1))


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
