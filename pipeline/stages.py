"""Cut the reference GPT into pipeline stages, and keep its one tied weight one. Lecture 07.

Each stage holds layers/stages blocks; the first also the embedding, the last also the final LayerNorm and the head.
The head is the token embedding, so first and last stage each hold a copy of it: equal at the start, and kept equal by
adding the gradients of both before every optimizer step.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from core import p2p
from core.gpt import GPT
from core.mesh import Axis


def check_layers(layers: int, stages: int) -> None:
    """Raises ValueError unless every stage gets the same number of layers, at least one."""
    if layers % stages or layers < stages:
        usable = [n for n in range(2, min(layers, 64) + 1) if layers % n == 0][-8:]
        ranks = f", or --nproc_per_node one of {', '.join(map(str, usable))}" if usable else ""
        raise ValueError(
            f"--layers {layers}: must be a multiple of the {stages} stages, so that each holds as many layers; "
            f"use --layers {max(1, round(layers / stages)) * stages}{ranks}"
        )


def cut(model: GPT, stage: int, stages: int) -> GPT:
    """Drop from `model` all that `stage` does not hold. The parameters that stay keep their full names."""
    check_layers(model.config.layers, stages)
    layers = model.config.layers // stages
    for name in list(model.blocks):
        if int(name) // layers != stage:
            del model.blocks[name]
    if stage > 0:
        model.embed = None
    if stage < stages - 1:
        model.norm = model.head = None
    return model


def tied_weight(stage: GPT, axis: Axis) -> nn.Parameter | None:
    """This rank's copy of the embedding that first and last stage share; None where there is nothing to sum."""
    if not stage.config.tied or axis.size == 1:
        return None
    if stage.embed is not None:
        return stage.embed.token.weight
    return stage.head.weight if stage.head is not None else None


def sum_tied_gradients(stage: GPT, axis: Axis) -> None:
    """Add the gradients of the two copies: an all-reduce of two ranks, which is one exchange.

    a + b is b + a to the last bit, so the copies stay equal to the last bit.
    """
    weight = tied_weight(stage, axis)
    if weight is not None and weight.requires_grad:
        other_end = axis.size - 1 - axis.index
        weight.grad += p2p.exchange(weight.grad, axis, other_end)


def counted_once(stage: GPT, axis: Axis) -> Iterator[Tensor]:
    """The gradients on this rank that belong in the global norm: without the last stage's copy of the tied one."""
    copy = tied_weight(stage, axis) if axis.index == axis.size - 1 else None
    return (p.grad for p in stage.parameters() if p.grad is not None and p is not copy)
