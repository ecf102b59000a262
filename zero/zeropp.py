"""Lecture 01: ZeRO++, ZeRO-3 for slow links between nodes (优化器并行 ZeRO1/2/3 原理). Wang et al. 2023 (2306.10209).

    torchrun --nproc_per_node=8 zero/zeropp.py

ZeRO-3 sends 3Ψ elements between the nodes. Three changes make that less:

    qwZ  the weights gathered for forward travel as 8-bit integers, with a scale for each block
    hpZ  each node keeps what was gathered, sharded over its ranks: backward gathers inside the node only
    qgZ  gradients travel as 4-bit integers, in two hops: summed inside the node first, and then between the nodes

hpZ is exact. The other two round; what that does to weights, gradients and losses is measured.

read: zeropp.py:47-140; zero3.py:71-110; then flat.py, engine/gathered.py

Ψ parameters, N ranks, l ranks in a node, n nodes
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.proof.lesson import Lesson, Run
from zero.engine.engine import Engine
from zero.engine.gathered import Unit
from zero.engine.parts import Named
from zero.engine.sharding import shard_parameters
from zero.evidence.training import add_flags
from zero.evidence.zeropp import (
    Nodes,
    check,
    claim_bytes,
    claim_gradient_error,
    claim_weight_error,
    make_nodes,
    train_exact,
    train_quantised,
)
from zero.flat import flatten, own_shard, set_data
from zero.zero3 import Zero3

BLOCK = 256  # elements that share a scale


def quantise(x: Tensor, bits: int) -> Tensor:
    """(R, E) to (R, bytes) uint8: integers of 4 or 8 bits, then a float32 scale for each block of `BLOCK`."""
    blocks = nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).float()  # (R, blocks, BLOCK)
    largest = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1).div_(largest)  # (R, blocks)
    integers = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().flatten(1)
    integers = (integers + largest + 1).to(torch.uint8)
    if bits == 4:
        integers = integers[:, ::2] * 16 + integers[:, 1::2]
    return torch.cat([integers, scale.view(torch.uint8)], 1)


def dequantise(packed: Tensor, elements: int, bits: int, dtype: torch.dtype) -> Tensor:
    """What `quantise` has packed, (R, elements), each off by at most half a step of its block."""
    blocks = -(-elements // BLOCK)
    integers, scale = packed.split([blocks * BLOCK * bits // 8, blocks * 4], 1)
    if bits == 4:
        integers = torch.stack([integers // 16, integers % 16], -1).flatten(1)
    scale = scale.contiguous().view(torch.float32)
    exact = torch.promote_types(dtype, torch.float32)
    values = (integers.unflatten(1, (blocks, BLOCK)).to(exact) - 2 ** (bits - 1)) * scale.unsqueeze(-1).to(exact)
    return values.flatten(1)[:, :elements].to(dtype)


def gather_quantised(shard: Tensor, full: Tensor, axis: Axis, bits: int) -> comm.Pending:
    """qwZ: start to fill `full` (Ψ,) with every rank's shard (Ψ/N,), this rank's too as the others see it."""
    packed = comm.all_gather_async(quantise(shard[None], bits), axis)  # (N, bytes)
    return replace(packed, finish=lambda p: full.copy_(dequantise(p, len(shard), bits, full.dtype).flatten()))


def gather_in_node(secondary: Tensor, full: Tensor, node: Axis) -> comm.Pending:
    """hpZ: start to fill `full` (Ψ,) with the secondary shards (Ψ/l,) of the ranks of this node."""
    full.chunk(node.size)[node.index].copy_(secondary)
    return comm.all_gather_in_place_async(full, node)


def reduce_scatter_quantised(gradient: Tensor, node: Axis, across: Axis, bits: int) -> Tensor:
    """qgZ: of the gradient (Ψ,), this rank's shard (Ψ/N,) summed over all ranks, in two hops.

    Shards are ordered (node, rank in the node). The first hop brings each to its rank of the node, summed over the
    node; the second to its node, summed over the nodes. Between the nodes travels 1/l of it.

    Args:
        across: the ranks of the same index in every node.
        bits: 0 leaves the numbers as they are.
    """
    shards = gradient.view(across.size, node.size, -1)  # (n, l, Ψ/N)
    of_node = hop(shards.transpose(0, 1).flatten(1), node, bits)  # (n Ψ/N,)
    return hop(of_node.view(across.size, -1), across, bits)  # (Ψ/N,)


def hop(rows: Tensor, axis: Axis, bits: int) -> Tensor:
    """Row i goes to rank i of the axis, quantised; the sum of what arrives."""
    equal = [1] * axis.size
    if not bits:
        return comm.all_to_all(rows.contiguous(), axis, equal, equal).sum(0)
    packed = comm.all_to_all(quantise(rows, bits), axis, equal, equal)
    return dequantise(packed, rows.shape[1], bits, rows.dtype).sum(0)


class ZeroPlusPlus(Zero3):
    """The plain ZeRO-3 with these collectives in place of its own. 0 bits do not quantise.

    Args:
        nodes: all ranks, those of this node, and those of the same index in every node.
    """

    def __init__(self, *arguments: Any, nodes: Nodes, weight_bits: int, gradient_bits: int):
        self.nodes, self.weight_bits, self.gradient_bits = nodes, weight_bits, gradient_bits
        self.secondary: dict[int, Tensor] = {}  # by unit, between its forward and its backward
        super().__init__(*arguments)

    def gather(self, unit: int) -> None:
        shard = self.shards[unit].detach().to(self.dtype)  # (Ψ/N,)
        full = shard.new_empty(self.axis.size * len(shard))  # (Ψ,)
        if unit in self.secondary:  # backward
            gather_in_node(self.secondary.pop(unit), full, self.nodes.node).wait()
        elif self.weight_bits:
            gather_quantised(shard, full, self.axis, self.weight_bits).wait()
            self.secondary[unit] = own_shard(full, self.nodes.node).clone()  # (Ψ/l,)
        else:
            full = comm.all_gather(shard, self.axis)
            self.secondary[unit] = own_shard(full, self.nodes.node).clone()
        set_data(self.units[unit], full)

    def reduce_scatter(self, unit: int) -> None:
        gradients = flatten([p.grad for p in self.units[unit]], self.axis.size)  # (Ψ,)
        for p in self.units[unit]:
            p.grad = None
        node, across = self.nodes.node, self.nodes.across
        self.shards[unit].grad += reduce_scatter_quantised(gradients, node, across, self.gradient_bits)


# ---- The same in ZeRO-3's engine, where layers are prefetched --------------------------------------------------------


class NodeUnit(Unit):
    """A unit of ZeRO-3's engine that is gathered from all ranks for forward, and inside the node for backward."""

    def __init__(self, named: Named, axis: Axis, node: Axis, bits: int):
        self.node, self.bits = node, bits  # bits 0: not quantised
        self.secondary: list[Tensor] = []  # this rank's shard of the node's copy, between forward and backward
        self.keeps = False  # whether the node is to keep what is gathered
        super().__init__(named, axis)

    def gather(self, forward: bool) -> None:
        secondary, self.secondary = self.secondary, []
        self.keeps = forward and torch.is_grad_enabled()
        if secondary and not forward:
            self.allocate()
            for full, shard in zip(self.full, secondary, strict=True):
                self.in_flight.append(gather_in_node(shard, full, self.node))
        elif self.bits:
            self.allocate()
            for full, own in zip(self.full, self.own, strict=True):
                self.in_flight.append(gather_quantised(own, full, self.axis, self.bits))
        else:
            super().gather(forward)

    def free(self) -> None:
        self.wait()
        if self.keeps:
            self.secondary = [full.chunk(self.node.size)[self.node.index].clone() for full in self.full]
            self.keeps = False
        super().free()


def zero_plus_plus(*arguments: Any, nodes: Nodes, weight_bits: int, gradient_bits: int, **more: Any) -> Engine:
    """ZeRO-3's engine with hpZ, qwZ (`weight_bits` 8) and qgZ (`gradient_bits` 4); 0 bits do not quantise."""

    def reduce(gradient: Tensor, axis: Axis) -> comm.Pending:
        shard = reduce_scatter_quantised(gradient, nodes.node, nodes.across, gradient_bits)
        return comm.Pending(None, axis, shard, "")

    make_unit = partial(NodeUnit, node=nodes.node, bits=weight_bits)
    return Engine(partial(shard_parameters, make_unit=make_unit, reduce=reduce), *arguments, **more)


def lesson(run: Run) -> None:
    nodes = make_nodes(run)
    exact, quantised = {"weight_bits": 0, "gradient_bits": 0}, {"weight_bits": 8, "gradient_bits": 4}
    train_exact(run, nodes, partial(ZeroPlusPlus, **exact), partial(zero_plus_plus, **exact))  # as exact as ZeRO-3
    trained = train_quantised(run, nodes, partial(ZeroPlusPlus, **quantised), partial(zero_plus_plus, **quantised))
    claim_bytes(run, trained, BLOCK)
    claim_weight_error(run, trained, quantise, dequantise, BLOCK)
    claim_gradient_error(run, nodes, partial(zero_plus_plus, weight_bits=0))


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "01",
        "Optimizer parallelism: ZeRO++",
        "优化器并行 ZeRO1/2/3 原理",
        "ZeRO-3 with weights in 8 bits, gradients in 4, and a copy in each node: the bytes saved and the error made.",
    )
    add_flags(frame)
    frame.parser.add_argument("--ranks-per-node", type=int, default=0, help="default: half of them")
    sys.exit(frame.main(check, lesson))
