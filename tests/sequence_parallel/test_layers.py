"""The layers and the loss of lecture 06, one by one."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.gpt import GPTConfig
from core.ledger import Ledger, SavedActivations
from core.mesh import Axis, Mesh
from megatron_tp.rng import RandomTracker
from sequence_parallel import recompute
from sequence_parallel.layers import ColumnParallelLinear, check
from sequence_parallel.loss import cross_entropy
from tests.pool import Pool

CPU = torch.device("cpu")


def axis_of_all() -> Axis:
    return Mesh("cpu", Ledger(), 30.0, tp=dist.get_world_size())["tp"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- The column-parallel layer: what it saves, and what overlaps


def order_in_backward() -> tuple[list[str], int]:
    """What happens in which order in the backward of a column-parallel layer, and the bytes saved for it."""
    happened = []

    def note(name: str, call: Callable) -> Callable:
        def noting(*args: object) -> object:
            happened.append(name)
            return call(*args)

        return noting

    axis = axis_of_all()
    layer = ColumnParallelLinear(nn.Linear(6, 8, dtype=torch.float64), axis)
    x = random(2, 3, 6).requires_grad_()
    with SavedActivations(layer.parameters()) as saved:
        y = layer(x)
    with (
        patch.object(comm, "all_gather_async", note("gather", comm.all_gather_async)),
        patch.object(comm, "reduce_scatter_async", note("scatter", comm.reduce_scatter_async)),
        patch.object(comm.Pending, "wait", note("wait", comm.Pending.wait)),
        patch.object(Tensor, "__matmul__", note("product", Tensor.__matmul__)),
    ):
        y.backward(torch.ones_like(y))
    return happened, saved.first


def test_gather_and_scatter_travel_during_the_products(pool: Pool) -> None:
    """x is gathered again during the product for the input's gradient, which is scattered during the weight's."""
    happened, saved = pool.run(2, order_in_backward)[0]
    assert happened == ["gather", "product", "scatter", "wait", "product", "wait"]
    assert saved == 2 * 3 * 6 * 8, "this rank's part of x, and no more"


# ---- The loss


def losses(vocabulary: int, scale: float, dtype: torch.dtype) -> None:
    axis = axis_of_all()
    t, i = axis.size, axis.index
    whole = (scale * random(3, 2 * t, vocabulary)).to(dtype)
    length = -(-vocabulary // t)
    padded = F.pad(whole, (0, length * t - vocabulary), value=1e6)  # must not matter
    ours, dense = padded.chunk(t, -1)[i].clone().requires_grad_(), whole.requires_grad_()
    targets = torch.arange(6 * t).reshape(3, 2 * t) * 5 % vocabulary
    expected = F.cross_entropy(dense.flatten(0, 1), targets.flatten(), reduction="none").view(3, 2 * t)
    found = cross_entropy(ours, targets, axis, vocabulary)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(found, expected.chunk(t, 1)[i], **tolerance)
    weights = random(3, 2 * t, seed=1).to(dtype)
    (found * weights.chunk(t, 1)[i]).sum().backward()
    (expected * weights).sum().backward()
    gradient = F.pad(dense.grad, (0, length * t - vocabulary)).chunk(t, -1)[i]
    assert torch.allclose(ours.grad, gradient, **tolerance)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [2, 7, 12])  # with 4 ranks a vocabulary of 2 leaves two ranks nothing
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1.0, torch.float64), (1e4, torch.float64), (1.0, torch.float32)], ids=str
)
def test_the_loss(pool: Pool, ranks: int, vocabulary: int, scale: float, dtype: torch.dtype) -> None:
    pool.run(ranks, losses, vocabulary, scale, dtype)


# ---- Recomputation with the tracker of lecture 05, whose numbers depend on what was drawn before


def test_the_trackers_numbers_are_restored() -> None:
    tracker = RandomTracker(3, Axis("tp", (0,), 0, None, Ledger(), None), CPU)

    def dropped(x: Tensor, draw: RandomTracker) -> Tensor:
        return x.exp() * draw.keep_mask(x.shape, 0.5, "", None, CPU)

    x = torch.zeros(1000, requires_grad=True)
    y = recompute._twice(dropped)(x, tracker)
    tracker.keep_mask(x.shape, 0.5, "", None, CPU)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


# ---- Refusals


@pytest.mark.parametrize(
    ("options", "ranks", "sequence", "message"),
    [
        ({}, 1, 64, "--nproc_per_node 1: sequence parallelism .* use --nproc_per_node 2"),
        ({"heads": 4}, 8, 64, "--heads 4: must be a multiple of the 8 ranks.* use --heads 8, or --nproc.* 2, 4"),
        ({"heads": 8}, 8, 60, "--sequence 60: must be a multiple of the 8 ranks.* use --sequence 64, or .* 2, 4"),
        ({"heads": 8, "feed_forward": 100}, 8, 64, "--feed-forward 100: must be.* use --feed-forward 96, or .* 2, 4"),
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict, ranks: int, sequence: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(GPTConfig(hidden=64, **options), ranks, sequence)
