"""CODE 04: the router of the engine (专家并行大规模训练). What it computes is in `router.py`.

The plain router is for one forward a step and full samples, and its losses are added to the model's. This one adds:
losses attached to the weights, so that a pipeline's last stage need not know them; a load counted ahead over the
micro-batches of a step; capacity where samples are sharded along the sequence (`capacity.py`); nothing counted twice
where a forward is recomputed.

B samples, S tokens of a sample, H hidden, E experts, k of them for each token, T tokens of this rank = B S
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core import comm, p2p
from core.mesh import Axis
from core.model.linear import linear
from core.model.precision import wide
from expert_parallel.engine.capacity import Holders
from expert_parallel.engine.routing import TINY, Routing, choose, keep


class Choice(NamedTuple):
    """Where the tokens of a forward go."""

    experts: Tensor  # (T, k)
    weights: Tensor  # (T, k), 0 where dropped
    kept: Tensor | None  # bool (T, k); None where nothing is dropped

    def detach(self) -> "Choice":
        return self._replace(weights=self.weights.detach())


@dataclass(frozen=True)
class Spread:
    """How the tokens of a global batch are spread over ranks and forwards: equally, but for shares of what is alike."""

    axes: tuple[Axis, ...] = ()  # each rank of these has tokens of its own
    holders: Holders | None = None  # those of them that have different tokens of the same samples
    forwards: int = 1  # of a step: its micro-batches
    alike: Axis | None = None  # the one of them whose ranks are given the same tokens, and route a share each
    twin: tuple[Axis, int] | None = None  # axis and rank that has the same layers, for other of the micro-batches

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
        self.bias = nn.Parameter(torch.zeros(routing.experts), requires_grad=False) if routing.biased else None
        self.load: Tensor | None = None  # choices of each expert by this rank's tokens, (E), since the last step
        self.share: Tensor | None = None  # of each expert in the global batch, (E), where it was counted ahead
        self.loss = 0.0  # this rank's share of the losses below, since the last step

    def forward(self, x: Tensor, alike: int | None = None) -> Choice:
        """Args: alike: of how many tokens of a sample, that ranks are given alike, this rank's are a share."""
        logits = linear(wide(x), wide(self.weight))  # a choice must not hang on 8 bits
        scored = logits if self.routing.aux or self.routing.score != "topk-softmax" else logits.detach()
        scores = scored.sigmoid() if self.routing.score == "sigmoid" else scored.softmax(-1)
        experts, kept = self.decide(scores.detach(), alike)
        counts = experts.new_zeros(self.routing.experts)
        counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
        if not _again():
            self.load = counts if self.load is None else self.load + counts
        weights = self._weights(logits, scores, experts)
        if kept is not None:
            weights = weights.masked_fill(~kept, 0.0)
            kept = kept.flatten(0, 1)
        if torch.is_grad_enabled() and (self.routing.aux or self.routing.z):
            weights = _Attach.apply(weights, self._losses(logits, scores, counts, alike))
        return Choice(experts.flatten(0, 1), weights.flatten(0, 1).to(x.dtype), kept)

    def decide(self, scores: Tensor, alike: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The experts (B, S, k) of these tokens, and which of the choices are within capacity."""
        routing, holders = self.routing, self.spread.holders
        experts = choose(self._biased(scores), routing)
        if not routing.capacity:
            return experts, None
        if holders is None:
            return experts, keep(experts, scores, routing)
        sample = round(self._share_on_average(scores, alike) * holders.ranks)
        return experts, holders.keep(experts, scores, routing, sample)

    def _share_on_average(self, scores: Tensor, alike: int | None) -> Fraction:
        """Tokens of a sample on a rank."""
        return Fraction(alike, self.spread.alike.size) if alike else Fraction(scores.shape[1])

    def _biased(self, scores: Tensor) -> Tensor:
        return scores if self.bias is None else scores + self.bias

    def _weights(self, logits: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        if self.routing.score == "topk-softmax":
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = scores.gather(-1, experts)
            if self.routing.normalised:
                weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return weights * self.routing.weight_scale

    def _losses(self, logits: Tensor, scores: Tensor, counts: Tensor, alike: int | None) -> Tensor:
        """This rank's share of aux E sum_i f_i P_i + z mean(logsumexp^2): f and the means are of the global batch."""
        routing, share = self.routing, self._share_on_average(scores, alike)
        tokens = float(len(logits) * share * self.spread.parts)
        loss = routing.z * logits.logsumexp(-1).square().sum() / tokens
        if routing.aux:
            chosen = self.share
            if chosen is None:
                assert self.spread.forwards == 1, "the load of the other micro-batches is needed: see count_ahead"
                chosen = _share(_over_ranks(counts, self.spread))
            probability = scores / scores.sum(-1, keepdim=True) if routing.score == "sigmoid" else scores
            loss = loss + routing.aux * routing.experts * (probability.sum((0, 1)) / tokens) @ chosen.to(scores.dtype)
        if not _again():
            self.loss = self.loss + loss.detach()
        return loss


def _again() -> bool:
    """Whether this is a forward that recomputation repeats within a backward: it has been counted."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _over_ranks(counts: Tensor, spread: Spread) -> Tensor:
    for axis in spread.axes:
        counts = comm.all_reduce(counts.clone(), axis.labelled("load"))
    if spread.twin:
        axis, rank = spread.twin
        counts = counts + p2p.exchange(counts, axis.labelled("load"), rank)
    return counts


def _share(load: Tensor) -> Tensor:
    return load.double() / load.sum()


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def forget(model: nn.Module) -> None:
    """A step begins: what one that failed has counted is not its own."""
    for router in routers(model):
        router.load, router.share, router.loss = None, None, 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Forwards without dropout, which are not counted as a step's."""
    loads = [(router, router.load) for router in routers(model)]
    model.eval()
    try:
        yield
    finally:
        model.train()
        for router, load in loads:
            router.load = load


def count_ahead(model: nn.Module) -> None:
    """Fix the load of the global batch, for the auxiliary losses of the forwards to come.

    Call it after a forward, without gradients, of each of the step's micro-batches: the loss of the first of them needs
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
        if router.bias is None:
            continue
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
