"""CODE 04: which tokens an expert drops, where the tokens of a sample are on several ranks. Switch (2101.03961), 2.2.

An expert takes so many tokens of a sample, and those beyond it are dropped. That must not depend on where the tokens
are, so it is decided over the full sample: of each run of neighbouring tokens the ranks tell each other how many chose
each expert, E numbers a run, and what is before a token follows (zigzag gives a rank two runs). Where the lowest scores
are dropped, they tell each other the k choices of each token, and their scores. Tokens themselves do not travel.

B samples, S tokens of a sample, s of them on this rank, E experts, k of them for each token, R ranks, M runs of a rank
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from core import comm
from core.mesh import Axis
from expert_parallel.engine.routing import Routing, by_score, chosen_of


@dataclass(frozen=True)
class Holders:
    """The ranks that have the tokens of a sample, each its own.

    Args:
        axes: the axes of these ranks. Their order is that of a gather over one after the other: the last is slowest.
        positions: of a sample with so many tokens, those of each rank, int64, ascending.
    """

    axes: tuple[Axis, ...]
    positions: Callable[[int], Sequence[Tensor]]

    @property
    def ranks(self) -> int:
        return prod(axis.size for axis in self.axes)

    @property
    def index(self) -> int:
        found = 0
        for axis in reversed(self.axes):
            found = found * axis.size + axis.index
        return found

    def keep(self, experts: Tensor, scores: Tensor, routing: Routing, tokens: int) -> Tensor:
        """Which choices of this rank's tokens are within their expert's capacity, bool (B, s, k).

        Args:
            experts: (B, s, k).
            scores: (B, s, E).
            tokens: S.
        """
        if routing.drop == "position":
            before = self.chosen_before(chosen_of(experts, scores), tokens)
        else:
            before = self.better(experts, scores, tokens)
        return (before < routing.expert_capacity(tokens)).gather(-1, experts)

    def chosen_before(self, chosen: Tensor, tokens: int) -> Tensor:
        """How many tokens of the sample before each of these chose each expert, (B, s, E), from whether these did."""
        every = [runs(each) for each in self.positions(tokens)]
        most, mine = max(map(len, every)), every[self.index]
        parts = chosen.split([size for _, size in mine], 1)
        counts = torch.zeros(most, len(chosen), chosen.shape[-1], dtype=torch.int32, device=chosen.device)
        for count, part in zip(counts, parts, strict=False):
            count.copy_(part.sum(1))
        counts = self._gathered(counts)  # (R M, B, E)
        # In the order of the sample; what a rank has fewer runs than others is empty, and at the end.
        firsts = [first for of_rank in every for first in [s for s, _ in of_rank] + [tokens] * (most - len(of_rank))]
        order = torch.tensor(sorted(range(len(firsts)), key=firsts.__getitem__), device=chosen.device)
        sorted_counts = counts[order]
        before = (sorted_counts.cumsum(0) - sorted_counts)[order.argsort()][self.index * most :]
        pairs = zip(parts, before.unsqueeze(2), strict=False)
        return torch.cat([part.cumsum(1) - 1 + earlier for part, earlier in pairs], 1)

    def better(self, experts: Tensor, scores: Tensor, tokens: int) -> Tensor:
        """How many tokens that chose an expert have a higher score than each here, or as high and before: (B, s, E)."""
        positions = self.positions(tokens)
        longest = max(map(len, positions))
        padding = (0, 0, 0, longest - experts.shape[1])
        of_choices = self._gathered(F.pad(scores.gather(-1, experts), padding).transpose(0, 1))  # (R longest, B, k)
        everyone = self._gathered(F.pad(experts, padding).transpose(0, 1))
        where = torch.cat([rank * longest + torch.arange(len(each)) for rank, each in enumerate(positions)])
        where = where[torch.cat([*positions]).argsort()].to(scores.device)  # of each token of the sample
        table = scores.new_full((tokens, len(scores), scores.shape[-1]), -torch.inf)
        table.scatter_(-1, everyone[where], of_choices[where])
        return by_score(table.transpose(0, 1))[:, positions[self.index].to(scores.device)]

    def _gathered(self, x: Tensor) -> Tensor:
        """Along the first dimension."""
        for axis in self.axes:
            x = comm.all_gather(x.contiguous(), axis.labelled("load"))
        return x


def runs(positions: Tensor) -> list[tuple[int, int]]:
    """The runs of neighbours among ascending positions: (first, how many), one or more of them."""
    found: list[tuple[int, int]] = []
    for position in positions.tolist():
        if found and position == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((position, 1))
    return found or [(0, 0)]
