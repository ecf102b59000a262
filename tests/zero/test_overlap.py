"""What travels while something else is computed, from the order in which it happens."""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm
from core.gpt import token_loss
from core.ledger import Ledger
from core.mesh import Mesh
from core.text import Text
from tests.pool import Pool
from tests.zero.test_stages import STAGES, Case, wide
from zero.zero3 import Unit
from zero.zeropp import quantise, restore


def order(kind: str) -> list[str]:
    """One step on this rank: when buckets leave, when units are asked for and there, when layers compute."""
    axis = Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size())["dp"]
    case = Case(wide(layers=4), elements=3000)
    model = case.model()
    stage = STAGES[kind](model, axis, case.optimizer, None, torch.float64, case.elements)
    happened: list[str] = []
    for i, block in model.blocks.items():
        block.mlp.register_forward_hook(lambda *_, i=i: happened.append(f"forward {i}"))
        block.mlp.down.bias.register_hook(lambda _, i=i: happened.append(f"backward {i}"))

    def note(name: str, call: Callable) -> Callable:
        def noting(*args: object, **more: object) -> object:
            happened.append(name)
            return call(*args, **more)

        return noting

    inputs, targets = Text(None, 8).batch(7, 0, 2)
    with (
        patch.object(comm, "all_reduce_async", note("leaves", comm.all_reduce_async)),
        patch.object(comm, "reduce_scatter_async", note("leaves", comm.reduce_scatter_async)),
        patch.object(Unit, "gather", note("asks", Unit.gather)),
    ):
        stage.zero_grad()
        stage.backward(token_loss(model(inputs), targets, 16))
    return happened


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "offload"])
def test_gradients_leave_while_backward_goes_on(pool: Pool, kind: str) -> None:
    happened = pool.run(2, order, kind)[0]
    backward = [i for i, what in enumerate(happened) if what.startswith("backward")]
    leaves = [i for i, what in enumerate(happened) if what == "leaves"]
    assert [happened[i] for i in backward] == [f"backward {i}" for i in (3, 2, 1, 0)]
    assert sum(backward[0] < i < backward[-1] for i in leaves) >= len(leaves) // 2


def test_zero3_asks_for_the_next_layer_before_it_computes_this_one(pool: Pool) -> None:
    happened = [what for what in pool.run(2, order, "zero3")[0] if what != "leaves"]
    ahead = ["asks", "asks"]  # both ends of the model, and the first layer
    assert happened == [
        *ahead, "asks", "forward 0", "asks", "forward 1", "asks", "forward 2", "forward 3",
        *ahead, "asks", "backward 3", "asks", "backward 2", "asks", "backward 1", "backward 0",
    ]  # fmt: skip


def whole_gradients() -> int:
    """In ZeRO-2's backward, the most elements of whole gradients there are at a time."""
    axis = Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size())["dp"]
    case = Case(wide(layers=4), elements=3000)
    model = case.model()
    stage = STAGES["zero2"](model, axis, case.optimizer, None, torch.float64, case.elements)
    most = [0]

    def sample(*_: object) -> None:
        here = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        most[0] = max(most[0], here)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(sample)
    inputs, targets = Text(None, 8).batch(7, 0, 2)
    stage.backward(token_loss(model(inputs), targets, 16))
    return most[0]


def test_zero2_never_has_all_gradients(pool: Pool) -> None:
    size = sum(p.numel() for p in Case(wide(layers=4)).model().parameters())
    assert pool.run(2, whole_gradients)[0] < size / 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("elements", [1, 255, 256, 257, 1000])
def test_quantised_numbers_are_off_by_half_a_step(bits: int, elements: int) -> None:
    x: Tensor = torch.randn(3, elements, dtype=torch.float64, generator=torch.Generator().manual_seed(elements))
    x[0] = 0.0
    back = restore(quantise(x, bits), elements, bits, torch.float64)
    pad = partial(torch.nn.functional.pad, pad=(0, -elements % 256))
    step = pad(x).unflatten(1, (-1, 256)).abs().amax(-1) / (2 ** (bits - 1) - 1)
    assert (pad(back - x).unflatten(1, (-1, 256)).abs().amax(-1) <= 0.5001 * step).all()
    assert not back[0].any()
