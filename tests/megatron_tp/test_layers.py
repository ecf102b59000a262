"""The layers, the loss and the random-number streams, one by one, against torch's dense ones: plain and engine."""

from collections.abc import Callable
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig
from core.model.streams import RandomTracker
from core.shards import Shard, shard_of
from megatron_tp import tensor_parallel
from megatron_tp.engine import layers, loss
from tests.pool import Pool

CPU = torch.device("cpu")
VERSIONS = (tensor_parallel, layers)  # plain, engine


def axis_of_all() -> Axis:
    return Mesh("cpu", Ledger(), 30.0, tp=dist.get_world_size())["tp"]


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias, dtype=torch.float64)
    for i, p in enumerate(layer.parameters()):
        p.data = random(*p.shape, seed=i)
    return layer


# ---- Linear layers


def linears(bias: bool, frozen: tuple[str, ...], version: object, axis: Axis) -> None:
    i, t = axis.index, axis.size
    column, row = linear(6, 4 * t, bias), linear(4 * t, 5, bias)
    sharded = version.ColumnParallelLinear(column, axis), version.RowParallelLinear(row, axis)
    xs = [random(2, 3, 6, seed=9).requires_grad_("x" not in frozen) for _ in range(2)]
    for pair in ((column, row), sharded):
        for layer in pair:
            layer.weight.requires_grad_("weight" not in frozen)
            if bias:
                layer.bias.requires_grad_("bias" not in frozen)
    dense = row(column(xs[0]).tanh())
    ours = sharded[1](sharded[0](xs[1]).tanh())
    close(ours, dense)
    for y in (dense, ours):
        (y * random(2, 3, 5, seed=8)).sum().backward()
    if "x" not in frozen:
        close(xs[1].grad, xs[0].grad)
    if "weight" not in frozen:
        close(sharded[0].weight.grad, column.weight.grad.chunk(t, 0)[i])
        close(sharded[1].weight.grad, row.weight.grad.chunk(t, 1)[i])
    if bias and "bias" not in frozen:
        close(sharded[0].bias.grad, column.bias.grad.chunk(t)[i])
        close(sharded[1].bias.grad, row.bias.grad)
    assert all(p.grad is None for layer in sharded for n, p in layer.named_parameters() if n in frozen)


def all_linears() -> None:
    axis = axis_of_all()
    for case in product((True, False), ((), ("x",), ("weight",), ("bias",), ("x", "bias")), VERSIONS):
        linears(*case, axis)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_linears(pool: Pool, ranks: int) -> None:
    pool.run(ranks, all_linears)


def order_in_backward(count: int) -> list[str]:
    """What happens in which order in the backward of so many column-parallel layers of one input."""
    happened = []

    def note(name: str, call: Callable) -> Callable:
        def noting(*args: object, **more: object) -> object:
            happened.append(name)
            return call(*args, **more)

        return noting

    axis = axis_of_all()
    several = [layers.ColumnParallelLinear(linear(6, 8, True), axis) for _ in range(count)]
    ys = several[0].together(random(2, 6).requires_grad_(), several)
    with (
        patch.object(comm, "all_reduce_async", note("start", comm.all_reduce_async)),
        patch.object(comm.Pending, "wait", note("wait", comm.Pending.wait)),
        patch.object(layers, "of_parameters", note("weight", layers.of_parameters)),
    ):
        torch.cat(ys).sum().backward()
    return happened


def test_the_all_reduce_travels_while_the_weights_gradient_is_computed(pool: Pool) -> None:
    assert pool.run(2, order_in_backward, 1)[0] == ["start", "weight", "wait"]
    assert pool.run(2, order_in_backward, 3)[0] == ["start", "weight", "weight", "weight", "wait"]


# ---- Embedding


def embedding(vocabulary: int, version: object, axis: Axis) -> None:
    dense = nn.Embedding(vocabulary, 6, dtype=torch.float64)
    dense.weight.data = random(vocabulary, 6)
    ours = version.VocabParallelEmbedding(dense, axis)
    tokens = torch.arange(3 * vocabulary).reshape(3, vocabulary) % vocabulary
    close(ours(tokens), dense(tokens))
    weights = random(3, vocabulary, 6, seed=1)
    (ours(tokens) * weights).sum().backward()
    (dense(tokens) * weights).sum().backward()
    mark = shard_of(ours.weight)
    close(ours.weight.grad, mark.local(dense.weight.grad))
    assert not ours.weight[mark.unpadded :].any()
    assert not ours.weight.grad[mark.unpadded :].any(), "padding is never trained"


# ---- Cross entropy


def cross_entropy(vocabulary: int, smoothing: float, scale: float, version: object, axis: Axis) -> None:
    full = (scale * random(2, 5, vocabulary)).requires_grad_()
    mark = Shard(2, axis.index, axis.size, vocabulary)
    ours = mark.local(full.detach())
    ours[..., mark.unpadded :] = 1e6  # the padding must not matter
    ours.requires_grad_()
    targets = torch.arange(10).reshape(2, 5) % vocabulary
    expected = F.cross_entropy(full.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    options = (smoothing,) if smoothing else ()
    losses = version.vocab_parallel_cross_entropy(ours, targets, axis, vocabulary, *options)
    close(losses.flatten(), expected)
    weights = random(10, seed=1)
    (losses.flatten() * weights).sum().backward()
    (expected * weights).sum().backward()
    close(ours.grad, mark.local(full.grad))


def both_ends_of_the_model() -> None:
    axis = axis_of_all()
    for vocabulary, version in product((2, 5, 12), VERSIONS):  # on 4 ranks a vocabulary of 2 leaves two ranks nothing
        embedding(vocabulary, version, axis)
    for vocabulary in (2, 7, 12):
        for smoothing, scale in ((0.0, 1.0), (0.0, 1e4), (0.1, 1.0), (0.3, 1e3)):
            cross_entropy(vocabulary, smoothing, scale, loss, axis)
            if not smoothing:
                cross_entropy(vocabulary, smoothing, scale, tensor_parallel, axis)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_embedding_and_cross_entropy(pool: Pool, ranks: int) -> None:
    pool.run(ranks, both_ends_of_the_model)


def wrong_logits() -> None:
    with pytest.raises(ValueError, match="each of the 2 ranks holds 4 of a vocabulary of 7"):
        loss.vocab_parallel_cross_entropy(torch.zeros(2, 7), torch.zeros(2, dtype=torch.int64), axis_of_all(), 7)


def test_full_logits_are_refused(pool: Pool) -> None:
    pool.run(2, wrong_logits)


# ---- Random numbers


def test_streams_go_on_after_a_replay() -> None:
    axis = Axis("tp", (0, 1), 1, None, Ledger(), None)
    a, b = RandomTracker(5, axis, CPU), RandomTracker(5, axis, CPU)
    shape = torch.Size([64])

    def masks(tracker: RandomTracker) -> Tensor:
        return torch.cat([tracker.keep_mask(shape, 0.2, "", split, CPU) for split in (None, (1, 0, 2))])

    states = a.states()
    first, second = masks(a), masks(a)
    assert (first != second).any()
    with a.replay(states):
        assert torch.equal(masks(a), first)
        assert torch.equal(masks(a), second)
    with pytest.raises(KeyError), a.replay(states):
        raise KeyError
    masks(b), masks(b)
    assert torch.equal(masks(a), masks(b)), "a replay leaves no trace, nor does a failed one"
    assert torch.cat([masks(a) for _ in range(100)]).float().mean() == pytest.approx(0.8, abs=0.02)
    outside, inside = masks(a).chunk(2)
    assert (outside != inside).any(), "two streams"


# ---- Refusals


@pytest.mark.parametrize("options", [{"heads": 4}, {"heads": 8, "feed_forward": 100}])
def test_what_cannot_be_sharded_is_refused(options: dict) -> None:
    eight = Axis("tp", (*range(8),), 0, None, Ledger(), None)
    with pytest.raises(ValueError, match="must be a multiple of the 8 ranks, so that each gets as much; use --"):
        layers.parallelize(GPT(GPTConfig(hidden=64, **options)), eight)
