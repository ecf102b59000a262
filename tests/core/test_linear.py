"""A linear layer whose weight's gradient comes later: the same numbers, and no work done twice."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.linear import Deferred, Linear
from core.model.text import Text
from core.proof.memory import SavedActivations

double = partial(torch.randn, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("times", [1, 2])
def test_later_is_the_same(bias: bool, frozen: tuple[str, ...], times: int) -> None:
    torch.manual_seed(0)
    usual = nn.Linear(5, 3, bias, dtype=torch.float64)
    ours = Linear(5, 3, bias, dtype=torch.float64)
    ours.load_state_dict(usual.state_dict())
    for layer in (usual, ours):
        for name, p in layer.named_parameters():
            p.requires_grad_(name not in frozen)
    deferred = Deferred(ours.parameters())
    for _ in range(times):
        x, y_gradient = double(2, 4, 5, requires_grad=True), double(2, 4, 3)
        again = x.detach().clone().requires_grad_()
        usual(x).backward(y_gradient)
        y = ours(again)
        before = [None if p.grad is None else p.grad.clone() for p in ours.parameters()]
        with deferred:
            y.backward(y_gradient)
        now = [p.grad for p in ours.parameters()]
        assert all((a is None) == (b is None) and (a is None or torch.equal(a, b))
                   for a, b in zip(before, now, strict=True)), "nothing yet"  # fmt: skip
        for later in deferred.take():
            later.add()
        assert deferred.take() == []
        assert torch.equal(x.grad, again.grad)
    for a, b in zip(usual.parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-14, atol=1e-14)


def test_hooks_see_the_gradient_when_it_is_added() -> None:
    layer, seen = Linear(3, 2), []
    deferred = Deferred(layer.parameters())
    for name, p in layer.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.extend([name] * (p.grad is not None)))
    for again in (False, True):  # the first becomes .grad, the second is added to it
        y = layer(torch.ones(1, 3))
        with deferred:
            y.sum().backward()
        assert again or seen == []
        seen.clear()
        for later in deferred.take():
            later.add()
        assert sorted(seen) == ["bias", "weight"]


def test_hooks_change_each_gradient_that_is_added() -> None:
    layer = Linear(3, 2, False)
    layer.weight.register_hook(lambda g: None if g is None else 10 * g)  # None in the backward that leaves it for later
    deferred = Deferred(layer.parameters())
    for _ in range(3):
        y = layer(torch.ones(1, 3))
        with deferred:
            y.sum().backward()
        for later in deferred.take():
            later.add()
    assert (layer.weight.grad == 30).all()


def test_a_gradient_of_another_type_is_added_in_that() -> None:
    """In float32 for weights in bfloat16: 256 + 1 is not 256."""
    layer = Linear(1, 1, False, dtype=torch.bfloat16)
    layer.weight.grad_dtype = torch.float32
    deferred = Deferred(layer.parameters())
    for x in (256.0, 1.0):
        y = layer(torch.full((1, 1), x, dtype=torch.bfloat16))
        with deferred:
            y.sum().backward()
        for later in deferred.take():
            later.add()
    assert (layer.weight.grad.dtype, layer.weight.grad.item()) == (torch.float32, 257.0)


def flops(what: object) -> int:
    with FlopCounterMode(display=False) as counter:
        what()
    return counter.get_total_flops()


def test_both_halves_together_do_what_the_whole_does() -> None:
    """Running a backward twice, once for each half, would do more."""
    config = GPTConfig(sequence=8, hidden=16, layers=2, heads=2, attention="softmax")
    model = materialize(GPT(config), 0, torch.device("cpu"), torch.float64)
    inputs, targets = Text(None, 8).batch(0, 0, 2)
    tokens = targets.numel()
    loss = token_loss(model(inputs), targets, tokens)
    whole = flops(loss.backward)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    deferred = Deferred(model.parameters())
    loss = token_loss(model(inputs), targets, tokens)
    with deferred:
        first = flops(loss.backward)
    second = flops(lambda: [later.add() for later in deferred.take()])
    assert first + second == whole
    linear_weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "position" not in n)
    assert second == 2 * tokens * linear_weights  # the tied head's table among them
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-12, atol=1e-14)


def test_what_is_kept_for_later_is_counted_until_it_is_done() -> None:
    layer = Linear(3, 2, dtype=torch.float64)
    saved = SavedActivations(layer.parameters())
    deferred = Deferred(layer.parameters())
    deferred.account = saved
    x = torch.ones(4, 3, dtype=torch.float64)
    with saved:
        y = layer(x)
    assert saved.live == x.nbytes
    with deferred:
        y.backward(torch.ones_like(y))
    assert saved.live == x.nbytes + y.nbytes
    work = deferred.take()
    while work:
        work.pop().add()
    assert saved.live == 0
