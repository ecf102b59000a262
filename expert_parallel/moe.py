"""CODE 04: a mixture of experts in one process (专家并行大规模训练): what expert parallelism must be equal to.

    python expert_parallel/moe.py

    read: moe.py:31-85; router.py:34-93; then engine/moe.py and engine/experts.py

In place of a layer's MLP, E of them, each for the tokens that chose it: the parameters of E MLPs for the work of k.
Shazeer et al. 2017 (1701.06538), section 2. The engine computes all experts as one grouped product, beside the loop.

B samples, S tokens of a sample, T = B S tokens, H hidden, F feed-forward, E experts, k of them for each token
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.mesh import Axis
from core.model.gpt import GPT, MLP, GPTConfig
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from expert_parallel.engine.routing import MoEConfig, replace_mlps
from expert_parallel.evidence.flags import add_flags, check, moe_of
from expert_parallel.evidence.moe import claim_work, show_routed_tokens
from expert_parallel.evidence.training import Plain, claim_equal, engine, mesh_of, train_versions
from expert_parallel.router import Router


class Linears(nn.Module):
    """One linear layer of each of E experts: y = x W_e^T + b_e, or without b_e."""

    def __init__(self, experts: int, inside: int, outside: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outside, inside, device="meta"))
        self.bias = nn.Parameter(torch.empty(experts, outside, device="meta")) if bias else None

    def forward(self, x: Tensor, e: int) -> Tensor:
        return F.linear(x, self.weight[e], None if self.bias is None else self.bias[e])


class Experts(nn.Module):
    """E MLPs of the model's kind, with F features each: rows (R, H) through expert e to (R, H)."""

    def __init__(self, config: GPTConfig, experts: int, features: int):
        super().__init__()
        self.gate = Linears(experts, config.hidden, features, config.biases) if config.gated else None
        self.up = Linears(experts, config.hidden, features, config.biases)
        self.down = Linears(experts, features, config.hidden, config.biases)

    def forward(self, x: Tensor, e: int) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x, e)), e)
        return self.down(F.silu(self.gate(x, e)) * self.up(x, e), e)


class MoE(nn.Module):
    """A mixture of experts in place of an MLP: (B, S, H) to (B, S, H). `dp`: the ranks with other tokens."""

    def __init__(self, config: GPTConfig, moe: MoEConfig, dp: Axis):
        super().__init__()
        self.router = Router(config.hidden, moe.routing, dp)
        self.experts = Experts(config, moe.routing.experts, moe.feed_forward or config.feed_forward)
        with torch.device("meta"):
            self.shared = MLP(replace(config, feed_forward=moe.shared)) if moe.shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (T, H)
        experts, weights, kept = self.router(x)  # (T, k) each

        y = torch.zeros_like(tokens)
        for e in range(self.router.routing.experts):
            token, choice = ((experts == e) & kept).nonzero(as_tuple=True)  # (R) each: the tokens routed to e
            rows = self.experts(tokens[token], e)  # (R, H)
            y = y.index_add(0, token, rows * weights[token, choice].unsqueeze(1))

        if self.shared is not None:  # all tokens go through it besides
            y = y + self.shared(tokens)
        return y.view_as(x)


def with_experts(model: GPT, moe: MoEConfig, dp: Axis) -> GPT:
    """The model with mixtures in place of its MLPs."""
    return replace_mlps(model, moe, lambda config, moe: MoE(config, moe, dp))


def lesson(run: Run) -> None:
    config, moe, mesh = configuration(run.args), moe_of(run.args), mesh_of(run, ep=1)
    show_routed_tokens(run, config, moe)
    plain = Plain(run, with_experts(GPT(config), moe, mesh["dp"]), mesh)
    claim_equal(run, train_versions(run, moe, {"plain": plain, "engine": engine(run, moe, mesh)}))
    if run.job.rank == 0:
        claim_work(run, config, moe)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: the mixture of experts",
        "专家并行大规模训练",
        "One expert after another, each for the tokens that chose it, beside all experts as one grouped computation.",
    )
    add_flags(frame, layers=1)
    sys.exit(frame.main(check, lesson))
