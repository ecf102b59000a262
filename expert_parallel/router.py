"""CODE 04: the router (专家并行大规模训练): which experts a token goes to, and what keeps their load even.

    torchrun --nproc_per_node=8 expert_parallel/router.py

    read: router.py:34-93; then engine/router.py

Top-k gating: Shazeer et al. 2017 (1701.06538). Auxiliary loss and capacity: Switch (2101.03961), section 2.2. z-loss:
ST-MoE (2202.08906), section 3. Balancing by a bias: 2408.15664. Groups of experts: DeepSeek-V3 (2412.19437), 2.1.2.

A router that is left alone soon sends all tokens to the same few experts: those learn fastest. Here the same model is
trained from the same start with each way against that, by the router below and by the engine's beside it.

B samples, S tokens of a sample, T = B S tokens of this rank, H hidden, E experts, k of them for each token, L layers
"""

import argparse
import sys

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis, Mesh
from core.model.gpt import GPT
from core.model.precision import wide
from core.proof.lesson import Lesson, Run
from core.proof.rules import Rule
from expert_parallel.engine.router import Choice
from expert_parallel.engine.routing import DROPS, TINY, MoEConfig, Routing
from expert_parallel.evidence.flags import add_flags, check
from expert_parallel.evidence.router import compare_ways, ways


class Router(nn.Module):
    """(B, S, H) to the k experts of each of T tokens, their weights, and whether they are within capacity."""

    def __init__(self, hidden: int, routing: Routing, dp: Axis):
        super().__init__()
        self.routing, self.dp = routing, dp
        self.weight = nn.Parameter(torch.empty(routing.experts, hidden, device="meta"))  # (E, H)
        bias = nn.Parameter(torch.zeros(routing.experts), requires_grad=False)  # (E), of selection
        self.bias = bias if routing.biased else None

    def forward(self, x: Tensor) -> Choice:
        r, E = self.routing, self.routing.experts
        logits = wide(x) @ wide(self.weight).T  # (B, S, E): rounded to 16 bits, it would choose other experts
        scores = logits.sigmoid() if r.score == "sigmoid" else logits.softmax(-1)

        # Selection: the best k by score + bias, within the best groups; of equal ones the first, which topk does not
        # promise. The bias is in no weight, and has no gradient.
        selection = scores.detach() if self.bias is None else scores.detach() + self.bias
        if r.top_groups < r.groups:
            of_group = selection.unflatten(-1, (r.groups, -1)).topk(max(1, r.top_k // r.top_groups)).values.sum(-1)
            best = of_group.argsort(descending=True, stable=True)[..., : r.top_groups]  # (B, S, top_groups)
            group = torch.arange(E, device=x.device) // (E // r.groups)  # (E)
            selection = selection.masked_fill((group != best.unsqueeze(-1)).all(-2), -torch.inf)
        experts = selection.argsort(descending=True, stable=True)[..., : r.top_k]  # (B, S, k)

        # Weights: a softmax over the chosen, or the scores of the chosen, sigmoids divided by their sum.
        weights = scores.gather(-1, experts)
        if r.score == "topk-softmax":
            weights = logits.gather(-1, experts).softmax(-1)
        elif r.score == "sigmoid" and r.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        weights = weights * r.weight_scale  # DeepSeek's routed scaling factor

        # Capacity: of each sample an expert takes its first C tokens, or the C with the highest score.
        kept = torch.ones_like(experts, dtype=torch.bool)
        if r.capacity:
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, True)  # (B, S, E)
            first = chosen if r.drop == "position" else torch.where(chosen, scores.detach(), -torch.inf)
            turn = first.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, S, E): 0 for the first taken
            kept = (turn < r.expert_capacity(x.shape[1])).gather(-1, experts)  # (B, S, k)
            weights = weights * kept

        # Auxiliary loss alpha E sum_i f_i P_i: f the share of the choices, P the mean probability, of the global batch.
        tokens = x.shape[0] * x.shape[1] * self.dp.size
        load = experts.flatten().bincount(minlength=E)  # (E): tokens of each expert on this rank
        self.load = comm.all_reduce(load, self.dp.labelled("load"))
        P = (scores / scores.sum(-1, keepdim=True)).sum((0, 1)) / tokens
        f = self.load.to(P) / (r.top_k * tokens)  # as exact as P: integers divide in float32
        self.loss = r.aux * E * (f * P).sum()

        # z-loss: keeps the logits small.
        self.loss = self.loss + r.z * logits.logsumexp(-1).square().sum() / tokens
        return Choice(experts.flatten(0, 1), weights.flatten(0, 1).to(x.dtype), kept.flatten(0, 1))  # (T, k) each

    def end_step(self) -> None:
        """The bias moves against the load: up where an expert had fewer tokens than the mean, down where more."""
        if self.bias is None:
            return
        error = self.load.double().mean() - self.load
        self.bias.data += self.routing.bias_rate * error.sign().to(self.bias.dtype)


def route_plainly(model: GPT, moe: MoEConfig, mesh: Mesh) -> GPT:
    """Give all mixtures of the model the router above."""
    for block in model.blocks.values():
        block.mlp.router = Router(model.config.hidden, moe.routing, mesh["dp"])
    return model


def lesson(run: Run) -> None:
    compare_ways(run, route_plainly)


BALANCED = (
    Rule("aux", "--aux {aux}", lambda c: c.aux != 0, "one of the ways would not balance the load",
         lambda c: "--aux 0.05"),
    Rule("bias rate", "--bias-rate {bias_rate}", lambda c: c.bias_rate != 0,
         "one of the ways would not balance the load", lambda c: "--bias-rate 0.01"),
)  # fmt: skip


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks, ways=ways, more=BALANCED)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: the router",
        "专家并行大规模训练",
        "Top-k gating left alone, and balanced by a loss, by a bias and by a capacity: the load of the experts.",
    )
    add_flags(frame, routing=False, layers=2, sequence=48, hidden=36, heads=3, feed_forward=72)
    flag = frame.parser.add_argument
    flag("--aux", type=float, help="of the load-balancing loss (default %(default)s)")
    flag("--z", type=float, default=0.001, help="of the router z-loss (default %(default)s)")
    flag("--bias-rate", type=float, help="of balancing by a bias (default %(default)s)")
    flag("--capacity", type=float, help="capacity factor (default %(default)s)")
    flag("--drop", choices=DROPS, default="probability", help="what is dropped (default %(default)s)")
    frame.parser.set_defaults(steps=30, aux=0.05, bias_rate=0.01, capacity=1.25)
    sys.exit(frame.main(refuse, lesson))
