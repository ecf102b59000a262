"""Lecture 01: ZeRO++, ZeRO-3 for slow links between nodes (优化器并行 ZeRO1/2/3 原理). Wang et al. 2023 (2306.10209).

    torchrun --nproc_per_node=8 zero/zeropp.py

ZeRO-3 sends 3Ψ elements between the nodes. Three changes make that less:

    qwZ  the weights gathered for forward travel as 8-bit integers, with a scale for each block
    hpZ  each node keeps what was gathered, cut over its ranks: backward gathers inside the node only
    qgZ  gradients travel as 4-bit integers, in two hops: summed inside the node first, and then between the nodes

hpZ is exact. The other two round; what that does to weights, gradients and losses is measured.

Ψ parameters, N ranks, l ranks in a node, n nodes
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.text import Text
from core.proof.lesson import Lesson, Run
from core.proof.plot import bars
from core.proof.training import train
from zero.stage import Stage
from zero.training import add_flags, build, check, teach
from zero.zero3 import Unit, Zero3

BLOCK = 256  # elements that share a scale


def quantise(x: Tensor, bits: int) -> Tensor:
    """(R, E) to (R, bytes) uint8: integers of 4 or 8 bits, then a float32 scale for each block of `BLOCK`."""
    blocks = nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).float()
    largest = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1).div_(largest)
    whole = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().flatten(1)
    whole = (whole + largest + 1).to(torch.uint8)
    if bits == 4:
        whole = whole[:, ::2] * 16 + whole[:, 1::2]
    return torch.cat([whole, scale.view(torch.uint8)], 1)


def restore(packed: Tensor, elements: int, bits: int, dtype: torch.dtype) -> Tensor:
    """What `quantise` has packed, (R, elements), each off by at most half a step of its block."""
    blocks = -(-elements // BLOCK)
    whole, scale = packed.split([blocks * BLOCK * bits // 8, blocks * 4], 1)
    if bits == 4:
        whole = torch.stack([whole // 16, whole % 16], -1).flatten(1)
    scale = scale.contiguous().view(torch.float32)
    exact = torch.promote_types(dtype, torch.float32)
    values = (whole.unflatten(1, (blocks, BLOCK)).to(exact) - 2 ** (bits - 1)) * scale.unsqueeze(-1).to(exact)
    return values.flatten(1)[:, :elements].to(dtype)


class NodeUnit(Unit):
    """A unit that is gathered from all ranks for forward, and inside the node for backward."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], axis: Axis, node: Axis, bits: int):
        self._node, self._bits = node, bits  # bits 0: not quantised
        self._second: list[Tensor] = []  # this rank's part of the node's copy, between forward and backward
        self._forward = False
        super().__init__(named, axis)

    def gather(self, forward: bool) -> None:
        from_node, self._second = [] if forward else self._second, []
        self._forward = forward and torch.is_grad_enabled()  # then the node keeps a copy
        for i, (bucket, flat, own) in enumerate(zip(self.buckets, self._flat, self.own, strict=True)):
            flat.untyped_storage().resize_(bucket.padded * bucket.dtype.itemsize)
            if from_node:
                flat.chunk(self._node.size)[self._node.index].copy_(from_node[i])
                self._arriving.append(comm.all_gather_in_place_async(flat, self._node))
            elif self._bits:
                packed = comm.all_gather_async(quantise(own[None], self._bits), self.axis)
                self._arriving.append(replace(packed, finish=partial(self._restore, flat, len(own))))
            else:
                flat[bucket.part(self.axis.index)].copy_(own)
                self._arriving.append(comm.all_gather_in_place_async(flat, self.axis))

    def _restore(self, flat: Tensor, length: int, packed: Tensor) -> Tensor:
        return flat.copy_(restore(packed, length, self._bits, flat.dtype).flatten())

    def free(self) -> None:
        self.wait()
        if self._forward:
            self._second = [flat.chunk(self._node.size)[self._node.index].clone() for flat in self._flat]
            self._forward = False
        super().free()


class ZeroPlusPlus(Zero3):
    """ZeRO-3 with qwZ (`weight_bits` 8), hpZ, and qgZ (`gradient_bits` 4); 0 bits leave the numbers as they are.

    Args:
        node: the ranks of this node.
        across: the ranks at this place in every node.
    """

    def __init__(self, model: nn.Module, axis: Axis, *rest: Any, node: Axis, across: Axis, weight_bits: int,
                 gradient_bits: int, **more: Any):  # fmt: skip
        self.node, self.across, self.weight_bits, self.gradient_bits = node, across, weight_bits, gradient_bits
        super().__init__(model, axis, *rest, **more)

    def _unit(self, named: Sequence[tuple[str, nn.Parameter]]) -> Unit:
        return NodeUnit(named, self.axis, self.node, self.weight_bits)

    def _launch(self, i: int) -> None:
        """Two hops. Parts are ordered (node, place in the node): first to the right place, then to the right node."""
        self._arrived(0)
        bucket = self.buckets[i]
        self.used |= {m.parameter for m in bucket.members if m.parameter.grad is not None}
        parts = bucket.take_away_gradients().view(self.across.size, self.node.size, bucket.length)
        of_node = self._hop(parts.transpose(0, 1).flatten(1), self.node)  # summed over the node, for each node
        total = self._hop(of_node.view(self.across.size, bucket.length), self.across)
        self._on_their_way.append((i, comm.Pending(None, self.axis, total, "")))

    def _hop(self, rows: Tensor, axis: Axis) -> Tensor:
        """Row i goes to rank i of the axis; the sum of what arrives."""
        equal = [1] * axis.size
        if not self.gradient_bits:
            return comm.all_to_all(rows.contiguous(), axis, equal, equal).sum(0)
        packed = comm.all_to_all(quantise(rows, self.gradient_bits), axis, equal, equal)
        return restore(packed, rows.shape[1], self.gradient_bits, rows.dtype).sum(0)


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    local = run.args.ranks_per_node or default_node(run.job.world_size)
    ledger = Ledger()
    mesh = Mesh(run.job.device.type, ledger, run.job.timeout, cp=local, dp=run.job.world_size // local)
    node, across = replace(mesh["cp"], name="node"), replace(mesh["dp"], name="across")
    plus = partial(ZeroPlusPlus, node=node, across=across)
    teach(run, partial(plus, weight_bits=0, gradient_bits=0), None)  # hpZ alone: as exact as ZeRO-3
    ledger.traffic.clear()
    quantised = Run(run.args, run.job, run.dtype)
    stage, oracle, _ = build(quantised, partial(plus, weight_bits=8, gradient_bits=4))
    train(quantised, {"": stage}, oracle)
    claim_bytes(run, stage, node, across)
    claim_errors(run, stage, plus, quantised)


def packed_bytes(elements: int, bits: int) -> int:
    return -(-elements // BLOCK) * (BLOCK * bits // 8 + 4)


def claim_bytes(run: Run, stage: Stage, node: Axis, across: Axis) -> None:
    """What travels inside a node and between the nodes, in a step."""
    n, steps, m, l = stage.axis.size, run.args.steps, run.args.microbatches, node.size  # noqa: E741
    sent = {
        "qwZ: weights, from all ranks": ("all-gather", stage.axis),
        "hpZ: weights, inside the node": ("all-gather", node),
        "qgZ: gradients, inside the node": ("all-to-all", node),
        "qgZ: gradients, between the nodes": ("all-to-all", across),
    }
    everyone = run.job.gather(
        [axis.ledger.traffic[operation, axis.name].bytes / steps for operation, axis in sent.values()]
    )
    if not everyone:
        return
    lengths = [bucket.length for bucket in stage.buckets]
    expected = [
        m * (n - 1) * sum(packed_bytes(length, 8) for length in lengths),
        m * (l - 1) * sum(length * across.size for length in lengths) * run.dtype.itemsize,
        m * (l - 1) * sum(packed_bytes(length * across.size, 4) for length in lengths),
        m * (across.size - 1) * sum(packed_bytes(length, 4) for length in lengths),
    ]
    formulas = ("m(N-1) parts of 1 byte", f"m(l-1)Ψ/l of {run.dtype.itemsize} bytes", "m(l-1)/l Ψ of 1/2 byte",
                "m(n-1)/n Ψ/l of 1/2 byte")  # fmt: skip
    rows = []
    size = sum(bucket.size for bucket in stage.buckets)
    for i, (name, formula) in enumerate(zip(sent, formulas, strict=True)):
        measured = [values[i] for values in everyone]
        run.evidence.on_ranks(
            f"bytes of {name}", f"{formula}, and scales = {expected[i]:,}", expected[i], measured, 1e-6
        )
        whole = name.startswith("hpZ")  # neither quantised nor, where --dtype is not bfloat16, in 16 bits
        rows.append((name, max(measured) / (m * size) * (2 / run.dtype.itemsize if whole else 1)))
    third = 2 * (n - 1) / n  # bytes that ZeRO-3 sends for a parameter, each of its three times, in 16 bits
    rows += [("ZeRO-3 in 16 bits: weights, twice", 2 * third), ("ZeRO-3 in 16 bits: gradients", third)]
    run.say("\nbytes that a rank sends for a parameter and microbatch, what is not quantised in 16 bits")
    run.say(tabulate(rows, floatfmt=".3f"))
    if run.args.plot:
        columns = {"bytes a parameter": [value for _, value in rows]}
        bars(run.args.plot, "ZeRO++ and ZeRO-3", "bytes", [name.replace(" ", "\n") for name, _ in rows], columns)


def claim_errors(run: Run, stage: Stage, plus: Callable[..., Stage], quantised: Run) -> None:
    """What rounding does to weights, gradients and losses."""
    steps_off, norms = [], []
    for own in stage._own_weights:
        packed = quantise(own[None], 8)
        exact = torch.promote_types(own.dtype, torch.float32)  # without the rounding to bfloat16 that follows
        back, own = restore(packed, len(own), 8, exact)[0], own.to(exact)
        step = packed[:, -(-len(own) // BLOCK) * BLOCK :].contiguous().view(torch.float32).repeat_interleave(BLOCK)
        steps_off.append(((back - own).abs() / step[: len(own)].clamp(min=1e-30)).max().item())
        norms.append((back - own).norm().item() / own.norm().item())
    gradients = []
    for bits in (0, 4):
        stage, _, forward_backward = build(
            Run(run.args, run.job, run.dtype), partial(plus, weight_bits=0, gradient_bits=bits)
        )
        data = Text(run.args.data, run.args.sequence).batch(run.args.seed, 0, run.args.batch)
        forward_backward(0, *(t.to(run.job.device) for t in data))
        gradients.append(torch.cat(stage.own_gradients).double())
    apart = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    everyone = run.job.gather((max(steps_off), max(norms), apart))
    if not everyone:
        return
    off, weight, gradient = (max(values) for values in zip(*everyone, strict=True))
    worst = max(abs(a - b) / b for a, b in zip(quantised.losses, quantised.reference_losses, strict=True))
    claim = run.evidence.claim
    claim("qwZ: error of a weight, in steps of its block", "at most 1/2", 0, off, 0.501)
    claim("qgZ: relative error of the gradient, 4 bits twice", "below 1/2 (no bound in the paper)", 0, gradient, 0.5)
    claim("losses, all steps, against one process", "within 2 % (no bound in the paper)", 0, worst, 0.02)
    run.say(f"\nrelative error of the weights {weight:.4f}, of the gradient {gradient:.4f}, of the losses {worst:.5f}")


def default_node(ranks: int) -> int:
    """Half of the ranks where that is more than one and divides them, otherwise all."""
    return ranks // 2 if ranks % 2 == 0 and ranks > 2 else ranks


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks)
    if args.ranks_per_node < 0 or (args.ranks_per_node and ranks % args.ranks_per_node):
        usable = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ValueError(
            f"--ranks-per-node {args.ranks_per_node}: the {ranks} ranks must fill whole nodes; "
            f"use --ranks-per-node one of {usable}"
        )


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
    sys.exit(frame.main(refuse, lesson))
