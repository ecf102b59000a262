"""How the reference GPT is split into pipeline stages, and how what several ranks have stays equal. Lecture 07.

Each stage has layers/stages blocks, or nearly, or as many as `--stages` says (`split.py`); the first also the
embedding, the last also the final LayerNorm and the head. A rank has one stage or several. The head is the token
embedding, so the ranks of first and last stage each have a copy of it, and DualPipe has every stage on two ranks.
Copies are equal at the start, and kept equal by adding their gradients before every optimizer step.

read: stages.py:25-118; then core/model/gpt.py
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from core import p2p
from core.mesh import Axis
from core.model.gpt import GPT
from pipeline.split import layers_by_stage


@cache  # a search asks millions of times
def layers_in(layers: int, stages: int, stage: int, split: str = "") -> range:
    """The layers of a stage: those that a split says or, without one, as many in each, or nearly.

    Raises:
        ValueError: the split does not fit, or without one a stage would have no layer.
    """
    of_stages = layers_by_stage(layers, stages, split)
    first = sum(of_stages[:stage])
    return range(first, first + of_stages[stage])


def partition(model: GPT, mine: Collection[int], stages: int, split: str = "") -> GPT:
    """Drop from `model` all that is in none of the stages `mine`. The parameters that stay keep their full names.

    Args:
        stages: of the pipeline.
        split: which layers each of them has, in the notation of `split.py`; without it nearly as many each.
    """
    layers = {layer for stage in mine for layer in layers_in(model.config.layers, stages, stage, split)}
    for name in list(model.blocks):
        if int(name) not in layers:
            del model.blocks[name]
    if 0 not in mine:
        model.embed = None
    if stages - 1 not in mine:
        model.norm = model.head = None
    return model


def each_stage(model: GPT, mine: Collection[int], stages: int, split: str = "") -> dict[int, GPT]:
    """The stages `mine` that `model` was partitioned to, by number: models of their own, with its modules."""
    found = {}
    for stage in mine:
        found[stage] = copy.copy(model)
        found[stage]._modules = dict(model._modules)
        found[stage].blocks = nn.ModuleDict(model.blocks)
        partition(found[stage], [stage], stages, split)
    return found


class Copies:
    """The parameters that this rank has in common with other ranks.

    Args:
        model: this rank's stages.
        stages_of_ranks: the stages of each rank of the axis.
        split: the layers of each stage, as `partition` has it.
    """

    def __init__(self, model: GPT, axis: Axis, stages_of_ranks: Sequence[Collection[int]], split: str = ""):
        self.model, self.axis = model, axis
        stages = 1 + max(max(those) for those in stages_of_ranks)
        every = each_stage(GPT(model.config), range(stages), stages, split)  # on the meta device, for the names
        names = [
            {_of_block(model.full_name(name)) for stage in those for name, _ in every[stage].named_parameters()}
            for those in stages_of_ranks
        ]
        self.shared: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = defaultdict(list)  # by the ranks
        for name, p in model.named_parameters():
            full_name = model.full_name(name)
            ranks = tuple(rank for rank in range(axis.size) if _of_block(full_name) in names[rank])
            if len(ranks) > 1:
                self.shared[ranks].append((full_name, p))
        for copies in self.shared.values():  # in one order on all ranks: a head's position is not an embedding's
            copies.sort(key=lambda each: each[0])
        self._ranks = {p: ranks for ranks, copies in self.shared.items() for _, p in copies}
        others = (copies for ranks, copies in self.shared.items() if ranks[0] != axis.index)
        self._counted_elsewhere = {p for copies in others for _, p in copies}

    def sum_gradients(self) -> None:
        """Add the gradients of the copies."""
        self.add_up({ranks: [p.grad for _, p in found if p.requires_grad] for ranks, found in self.shared.items()})

    def add_up(self, gradients_by_ranks: Mapping[tuple[int, ...], list[Tensor]]) -> None:
        """Add gradients, or the same shards of them, over the ranks that have them; for two an exchange is enough.

        In the order of the ranks on each of them, so copies stay equal to the last bit.
        """
        for ranks, gradients in sorted(gradients_by_ranks.items()):  # in one order on all ranks
            if not gradients:
                continue
            flat = torch.cat([g.flatten() for g in gradients])
            others = [rank for rank in ranks if rank != self.axis.index]
            terms = {rank: p2p.exchange(flat, self.axis, rank) for rank in others} | {self.axis.index: flat}
            total = sum(terms[rank] for rank in ranks)
            for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def ranks_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """All ranks that have it; none where only this one has."""
        return self._ranks.get(parameter, ())

    def counted_here(self, parameter: nn.Parameter) -> bool:
        """Whether this rank adds the parameter's gradient to the global norm: of its ranks the first one does."""
        return parameter not in self._counted_elsewhere

    def counted_once(self) -> Iterator[Tensor]:
        """The gradients on this rank that belong in the global norm."""
        return (p.grad for p in self.model.parameters() if p.grad is not None and self.counted_here(p))


def _of_block(full_name: str) -> str:
    """The name of the block, all of which is on one stage: it may have experts, which a plain model has not."""
    return ".".join(full_name.split(".")[:2]) if full_name.startswith("blocks.") else full_name
