"""Messages of ranks that share a GPU: through pinned host memory, over gloo. NCCL takes one rank a GPU.

A tensor that is sent is copied to the host first, which waits for what computes it. What arrives is copied to the
device when it is waited for, and not before: an asynchronous collective stays one. Elsewhere nothing is copied at all.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_needed(x: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether `x` is on a device to which the group does not send."""
    return x.device.type != "cpu" and f"{x.device.type}:gloo" in dist.get_backend_config(group)


def pinned(x: Tensor) -> Tensor:
    """Host memory for values like x's."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=torch.accelerator.is_available())


def outgoing(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What is sent of `x`: itself, or its values on the host."""
    return pinned(x).copy_(x.detach()) if is_needed(x, group) else x


def landing(into: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Where a message for `into` arrives: there, or on the host."""
    return pinned(into) if is_needed(into, group) else into


def fill(into: Tensor, landing: Tensor) -> Tensor:
    """`into`, with what has arrived for it."""
    return into if landing is into else into.copy_(landing, non_blocking=True)
