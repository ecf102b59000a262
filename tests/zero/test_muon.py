"""Muon over shards of any kind of ZeRO equals torch.optim.Muon in one process; its directions, and who makes them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig
from tests.pool import Pool
from tests.zero import test_checkpoint, test_engine
from tests.zero.test_engine import ENGINES, Case, equal, one_process, wide
from zero.engine.engine import Engine
from zero.engine.muon import Muon, options_of
from zero.evidence.muon import OneProcess
from zero.newton_schulz import EPS, SCALES, MuonSettings, deal, direction, flops, newton_schulz, scale_of

SETTINGS = MuonSettings(momentum=0.9, steps=4, coefficients=(3.0, -3.2, 1.2))
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
MUON = {f"muon {kind}": make for kind, make in ENGINES.items()}
USUAL = MuonSettings()


def engine_of(
    kind: str, model: GPT, axis: Axis, optimizer: object, groups: list | None, master: torch.dtype, elements: int
) -> Engine:
    """As the makers in `ENGINES`, whose optimizer is AdamW."""
    options = options_of(model, SETTINGS, axis, groups=groups)
    return MUON[kind](model, axis, partial(Muon, momentum=SETTINGS.momentum, **ADAMW), master=master, elements=elements,
                      **options)  # fmt: skip


def with_muon(run: Callable, *arguments: object) -> object:
    """`run` with engines that have Muon too, on a rank or in one process."""
    with patch.dict(ENGINES, {kind: partial(engine_of, kind) for kind in MUON}):
        return run(*arguments)


def of(case: Case) -> Case:
    """Whose one process has torch.optim.Muon."""
    named = [(name, p) for name, p in case.model().named_parameters() if p.requires_grad]

    def optimizer(parameters: Iterable[nn.Parameter]) -> OneProcess:
        names = [name for name, _ in named]
        return OneProcess(zip(names, parameters, strict=True), case.config.head_dim, SETTINGS, **ADAMW)

    return replace(case, optimizer=optimizer)


LLAMA = replace(wide(heads=6, hidden=24), kv_heads=2, gated=True, biases=False, learned_positions=False, tied=False,
                norm="rms", rope_theta=500_000.0)  # fmt: skip
CASES = {
    "plain": Case(steps=3),
    "accumulated": Case(microbatches=3),
    "llama": Case(LLAMA),
    "frozen": Case(wide(tied=False), freeze=("blocks.1", "embed", "blocks.2.mlp.up.weight")),
    "a bucket a parameter": Case(elements=1),
    "one bucket": Case(elements=10**9),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_equals_torchs_muon_in_one_process(pool: Pool, name: str, ranks: int) -> None:
    by_rank = pool.run(ranks, with_muon, test_engine.train_all, [*MUON], CASES[name])
    expected = one_process(of(CASES[name]), ranks)
    for kind, results in zip(MUON, zip(*by_rank, strict=True), strict=True):
        equal(list(results), expected, kind)


def test_more_ranks_than_matrices(pool: Pool) -> None:
    """Some ranks own none; and of a small bucket the last have no element."""
    case = Case(GPTConfig(sequence=8, hidden=4, layers=1, heads=2), elements=1)
    by_rank = pool.run(7, with_muon, test_engine.train_all, ["muon zero1", "muon zero3"], case)
    for results in zip(*by_rank, strict=True):
        equal(list(results), one_process(of(case), 7))


ROADS = [(("ddp", 1), ("zero3", 4)), (("zero3", 4), ("zero1", 2)), (("zero1", 3), ("zero2", 2))]


@pytest.mark.parametrize(("first", "second"), ROADS)
def test_goes_on_in_another_layout(pool: Pool, tmp_path: Path, first: tuple[str, int], second: tuple[str, int]) -> None:
    """With the momentum."""
    folder, case = str(tmp_path / "checkpoint"), Case(steps=4)
    go_on = partial(with_muon, test_checkpoint.go_on)
    pool.run(first[1], go_on, f"muon {first[0]}", case, range(2), None, folder)
    results = pool.run(second[1], go_on, f"muon {second[0]}", case, range(2, 4), folder, None)
    losses, norms, *rest = one_process(replace(of(case), samples=test_checkpoint.BATCH), 1)
    equal(results, (losses[2:], norms[2:], *rest))


# ---- Directions

SHAPES = [(8, 8), (24, 8), (8, 24), (1, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_torchs(shape: tuple[int, int]) -> None:
    """torch's own code, once as it is, in bfloat16, and once in float64."""
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for settings in (USUAL, SETTINGS):
        found = newton_schulz(matrix, settings.steps, settings.coefficients)
        rounded = _zeropower_via_newtonschulz(matrix, settings.coefficients, settings.steps, EPS)
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            exact = _zeropower_via_newtonschulz(matrix, settings.coefficients, settings.steps, EPS)
        assert (found - exact).norm() < 1e-12 * exact.norm()
        assert (found - rounded.double()).norm() < 0.05 * exact.norm()


def test_singular_values_come_near_one() -> None:
    matrix = torch.randn(32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(newton_schulz(matrix, USUAL.steps, USUAL.coefficients))
    assert 0.6 < values.min() < values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    exact = newton_schulz(matrix, 40, (1.5, -0.5, 0.0))  # a polynomial that converges
    assert (exact - left @ right).norm() < 1e-10


def test_nothing_goes_nowhere() -> None:
    assert not newton_schulz(torch.zeros(3, 4), USUAL.steps, USUAL.coefficients).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_is_torchs(shape: tuple[int, int], scale: str) -> None:
    assert scale_of(shape, scale) == pytest.approx(_adjust_lr(1.0, scale, torch.Size(shape)))


def test_queries_keys_and_values_are_three_matrices() -> None:
    """Fused, (head, q|k|v, D) a row, or apart: the same directions, each of them orthogonal."""
    heads, d, hidden = 3, 4, 12
    fused = torch.randn(heads, 3, d, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = direction(fused.view(-1, hidden), d, USUAL).view(heads, 3, d, hidden)
    for i in range(3):
        assert torch.equal(found[:, i].reshape(-1, hidden), direction(fused[:, i].reshape(-1, hidden), 0, USUAL))


def test_torchs_muon_as_it_is_goes_nearly_the_same_way() -> None:
    """One process with torch's bfloat16: what the oracle leaves out is only a rounding."""
    config = replace(LLAMA, layers=1)
    models = [Case(config).model() for _ in range(2)]
    for model in models:
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
    exact, rounded = (dict(model.named_parameters()) for model in models)
    before = {name: p.detach().clone() for name, p in exact.items()}
    OneProcess(exact.items(), config.head_dim, USUAL, lr=0.1, weight_decay=0.0).step()
    matrices = [p for name, p in rounded.items() if name.startswith("blocks") and p.dim() == 2]
    torch.optim.Muon(matrices, lr=0.1, weight_decay=0.0, adjust_lr_fn=USUAL.scale).step()
    assert len(matrices) == 7
    for name, p in rounded.items():
        if any(p is each for each in matrices):
            step = (exact[name] - before[name]).norm()
            assert step > 0
            assert (p - exact[name]).norm() < 0.05 * step, name


# ---- Who makes them


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_the_work_is_dealt_evenly(costs: list[int], n: int) -> None:
    """Graham's bound: no rank has more than the mean and one more matrix."""
    owners = deal(costs, n)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(n)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / n + max(costs, default=0)


def test_flops_are_those_of_the_products() -> None:
    for shape, d in (((6, 4), 0), ((4, 6), 0), ((18, 5), 3)):
        with FlopCounterMode(display=False) as counter:
            direction(torch.randn(shape), d, USUAL)
        assert counter.get_total_flops() == flops(shape, d, USUAL.steps)


def test_a_model_is_freed(pool: Pool) -> None:
    assert pool.run(1, with_muon, test_engine.kept_alive) == [[]]
