"""Where the ranks sent each token in a step, so that one process, which computes in other bits, can send it there too.

A choice is discrete: with few bits a rounding decides now and then for another expert, and what follows is another
computation. Compared is then what is computed from the same choices; that scores are what they should be, the
gradients of the router say.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from expert_parallel.engine.router import Choice


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """By name; of a plain model, or of one of the engine."""
    return {name: module for name, module in model.named_modules() if name.endswith(".router")}


class Choices:
    """What the routers of a rank have chosen since `forget`, by layer.

    Args:
        model: this rank's shards, with the names of the full model.
        rows: (B, S) of the forward that runs now: which tokens these are of the global batch, flattened.
    """

    def __init__(self, model: nn.Module, rows: Callable[[], Tensor]):
        self.found: dict[str, dict[int, tuple[Tensor, Tensor, Tensor | None]]] = {}
        for name, router in routers(model).items():
            router.register_forward_hook(partial(self._note, name, rows))

    def forget(self) -> None:
        self.found.clear()

    def _note(self, name: str, rows: Callable[[], Tensor], router: nn.Module, _: object, choice: Choice) -> None:
        here = rows().flatten().cpu()
        kept = None if choice.kept is None else choice.kept.detach().cpu()
        # A forward that is repeated, to count the load ahead or to recompute, chooses the same.
        first = int(here[0]) if len(here) else -1  # a rank of tp may have no token
        self.found.setdefault(name, {})[first] = here, choice.experts.detach().cpu(), kept


def follow(model: nn.Module, everyone: list[dict]) -> None:
    """Make the routers of the full model choose, in its next forwards, what the ranks have chosen.

    Args:
        everyone: `Choices.found` of all ranks.
    """
    for name, router in routers(model).items():
        found = [each for of_rank in everyone for each in of_rank.get(name, {}).values()]
        rows = torch.cat([here for here, _, _ in found])
        experts = torch.cat([experts for _, experts, _ in found])
        all_experts = experts.new_empty(int(rows.max()) + 1, experts.shape[1])
        all_experts[rows] = experts
        all_kept = None
        if found[0][2] is not None:
            all_kept = torch.ones_like(all_experts, dtype=torch.bool)
            all_kept[rows] = torch.cat([kept for _, _, kept in found])
        router.decide = partial(_decided, all_experts, all_kept)


def _decided(experts: Tensor, kept: Tensor | None, scores: Tensor, _: int | None) -> tuple[Tensor, Tensor | None]:
    shape = (*scores.shape[:2], experts.shape[1])
    return experts.view(shape).to(scores.device), None if kept is None else kept.view(shape).to(scores.device)
