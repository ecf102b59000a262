"""CODE 04: a mixture of experts in one process (专家并行大规模训练): what expert parallelism must be equal to.

    python expert_parallel/moe.py

In place of a layer's MLP, E of them, each for the tokens that chose it. Rows are put in the order of their experts, so
that an expert's are one block, and all experts are one grouped product. Shazeer et al. 2017 (1701.06538), section 2.

T tokens, K experts for each of them, R = T K rows (less what is dropped), E experts, H hidden, F feed-forward,
I and O in and out features
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.gpt import GPT, MLP, GPTConfig
from core.linear import Gradients, deferring
from expert_parallel.gating import Choice, Router, Routing


@dataclass(frozen=True)
class MoEConfig:
    """What stands in place of the MLPs.

    Raises:
        ValueError: a size is not possible.
    """

    routing: Routing = field(default_factory=Routing)
    feed_forward: int = 0  # of an expert; 0: of the MLP it replaces
    shared: int = 0  # feed-forward of an MLP that all tokens go through besides; 0: none
    every: int = 1  # each so manyeth layer, the last of so many

    def __post_init__(self) -> None:
        for name, least in (("feed_forward", 0), ("shared", 0), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least {least}; use {least}")


# ---- Experts as one grouped computation ------------------------------------------------------------------------------


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


# ---- From tokens to rows and back ------------------------------------------------------------------------------------


def order_of(choice: Choice, experts: int) -> tuple[Tensor, Tensor]:
    """The places (token, k) of the choices in the order of their experts, flattened, (R); the rows of each expert, (E).

    Choices of one expert stay in the order of their tokens. What is dropped has no row.
    """
    chosen = choice.experts.flatten()
    if choice.kept is not None:
        chosen = chosen.masked_fill(~choice.kept.flatten(), experts)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    order = chosen.argsort(stable=True)
    if choice.kept is not None:
        order = order[: len(order) - counts[experts].item()]
    return order, counts[:experts]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k, ctx.tokens = k, len(x)
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _to_places(gradient, order, ctx.tokens, ctx.k).sum(1), None, None


def permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Tokens (T, H) to rows (R, H): row i is the token of the place `order[i]`."""
    return _Permute.apply(x, order, k)


def _to_places(rows: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
    """Rows (R, H) back to (T, K, H), zeros where dropped."""
    make = rows.new_empty if len(order) == tokens * k else rows.new_zeros
    return make(tokens * k, rows.shape[1]).index_copy(0, order, rows).view(tokens, k, -1)


def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows (R, H) back to tokens (T, H): the sum of a token's rows, each times its weight (T, K)."""
    return (weights.unsqueeze(1) @ _to_places(rows, order, *weights.shape)).squeeze(1)


# ---- The layer -------------------------------------------------------------------------------------------------------


class MoE(nn.Module):
    """(B, S, H) to (B, S, H), in place of an MLP."""

    def __init__(self, config: GPTConfig, moe: MoEConfig):
        super().__init__()
        self.router = Router(config.hidden, moe.routing)
        self.experts = Experts(moe.routing.experts, config.hidden, moe.feed_forward or config.feed_forward)
        with torch.device("meta"):
            self.shared = MLP(replace(config, feed_forward=moe.shared)) if moe.shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        choice = self.router(x)
        order, counts = order_of(choice, self.router.routing.experts)
        rows = permute(tokens, order, self.router.routing.top_k)
        y = unpermute(self.experts(rows, counts.tolist()), order, choice.weights)
        return (y if self.shared is None else y + self.shared(tokens)).view_as(x)


def to_moe(model: GPT, moe: MoEConfig) -> GPT:
    """Put mixtures of experts in place of the MLPs of the GPT, or of a pipeline stage of it, which is not yet real."""
    for name, block in model.blocks.items():
        if (int(name) + 1) % moe.every == 0:
            block.mlp = MoE(model.config, moe)
    return model
