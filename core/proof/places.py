"""Lets a model and autograd tell the flight record where in a step a rank is, without a line in any lesson."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from core.proof.flight import FLIGHT


def follow_layers(blocks: nn.ModuleDict) -> None:
    """Let each layer say when its forward begins, and its backward: when its last parameter gets its gradient."""

    def say(name: str) -> Callable[..., None]:
        return lambda *_: FLIGHT.in_layer(name)

    for name, block in blocks.items():
        if hasattr(block, "followed"):
            continue
        block.followed = True
        block.register_forward_pre_hook(say(name))
        trained = [p for p in block.parameters() if p.requires_grad]
        for p in trained[-1:]:
            p.register_post_accumulate_grad_hook(say(name))


def follow_backward() -> None:
    """Let every backward of this process say that it is one; again without effect."""
    for name in ("backward", "grad"):
        original = getattr(torch.autograd, name)
        if not hasattr(original, "original"):
            setattr(torch.autograd, name, _followed(original))


def _followed(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(*args: Any, **more: Any) -> Any:
        before = FLIGHT.here()
        FLIGHT.go_to(before._replace(phase="backward"))
        result = original(*args, **more)
        FLIGHT.go_to(before)  # not where it fails: then it stays there
        return result

    backward.original = original
    return backward
