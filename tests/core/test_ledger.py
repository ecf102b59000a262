"""The ledger's memory and clock."""

import pytest
import torch
from torch import nn

from core.proof.clock import VirtualClock
from core.proof.memory import SavedActivations, live_bytes


def test_live_bytes_count_each_storage_once() -> None:
    x = torch.zeros(10, 10)
    assert live_bytes([x, x[0], x.T, x.view(-1)]) == 400
    assert live_bytes([x[0]]) == 400, "a view holds its whole storage"
    assert live_bytes([x, torch.zeros(3, dtype=torch.float64)]) == 424
    assert live_bytes([]) == 0


def test_saved_activations_are_what_backward_needs() -> None:
    linear, x = nn.Linear(8, 16), torch.randn(4, 8)
    saved = SavedActivations(linear.parameters())
    with saved:
        y = torch.sigmoid(linear(x)).exp()  # saves: x, sigmoid's output, exp's output
    expected = 4 * (4 * 8 + 4 * 16 + 4 * 16)
    assert (saved.live, saved.peak) == (expected, expected)
    with saved:
        z = x.requires_grad_() * 2.0  # a product with a number saves nothing
        assert saved.live == expected
    y.sum().backward()
    del y, z
    assert saved.live == 0
    assert saved.peak == expected


def test_a_tensor_saved_twice_counts_once_until_the_last_holder_goes() -> None:
    saved, x = SavedActivations([]), torch.randn(5, 5, requires_grad=True)
    with saved:
        a, b = x.exp(), None
        b = a * a  # saves a, which exp saved already
    assert saved.live == 100
    b.sum().backward()
    del a, b
    assert saved.live == 0


def test_what_is_held_anyway_does_not_count() -> None:
    batch, weight = torch.randint(5, (4, 3)), torch.randn(5, 2, requires_grad=True)
    saved = SavedActivations([weight, batch])
    with saved:
        nn.functional.embedding(batch[1:], weight)
    assert saved.peak == 0


def test_clocks_follow_messages() -> None:
    cpu = torch.device("cpu")
    a, b = VirtualClock(cpu), VirtualClock(cpu)
    with a.action("0F0", 1.0):
        sum(range(20000))
    with a.action("0F1", 1.0):
        pass
    with b.action("1F9", 0.5):
        pass
    b.receive(a.stamp())
    with b.action("1F0", 2.0):
        pass
    assert [(e.label, e.start[0], e.end[0]) for e in b.events] == [("1F9", 0.0, 0.5), ("1F0", 2.0, 4.0)]
    a.receive(torch.zeros(2, dtype=torch.float64))
    assert a.now[0] == 2.0, "an old message does not turn a clock back"
    assert 0 < a.events[0].end[1] < 1, "seconds of this thread"
    assert b.events[1].start[1] >= a.events[1].end[1]


def test_a_stamp_is_a_copy() -> None:
    clock = VirtualClock(torch.device("cpu"))
    stamp = clock.stamp()
    with clock.action("0F0", 1.0):
        pass
    assert stamp[0] == 0.0
    assert clock.now[0] == pytest.approx(1.0)
