"""The engines of data parallelism and ZeRO on real ranks: equal to one process, and to each other, in every corner."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import worst_difference
from core.shards import LocalTensor
from tests.pool import Pool
from zero.engine.engine import Engine, data_parallel, zero1, zero2, zero3
from zero.engine.offload import zero_offload

ENGINES: dict[str, Callable[..., Engine]] = {
    "ddp": data_parallel, "zero1": zero1, "zero2": zero2, "zero3": zero3, "offload": zero_offload
}  # fmt: skip
CPU, SEED, CLIP = torch.device("cpu"), 7, 0.5


@dataclass(frozen=True)
class Case:
    """What to train, and how. `decay`: a second parameter group of biases and LayerNorms, without weight decay."""

    config: GPTConfig = GPTConfig(sequence=8, hidden=12, layers=2, heads=2)  # noqa: RUF009
    optimizer: Callable = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)  # noqa: RUF009
    freeze: tuple[str, ...] = ("none",)
    two_groups: bool = False
    microbatches: int = 1
    samples: int = 0  # 0: two a microbatch and rank
    elements: int = 1000
    steps: int = 2
    dtype: torch.dtype = torch.float64

    def model(self) -> GPT:
        model = materialize(GPT(self.config), SEED, CPU, self.dtype)
        model.masks = use_masks(model, SampleMasks(SEED))
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(self.freeze))
        return model

    def groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        if not self.two_groups:
            return None
        trained = [p for p in model.parameters() if p.requires_grad]
        small = [p for p in trained if p.dim() < 2]
        return [{"params": [p for p in trained if p.dim() == 2]}, {"params": small, "weight_decay": 0.0, "lr": 2e-3}]


Result = tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor]]


def all_ranks() -> Axis:
    return Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size())["dp"]


def train(kind: str, case: Case, axis: Axis) -> Result:
    """On one rank: losses, norms, the last gradients, the weights and the optimizer's state after."""
    model = case.model()
    engine = ENGINES[kind](model, axis, case.optimizer, case.groups(model), case.dtype, case.elements)
    losses, norms, gradients = [], [], []
    each = case.samples or 2
    batch = each * axis.size * case.microbatches
    for step in range(case.steps):
        engine.zero_grad()
        share = torch.zeros((), dtype=case.dtype)
        inputs, targets = Text(None, case.config.sequence).batch(SEED, step, batch)
        for m in range(case.microbatches):
            first = (axis.index * case.microbatches + m) * each
            mine = slice(first, first + each)
            model.masks.seek(step, first)
            loss = token_loss(model(inputs[mine]), targets[mine], targets.numel())
            engine.backward(loss, last=m == case.microbatches - 1)
            share += loss.detach()
        gradients = engine.gradients()
        norm, total = engine.clip_and_total(CLIP, share)
        losses.append(total)
        norms.append(norm)
        engine.step()
    return losses, norms, gradients, engine.weights(), engine.states()


def train_all(kinds: list[str], case: Case) -> list[Result]:
    axis = all_ranks()
    return [train(kind, case, axis) for kind in kinds]


def after_a_failure(kind: str) -> None:
    """A backward raises on all ranks, in the middle; the step after it is that of a run without."""
    axis, case = all_ranks(), Case(elements=200)
    model = case.model()
    engine = ENGINES[kind](model, axis, case.optimizer, None, case.dtype, case.elements)
    found = []
    for fails in (False, True, False):
        inputs, targets = Text(None, case.config.sequence).batch(SEED, axis.index + 7 * fails, 2)
        model.masks.seek(0)
        hook = model.blocks["0"].register_forward_hook(  # buckets are in flight
            lambda *x, fails=fails: x[-1].register_hook(lambda g: 1 / 0 if fails else g) and None
        )
        engine.zero_grad()
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            engine.backward(token_loss(model(inputs), targets, targets.numel()))
        hook.remove()
        if not fails:
            found.append([each.value for each in engine.gradients()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_after_one_that_failed_is_as_any(pool: Pool, kind: str) -> None:
    pool.run(2, after_a_failure, kind)


def kept_alive() -> list[str]:
    """The engines that are still there once nobody has them."""
    axis, case = all_ranks(), Case()
    models = []
    for make in ENGINES.values():
        model = case.model()
        engine = make(model, axis, case.optimizer, None, case.dtype, case.elements)
        inputs, targets = Text(None, case.config.sequence).batch(SEED, 0, 2)
        engine.backward(token_loss(model(inputs), targets, targets.numel()), last=True)
        engine.clip_and_total(CLIP, torch.zeros(()))
        engine.step()
        models.append(weakref.ref(model))
        del model, engine
    gc.collect()
    return [kind for kind, model in zip(ENGINES, models, strict=True) if model() is not None]


def one_process(case: Case, ranks: int) -> tuple[list[float], list[float], dict, dict, dict]:
    model = case.model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = case.optimizer(case.groups(model) or trained)
    losses, norms, gradients = [], [], {}
    for step in range(case.steps):
        optimizer.zero_grad()
        batch = (case.samples or 2) * ranks * case.microbatches
        inputs, targets = Text(None, case.config.sequence).batch(SEED, step, batch)
        model.masks.seek(step)
        loss = token_loss(model(inputs), targets, targets.numel())
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(nn.utils.clip_grad_norm_(trained, CLIP).item())
        losses.append(loss.item())
        optimizer.step()
    states = {(n, k): v for n, p in model.named_parameters() for k, v in optimizer.state[p].items() if v is not None}
    return losses, norms, gradients, {n: p.detach() for n, p in model.named_parameters()}, states


def all_equal(pool: Pool, ranks: int, kinds: list[str], case: Case) -> None:
    """Each kind of engine equals one process."""
    by_rank, expected = pool.run(ranks, train_all, kinds, case), one_process(case, ranks)
    for kind, results in zip(kinds, zip(*by_rank, strict=True), strict=True):
        equal(list(results), expected, kind)


def equal(results: list[Result], expected: tuple, kind: str = "") -> None:
    losses, norms, *tensors = expected
    for rank in results:
        assert rank[0] == pytest.approx(losses, rel=1e-10), kind
        assert rank[1] == pytest.approx(norms, rel=1e-10), kind
    for i, reference in enumerate(tensors, 2):
        found = full_tensors(tensor for rank in results for tensor in rank[i])
        assert worst_difference(found, reference) < 1e-10, kind


def wide(**options: Any) -> GPTConfig:
    return GPTConfig(**{"sequence": 8, "hidden": 12, "layers": 3, "heads": 2} | options)


CASES = {
    "plain": Case(),
    "accumulated": Case(microbatches=3),
    "untied": Case(wide(tied=False)),
    "dropout": Case(wide(dropout=0.3, attention="softmax"), microbatches=2),
    "sgd with momentum": Case(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
    "plain sgd": Case(optimizer=partial(torch.optim.SGD, lr=0.1)),
    "adam with amsgrad": Case(optimizer=partial(torch.optim.Adam, lr=1e-3, amsgrad=True)),
    "nadam": Case(optimizer=partial(torch.optim.NAdam, lr=1e-3)),
    "rmsprop": Case(optimizer=partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5)),
    "adagrad": Case(optimizer=partial(torch.optim.Adagrad, lr=1e-2)),
    "two groups": Case(two_groups=True, microbatches=2),
    "frozen ends": Case(wide(tied=False), freeze=("embed", "head"), microbatches=2),
    "frozen first block and embedding": Case(wide(tied=False), freeze=("embed", "blocks.0")),
    "frozen middle": Case(wide(), freeze=("blocks.1",)),
    "frozen last block and end": Case(wide(tied=False), freeze=("blocks.2", "norm", "head")),
    "frozen weights, trained biases": Case(wide(), freeze=("blocks.1.attention.qkv.weight", "blocks.1.mlp.up.weight")),
    "one bucket": Case(elements=10**9),
    "a bucket a parameter": Case(elements=1),
}


OFFLOADED = ("plain", "accumulated", "two groups", "frozen ends")  # which is ZeRO-2 but for where things are


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(pool: Pool, name: str) -> None:
    kinds = [kind for kind in ENGINES if kind != "offload" or name in OFFLOADED]
    all_equal(pool, 2, kinds, CASES[name])


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_any_number_of_ranks(pool: Pool, ranks: int) -> None:
    all_equal(pool, ranks, list(ENGINES), Case(microbatches=2))


def test_the_engines_are_equal_to_the_last_bit(pool: Pool) -> None:
    """From ZeRO-1 on each rank sums its shard in the order of the ranks, so the gradients of a step are the same."""
    by_rank = pool.run(4, train_all, ["zero1", "zero2", "zero3"], Case(steps=1))
    full = [dict(full_tensors(t for result in results for t in result[2])) for results in zip(*by_rank, strict=True)]
    for name, value in full[0].items():
        assert all(torch.equal(value, other[name]) for other in full[1:]), name


# ---- Models that are no GPT


class Odd(nn.Module):
    """Blocks that use their parameters, or not, as `uses` says; an empty parameter; fewer elements than ranks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.start = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))
        self.nothing = nn.Parameter(torch.empty(0, 5, dtype=torch.float64))
        self.never = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.blocks = nn.ModuleDict({str(i): Scale(i) for i in range(3)})

    def forward(self, x: Tensor, uses: tuple[int, ...]) -> Tensor:
        x = x + self.start
        for i, block in enumerate(self.blocks.values()):
            if i in uses:
                x = block(x)
        return x


class Scale(nn.Module):
    def __init__(self, i: int):
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 0.5 + i, dtype=torch.float64))
        self.shift = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor + self.shift).tanh()


def data(rank: int, step: int) -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


USES = {0: (0, 1, 2), 1: (1,), 2: (), 3: (0, 2)}  # by rank
NOTHING = dict.fromkeys(range(4), ()) | {1: None, 3: (2,)}  # rank 1 has no loss at all


def train_odd(kind: str, uses: dict[int, tuple[int, ...]], axis: Axis) -> tuple[list[LocalTensor], list[LocalTensor]]:
    model = Odd()
    engine = ENGINES[kind](model, axis, partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5), None, torch.float64, 4)
    for step in range(3):
        engine.zero_grad()
        for m in range(2):
            mine = uses[axis.index % 4]
            y = model(data(axis.index, 2 * step + m), mine or ())
            loss = torch.zeros((), dtype=torch.float64) if mine is None else y.square().sum() / 100
            engine.backward(loss, last=m == 1)
        engine.clip_and_total(CLIP, loss.detach())
        engine.step()
    return engine.weights(), engine.states()


def train_all_odd(uses: dict[int, tuple[int, ...]]) -> list[tuple[list[LocalTensor], list[LocalTensor]]]:
    axis = all_ranks()
    return [train_odd(kind, uses, axis) for kind in ENGINES]


@pytest.mark.parametrize(  # 15 elements in the full model: most parameters have fewer than there are ranks
    ("ranks", "uses"),
    [(8, USES), (4, USES), (4, NOTHING), (4, dict.fromkeys(range(4), (0,))), (4, dict.fromkeys(range(4), ()))],
    ids=str,
)
def test_unused_parameters_and_tiny_ones(pool: Pool, uses: dict, ranks: int) -> None:
    """Ranks differ in what they use: no hang, and what nobody uses is not even decayed."""
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        for m in range(2):
            for rank in range(ranks):
                if uses[rank % 4] is not None:
                    (model(data(rank, 2 * step + m), uses[rank % 4]).square().sum() / 100).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    by_rank = pool.run(ranks, train_all_odd, uses)
    states = {(n, k): v for n, p in model.named_parameters() for k, v in optimizer.state[p].items() if p.numel()}
    for kind, results in zip(ENGINES, zip(*by_rank, strict=True), strict=True):
        weights = {n: p.detach() for n, p in model.named_parameters() if p.numel() or kind != "zero3"}
        assert worst_difference(full_tensors(t for r in results for t in r[0]), weights) < 1e-10, kind
        assert worst_difference(full_tensors(t for r in results for t in r[1]), states) < 1e-10, kind


class Tiny(nn.Module):
    """Two elements in all: most ranks have nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"0": nn.Linear(1, 1, dtype=torch.float64)})
        for p in self.parameters():
            p.data.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["0"](x)


def train_tiny(kind: str, axis: Axis) -> tuple[list[LocalTensor], list[LocalTensor]]:
    model = Tiny()
    engine = ENGINES[kind](model, axis, partial(torch.optim.AdamW, lr=1e-2), None, torch.float64)
    for step in range(3):
        engine.zero_grad()
        loss = model(data(axis.index, step)[:, :1]).square().sum() / 100
        engine.backward(loss)
        engine.clip_and_total(CLIP, loss.detach())
        engine.step()
    return engine.weights(), engine.states()


def train_all_tiny() -> list[tuple[list[LocalTensor], list[LocalTensor]]]:
    axis = all_ranks()
    return [train_tiny(kind, axis) for kind in ENGINES]


def test_more_ranks_than_elements(pool: Pool) -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(8):
            (model(data(rank, step)[:, :1]).square().sum() / 100).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    states = {(n, k): v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    for kind, results in zip(ENGINES, zip(*pool.run(8, train_all_tiny), strict=True), strict=True):
        assert worst_difference(full_tensors(t for r in results for t in r[0]), weights) < 1e-10, kind
        assert worst_difference(full_tensors(t for r in results for t in r[1]), states) < 1e-10, kind


def shared_by_two_blocks() -> None:
    axis = Axis("dp", (0,), 0, None, Ledger(), None)
    model = Odd()
    model.blocks["1"].factor = model.blocks["0"].factor
    with pytest.raises(ValueError, match="two blocks share a parameter"):
        zero3(model, axis, torch.optim.SGD)


def test_a_parameter_shared_by_two_blocks_is_refused() -> None:
    shared_by_two_blocks()


def test_an_engine_that_nobody_has_is_freed(pool: Pool) -> None:
    """Its hooks in autograd must not hold it, and with it the model and its process groups."""
    assert pool.run(2, kept_alive) == [[], []]
