"""CODE 04: the mixture of experts in one process, as grouped products (专家并行大规模训练). 1701.06538, section 2.

What the plain one (`moe.py`) computes, without a loop: routed tokens are permuted, so that an expert's are one block.

T tokens, k experts for each of them, R = T k rows (less what is dropped), E experts, H hidden
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.model.gpt import GPT, MLP, GPTConfig
from expert_parallel.engine.experts import Experts
from expert_parallel.engine.router import Choice, Router
from expert_parallel.engine.routing import MoEConfig, replace_mlps


def order_of(choice: Choice, experts: int) -> tuple[Tensor, Tensor]:
    """The choices (token, k), flattened, in the order of their experts, (R); the rows of each expert, (E).

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
        """The sum of a token's rows in one order, where that of `index_select` depends on luck on a GPU."""
        (order,) = ctx.saved_tensors
        return _by_choice(gradient, order, ctx.tokens, ctx.k).sum(1), None, None


def permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Tokens (T, H) to rows (R, H): row i is the token of the choice `order[i]`."""
    return _Permute.apply(x, order, k)


def _by_choice(rows: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
    """Rows (R, H) back to (T, k, H), zeros where dropped."""
    if len(order) == tokens * k:
        return rows.index_select(0, order.argsort()).view(tokens, k, rows.shape[1])
    return rows.new_zeros(tokens * k, rows.shape[1]).index_copy(0, order, rows).view(tokens, k, rows.shape[1])


def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows (R, H) back to tokens (T, H): the sum of a token's rows, each times its weight (T, k)."""
    return (weights.unsqueeze(1) @ _by_choice(rows, order, *weights.shape)).squeeze(1)


class MoE(nn.Module):
    """(B, S, H) to (B, S, H), in place of an MLP."""

    def __init__(self, config: GPTConfig, moe: MoEConfig):
        super().__init__()
        self.router = Router(config.hidden, moe.routing)
        self.experts = Experts(config, moe.routing.experts, moe.feed_forward or config.feed_forward)
        with torch.device("meta"):
            self.shared = MLP(replace(config, feed_forward=moe.shared)) if moe.shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        choice = self.router(x)
        order, counts = order_of(choice, self.router.routing.experts)
        rows = permute(tokens, order, self.router.routing.top_k)
        y = unpermute(self.experts(rows, counts.tolist()), order, choice.weights)
        return (y if self.shared is None else y + self.shared(tokens)).view_as(x)


def to_moe(model: GPT, moe: MoEConfig | None = None) -> GPT:
    """Replace the MLPs of the model, or of a pipeline stage of it, by mixtures, before it is materialized.

    `moe` and errors as of `replace_mlps`.
    """
    return replace_mlps(model, moe, MoE)
