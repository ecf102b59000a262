"""The loss in chunks of tokens: equal to that of whole logits, in every way a head is used, and never with them all."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.model import loss
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.linear import Deferred
from core.model.loss import InHead, chunk_of, loss_of
from core.model.precision import POLICIES
from core.model.text import Text

CPU = torch.device("cpu")
SIZES = {"sequence": 10, "hidden": 16, "layers": 1, "heads": 2, "vocabulary": 259}
TOKENS = 30


def model(precision: str = "float64", **more: Any) -> GPT:
    return materialize(GPT(GPTConfig(**SIZES | more)), 0, CPU, POLICIES[precision])


def in_chunks_of(chunk: int) -> InHead:
    return InHead(lambda head, x, targets: loss.token_loss(head, x, targets, TOKENS, chunk))


def trained(gpt: GPT, chunk: int, scale: float = 1.0, split: bool = False) -> tuple[float, list[Tensor]]:
    """The loss, and all gradients. 0: from whole logits."""
    gpt.zero_grad()
    inputs, targets = Text(None, 10).batch(0, 0, 3)
    deferred = Deferred(gpt.parameters()) if split else None
    found = loss_of(gpt, inputs, targets, in_chunks_of(chunk) if chunk else lambda x, y: token_loss(x, y, TOKENS))
    if deferred:
        with deferred:
            (found * scale).backward()
        for later in deferred.take():
            later.add()
    else:
        (found * scale).backward()
    return found.item(), [p.grad for p in gpt.parameters() if p.grad is not None]


def close(found: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]], near: float) -> bool:
    if len(found[1]) != len(expected[1]) or abs(found[0] - expected[0]) > near * expected[0]:
        return False
    return all((a - b).norm() <= near * b.norm() for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 15, 29])
@pytest.mark.parametrize("more", [{}, {"tied": False}, {"tied": False, "head_bias": True}], ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_equals_whole_logits(chunk: int, more: dict, split: bool) -> None:
    """Also where the gradient that comes in is not 1, and where the weight's is left for later."""
    gpt = model(**more)
    assert close(trained(gpt, chunk, 0.3, split), trained(gpt, 0, 0.3), 1e-12)


def test_a_head_that_is_not_trained() -> None:
    gpt = model(tied=False)
    gpt.head.weight.requires_grad = False
    assert close(trained(gpt, 7, split=True), trained(gpt, 0), 1e-12)


@pytest.mark.parametrize("policy", ["bfloat16", "bfloat16-grads"])
def test_in_bfloat16_it_is_as_near_to_float64_as_whole_logits(policy: str) -> None:
    """The chunks' gradients are added up in float32: thirty of them lose no more than one product."""
    gpt = model(policy, tied=False)
    exact = model(tied=False)
    for p, q in zip(exact.parameters(), gpt.parameters(), strict=True):
        p.data.copy_(q.data)
    (_, expected), (a, whole), (b, chunked) = trained(exact, 0), trained(gpt, 0), trained(gpt, 1)
    assert a == pytest.approx(b, rel=1e-6)
    for one, two, right in zip(whole, chunked, expected, strict=True):
        assert one.dtype == two.dtype
        assert (two - right).norm() < 1.2 * (one - right).norm() + 1e-3 * right.norm()


class Largest(TorchDispatchMode):
    """The most rows of a tensor with as many columns as the vocabulary, but for a transposed weight's."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, call: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        found = call(*args, **kwargs or {})
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor) and each.dim() > 1 and each.shape[-1] == SIZES["vocabulary"]:
                rows = each.numel() // each.shape[-1]
                self.rows = max(self.rows, rows if rows != SIZES["hidden"] else 0)
        return found


def test_no_more_than_a_chunk_of_logits_is_ever_made() -> None:
    for chunk, rows in ((0, TOKENS), (7, 7)):
        with Largest() as largest:
            trained(model(), chunk)
        assert largest.rows == rows


def test_a_forward_without_gradients() -> None:
    gpt = model()
    inputs, targets = Text(None, 10).batch(0, 0, 3)
    with torch.no_grad():
        found = loss_of(gpt, inputs, targets, in_chunks_of(7))
    assert not found.requires_grad
    assert found.item() == pytest.approx(trained(gpt, 0)[0], rel=1e-12)


def test_chunks_only_of_many_logits() -> None:
    assert chunk_of(4096, 256) == chunk_of(512, 128_256) == 0  # what has been trained so far stays as it is
    chunk = chunk_of(8192, 128_256)
    assert chunk * 128_256 <= loss.LOGITS < 1.1 * chunk * 128_256
    assert chunk_of(8192, 128_256, 100) == 100
    assert chunk_of(100, 256, 100) == 0


def last_chunk_lost(right: Callable) -> Callable:
    def wrong(self: Any, x: Tensor, *rows: Tensor) -> Tensor:
        found = right(self, x, *rows)
        found[:, len(x) // self.chunk * self.chunk :] = 0.0
        return found

    return wrong


def of_other_chunk(right: Callable) -> Callable:
    """One chunk's statistics with the next one's tokens."""
    return lambda self, g, lse, *rest: right(self, g, lse.roll(self.chunk), *rest)


def overwritten(right: Callable) -> Callable:
    return lambda self, a, b: right(self, a, b, beta=0)


MUTATIONS = {
    "the last chunk is lost": (loss._Head, "statistics", last_chunk_lost),
    "a chunk has another one's lse": (loss._Head, "gradients_of_logits", of_other_chunk),
    "a chunk's gradient of the weight is not added": (Tensor, "addmm_", overwritten),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_loss_is_caught(name: str) -> None:
    owner, what, change = MUTATIONS[name]
    gpt = model()
    expected = trained(gpt, 0)
    with patch.object(owner, what, change(getattr(owner, what))):
        assert not close(trained(gpt, 7), expected, 1e-6)
