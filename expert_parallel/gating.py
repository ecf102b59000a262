"""CODE 04: which experts a token goes to (专家并行大规模训练), and how their load is kept even.

Top-k gating: Shazeer et al. 2017 (1701.06538). Auxiliary loss and capacity: Switch (2101.03961), section 2.2. z-loss:
ST-MoE (2202.08906). Balancing by a bias: 2408.15664. Sigmoid scores, groups of experts: DeepSeek-V3 (2412.19437).

B samples, S tokens of a sample, H hidden, E experts, K of them for each token, T tokens of this rank = B S
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.linear import linear

SCORES = ("softmax-topk", "topk-softmax", "sigmoid")
DROPS = ("position", "probability")


@dataclass(frozen=True)
class Routing:
    """How tokens find experts.

    Raises:
        ValueError: the numbers do not fit each other.
    """

    experts: int = 8
    top_k: int = 2
    score: str = "topk-softmax"  # softmax over the chosen; or over all, then choose; or sigmoids, divided by their sum
    groups: int = 1  # the experts stand in so many equal groups,
    top_groups: int = 1  # and a token's must be in so many of them
    capacity: float = 0.0  # an expert takes at most ceil(capacity K S / E) tokens of a sample; 0: all
    drop: str = "position"  # what goes beyond that is dropped: the last tokens, or those with the lowest score
    aux: float = 0.0  # coefficient of Switch's load-balancing loss
    z: float = 0.0  # of the router z-loss
    bias_rate: float = 0.0  # how fast the bias of selection moves against the load

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "groups", "top_groups"):
            if getattr(self, name) < 1:
                usual = {"experts": max(8, self.top_k), "top_k": min(2, self.experts)}.get(name, 1)
                raise ValueError(
                    f"--{_flag(name)} {getattr(self, name)}: must be at least 1; use --{_flag(name)} {usual}"
                )
        for name in ("capacity", "aux", "z", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                flag, usual = _flag(name), {"capacity": "1.25, or 0 to drop nothing", "bias_rate": "0.001"}
                raise ValueError(
                    f"--{flag} {getattr(self, name)}: must be finite, and not negative; use --{flag} "
                    + usual.get(name, "0.01")
                )
        for name, known in (("score", SCORES), ("drop", DROPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}; use {known[0]}")
        if self.top_k > self.experts:
            other = " --score softmax-topk" if self.experts == 1 and self.score == "topk-softmax" else ""
            raise ValueError(
                f"--top-k {self.top_k}: a token cannot choose more than the --experts {self.experts}; "
                f"use --top-k {self.experts}{other}" + (f" --top-groups {self.groups}" if self.groups > 1 else "")
            )
        if self.top_k == 1 and self.score == "topk-softmax":
            raise ValueError(
                "--top-k 1: the softmax over one chosen expert is always 1, and the router would learn nothing; "
                "use --score softmax-topk"
            )
        if self.experts % self.groups:
            fitting = max(g for g in range(1, self.groups + 1) if self.experts % g == 0)
            raise ValueError(
                f"--groups {self.groups}: must divide --experts {self.experts}, so that groups are equal; "
                f"use --groups {fitting} --top-groups {fitting}"
            )
        within = self.experts // self.groups
        if not -(-self.top_k // within) <= self.top_groups <= self.groups:
            raise ValueError(
                f"--top-groups {self.top_groups}: of the {self.groups} groups of {within}, and with --top-k "
                f"{self.top_k} experts in them; use --top-groups {self.groups}"
            )

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token's experts do, if none is dropped."""
        return self.score == "topk-softmax" or (self.score == "sigmoid" and self.top_k > 1)

    def places(self, tokens: int) -> int:
        """Tokens that an expert takes of a sample of so many."""
        # A decimal, as it is written: 0.55 x 2 x 50 / 5 is 11, and a little more in binary, which ceil would make 12.
        return min(tokens, math.ceil(Fraction(str(self.capacity)) * self.top_k * tokens / self.experts))


def _flag(name: str) -> str:
    return name.replace("_", "-")


# ---- Decisions, without gradients ------------------------------------------------------------------------------------


def choose(scores: Tensor, routing: Routing) -> Tensor:
    """The K experts of each token, (..., E) to (..., K), the best first; in the best groups, where there are groups."""
    if routing.top_groups < routing.groups:
        grouped = rearrange(scores, "... (g e) -> ... g e", g=routing.groups)
        # A group is as good as its share of the choice: the sum of its best K / top_groups.
        of_group = grouped.topk(max(1, routing.top_k // routing.top_groups)).values.sum(-1)
        closed = torch.ones_like(of_group, dtype=torch.bool)
        closed.scatter_(-1, of_group.topk(routing.top_groups).indices, False)
        scores = grouped.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(-2)
    return scores.topk(routing.top_k).indices


def keep(experts: Tensor, scores: Tensor, routing: Routing) -> Tensor:
    """Which choices find a place with their expert, bool (B, S, K).

    Args:
        experts: (B, S, K).
        scores: (B, S, E).
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, True)
    if routing.drop == "position":
        before = chosen.cumsum(1) - 1
    else:
        best_first = scores.masked_fill(~chosen, -math.inf).argsort(dim=1, descending=True, stable=True)
        before = best_first.argsort(1)
    return (before < routing.places(scores.shape[1])).gather(-1, experts)


# ---- The router ------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Where the tokens of a forward go."""

    experts: Tensor  # (T, K)
    weights: Tensor  # (T, K), 0 where dropped
    kept: Tensor | None  # bool (T, K); None where nothing is dropped

    def detach(self) -> "Choice":
        return self._replace(weights=self.weights.detach())


@dataclass(frozen=True)
class Spread:
    """How the tokens of a global batch are spread over ranks and forwards, in equal parts."""

    axes: tuple[Axis, ...] = ()  # each rank of these has tokens of its own
    sequence: Axis | None = None  # the one of them over whose ranks the samples themselves are cut, in order
    forwards: int = 1  # of a step: its microbatches

    @property
    def parts(self) -> int:
        return self.forwards * math.prod(axis.size for axis in self.axes)


class _Attach(torch.autograd.Function):
    """x as it is; in backward `loss` has the gradient 1, as if it were added to the loss at the end of the model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.one


class Router(nn.Module):
    """(B, S, H) to the `Choice` of its T = B S tokens, on the meta device but for the bias, which starts at 0."""

    def __init__(self, hidden: int, routing: Routing):
        super().__init__()
        self.routing, self.spread = routing, Spread()
        self.weight = nn.Parameter(torch.empty(routing.experts, hidden, device="meta"))
        self.bias = nn.Parameter(torch.zeros(routing.experts), requires_grad=False)
        self.load: Tensor | None = None  # choices of each expert by this rank's tokens, (E), since the last step
        self.share: Tensor | None = None  # of each expert in the global batch, (E), where it was counted ahead
        self.loss = 0.0  # this rank's share of the losses below, since the last step

    def forward(self, x: Tensor) -> Choice:
        wide = torch.promote_types(x.dtype, torch.float32)  # a choice must not hang on 8 bits
        logits = linear(x.to(wide), self.weight.to(wide))
        scores = logits.sigmoid() if self.routing.score == "sigmoid" else logits.softmax(-1)
        experts, kept = self.decide(scores.detach())
        counts = torch.zeros_like(self.bias, dtype=torch.int64)
        counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
        if not _again():
            self.load = counts if self.load is None else self.load + counts
        weights = self._weights(logits, scores, experts)
        if kept is not None:
            weights = weights.masked_fill(~kept, 0.0)
            kept = kept.flatten(0, 1)
        if torch.is_grad_enabled() and (self.routing.aux or self.routing.z):
            weights = _Attach.apply(weights, self._losses(logits, scores, counts))
        return Choice(experts.flatten(0, 1), weights.flatten(0, 1).to(x.dtype), kept)

    def decide(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts (B, S, K) of these tokens, and which of the choices find a place."""
        routing, cut = self.routing, self.spread.sequence
        if not routing.capacity:
            return choose(scores + self.bias, routing), None
        if cut:  # who is dropped is decided over the whole sample
            scores = comm.all_gather(scores, cut.labelled("router"), 1)
        experts = choose(scores + self.bias, routing)
        kept = keep(experts, scores, routing)
        return (experts.chunk(cut.size, 1)[cut.index], kept.chunk(cut.size, 1)[cut.index]) if cut else (experts, kept)

    def _weights(self, logits: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        if self.routing.score == "topk-softmax":
            return logits.gather(-1, experts).softmax(-1)
        weights = scores.gather(-1, experts)
        return weights / weights.sum(-1, keepdim=True) if self.routing.sums_to_one else weights

    def _losses(self, logits: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
        """This rank's share of aux E sum_i f_i P_i + z mean(logsumexp^2): f and the means are of the global batch."""
        routing, tokens = self.routing, logits.shape[0] * logits.shape[1] * self.spread.parts
        loss = routing.z * logits.logsumexp(-1).square().sum() / tokens
        if routing.aux:
            share = self.share
            if share is None:
                assert self.spread.forwards == 1, "the load of the other microbatches is needed: see count_ahead"
                share = _share(_over_ranks(counts, self.spread))
            probability = scores / scores.sum(-1, keepdim=True) if routing.score == "sigmoid" else scores
            loss = loss + routing.aux * routing.experts * (probability.sum((0, 1)) / tokens) @ share.to(scores.dtype)
        if not _again():
            self.loss = self.loss + loss.detach()
        return loss


def _again() -> bool:
    """Whether this is a forward that recomputation repeats within a backward: it has been counted."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _over_ranks(counts: Tensor, spread: Spread) -> Tensor:
    for axis in spread.axes:
        counts = comm.all_reduce(counts.clone(), axis.labelled("load"))
    return counts


def _share(load: Tensor) -> Tensor:
    return load.double() / load.sum()


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def forget(model: nn.Module) -> None:
    """Do not count the forwards since the last step: they were an evaluation."""
    for router in routers(model):
        router.load = None


def count_ahead(model: nn.Module) -> None:
    """Fix the load of the global batch, for the auxiliary losses of the forwards to come.

    Call it after a forward, without gradients, of each of the step's microbatches: the loss of the first of them needs
    the choices of the last. Until `end_step`. One message.
    """
    found = routers(model)
    for router, load in zip(found, _take(found), strict=True):
        router.share = _share(load)


def end_step(model: nn.Module) -> Tensor:
    """Move the biases of selection against the load of the step, and forget it; the load, (layers, E). One message.

    Without routers there is nothing to do: (0, 0).
    """
    found = routers(model)
    loads = _take(found)
    for router, load in zip(found, loads, strict=True):
        router.share, router.loss = None, 0.0
        error = load.double().mean() - load
        router.bias.data += router.routing.bias_rate * error.sign().to(router.bias.dtype)
    return loads


def _take(found: list[Router]) -> Tensor:
    if not found:  # a pipeline stage without mixtures
        return torch.zeros(0, 0, dtype=torch.int64)
    loads = torch.stack([router.load for router in found])
    for router in found:
        router.load = None
    return _over_ranks(loads, found[0].spread)
