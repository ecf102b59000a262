"""CODE 04: a mixture of experts in one process (专家并行大规模训练): what expert parallelism must be equal to.

    python expert_parallel/moe.py

In place of a layer's MLP, E of them, each for the tokens that chose it. Rows are put in the order of their experts, so
that an expert's are one block, and all experts are one grouped product. Shazeer et al. 2017 (1701.06538), section 2.

T tokens, K experts for each of them, R = T K rows (less what is dropped), E experts, H hidden
"""

import argparse
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.model.gpt import GPT, MLP, GPTConfig, materialize
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from expert_parallel.experts import Experts
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
        """The sum of a token's rows in one order, where that of `index_select` depends on luck on a GPU."""
        (order,) = ctx.saved_tensors
        return _to_places(gradient, order, ctx.tokens, ctx.k).sum(1), None, None


def permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Tokens (T, H) to rows (R, H): row i is the token of the place `order[i]`."""
    return _Permute.apply(x, order, k)


def _to_places(rows: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
    """Rows (R, H) back to (T, K, H), zeros where dropped."""
    if len(order) == tokens * k:
        return rows.index_select(0, order.argsort()).view(tokens, k, -1)
    return rows.new_zeros(tokens * k, rows.shape[1]).index_copy(0, order, rows).view(tokens, k, -1)


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


# ---- The lesson ------------------------------------------------------------------------------------------------------


class TokenByToken(MoE):
    """The definition: each token by itself through each of its experts."""

    def forward(self, x: Tensor) -> Tensor:
        choice, up, down = self.router(x), self.experts.up, self.experts.down
        results = []
        for t, token in enumerate(x.flatten(0, 1)):
            y = torch.zeros_like(token) if self.shared is None else self.shared(token)
            for k, e in enumerate(choice.experts[t].tolist()):
                if choice.kept is None or choice.kept[t, k]:
                    inside = F.gelu(F.linear(token, up.weight[e], up.bias[e]))
                    y = y + choice.weights[t, k] * F.linear(inside, down.weight[e], down.bias[e])
            results.append(y)
        return torch.stack(results).view_as(x)


def by_token(model: GPT, moe: MoEConfig) -> GPT:
    """`to_moe`, of layers that compute by the definition."""
    for block in to_moe(model, moe).blocks.values():
        if isinstance(block.mlp, MoE):
            block.mlp = TokenByToken(model.config, moe)
    return model


def lesson(run: Run) -> None:
    from expert_parallel.training import claim_equal, moe_of, train_with  # it imports this file

    config, moe = configuration(run.args), moe_of(run.args)
    show(run, config, moe)
    claim_equal(run, train_with(run, moe, ep=1, reference=by_token))
    if run.job.rank == 0:
        claim_work(run, config, moe)


def first_layer(run: Run, config: GPTConfig, moe: MoEConfig) -> tuple[GPT, MoE]:
    """A real model, and its first mixture."""
    model = materialize(to_moe(GPT(config), moe), run.args.seed, run.job.device, run.dtype)
    return model, next(block.mlp for block in model.blocks.values() if isinstance(block.mlp, MoE))


def show(run: Run, config: GPTConfig, moe: MoEConfig) -> None:
    """Some tokens, their experts, and their rows."""
    model, layer = first_layer(run, config, moe)
    made: list[Choice] = []
    layer.router.register_forward_hook(lambda _, __, choice: made.append(choice))
    inputs, _ = Text(run.args.data, config.sequence).batch(run.args.seed, 0, 1)
    inputs = inputs[:, :8].to(run.job.device)
    model(inputs)
    order, counts = order_of(made[0], moe.routing.experts)
    by_token = [
        (t, repr(chr(byte)), " ".join(map(str, experts)), " ".join(f"{weight:.2f}" for weight in weights))
        for t, (byte, experts, weights) in enumerate(
            zip(inputs[0].tolist(), made[0].experts.tolist(), made[0].weights.tolist(), strict=True)
        )
    ]
    blocks = (order // moe.routing.top_k).split(counts.tolist())
    by_expert = [(e, len(block), " ".join(map(str, block.tolist()))) for e, block in enumerate(blocks)]
    run.say("the first layer at the start: some tokens and their experts")
    run.say(tabulate(by_token, ("token", "byte", "experts", "weights"), disable_numparse=True))
    run.say("\nin the order of the experts: one block of rows for each")
    run.say(tabulate(by_expert, ("expert", "rows", "tokens"), disable_numparse=True) + "\n")


def claim_work(run: Run, config: GPTConfig, moe: MoEConfig) -> None:
    """The parameters of E MLPs for the work of K."""
    _, layer = first_layer(run, config, moe)
    with torch.device("meta"):
        dense = MLP(replace(config, feed_forward=layer.experts.up.weight.shape[1]))
    tokens = torch.zeros(config.sequence, config.hidden, device=run.job.device)
    e, k, rows = moe.routing.experts, moe.routing.top_k, config.sequence * moe.routing.top_k
    counts = [rows // e + (i < rows % e) for i in range(e)]
    with FlopCounterMode(display=False) as of_experts:
        layer.experts.float()(tokens.repeat_interleave(k, 0), counts)  # of its grouped_mm torch counts none
    with FlopCounterMode(display=False) as of_dense:
        dense(tokens.to("meta"))
    claim, size = run.evidence.claim, sum(p.numel() for p in layer.experts.parameters())
    one = sum(p.numel() for p in dense.parameters())
    claim("parameters of the experts, in MLPs", f"E = {e}", e, size / one)
    claim("their FLOPs for a token, in MLPs", f"K = {k}", k, of_experts.get_total_flops() / of_dense.get_total_flops())


def refuse(args: argparse.Namespace, ranks: int) -> None:
    from expert_parallel.training import check

    check(args, ranks)


def main() -> int:
    from expert_parallel.training import add_flags

    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: the mixture of experts",
        "专家并行大规模训练",
        "All experts of a layer as one grouped computation, beside the definition, token by token.",
    )
    add_flags(frame, layers=2, batch=8, sequence=32)
    return frame.main(refuse, lesson)


if __name__ == "__main__":
    sys.exit(main())
