"""Recomputation of activations by torch. Korthikanti et al. 2022 (2205.05198), section 5.

What it adds to the plain one of `activations.py`: `torch.utils.checkpoint` stops the second forward as soon as it has
what backward reads, and works under `torch.autograd.grad`. It restores torch's own generators only, so `SampleMasks`,
or the tracker of lecture 05, restores its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.model.gpt import GPT, Block, Dropout

KINDS = ("none", "selective", "full")


def recompute_block(block: Block, kind: str) -> Block:
    """Make one layer forget activations in forward and compute them again in backward."""
    if kind == "selective":
        block.attention.core = computed_twice(block.attention.core, block.attention.dropout)
    elif kind == "full":
        block.forward = computed_twice(block.forward, block.attention_dropout)
    else:
        assert kind == "none", kind
    return block


def recompute(model: GPT, kind: str) -> GPT:
    """The same for all layers of the model, or of a pipeline stage of it."""
    for block in model.blocks.values():
        recompute_block(block, kind)
    return model


def computed_twice(function: Callable[..., Tensor], dropout: Dropout) -> Callable[..., Tensor]:
    def call(*activations: Tensor, **options: Any) -> Tensor:
        again = partial(function, **options)
        restored = {"context_fn": dropout.masks.contexts} if dropout.masks else {}
        return checkpoint(again, *activations, use_reentrant=False, preserve_rng_state=False, **restored)

    return call
