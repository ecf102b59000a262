"""Lecture 01: Muon with ZeRO, an optimizer that looks at whole matrices (优化器并行 ZeRO1/2/3 原理). 2502.16982, 2.3.

    torchrun --nproc_per_node=8 zero/muon.py
    torchrun --nproc_per_node=8 zero/muon.py --zero 3        # the engine; the plain version is ZeRO-1

Adam treats each element by itself, so ZeRO shards it anywhere. Muon orthogonalises the momentum of a weight matrix, for
which it needs all of it. Each matrix has an owner, dealt by cost: an all-to-all brings the ranks' shards of its update
to the owner, which orthogonalises it alone, and a second one takes the direction back. 2Ψm/N elements a rank, little
beside ZeRO's 2Ψ; to all-gather every update on every rank would be Ψm, and N times the work. One momentum in place of
Adam's two moments: 4 bytes a parameter less.

Shards that are whole matrices would need no exchange (KellerJordan/Muon, Megatron-LM's layer-wise optimizer). But they
are unequal, and where tensor parallelism has sharded a matrix it has to be gathered all the same: see the engine.

read: muon.py:37-125; newton_schulz.py:17-64; then flat.py, engine/muon.py

Ψ parameters, Ψm of them in matrices of the layers, N ranks, m micro-batches a step
"""

import sys
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, token_loss
from core.proof.lesson import Lesson, Run
from zero.engine.engine import MakeOptimizer
from zero.evidence.muon import add_flags, check, teach
from zero.flat import flatten, own_shard, set_data
from zero.newton_schulz import MuonSettings, deal, direction, flops, is_matrix


class ZeroMuon:
    """ZeRO-1 with Muon. A step is `forward_backward` and `step`; gradients may be clipped between.

    Args:
        make_optimizer: AdamW, over the parameters that it is given: for what is no matrix.
        master: the precision of the update.
    """

    def __init__(
        self, model: GPT, axis: Axis, make_optimizer: MakeOptimizer, master: torch.dtype, settings: MuonSettings
    ):
        self.model, self.axis, self.settings = model, axis, settings
        named, d = list(model.named_parameters()), model.config.head_dim
        self.matrices = [(p, d if "qkv" in name else 0) for name, p in named if is_matrix(name, p)]
        self.units = [[p for p, _ in self.matrices], [p for name, p in named if not is_matrix(name, p)]]
        self.weights = [flatten(unit, axis.size) for unit in self.units]  # (Ψm,), (Ψ-Ψm,)
        for unit, flat in zip(self.units, self.weights, strict=True):
            set_data(unit, flat)
        self.shards = [nn.Parameter(own_shard(flat, axis).to(master, copy=True)) for flat in self.weights]
        of_matrices, of_rest = self.shards  # (Ψm/N,), ((Ψ-Ψm)/N,), master weights
        self.optimizer = make_optimizer([of_rest])
        self.momentum = self.optimizer.state[of_matrices]["momentum_buffer"] = torch.zeros_like(of_matrices)
        owners = deal([flops(p.shape, d, settings.steps) for p, d in self.matrices], axis.size)
        self.owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(axis.size)]
        self.starts = [0, *accumulate(p.numel() for p, _ in self.matrices)]  # of each matrix in the flat buffer
        self.to_owner = [sum(self.size(i, axis.index) for i in each) for each in self.owned]  # elements, by owner
        self.to_shard = [sum(self.size(i, r) for i in self.owned[axis.index]) for r in range(axis.size)]  # by rank
        self.group = axis.labelled("muon")

    def forward_backward(self, microbatches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        """This rank's share of the loss. `tokens`: of the global batch, so that losses and gradients are sums."""
        share = torch.zeros((), device=self.weights[0].device)
        for inputs, targets in microbatches:  # (B, S) each
            loss = token_loss(self.model(inputs), targets, tokens)
            loss.backward()
            share = share + loss.detach()

        for unit, shard in zip(self.units, self.shards, strict=True):
            gradients = flatten([p.grad for p in unit], self.axis.size)
            shard.grad = comm.reduce_scatter(gradients, self.axis).to(shard.dtype)
        self.model.zero_grad()
        return share

    def step(self) -> None:
        of_matrices, mu = self.shards[0], self.settings.momentum
        self.momentum.lerp_(of_matrices.grad, 1 - mu)
        update = of_matrices.grad.lerp(self.momentum, mu)  # Nesterov; (Ψm/N,)

        mine = self.to_owners(update)
        directions = self.to_shards([direction(full, d, self.settings) for full, d in mine], update)

        (group,) = self.optimizer.param_groups
        of_matrices.data.mul_(1 - group["lr"] * group["weight_decay"]).sub_(directions, alpha=group["lr"])
        self.optimizer.step()  # AdamW, of this rank's 1/N of the rest
        for weights, shard in zip(self.weights, self.shards, strict=True):
            weights.copy_(comm.all_gather(shard.detach().to(weights.dtype), self.axis))

    def to_owners(self, update: Tensor) -> list[tuple[Tensor, int]]:
        """From shards of the updates, (Ψm/N,) a rank, to the full ones of the matrices that are this rank's."""
        mine = self.owned[self.axis.index]
        pieces = [update[self.held(i, self.axis.index)] for each in self.owned for i in each]
        received = comm.all_to_all(torch.cat(pieces), self.group, self.to_owner, self.to_shard)
        parts = received.split([self.size(i, rank) for rank in range(self.axis.size) for i in mine])
        full = [torch.cat(parts[k :: len(mine)]) for k in range(len(mine))]
        return [(flat.view(p.shape), d) for flat, (p, d) in zip(full, (self.matrices[i] for i in mine), strict=True)]

    def to_shards(self, directions: list[Tensor], update: Tensor) -> Tensor:
        """And back: from the full directions of this rank's matrices to its shard of all of them, (Ψm/N,)."""
        mine, ranks = self.owned[self.axis.index], range(self.axis.size)
        parts = [
            full.flatten().split([self.size(i, rank) for rank in ranks])
            for i, full in zip(mine, directions, strict=True)
        ]
        pieces = [update[:0], *(of_matrix[rank] for rank in ranks for of_matrix in parts)]
        received = comm.all_to_all(torch.cat(pieces), self.group, self.to_shard, self.to_owner)
        order = [i for each in self.owned for i in each]
        shard = torch.zeros_like(update)
        for i, piece in zip(order, received.split([self.size(i, self.axis.index) for i in order]), strict=True):
            shard[self.held(i, self.axis.index)] = piece
        return shard

    def held(self, i: int, rank: int) -> slice:
        """Where a rank's shard has elements of matrix i."""
        before, length = rank * len(self.momentum), len(self.momentum)
        return slice(*(min(max(at - before, 0), length) for at in self.starts[i : i + 2]))

    def size(self, i: int, rank: int) -> int:
        held = self.held(i, rank)
        return held.stop - held.start


def lesson(run: Run) -> None:
    teach(run, ZeroMuon)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: Muon with ZeRO",
        "优化器并行 ZeRO1/2/3 原理",
        "Muon's matrices gathered from all shards, each orthogonalised by one rank: 2Ψm/N elements, one moment.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
