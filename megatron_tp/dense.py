"""What lecture 04's lesson compares with: the same in one process, and the whole tensors behind the parts.

b samples, s tokens in a sample, h hidden, d head size, V vocabulary
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.mesh import Axis
from core.model.seeded import generator
from core.model.text import VOCABULARY
from core.proof.lesson import Run
from core.shards import LocalTensor, Shard, full_tensors

Weights = dict[str, Tensor]
Cuts = dict[str, int | None]  # how each tensor is cut: the dimension, or None

COLUMNS, ROWS, WHOLE = -1, 0, None


@dataclass
class Dense:
    """The same in one process: the whole weights and torch's own operations."""

    d: int  # head size

    def column(self, x: Tensor, w: Weights) -> Tensor:
        return torch.matmul(x, w["A"])

    row = column

    def mlp(self, x: Tensor, w: Weights) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w["A"].T, w["A bias"])), w["B"].T, w["B bias"])

    def attention(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = (F.linear(x, w[name].T).unflatten(-1, (-1, self.d)).transpose(1, 2) for name in "QKV")
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(heads.transpose(1, 2).flatten(2), w["O"].T, w["O bias"])


# ---- Wholes and parts ------------------------------------------------------------------------------------------------


def whole(run: Run, name: str) -> Tensor:
    """The tensor `name`, or "d name", a gradient of it, as one process has it: the same numbers on every rank."""
    b, s, h = run.args.batch, run.args.sequence, run.args.hidden
    shapes = {"X": (b, s, h), "Y": (b, s, 4 * h), "Z": (b, s, h), "A": (h, 4 * h), "B": (4 * h, h)}
    shapes |= {"A bias": (4 * h,), "B bias": (h,), "O bias": (h,)} | dict.fromkeys("QKVO", (h, h))
    shapes |= {"token": (VOCABULARY, h), "position": (s, h), "logits": (h, VOCABULARY)}
    shape = shapes[name.removeprefix("d ")]
    std = 1.0 if len(shape) == 3 else shape[0] ** -0.5  # a product is then about as large as its input
    value = torch.empty(shape, dtype=torch.float64).normal_(0.0, std, generator=generator(run.args.seed, name))
    return value.to(run.job.device, run.dtype)


def part(run: Run, name: str, cut: int | None, axis: Axis) -> Tensor:
    """This rank's equal part of the whole. Parts drawn on each rank from one seed would all be the same numbers."""
    return whole(run, name) if cut is WHOLE else whole(run, name).chunk(axis.size, cut)[axis.index].contiguous()


def joined(run: Run, parts: Weights, cuts: Cuts, axis: Axis) -> list[tuple[str, Tensor]]:
    """The wholes, from all ranks' parts, on rank 0; what is not cut comes from every rank. Elsewhere an empty list."""
    pieces = []
    for name, value in parts.items():
        cut, t = cuts[name], axis.size
        mark = None if cut is WHOLE else Shard(cut % value.dim(), axis.index, t, t * value.shape[cut])
        pieces.append(LocalTensor(name, value.detach().cpu(), mark))
    return list(full_tensors(piece for rank in run.job.gather(pieces) for piece in rank))
