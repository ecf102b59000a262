"""The direction of Muon: a momentum matrix orthogonalised as a whole, and who does that for which matrix. Lecture 01.

Newton-Schulz, its coefficients, Nesterov: Keller Jordan, https://kellerjordan.github.io/posts/muon. The scale with
which Muon takes AdamW's learning rate and weight decay: Moonlight (2502.16982), section 2.2. torch.optim.Muon has both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7  # below any norm of a gradient
SCALES = ("match_rms_adamw", "original")  # torch.optim.Muon's names: Moonlight's and Keller Jordan's


class MuonSettings(NamedTuple):
    """What Muon has besides AdamW's learning rate and weight decay."""

    momentum: float = 0.95
    steps: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    scale: str = SCALES[0]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's: a weight of a layer, of experts a stack of weights. AdamW's: embeddings, head, norms and biases."""
    return name.startswith("blocks.") and name.endswith("weight") and parameter.dim() > 1


def newton_schulz(matrix: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """About UV^T of the matrix USV^T, (O, I): singular values between 0.7 and 1.2 or so, in matrix products only."""
    a, b, c = coefficients
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPS)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def scale_of(shape: Sequence[int], scale: str) -> float:
    """Of the direction of a matrix (O, I): so that its elements are as large as Adam's, or as a spectral norm wants."""
    rows, columns = shape
    return 0.2 * max(rows, columns) ** 0.5 if scale == SCALES[0] else max(1.0, rows / columns) ** 0.5


def direction(update: Tensor, head_size: int, settings: MuonSettings) -> Tensor:
    """Where a weight (O, I) goes, from its full update.

    Queries, keys and values are three matrices, as in Megatron-LM (unless --muon-no-split-qkv) and wherever they are
    three weights: one direction for the three of them would depend on how they are stored.

    Args:
        head_size: D, of a weight with rows (head, q|k|v, D); 0 for any other.
    """
    *_, columns = update.shape
    parts = update.view(-1, 3, head_size, columns).unbind(1) if head_size else [update[None]]  # (A, D, I) each
    found = []
    for part in parts:
        matrix = part.reshape(-1, columns)
        orthogonal = newton_schulz(matrix, settings.steps, settings.coefficients)
        found.append(orthogonal.mul(scale_of(matrix.shape, settings.scale)).view(part.shape))
    return torch.stack(found, 1).view(update.shape)


def flops(shape: Sequence[int], head_size: int, steps: int) -> int:
    """Of `direction`: in each step two products with the (s, s) matrix for 2 s^2 l each, and its square for 2 s^3."""
    rows, columns = shape
    if head_size:
        return 3 * flops((rows // 3, columns), 0, steps)
    short, long = min(shape), max(shape)
    return steps * (4 * short * short * long + 2 * short**3)


def deal(costs: Sequence[int], n: int) -> list[int]:
    """Which of n ranks does what: the most costly first, each to the rank with the least to do so far."""
    owners, loads = [0] * len(costs), [0] * n
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
