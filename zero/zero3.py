"""Lecture 01: ZeRO-3, parameters sharded too (优化器并行 ZeRO1/2/3 原理). Rajbhandari et al. 2019 (1910.02054).

    torchrun --nproc_per_node=8 zero/zero3.py

Each rank keeps 1/N of the model states, (2+2+K)Ψ/N bytes in the paper's mixed precision, K = 12, and in full both ends
of the model and the layer at hand. The weights of a layer are gathered just before its forward and freed after, again
for its backward, and its gradients are reduced and scattered: 3 times Ψ (N-1)/N elements for each of m micro-batches.

The plain version keeps the input of each layer and computes the layer again in backward: the graph of its forward would
keep alive the weights that autograd has saved in it. The engine frees the storage under what autograd has saved
(as FSDP does), so it computes nothing twice, and it prefetches the next layer while this one computes.

read: zero3.py:34-113; flat.py:16-37; then engine/gathered.py, engine/gradients.py, engine/engine.py

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
from zero.engine.engine import MakeOptimizer, zero3
from zero.evidence.events import Order
from zero.evidence.training import add_flags, check, claim_gathered, teach
from zero.flat import flatten, own_shard, set_data


class Zero3:
    """ZeRO-3 layer by layer. A step is `forward_backward` and `step`; gradients may be clipped between.

    A unit is what is gathered and freed together: a layer, and as unit 0 both ends of the model, which share the tied
    embedding.

    Args:
        make_optimizer: AdamW, over the parameters that it is given.
        master: the precision of the update.
    """

    def __init__(self, model: GPT, axis: Axis, make_optimizer: MakeOptimizer, master: torch.dtype):
        self.model, self.axis, self.dtype = model, axis, next(model.parameters()).dtype
        layers = [list(block.parameters()) for block in model.blocks.values()]
        inside = {p for layer in layers for p in layer}
        self.units = [[p for p in model.parameters() if p not in inside], *layers]
        self.shards = []  # (Ψ/N,) together, in master precision
        for unit in range(len(self.units)):
            weights = flatten(self.units[unit], axis.size)  # (Ψ of the unit,)
            self.shards.append(nn.Parameter(own_shard(weights, axis).to(master, copy=True)))
            self.free(unit)
        self.optimizer = make_optimizer(self.shards)

    def gather(self, unit: int) -> None:
        shard = self.shards[unit].detach().to(self.dtype)
        set_data(self.units[unit], comm.all_gather(shard, self.axis))

    def free(self, unit: int) -> None:
        for p in self.units[unit]:
            p.data = p.new_empty(1).expand(p.shape)  # one element that stands for all: the shape stays

    def reduce_scatter(self, unit: int) -> None:
        gradients = flatten([p.grad for p in self.units[unit]], self.axis.size)
        for p in self.units[unit]:
            p.grad = None
        self.shards[unit].grad += comm.reduce_scatter(gradients, self.axis)

    def forward_backward(self, microbatches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        """This rank's share of the loss. `tokens`: of the global batch, so that losses and gradients are sums."""
        share = torch.zeros((), device=self.shards[0].device)
        layers, ends = list(enumerate(self.model.blocks.values(), 1)), 0
        for shard in self.shards:
            shard.grad = torch.zeros_like(shard)

        for inputs, targets in microbatches:  # (B, S) each
            # Forward. Only the input of each layer stays.
            with torch.no_grad():
                self.gather(ends)
                x = self.model.embed(inputs)  # (B, S, H)
                self.free(ends)
                kept = []
                for unit, layer in layers:
                    kept.append(x)
                    self.gather(unit)
                    x = layer(x)
                    self.free(unit)

            # The loss, and its gradient with respect to the output of the last layer.
            self.gather(ends)
            x.requires_grad_()
            loss = token_loss(self.model.head(self.model.norm(x)), targets, tokens)
            loss.backward()
            gradient = x.grad
            share = share + loss.detach()

            # Backward, the last layer first.
            for unit, layer in reversed(layers):
                self.gather(unit)
                x = kept.pop().requires_grad_()
                layer(x).backward(gradient)  # computed again; adds to .grad of its parameters and of x
                gradient = x.grad
                self.reduce_scatter(unit)
                self.free(unit)
            self.model.embed(inputs).backward(gradient)
            self.reduce_scatter(ends)
            self.free(ends)
        return share

    def step(self) -> None:
        self.optimizer.step()  # of this rank's 1/N; the next forward gathers them


def lesson(run: Run) -> None:
    order = Order()
    claim_gathered(run, teach(run, Zero3, zero3, elements=lambda m, n: 3 * m, observe=order.watch))
    order.claim_weights(run)
    order.claim_gradients(run)


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
