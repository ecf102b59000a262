"""A step or an evaluation raises on the ranks of a stage, and is caught: the next step is as if it had not been."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from cluster.planner.layout import Layout
from cluster.run import worker as run
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPTConfig
from core.model.precision import POLICIES
from expert_parallel.engine.routing import MoEConfig, Routing
from tests.pool import Pool
from zero.engine.engine import zero1
from zero.engine.gradients import Gradients

CPU = torch.device("cpu")
CONFIG = GPTConfig(sequence=8, hidden=16, layers=2, heads=4, vocabulary=37, tied=False)
MOE = MoEConfig(Routing(4, 2, aux=0.5, z=0.001, bias_rate=0.01))
SMALL = partial(torch.optim.AdamW, lr=1e-2)


def worker(layout: Layout, config: GPTConfig = CONFIG, moe: MoEConfig | None = None) -> Worker:
    mesh = make_mesh(layout, "cpu", Ledger(), 20.0)
    return Worker(TrainSpec(config, moe, layout, 7, POLICIES["float64"], CPU, SMALL, bucket=3000), mesh)


def batch(of: Worker, seed: int, wrong: bool = False) -> list[Tensor]:
    """Samples; `wrong`: with a token that there is not, in the second micro-batch."""
    tokens = torch.randint(37, (of.layout.batch, 9), generator=torch.Generator().manual_seed(seed))
    if wrong:
        tokens[-1, 0] = 1000
    return [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]


def step(of: Worker, number: int) -> list[float]:
    """The loss, the norm and the gradients, and the weights after."""
    of.zero_grad()
    share = of.forward_backward(number, *batch(of, number))
    gradients = [each.value.clone() for each in of.gradients()]
    norm, loss = of.clip(0.5, share)
    of.step()
    return [norm, loss, *torch.cat([t.flatten() for t in gradients + [w.value for w in of.weights()]]).tolist()]


@contextmanager
def last_backward_raises(of: Worker) -> AbstractContextManager:
    """On the ranks of the first stage, when the last stage has done all of its step."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == of.layout.microbatches:
            raise ZeroDivisionError

    hook = of.model.blocks["0"].attention.out.register_full_backward_hook(count) if of.pp.index == 0 else None
    yield
    if hook:
        hook.remove()
        assert calls == of.layout.microbatches


def in_a_pipeline(of: Worker) -> None:
    with last_backward_raises(of), suppress(ZeroDivisionError):
        of.zero_grad()
        of.forward_backward(5, *batch(of, 5))


def in_a_forward(of: Worker) -> None:
    of.zero_grad()
    with pytest.raises(IndexError):
        of.forward_backward(5, *batch(of, 5, wrong=True))


def in_an_evaluation(of: Worker) -> None:
    with pytest.raises(IndexError):
        of.evaluate(*batch(of, 5, wrong=True))


PIPELINE = Layout(pp=2, microbatches=2, microbatch=1)
ALONE = Layout(microbatches=2, microbatch=2)
DROPOUT = replace(CONFIG, dropout=0.3, attention="softmax")
CASES: dict[str, tuple[Layout, GPTConfig, MoEConfig | None, Callable[[Worker], None]]] = {
    "1f1b zero 0": (replace(PIPELINE, dp=2, zero=0), CONFIG, None, in_a_pipeline),
    "1f1b zero 1": (replace(PIPELINE, dp=2, zero=1), CONFIG, None, in_a_pipeline),
    "1f1b zero 2": (replace(PIPELINE, dp=2, zero=2), CONFIG, None, in_a_pipeline),
    "zb-h1": (replace(PIPELINE, schedule="zb-h1"), CONFIG, None, in_a_pipeline),
    "zb-h1 zero 1": (replace(PIPELINE, dp=2, zero=1, schedule="zb-h1"), CONFIG, None, in_a_pipeline),
    "experts, forward": (ALONE, CONFIG, MOE, in_a_forward),
    "experts, evaluation": (ALONE, CONFIG, MOE, in_an_evaluation),
    "dropout, evaluation": (ALONE, DROPOUT, None, in_an_evaluation),
}


def apart(layout: Layout, config: GPTConfig, moe: MoEConfig | None, fails: Callable[[Worker], None]) -> float:
    found = []
    for failed in (False, True):
        of = worker(layout, config, moe)
        step(of, 0)
        if failed:
            fails(of)
        found.append(torch.tensor(step(of, 1)))
        of.close()
    return (found[0] - found[1]).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_the_next_step_is_as_if_it_had_not_been(pool: Pool, name: str) -> None:
    assert max(pool.run(CASES[name][0].ranks, apart, *CASES[name])) < 1e-12


def evaluated_between() -> float:
    """An evaluation between a step's gradients and its update takes nothing from what the routers have counted."""
    found = []
    for evaluates in (False, True):
        of = worker(ALONE, moe=MOE)
        of.zero_grad()
        share = of.forward_backward(0, *batch(of, 0))
        if evaluates:
            of.evaluate(*batch(of, 3))
        of.clip(0.5, share)
        of.step()
        found.append(torch.cat([each.value.flatten() for each in of.weights()]))
        of.close()
    return (found[0] - found[1]).abs().max().item()


def test_an_evaluation_within_a_step(pool: Pool) -> None:
    assert pool.run(1, evaluated_between) == [0.0]


def with_bug(make: Callable[[], AbstractContextManager], *case: object) -> float:
    with make():
        return apart(*case)


def finishing_stays() -> AbstractContextManager:
    right = Gradients.zero

    def wrong(self: Gradients) -> None:
        kept = self.finishing
        right(self)
        self.finishing = kept

    return patch.object(Gradients, "zero", wrong)


def counts_stay() -> AbstractContextManager:
    return patch.object(run, "forget", lambda _: None)


def evaluation_stays() -> AbstractContextManager:
    right = nn.Module.train
    return patch.object(nn.Module, "train", lambda self, mode=True: self if mode else right(self, False))


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("1f1b zero 1", finishing_stays),
        ("experts, forward", counts_stay),
        ("dropout, evaluation", evaluation_stays),
    ],
)
def test_what_stays_is_seen(pool: Pool, name: str, bug: Callable) -> None:
    with pytest.raises(AssertionError):
        assert max(pool.run(CASES[name][0].ranks, with_bug, bug, *CASES[name])) < 1e-12


# ---- ZeRO alone


class Two(nn.Module):
    """Of which the second layer is not used in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))

    def forward(self, both: bool) -> Tensor:
        y = self.a(torch.ones(2, 4, dtype=torch.float64))
        return (self.b(y) if both else y).square().sum()


def updates(make: Callable, uses: list[bool], fails: int = -1) -> float:
    """How far ours is from one process after these steps, of which one fails with us, and is not made by that."""
    model, alone = Two(), Two()
    axis = Mesh("cpu", Ledger(), 20.0, dp=2)["dp"]
    engine, optimizer = zero1(model, axis, make, None, torch.float64), make(alone.parameters())
    for i, both in enumerate(uses):
        engine.zero_grad()
        loss = model(both) / 2
        if i == fails:
            hook = model.a.register_full_backward_hook(lambda *_: 1 / 0)
            with suppress(ZeroDivisionError):
                engine.backward(loss)
            hook.remove()
            continue
        engine.backward(loss)
        engine.clip_and_total(1e9, loss.detach())
        engine.step()
        optimizer.zero_grad()
        alone(both).backward()
        optimizer.step()
    return max((a - b).abs().max().item() for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "uses", "fails"),
    [
        (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1), [True, False], 0),  # what only that used stays
        (partial(torch.optim.SGD, lr=0.01, momentum=0.9), [False, True, False, True], -1),  # first used later
        (partial(torch.optim.SGD, lr=0.01), [False, True], -1),
    ],
)
def test_what_is_not_used_in_every_step(pool: Pool, make: Callable, uses: list[bool], fails: int) -> None:
    assert max(pool.run(2, updates, make, uses, fails)) < 1e-12
