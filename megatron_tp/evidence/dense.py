"""What lecture 04 compares with: the same in one process, and the full tensors behind the shards.

b samples, s tokens in a sample, h hidden, d head size, V vocabulary
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from core.mesh import Axis
from core.model.seeded import generator
from core.model.text import VOCABULARY
from core.proof.full import full_tensors
from core.proof.lesson import Run
from core.shards import LocalTensor, Shard

Weights = Mapping[str, Tensor]
Shards = Mapping[str, int | None]  # how each tensor is sharded: the dimension, or None

COLUMNS, ROWS, REPLICATED = -1, 0, None

# ---- In one process, by torch's own operations -----------------------------------------------------------------------


def product(x: Tensor, w: Weights) -> Tensor:
    return torch.matmul(x, w["A"])


def mlp(x: Tensor, w: Weights) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w["A"].T, w["A bias"])), w["B"].T, w["B bias"])


def attention(x: Tensor, w: Weights, d: int) -> Tensor:
    q, k, v = (F.linear(x, w[name].T).unflatten(-1, (-1, d)).transpose(1, 2) for name in "QKV")
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(heads.transpose(1, 2).flatten(2), w["O"].T, w["O bias"])


def one_layer(w: Weights, tokens: Tensor, d: int) -> Tensor:
    x = F.embedding(tokens, w["token"]) + w["position"]
    x = x + attention(x, w, d)
    x = x + mlp(x, w)
    return F.linear(x, w["logits"].T)


# ---- Full tensors and shards -----------------------------------------------------------------------------------------


def full_tensor(run: Run, name: str) -> Tensor:
    """The tensor `name`, or "d name", a gradient of it, as one process has it: the same numbers on every rank."""
    b, s, h = run.args.batch, run.args.sequence, run.args.hidden
    shapes = {"X": (b, s, h), "Y": (b, s, 4 * h), "Z": (b, s, h), "A": (h, 4 * h), "B": (4 * h, h)}
    shapes |= {"A bias": (4 * h,), "B bias": (h,), "O bias": (h,)} | dict.fromkeys("QKVO", (h, h))
    shapes |= {"token": (VOCABULARY, h), "position": (s, h), "logits": (h, VOCABULARY)}
    shape = shapes[name.removeprefix("d ")]
    std = 1.0 if len(shape) == 3 else shape[0] ** -0.5  # a product is then about as large as its input
    value = torch.empty(shape, dtype=torch.float64).normal_(0.0, std, generator=generator(run.args.seed, name))
    return value.to(run.job.device, run.dtype)


def local_tensor(run: Run, name: str, dim: int | None, axis: Axis) -> Tensor:
    """This rank's shard of the full tensor. Shards drawn on each rank from one seed would all be the same numbers."""
    full = full_tensor(run, name)
    return full if dim is REPLICATED else full.chunk(axis.size, dim)[axis.index].contiguous()


def shard_mark(value: Tensor, dim: int | None, axis: Axis) -> Shard | None:
    """Says how the local tensor `value` is sharded."""
    if dim is REPLICATED:
        return None
    return Shard(dim % value.dim(), axis.index, axis.size, axis.size * value.shape[dim])


def gathered(run: Run, tensors: Weights, shards: Shards, axis: Axis) -> list[tuple[str, Tensor]]:
    """The full tensors, on rank 0; what is replicated comes from every rank. Elsewhere an empty list."""
    mine = [
        LocalTensor(name, value.detach().cpu(), shard_mark(value, shards[name], axis))
        for name, value in tensors.items()
    ]
    return list(full_tensors(each for rank in run.job.gather(mine) for each in rank))
