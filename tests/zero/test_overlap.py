"""What travels while something else is computed, from the order in which it happens."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from core import comm
from core.mesh import Axis
from core.model.gpt import token_loss
from core.model.text import Text
from tests.pool import Pool
from tests.zero.test_engine import ENGINES, Case, all_ranks, wide
from zero.engine.gathered import Unit
from zero.engine.offload import HostShards
from zero.engine.optimizer import ShardOptimizer
from zero.zeropp import dequantise, quantise


def order(kind: str, axis: Axis) -> list[str]:
    """One step on this rank: what is reduced, gathered, waited for and freed, and when layers compute and update."""
    case = Case(wide(layers=4), elements=3000)
    model = case.model()
    engine = ENGINES[kind](model, axis, case.optimizer, None, torch.float64, case.elements)
    happened: list[str] = []
    for i, block in model.blocks.items():
        block.mlp.register_forward_hook(lambda *_, i=i: happened.append(f"forward {i}"))
        block.mlp.down.bias.register_hook(lambda _, i=i: happened.append(f"backward {i}"))

    def note(name: str, call: Callable) -> Callable:
        def noting(*args: object, **more: object) -> object:
            happened.append(name)
            return call(*args, **more)

        return noting

    def wait(pending: comm.Pending) -> Tensor:
        happened.append(f"waits, {pending.what}")
        return right_wait(pending)

    def free(unit: Unit) -> None:
        happened.extend(["frees"] * (unit.full[0].untyped_storage().size() > 0))
        right_free(unit)

    def keep(shards: HostShards, i: int, gradient: Tensor) -> None:
        right_keep(shards, i, gradient)
        happened.append(f"{len(shards.in_flight)} go down")

    right_wait, right_free, right_keep = comm.Pending.wait, Unit.free, HostShards.add
    inputs, targets = Text(None, 8).batch(7, 0, 2)
    with (
        patch.object(comm, "all_reduce_async", note("reduces", comm.all_reduce_async)),
        patch.object(comm, "reduce_scatter_async", note("reduces", comm.reduce_scatter_async)),
        patch.object(comm, "all_gather_in_place_async", note("gathers", comm.all_gather_in_place_async)),
        patch.object(comm.Pending, "wait", wait),
        patch.object(Unit, "free", free),
        patch.object(HostShards, "add", keep),
        patch.object(ShardOptimizer, "step", note("updates", ShardOptimizer.step)),
    ):
        engine.zero_grad()
        engine.backward(token_loss(model(inputs), targets, 16))
        happened.append("steps")
        engine.step()
    return happened


def all_orders() -> dict[str, list[str]]:
    axis = all_ranks()
    return {kind: order(kind, axis) for kind in ENGINES}


@pytest.fixture(scope="module")
def orders(pool: Pool) -> dict[str, list[str]]:
    """Of each kind of engine, on rank 0."""
    return pool.run(2, all_orders)[0]


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "offload"])
def test_gradients_are_reduced_while_backward_goes_on(orders: dict, kind: str) -> None:
    happened = orders[kind]
    backward = [i for i, what in enumerate(happened) if what.startswith("backward")]
    reduces = [i for i, what in enumerate(happened) if what == "reduces"]
    assert [happened[i] for i in backward] == [f"backward {i}" for i in (3, 2, 1, 0)]
    assert sum(backward[0] < i < backward[-1] for i in reduces) >= len(reduces) // 2


@pytest.mark.parametrize("kind", ["zero2", "offload"])
def test_two_buckets_of_full_gradients_are_in_flight(orders: dict, kind: str) -> None:
    steps = {"reduces": 1, "waits, reduce-scatter": -1}
    happened = orders[kind]
    assert max(accumulate(steps.get(what, 0) for what in happened)) == 2
    if kind == "offload":
        assert max(what for what in happened if what.endswith("go down")) == "2 go down"


@pytest.mark.parametrize("kind", ["zero1", "zero2", "offload"])
def test_updated_buckets_travel_while_the_next_is_updated(orders: dict, kind: str) -> None:
    happened = orders[kind]
    step = happened[happened.index("steps") + 1 :]
    buckets = step.count("updates")
    assert buckets > 2
    assert step == ["updates", "gathers"] * buckets + ["waits, all-gather"] * buckets


def test_zero3_computes_a_layer_while_the_next_arrives(orders: dict) -> None:
    here = "waits, all-gather"
    happened = [what for what in orders["zero3"] if what != "waits, reduce-scatter"]
    ends_and_first = ["gathers", "gathers", here]
    assert happened == [
        *ends_and_first, "gathers", here, "forward 0", "frees", "gathers", here, "forward 1", "frees", "gathers", here,
        "forward 2", "frees", here, "forward 3", "frees", "frees",
        *ends_and_first, here, "gathers", "backward 3",
        here, "frees", "gathers", "reduces", "backward 2",
        here, "frees", "gathers", "reduces", "backward 1",
        here, "frees", "reduces", "backward 0",
        "frees", "reduces", "frees", "reduces", "steps", *["updates"] * 5,
    ]  # fmt: skip


def full_gradients() -> int:
    """In ZeRO-2's backward, the most elements of full gradients there are at a time."""
    axis = all_ranks()
    case = Case(wide(layers=4), elements=3000)
    model = case.model()
    engine = ENGINES["zero2"](model, axis, case.optimizer, None, torch.float64, case.elements)
    most = [0]

    def sample(*_: object) -> None:
        here = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        most[0] = max(most[0], here)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(sample)
    inputs, targets = Text(None, 8).batch(7, 0, 2)
    engine.backward(token_loss(model(inputs), targets, 16))
    return most[0]


def test_zero2_never_has_all_gradients(pool: Pool) -> None:
    size = sum(p.numel() for p in Case(wide(layers=4)).model().parameters())
    assert pool.run(2, full_gradients)[0] < size / 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("elements", [1, 255, 256, 257, 1000])
def test_quantised_numbers_are_off_by_half_a_step(bits: int, elements: int) -> None:
    x: Tensor = torch.randn(3, elements, dtype=torch.float64, generator=torch.Generator().manual_seed(elements))
    x[0] = 0.0
    back = dequantise(quantise(x, bits), elements, bits, torch.float64)
    pad = partial(torch.nn.functional.pad, pad=(0, -elements % 256))
    step = pad(x).unflatten(1, (-1, 256)).abs().amax(-1) / (2 ** (bits - 1) - 1)
    assert (pad(back - x).unflatten(1, (-1, 256)).abs().amax(-1) <= 0.5001 * step).all()
    assert not back[0].any()
