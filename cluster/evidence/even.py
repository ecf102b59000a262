"""Tokens that choose their experts evenly, so that a dry run, whose tensors have no numbers, knows how many go where.

The choices of a rank's tokens are dealt out: the first expert, the second, and so on, and round again.
"""

from functools import partial

import torch
from torch import Tensor

from cluster.planner.layout import Layout
from cluster.planner.traffic import rows
from cluster.run.worker import Worker
from core.mesh import axis_groups
from core.model.config import ModelConfig
from expert_parallel.engine.layers import ExpertParallelMoE, Numbers
from expert_parallel.engine.shares import sizes

ROUTED = "tokens choose their experts evenly; the router has no losses and drops nothing"


def route_evenly(worker: Worker) -> None:
    """Make the routers of this rank deal out its tokens, and its layers know what other ranks' routers do."""
    for layer in worker.model.modules():
        if isinstance(layer, ExpertParallelMoE):
            layer.router.decide = partial(dealt, layer.router.routing.top_k)
            layer.numbers = Dealt(worker, layer)


def dealt(k: int, scores: Tensor, _: int | None = None) -> tuple[Tensor, None]:
    """The experts (B, S, k) of tokens with scores (B, S, E)."""
    samples, tokens, experts = scores.shape
    choices = torch.arange(samples * tokens * k, device=scores.device)
    return (choices % experts).view(samples, tokens, k), None


class Dealt(Numbers):
    """How many rows go where. Tensors are not read."""

    def __init__(self, worker: Worker, layer: ExpertParallelMoE):
        self.layout, self.config, self.mesh = worker.layout, worker.spec.config, worker.mesh
        self.ep, self.etp = layer.ep, layer.etp
        # Of tp: whose ranks have the tokens of a sample between them, or all of them.
        self.shares = self.layout.tp if self.layout.sp or layer.router.spread.alike else 1
        self.here = self.config.experts // self.ep.size  # experts of a rank

    def sent(self, counts: Tensor) -> list[list[int]]:
        of_experts = self._of(self.ep.ranks[self.ep.index])
        return [of_experts[i : i + self.here] for i in range(0, len(of_experts), self.here)]

    def received(self, counts: Tensor) -> list[list[int]]:
        return self._received_by(self.ep.ranks)

    def of_everyone(self, counts: Tensor) -> list[list[int]]:
        groups = axis_groups(self.mesh.sizes, "ep", self.mesh.order)
        every = (next(group for group in groups if rank in group) for rank in self.etp.ranks)
        return [counts for group in every for counts in self._received_by(group)]

    def _received_by(self, group: tuple[int, ...]) -> list[list[int]]:
        """Of each source of this rank's ep group, or another's, the rows for the experts that are here."""
        first = self.ep.index * self.here
        return [self._of(rank)[first : first + self.here] for rank in group]

    def _of(self, rank: int) -> list[int]:
        """Rows of each expert, of the tokens of that rank: the neighbours of tp share those of a sample."""
        tokens = sizes(self.config.sequence // self.layout.cp, self.shares)[rank % self.shares]
        return sizes(self.layout.microbatch * tokens * self.config.top_k, self.config.experts)


def unevenness(model: ModelConfig, layout: Layout) -> float:
    """By how much of the mean a rank's rows may differ from it, where they cannot be dealt out equally."""
    if not model.experts:
        return 0.0
    mean = rows(model, layout)
    return 0.0 if mean % model.experts == 0 else model.experts / mean
