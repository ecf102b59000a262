"""CODE 04: all experts of a layer as one grouped product (专家并行大规模训练). MegaBlocks (2211.15841), section 4.

The plain version (`moe.py`) loops over the experts, and indexes the rows of each. Here the rows of an expert are one
block, so that an expert is a matrix product and none is padded to the size of another; and the gradients of the weights
(wgrad) can be deferred, as zero-bubble pipelines do.

R rows, E experts, H hidden, F feed-forward, I and O in and out features
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.model.config import ModelConfig as GPTConfig
from core.model.linear import Gradients, deferring


def grouped(x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None = None) -> Tensor:
    """Rows (R, I), the first `counts[0]` of them times `weight[0]` of (E, I, O) plus `bias[0]` of (E, O), and so on."""
    aligned = not any(size % 8 for size in weight.shape[1:])  # torch's grouped_mm wants strides of 16 bytes
    if x.dtype == torch.bfloat16 and aligned:  # the only type that it has on every device
        sizes = torch.tensor(counts, device=x.device)
        y = F.grouped_mm(x, weight, offs=sizes.cumsum(0).to(torch.int32))
        return y if bias is None else y + bias.repeat_interleave(sizes, 0, output_size=len(y))
    y = x.new_empty(len(x), weight.shape[2])
    for e, (rows, out) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        torch.mm(rows, weight[e], out=out) if bias is None else torch.addmm(bias[e], rows, weight[e], out=out)
    return y


def grouped_outer(x: Tensor, y: Tensor, counts: list[int]) -> Tensor:
    """For each expert its rows of (R, O) and (R, I), transposed and multiplied: (E, O, I)."""
    product = x.new_empty(len(counts), x.shape[1], y.shape[1])
    for left, right, out in zip(x.split(counts), y.split(counts), product, strict=True):
        torch.mm(left.T, right, out=out)  # zeros where there are no rows
    return product


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.counts = weight, bias, counts
        return grouped(x, weight.transpose(1, 2), counts, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, bias, counts = ctx.saved_tensors, ctx.weight, ctx.bias, ctx.counts
        gradient = gradient.contiguous()
        dgrad = grouped(gradient, weight, counts) if ctx.needs_input_grad[0] else None

        def wgrad() -> Gradients:
            of_weight = grouped_outer(gradient, x, counts) if weight.requires_grad else None
            trained = bias is not None and bias.requires_grad
            return of_weight, torch.stack([g.sum(0) for g in gradient.split(counts)]) if trained else None

        deferred = deferring(weight)
        found = deferred.put((weight, bias), wgrad, (gradient, x)) if deferred else wgrad()
        return dgrad, *found, None


class GroupedLinear(nn.Module):
    """Rows (R, I) in the order of their experts to (R, O), each by its expert's weight (E, O, I) and bias (E, O)."""

    def __init__(self, experts: int, inside: int, outside: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outside, inside, device="meta"))
        self.bias = nn.Parameter(torch.empty(experts, outside, device="meta")) if bias else None

    def forward(self, x: Tensor, counts: list[int], add_bias: bool = True) -> Tensor:
        return _GroupedLinear.apply(x, self.weight, self.bias if add_bias else None, counts)


class Experts(nn.Module):
    """E MLPs of the model's kind, with F features each: rows (R, H) in the order of their experts to (R, H)."""

    def __init__(self, config: GPTConfig, experts: int, features: int):
        super().__init__()
        self.gate = GroupedLinear(experts, config.hidden, features, config.biases) if config.gated else None
        self.up = GroupedLinear(experts, config.hidden, features, config.biases)
        self.down = GroupedLinear(experts, features, config.hidden, config.biases)

    def forward(self, x: Tensor, counts: list[int], last_bias: bool = True) -> Tensor:
        layers = [self.up] if self.gate is None else [self.gate, self.up]
        inner = self.activation(*(layer(x, counts) for layer in layers))
        return self.down(inner, counts, last_bias)

    def activation(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """As `core.model.gpt.MLP.activation`."""
        return F.gelu(x) if up is None else F.silu(x) * up
