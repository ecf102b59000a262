"""CODE 04: all experts of a layer as one grouped computation (专家并行大规模训练). MegaBlocks (2211.15841), section 4.

The rows of an expert stand together, so an expert is a matrix product of its block, with no loop over tokens, and none
is padded to the size of another.

R rows, E experts, H hidden, F feed-forward, I and O in and out features
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.linear import Gradients, deferring


def grouped(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows (R, I), the first `counts[0]` of them times `weight[0]` of (E, I, O), and so on: (R, O)."""
    if x.dtype == torch.bfloat16:  # the only type that torch's has on every device
        ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight, offs=ends)
    y = x.new_empty(len(x), weight.shape[2])
    for rows, matrix, out in zip(x.split(counts), weight, y.split(counts), strict=True):
        torch.mm(rows, matrix, out=out)
    return y


def grouped_outer(x: Tensor, y: Tensor, counts: list[int]) -> Tensor:
    """For each expert its rows of (R, O) and (R, I), transposed and multiplied: (E, O, I)."""
    product = x.new_empty(len(counts), x.shape[1], y.shape[1])
    for left, right, out in zip(x.split(counts), y.split(counts), product, strict=True):
        torch.mm(left.T, right, out=out)  # zeros where there are no rows
    return product


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.counts = weight, counts
        return grouped(x, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, counts = ctx.saved_tensors, ctx.weight, ctx.counts
        gradient = gradient.contiguous()
        of_x = grouped(gradient, weight, counts) if ctx.needs_input_grad[0] else None

        def of_weight() -> Gradients:
            return (grouped_outer(gradient, x, counts) if weight.requires_grad else None), None

        deferred = deferring(weight)
        found = deferred.put(weight, None, of_weight, (gradient, x)) if deferred else of_weight()
        return of_x, found[0], None


class GroupedLinear(nn.Module):
    """Rows (R, I) in the order of their experts to (R, O), each by its expert's weight (E, O, I) and bias (E, O)."""

    def __init__(self, experts: int, inside: int, outside: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outside, inside, device="meta"))
        self.bias = nn.Parameter(torch.empty(experts, outside, device="meta"))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        return self.add_bias(self.product(x, counts), counts)

    def product(self, x: Tensor, counts: list[int]) -> Tensor:
        return _GroupedLinear.apply(x, self.weight, counts)

    def add_bias(self, y: Tensor, counts: list[int]) -> Tensor:
        return y + self.bias.repeat_interleave(torch.tensor(counts, device=y.device), 0, output_size=len(y))


class Experts(nn.Module):
    """The MLPs of the model, E at once: rows (R, H) in the order of their experts to (R, H)."""

    def __init__(self, experts: int, hidden: int, feed_forward: int):
        super().__init__()
        self.up = GroupedLinear(experts, hidden, feed_forward)
        self.down = GroupedLinear(experts, feed_forward, hidden)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        return self.down.add_bias(self.without_last_bias(x, counts), counts)

    def without_last_bias(self, x: Tensor, counts: list[int]) -> Tensor:
        return self.down.product(F.gelu(self.up(x, counts)), counts)
