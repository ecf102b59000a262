"""What computation takes: matrix products tile by tile, attention by its kernel, the rest by memory. Lecture 03.

A device multiplies matrices tile by tile, all its processors at once, and the last wave of tiles may leave most of them
idle: so small products are less efficient. Everything between the products is bound by memory, and where kernels are
small by the host that starts them one by one.
"""

from functools import cache
from math import ceil
from typing import NamedTuple

from cluster.planner.counting import attention_flops, expert_matrices, layer_flops, layer_matrices, vocabulary_shard
from cluster.planner.layout import Layout
from cluster.planner.machines import Machine
from cluster.planner.software import Software
from core.model.config import ModelConfig

TILE = (256, 128)  # rows and columns of the result that one processor computes at a time, of a GPU's largest kernels
BACKWARD = 2.5 / 0.8  # of flash attention over its forward: 5 products for 2, at four fifths of its speed (2407.08608)
# Operators that the host starts for the forward of a layer; of backward for dgrad and wgrad as many each. Experts: the
# router's and those that sort rows and back; for each expert here two products, and with biases their sums. Latent
# attention's: what is compressed, split, normed, rotated and put together.
OPERATORS, ROUTER, EXPERT, EXPERT_BIASES, LATENT = 20, 50, 2, 4, 80
KEPT_WIDE = 0.15  # of the layers that a training in 4 bits has in 16: 2509.25149, section 3
QUANTIZING = 8  # both operands of four products are cast
CHECKPOINT = 18  # of torch.utils.checkpoint's own: it saves and restores the generators' states


def product(rows: float, inputs: float, outputs: float, machine: Machine, count: int = 1) -> float:
    """FLOP that `count` products (rows x inputs) x (inputs x outputs) keep the device busy for."""
    if machine.processors == 1:
        return 2 * rows * inputs * outputs * count
    tall, wide = TILE
    tiles = min(ceil(rows / a) * ceil(outputs / b) for a, b in ((tall, wide), (wide, tall)))
    waves = ceil(count * tiles / machine.processors)
    return 2 * waves * machine.processors * tall * wide * inputs


class LayerFlop(NamedTuple):
    """FLOP of one layer on a rank and one microbatch, as `product` counts them."""

    forward: float  # of matrices
    dgrad: float
    wgrad: float
    attention: float  # forward, all of it, causal or not
    grouped: tuple[float, float, float] = (0.0, 0.0, 0.0)  # forward, dgrad and wgrad of the routed experts


@cache
def layer_flop(model: ModelConfig, layout: Layout, moe: bool, machine: Machine, imbalance: float = 1.0) -> LayerFlop:
    tokens = layout.tokens(model.sequence)
    attention = tokens * attention_flops(model) / layout.tp
    dense = of_products([(matrix.shape(layout.tp), tokens, 1) for matrix in layer_matrices(model, moe)], machine)
    if not moe:
        return LayerFlop(*dense, attention)
    experts = model.experts // layout.ep  # on this rank, and the rows of each
    rows = imbalance * tokens / layout.tp * layout.etp * model.top_k / experts
    grouped = of_products([(m.shape(layout.etp), rows, experts) for m in expert_matrices(model)], machine)
    return LayerFlop(*dense, attention, grouped)


def of_products(products: list[tuple[tuple[int, int], float, int]], machine: Machine) -> tuple[float, float, float]:
    """FLOP of forward, dgrad and wgrad of matrices, each ((inputs, outputs), rows, how many alike)."""
    forward = dgrad = wgrad = 0.0
    for (inputs, outputs), rows, count in products:
        forward += product(rows, inputs, outputs, machine, count)
        dgrad += product(rows, outputs, inputs, machine, count)
        wgrad += product(inputs, rows, outputs, machine, count)
    return forward, dgrad, wgrad


def speed(machine: Machine, software: Software, bits: int = 16) -> float:
    """FLOP/s of large matrix products of elements of so many bits."""
    wide = machine.peak * machine.sustained * software.gemm
    peak = {8: machine.peak8, 4: machine.peak4 or machine.peak8}.get(bits, 0.0)
    if not peak:
        return wide
    narrow = peak * machine.sustained * software.gemm * software.gemm8
    return 1 / ((1 - KEPT_WIDE) / narrow + KEPT_WIDE / wide) if bits == 4 else narrow


def attention_time(model: ModelConfig, flop: float, machine: Machine, software: Software) -> tuple[float, float]:
    """Seconds of attention's products, forward and backward; `flop`: of the forward, causal or not."""
    if not software.attention:
        forward = flop / speed(machine, software)
        return forward, 2 * forward
    reached = software.attention * model.sequence / (model.sequence + software.warming)
    forward = flop / 2 / (machine.peak * reached)
    return forward, BACKWARD * forward


def head_time(model: ModelConfig, layout: Layout, machine: Machine, software: Software) -> float:
    """Seconds of the head and the loss of one microbatch, forward and backward."""
    tokens, columns = layout.tokens(model.sequence), vocabulary_shard(model, layout.tp)
    products = 4 if layout.chunk_of_loss(model) else 3
    of_products = products * product(tokens, model.hidden, columns, machine) / speed(machine, software)
    return of_products + software.logits * tokens * columns / machine.bandwidth


def operators(model: ModelConfig, layout: Layout, moe: bool, at_once: bool = False, bits: int = 16) -> int:
    """That the host starts for a layer's forward; fewer bits are made of more, before each product."""
    of_expert = EXPERT + (EXPERT_BIASES if model.biases or model.expert_bias else 0)
    of_experts = ROUTER + of_expert * (1 if at_once else model.experts // layout.ep) if moe else 0
    return OPERATORS + (QUANTIZING if bits < 16 else 0) + of_experts + (LATENT if model.latent else 0)


def head_in_layers(model: ModelConfig) -> float:
    """The products of the head, in those of a layer."""
    return 2 * model.hidden * model.vocabulary / layer_flops(model, model.moe_layers > 0)
