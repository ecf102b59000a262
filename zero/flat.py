"""Parameters end to end in one flat buffer, padded so that N ranks have equal shards of it. Lecture 01.

A shard starts and ends anywhere, inside a parameter too: an element-wise optimizer such as Adam does not mind, and no
rank has more to update than another.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.mesh import Axis


def flatten(tensors: Sequence[Tensor], n: int) -> Tensor:
    """Copies of the tensors end to end, (Ψ,), and zeros to a multiple of n."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    return F.pad(flat, (0, -len(flat) % n))


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `flatten` made, in the shapes of the tensors."""
    sizes = [t.numel() for t in tensors]
    *views, _ = flat.split([*sizes, len(flat) - sum(sizes)])
    return [view.view(t.shape) for view, t in zip(views, tensors, strict=True)]


def set_data(parameters: Sequence[Tensor], flat: Tensor) -> None:
    """Make the parameters views of the buffer that has their values: to write into it is to set them."""
    for parameter, view in zip(parameters, unflatten(flat, parameters), strict=True):
        parameter.data = view


def own_shard(flat: Tensor, axis: Axis) -> Tensor:
    """This rank's shard, (Ψ/N,), a view."""
    return flat.chunk(axis.size)[axis.index]
