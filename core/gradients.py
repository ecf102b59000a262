"""Gradients over the ranks: summed, and clipped by the norm of the full model's."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis


def sum_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Add up gradients over the ranks, in one message a data type.

    Args:
        parameters: what the ranks of the axis have in common. The same of them must have gradients on every rank.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in found):
        gradients = [g for g in found if g.dtype == dtype]
        flat = comm.all_reduce(torch.cat([g.flatten() for g in gradients]), axis)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def norm_and_totals(counted: Iterable[Tensor], axes: Sequence[Axis], more: Tensor) -> tuple[float, list[float]]:
    """The norm of the full model's gradient, and what else is to be summed over the ranks, in one message an axis.

    Args:
        counted: the gradients that this rank adds to the norm: over the ranks of `axes`, each number once.
        more: this rank's numbers to be summed, one-dimensional.
    """
    squares = [g.double().square().sum().to(more.device) for g in counted]
    square = sum(squares, torch.zeros((), dtype=torch.float64, device=more.device))
    totals = torch.cat([square[None], more.double()])
    for axis in axes:
        comm.all_reduce(totals, axis.labelled("norm"))
    square_norm, *sums = totals.tolist()
    return square_norm**0.5, sums


def clip_by(parameters: Iterable[nn.Parameter], clip: float, norm: float) -> None:
    """Scale the gradients as one process would, whose gradient has this norm."""
    nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm, dtype=torch.float64))


def clip_and_total(
    parameters: Iterable[nn.Parameter], counted: Iterable[Tensor], axes: Sequence[Axis], clip: float, loss: Tensor
) -> tuple[float, float]:
    """Clip by the norm of the *full* model's gradient; returns (norm, loss).

    Args:
        counted: see `norm_and_totals`.
        clip: largest global norm.
        loss: this rank's share of the loss, a scalar; travels along, so that all ranks know the sum.
    """
    norm, (total,) = norm_and_totals(counted, axes, loss[None])
    clip_by(parameters, clip, norm)
    return norm, total
