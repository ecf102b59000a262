"""The layers and the loss of lecture 06, one by one."""

import argparse
import re
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, Dropout, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.model.streams import RandomTracker
from core.proof.memory import SavedActivations
from core.shards import shard_of
from sequence_parallel import megatron_sp
from sequence_parallel.activations import Recompute
from sequence_parallel.engine.layers import ColumnParallelLinear, RowParallelLinear, parallelize, parallelize_block
from sequence_parallel.engine.loss import cross_entropy
from sequence_parallel.engine.recompute import computed_twice
from sequence_parallel.evidence.rules import check_sequence_parallel
from tests.pool import Pool

CPU = torch.device("cpu")


def axis_of_all() -> Axis:
    return Mesh("cpu", Ledger(), 30.0, tp=dist.get_world_size())["tp"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- The column-parallel layer: what it saves, and what overlaps


def order_in_backward(count: int) -> tuple[list[str], int]:
    """What happens in which order in the backward of so many column-parallel layers of one input; the bytes saved."""
    happened = []

    def note(name: str, call: Callable) -> Callable:
        def noting(*args: object) -> object:
            happened.append(name)
            return call(*args)

        return noting

    axis = axis_of_all()
    layers = nn.ModuleList(ColumnParallelLinear(nn.Linear(6, 8, dtype=torch.float64), axis) for _ in range(count))
    x = random(2, 3, 6).requires_grad_()
    with SavedActivations(layers.parameters()) as saved:
        ys = layers[0].together(x, layers)
    kept = saved.live
    with (
        patch.object(comm, "all_gather_async", note("gather", comm.all_gather_async)),
        patch.object(comm, "reduce_scatter_async", note("scatter", comm.reduce_scatter_async)),
        patch.object(comm.Pending, "wait", note("wait", comm.Pending.wait)),
        patch.object(Tensor, "__matmul__", note("product", Tensor.__matmul__)),
    ):
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    return happened, kept


def test_gather_and_scatter_travel_during_the_products(pool: Pool) -> None:
    """x is gathered again during the product for the input's gradient, which is scattered during the weight's."""
    for count in (1, 3):  # the products for an input's gradient are added up in place
        happened, saved = pool.run(2, order_in_backward, count)[0]
        assert happened == ["gather", "product", "scatter", "wait", *["product"] * count, "wait"]
        assert saved == 2 * 3 * 6 * 8, "this rank's shard of x, and no more"


# ---- The loss


def losses(vocabulary: int, scale: float, dtype: torch.dtype) -> None:
    axis = axis_of_all()
    t, i = axis.size, axis.index
    full = (scale * random(3, 2 * t, vocabulary)).to(dtype)
    length = -(-vocabulary // t)
    padded = F.pad(full, (0, length * t - vocabulary), value=1e6)  # must not matter
    ours, plain = (padded.chunk(t, -1)[i].clone().requires_grad_() for _ in range(2))
    dense = full.requires_grad_()
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
    total = megatron_sp.token_loss(plain, targets, 10, axis, vocabulary)
    assert torch.allclose(total, expected.sum() / 10, **tolerance)  # of all tokens, on every rank
    total.backward()
    dense.grad = None
    (F.cross_entropy(dense.flatten(0, 1), targets.flatten(), reduction="sum") / 10).backward()
    gradient = F.pad(dense.grad, (0, length * t - vocabulary)).chunk(t, -1)[i]
    assert torch.allclose(plain.grad, gradient, **tolerance)


def all_losses() -> None:
    for vocabulary in (2, 7, 12):  # with 4 ranks a vocabulary of 2 leaves two ranks nothing
        for scale, dtype in ((1.0, torch.float64), (1e4, torch.float64), (1.0, torch.float32)):
            losses(vocabulary, scale, dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_loss(pool: Pool, ranks: int) -> None:
    pool.run(ranks, all_losses)


def masked() -> None:
    """A token for which all of one rank's logits are -inf, as where some of the vocabulary is forbidden."""
    axis = axis_of_all()
    full = random(1, 2, 6)
    full[..., 3:] = -torch.inf
    targets, mine = torch.tensor([[0, 2]]), full.chunk(2, -1)[axis.index].contiguous()
    expected = F.cross_entropy(full[0], targets[0], reduction="none")
    assert torch.allclose(cross_entropy(mine, targets, axis, 6).flatten(), expected[axis.index])
    assert torch.allclose(megatron_sp.token_loss(mine, targets, 2, axis, 6), expected.mean())


def test_the_loss_of_masked_logits(pool: Pool) -> None:
    pool.run(2, masked)


# ---- Recomputation with the tracker of lecture 05, whose numbers depend on what was drawn before


def test_the_trackers_numbers_are_restored() -> None:
    tracker = RandomTracker(3, Axis("tp", (0,), 0, None, Ledger(), None), CPU)

    dropout = Dropout(0.5, "")
    dropout.masks = tracker

    def dropped(x: Tensor) -> Tensor:
        return x.exp() * tracker.keep_mask(x.shape, 0.5, "", None, CPU)

    def plain(x: Tensor) -> Tensor:
        return Recompute.apply(dropped, tracker, x)

    for recomputed in (computed_twice(dropped, dropout), plain):
        x = torch.zeros(1000, requires_grad=True)
        y = recomputed(x)
        tracker.keep_mask(x.shape, 0.5, "", None, CPU)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())


# ---- Refusals


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ({}, 1, "--nproc_per_node 1: sequence parallelism .* use --nproc_per_node 2$"),
        ({"heads": 1}, 1, "use --nproc_per_node 2 --heads 8 --sequence 64"),
        ({"heads": 4}, 8, "--heads 4: .* use --heads 8, or --nproc_per_node one of 2, 4$"),
        ({"sequence": 60}, 8, "--sequence 60: .* use --sequence 64, or --nproc_per_node one of 2, 4$"),
        ({"feed_forward": 100}, 8, "--feed-forward 100: .* use --feed-forward 96, or .* one of 2, 4$"),
        ({"hidden": 60}, 8, "--heads 8 --hidden 60: .* use --heads 8 --hidden 64$"),
        ({}, 3, "use --heads 9 --hidden 63 --sequence 63, or --nproc_per_node one of 2, 4, 8$"),
    ],
)
def test_what_has_no_equal_shards_is_refused(flags: dict, ranks: int, message: str) -> None:
    args = argparse.Namespace(**{"heads": 8, "hidden": 64, "feed_forward": 0, "sequence": 64} | flags)
    with pytest.raises(ValueError, match=message):
        check_sequence_parallel(args, ranks)
    if suggested := re.findall(r"--(heads|hidden|feed-forward|sequence) (\d+)", message.partition("use")[2]):
        for name, value in suggested:
            setattr(args, name.replace("-", "_"), int(value))
        check_sequence_parallel(args, max(ranks, 2))


def test_a_model_without_equal_shards_is_refused() -> None:
    axis = Axis("tp", (0, 1), 0, None, Ledger(), None)
    for sizes, use in (({"heads": 3}, "--heads 4"), ({"heads": 4, "feed_forward": 25}, "--feed-forward 24")):
        with pytest.raises(ValueError, match=f"must be a multiple of the 2 ranks, .*; use {use}"):
            parallelize(GPT(GPTConfig(hidden=12, **sizes)), axis)


# ---- The block that the lesson compares with: tensor parallelism alone; and rows without a bias


def a_block(sequence: bool) -> None:
    axis = axis_of_all()
    t, i = axis.size, axis.index
    config = GPTConfig(hidden=16, heads=4, layers=1, sequence=8, dropout=0.2, attention="softmax")
    dense = materialize(GPT(config), 0, CPU, torch.float64).blocks["0"]
    model = GPT(config)
    parallelize_block(model.blocks["0"], axis, sequence)
    ours = materialize(model, 0, CPU, torch.float64).blocks["0"]
    x, gradient = random(2, 8, 16).requires_grad_(), random(2, 8, 16, seed=1)
    mine = (x.detach().chunk(t, 1)[i] if sequence else x.detach()).clone().requires_grad_()
    use_masks(dense, SampleMasks(0))
    use_masks(ours, SampleMasks(0))
    expected, found = dense(x), ours(mine)
    expected.backward(gradient)
    found.backward(gradient.chunk(t, 1)[i].contiguous() if sequence else gradient)
    shard = (lambda y: y.chunk(t, 1)[i]) if sequence else (lambda y: y)
    assert torch.allclose(found, shard(expected), rtol=1e-12, atol=1e-13)
    assert torch.allclose(mine.grad, shard(x.grad), rtol=1e-12, atol=1e-13)
    full = dict(dense.named_parameters())
    for name, p in ours.named_parameters():
        mark = shard_of(p)
        if mark is None and sequence:
            comm.all_reduce(p.grad, axis)
        right = mark.local(full[name].grad) if mark else full[name].grad
        assert torch.allclose(p.grad, right, rtol=1e-12, atol=1e-13), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_block(pool: Pool, ranks: int, sequence: bool) -> None:
    pool.run(ranks, a_block, sequence)


def rows_without_bias() -> None:
    layer = RowParallelLinear(nn.Linear(4, 3, bias=False, dtype=torch.float64), axis_of_all())
    assert layer(random(1, 2, 2)).shape == (1, 1, 3)


def test_rows_without_a_bias(pool: Pool) -> None:
    pool.run(2, rows_without_bias)
