"""Cut the reference GPT into pipeline stages, and keep what several ranks hold one. Lecture 07.

Each stage has layers/stages blocks, or nearly (`layers_in`); the first also the embedding, the last also the final
LayerNorm and the head. A rank holds one stage or several. The head is the token embedding, so the ranks of first and
last stage each hold a copy of it, and DualPipe has every stage on two ranks. Copies are equal at the start, and kept
equal by adding their gradients before every optimizer step.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from core import p2p
from core.mesh import Axis
from core.model.gpt import GPT

TOO_FEW = "must be a multiple of the {stages} stages, or 2 x {stages} - 2 or more, so that each has a layer"


@cache  # a search asks millions of times
def layers_in(layers: int, stages: int, stage: int) -> range:
    """The layers of a stage: as many in each or, where that cannot be, nearly.

    Then the embedding counts as a layer and the head as another, so that the ends of the model get fewer layers
    (2407.21783, section 3.3.2), and the first stages, which keep the most microbatches, are the shorter ones.

    Raises:
        ValueError: a stage would have no layer.
    """
    each, longer = divmod(layers, stages)
    if longer == 0 and each:
        return range(stage * each, (stage + 1) * each)
    if layers + 2 < 2 * stages:
        usual = max(1, round(layers / stages)) * stages
        raise ValueError(f"--layers {layers}: {TOO_FEW.format(stages=stages)}; use --layers {usual}")
    each, longer = divmod(layers + 2, stages)
    first, end = (s * each + max(0, s - (stages - longer)) - 1 for s in (stage, stage + 1))
    return range(max(0, first), min(layers, end))


def check_layers(layers: int, stages: int, per_rank: int = 1) -> None:
    """Raises ValueError unless every stage gets the same number of layers, at least one: a lesson's claims are so."""
    if layers % stages or layers < stages:
        usable = [n for n in range(2, min(layers // per_rank, 64) + 1) if layers % (n * per_rank) == 0][-8:]
        ranks = f", or --nproc_per_node one of {', '.join(map(str, usable))}" if usable else ""
        raise ValueError(
            f"--layers {layers}: must be a multiple of the {stages} stages, so that each holds as many layers; "
            f"use --layers {max(1, round(layers / stages)) * stages}{ranks}"
        )


def cut(model: GPT, held: Collection[int], stages: int) -> GPT:
    """Drop from `model` all that is in none of the stages `held`. The parameters that stay keep their full names."""
    kept = {layer for stage in held for layer in layers_in(model.config.layers, stages, stage)}
    for name in list(model.blocks):
        if int(name) not in kept:
            del model.blocks[name]
    if 0 not in held:
        model.embed = None
    if stages - 1 not in held:
        model.norm = model.head = None
    return model


def each_stage(part: GPT, held: Collection[int], stages: int) -> dict[int, GPT]:
    """The stages of which `part` was cut, by number: models of their own, with the modules of `part`."""
    found = {}
    for stage in held:
        found[stage] = copy.copy(part)
        found[stage]._modules = dict(part._modules)
        found[stage].blocks = nn.ModuleDict(part.blocks)
        cut(found[stage], [stage], stages)
    return found


class Copies:
    """What this rank's part of the model has in common with other ranks' parts.

    Args:
        held: the stages of each rank of the axis.
    """

    def __init__(self, part: GPT, axis: Axis, held: Sequence[Collection[int]]):
        self.part, self.axis = part, axis
        stages = 1 + max(max(those) for those in held)
        every = each_stage(GPT(part.config), range(stages), stages)  # on the meta device, for the names
        names = [{part.full_name(name) for s in those for name, _ in every[s].named_parameters()} for those in held]
        self.shared: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = defaultdict(list)  # by the ranks
        for name, p in part.named_parameters():
            whole = part.full_name(name)
            holders = tuple(rank for rank in range(axis.size) if whole in names[rank])
            if len(holders) > 1:
                self.shared[holders].append((whole, p))
        for copies in self.shared.values():  # in one order on all ranks: a head's place is not an embedding's
            copies.sort(key=lambda each: each[0])
        others = (copies for holders, copies in self.shared.items() if holders[0] != axis.index)
        self._counted_elsewhere = {p for copies in others for _, p in copies}

    def sum_gradients(self) -> None:
        """Add the gradients of the copies; for two ranks an all-reduce is one exchange.

        In the order of the ranks on each of them, so copies stay equal to the last bit.
        """
        for holders in sorted(self.shared):  # in one order on all ranks
            gradients = [p.grad for _, p in self.shared[holders] if p.requires_grad]
            if not gradients:
                continue
            flat = torch.cat([g.flatten() for g in gradients])
            others = [rank for rank in holders if rank != self.axis.index]
            terms = {rank: p2p.exchange(flat, self.axis, rank) for rank in others} | {self.axis.index: flat}
            total = sum(terms[rank] for rank in holders)
            for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def counted_here(self, parameter: nn.Parameter) -> bool:
        """Whether this rank adds the parameter's gradient to the global norm: of its holders the first one does."""
        return parameter not in self._counted_elsewhere

    def counted_once(self) -> Iterator[Tensor]:
        """The gradients on this rank that belong in the global norm."""
        return (p.grad for p in self.part.parameters() if p.grad is not None and self.counted_here(p))
