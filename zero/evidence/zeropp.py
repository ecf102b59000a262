"""ZeRO++: what travels inside a node and between the nodes, and what rounding does to weights, gradients and losses.

Ψ parameters, N ranks, l ranks in a node, n nodes
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.text import Text
from core.proof.comparison import claim_equal
from core.proof.figures import bars
from core.proof.lesson import Run
from core.proof.rules import check as check_rules
from core.proof.training import train
from zero.engine.engine import Engine
from zero.evidence import training
from zero.evidence.pictures import draw_owned
from zero.evidence.rules import NODES
from zero.evidence.training import Fast, Plain, Technique, data_axis, make_oracle


class Nodes(NamedTuple):
    """All ranks, those of this node, and those of the same index in every node."""

    every: Axis
    node: Axis
    across: Axis

    def counted_apart(self) -> "Nodes":
        """The same ranks, with a new ledger."""
        ledger = Ledger()
        return Nodes(*(replace(axis, ledger=ledger) for axis in self))


Trained = dict[str, Plain | Fast]
MakeEngine = Callable[..., Engine]  # with the keyword nodes


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the ranks do not fill the nodes, or another flag does not fit."""
    training.check(args, ranks)
    check_rules(argparse.Namespace(**vars(args), ranks=ranks), NODES)


def default_node(ranks: int) -> int:
    """Half of the ranks where that is more than one and divides them, otherwise all."""
    return ranks // 2 if ranks % 2 == 0 and ranks > 2 else ranks


def make_nodes(run: Run) -> Nodes:
    every, n = data_axis(run), run.job.world_size
    run.mesh = {"dp": n}
    local = run.args.ranks_per_node or default_node(n)
    mesh = Mesh(run.job.device.type, every.ledger, run.job.timeout, cp=local, dp=n // local)
    return Nodes(every, replace(mesh["cp"], name="node"), replace(mesh["dp"], name="across"))


def trainables(run: Run, nodes: Nodes, technique: Callable[..., Technique], make_engine: MakeEngine) -> Trained:
    plain, engine = nodes.counted_apart(), nodes.counted_apart()
    return {
        "plain": Plain(run, plain.every, partial(technique, nodes=plain)),
        "engine": Fast(run, engine.every, partial(make_engine, nodes=engine)),
    }


def train_exact(run: Run, nodes: Nodes, technique: Callable[..., Technique], make_engine: MakeEngine) -> None:
    """Claim that nothing is lost where nothing is quantised."""
    trained = trainables(run, nodes, technique, make_engine)
    claim_equal(run, train(run, trained, make_oracle(run)))
    run.sent = {name: each.axis.ledger for name, each in trained.items()}
    if run.page:
        draw_owned(run, trained)


def train_quantised(run: Run, nodes: Nodes, technique: Callable[..., Technique], make_engine: MakeEngine) -> Trained:
    trained = trainables(run, nodes, technique, make_engine)
    unreported = Run(run.args, run.job, run.precision)  # the report is of the exact ones
    compared = train(unreported, trained, make_oracle(run))
    if run.job.rank == 0:
        claim = "losses, all steps, against one process"
        cases = [(f"{claim} ({name})", 0.0, each.loss) for name, each in compared.items()]
        run.evidence.each(claim, "within 2 % (no bound in the paper)", cases, 0.02)
    return trained


def claim_bytes(run: Run, trained: Trained, block: int) -> None:
    """What a rank sends in a step.

    Args:
        block: elements that share a scale.
    """

    def packed(elements: int, bits: int) -> int:
        return -(-elements // block) * (block * bits // 8 + 4)

    for name, each in trained.items():
        _claim_bytes(run, name, each, packed)


def _claim_bytes(run: Run, which: str, each: Plain | Fast, packed: Callable[[int, int], int]) -> None:
    traffic, steps, m, size = each.axis.ledger.traffic, run.args.steps, run.args.microbatches, run.dtype.itemsize
    local = run.args.ranks_per_node or default_node(run.job.world_size)
    n = run.job.world_size // local  # nodes
    shards = [bucket.length for bucket in each.buckets]  # Ψ/N elements together
    weights, inside, hop_inside, hop_between = (
        sum(packed(shard, 8) for shard in shards),
        sum(shard * n for shard in shards) * size,
        sum(packed(shard * n, 4) for shard in shards),
        sum(packed(shard, 4) for shard in shards),
    )
    claims = {
        "qwZ: weights, from all ranks": ("all-gather", "dp", m * (n * local - 1) * weights,
                                         "m(N-1) shards of 1 byte"),
        "hpZ: weights, inside the node": ("all-gather", "node", m * (local - 1) * inside,
                                          f"m(l-1)Ψ/l of {size} bytes"),
        "qgZ: gradients, inside the node": ("all-to-all", "node", m * (local - 1) * hop_inside,
                                            "m(l-1)/l Ψ of 1/2 byte"),
        "qgZ: gradients, between the nodes": ("all-to-all", "across", m * (n - 1) * hop_between,
                                              "m(n-1)/n Ψ/l of 1/2 byte"),
    }  # fmt: skip
    sent = [traffic[operation, axis].bytes / steps for operation, axis, _, _ in claims.values()]
    everyone = run.job.gather(sent)
    if not everyone:
        return
    rows = []
    parameters = sum(bucket.size for bucket in each.buckets)
    for (claim, (_, _, expected, formula)), measured in zip(claims.items(), zip(*everyone, strict=True), strict=True):
        formula = f"{formula}, and scales = {expected:,}; counted"
        run.evidence.on_ranks(f"bytes of {claim}, {which}", formula, expected, measured, 1e-6)
        # hpZ's are neither quantised nor, where --dtype is not bfloat16, in 16 bits.
        in_16_bits = 2 / size if claim.startswith("hpZ") else 1
        rows.append((claim, max(measured) / (m * parameters) * in_16_bits))
    if which == "engine":
        show_bytes(run, rows)


def show_bytes(run: Run, rows: list[tuple[str, float]]) -> None:
    ranks = run.job.world_size
    third = 2 * (ranks - 1) / ranks  # bytes that ZeRO-3 sends for a parameter, each of its three times, in 16 bits
    rows += [("ZeRO-3 in 16 bits: weights, twice", 2 * third), ("ZeRO-3 in 16 bits: gradients", third)]
    run.say("\nbytes that a rank sends for a parameter and micro-batch, what is not quantised in 16 bits")
    run.say(tabulate(rows, floatfmt=".3f"))
    columns = {"bytes a parameter": [value for _, value in rows]}
    title = (
        "ZeRO++ and ZeRO-3: sent for a parameter and micro-batch",
        "ZeRO++ 与 ZeRO-3：每参数每微批次的发送量",
    )
    run.draw(bars(title, ("bytes", "字节"), [name for name, _ in rows], columns), chart=True)


def claim_weight_error(
    run: Run, trained: Trained, quantise: Callable[..., Tensor], dequantise: Callable[..., Tensor], block: int
) -> None:
    """Quantise the weights once more."""
    steps_off, norms = [], []
    for own in trained["engine"].engine.sharding.weights.own:
        packed = quantise(own[None], 8)
        exact = torch.promote_types(own.dtype, torch.float32)  # without the rounding to bfloat16 that follows
        back, own = dequantise(packed, len(own), 8, exact)[0], own.to(exact)
        step = packed[:, -(-len(own) // block) * block :].contiguous().view(torch.float32).repeat_interleave(block)
        steps_off.append(((back - own).abs() / step[: len(own)].clamp(min=1e-30)).max().item())
        norms.append((back - own).norm().item() / own.norm().item())
    everyone = run.job.gather((max(steps_off), max(norms)))
    if everyone:
        off, relative = (max(values) for values in zip(*everyone, strict=True))
        run.evidence.claim("qwZ: error of a weight, in steps of its block", "at most 1/2", 0, off, 0.501)
        run.say(f"\nrelative error of the weights {relative:.4f}")


def claim_gradient_error(run: Run, nodes: Nodes, make_engine: MakeEngine) -> None:
    """The first gradient, in 4 bits and as it is."""
    gradients = []
    for bits in (0, 4):
        apart = nodes.counted_apart()
        trained = Fast(run, apart.every, partial(make_engine, nodes=apart, gradient_bits=bits))
        data = Text(run.args.data, run.args.sequence).batch(run.args.seed, 0, run.args.batch)
        trained.forward_backward(0, *(t.to(run.job.device) for t in data))
        gradients.append(torch.cat(trained.engine.own_gradients).double())
    everyone = run.job.gather(((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item())
    if everyone:
        formula = "below 1/2 (no bound in the paper)"
        run.evidence.claim("qgZ: relative error of the gradient, 4 bits twice", formula, 0, max(everyone), 0.5)
