"""What is computed again: as much as the planner counts, once, in every k-th layer, and by which rule it is refused."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cluster import rules
from cluster.planner.counting import flops_again
from cluster.planner.layout import Layout
from cluster.planner.stages import recomputed_of, sum_of_layers
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.config import ModelConfig
from core.model.gpt import GPT, GPTConfig, token_loss, use_masks
from core.model.gpt import materialize as with_numbers
from core.model.precision import POLICIES
from core.model.seeded import SampleMasks
from core.model.text import Text
from expert_parallel.engine.routing import MoEConfig, Routing
from pipeline.engine.actions import Action
from pipeline.engine.runtime import Pipeline
from sequence_parallel.engine import recompute
from sequence_parallel.engine.recompute import KINDS
from tests.pool import Pool

CPU = torch.device("cpu")
CONFIG = GPTConfig(sequence=8, hidden=16, layers=4, heads=4, vocabulary=257, attention="softmax", dropout=0.1)
LLAMA = replace(
    CONFIG, kv_heads=2, gated=True, biases=False, learned_positions=False, tied=False, norm="rms", feed_forward=40
)
MOE = MoEConfig(Routing(4, 2, aux=0.01), shared=8)
WITH_EXPERTS = replace(CONFIG, experts=4, top_k=2, shared_feed_forward=8)
CASES: dict[str, tuple[ModelConfig, Layout]] = {
    "sp": (LLAMA, Layout(tp=2, sp=True)),
    "tp zero-3": (CONFIG, Layout(dp=2, zero=3, microbatches=2)),
    "zb-h1": (CONFIG, Layout(pp=2, schedule="zb-h1", microbatches=3)),
    "zb-v": (LLAMA, Layout(pp=2, v=2, schedule="zb-v", microbatches=4)),
    "experts": (WITH_EXPERTS, Layout(dp=2, ep=2)),
}


def step_flops(config: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Index in the pipeline, and FLOP of a step's matrix products on this rank, as torch counts them."""
    mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
    moe = MOE if config.experts else None
    plain = replace(config, experts=0, top_k=0, shared_feed_forward=0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    worker = Worker(TrainSpec(plain, moe, layout, 0, POLICIES["float64"], CPU, optimizer), mesh)
    with FlopCounterMode(display=False) as counter:
        worker.forward_backward(0, *Text(None, config.sequence).batch(0, 0, layout.batch))
    worker.close()
    return mesh["pp"].index, counter.get_total_flops()


def ways(layout: Layout, experts: int) -> list[Layout]:
    """With every kind of recomputation; of experts without the full one, whose router's products no formula has."""
    kinds = [kind for kind in KINDS if not (experts and kind == "full")]
    return [replace(layout, recompute=kind) for kind in kinds] + [
        replace(layout, recompute="operators" if experts else "full", recompute_every=3)
    ]


def all_flops(names: list[str]) -> dict[str, list[tuple[int, int]]]:
    cases = {name: CASES[name] for name in names}
    return {name: [step_flops(config, x) for x in ways(layout, config.experts)] for name, (config, layout) in
            cases.items()}  # fmt: skip


def wrong(found: list[dict[str, list[tuple[int, int]]]]) -> set[tuple[str, str, int]]:
    """Where more or less is computed again than the formula says: case, recomputation, how much more."""
    differing = set()
    for rank in found:
        for name, counts in rank.items():
            config, layout = CASES[name]
            (index, usual), *others = counts
            for x, (_, flops) in zip(ways(layout, config.experts)[1:], others, strict=True):
                stages = x.stages_of(index)
                again = sum(sum_of_layers(config, x, stage, partial(flops_again, config)) for stage in stages)
                if flops - usual != x.microbatches * again:
                    differing.add((name, f"{x.recompute} {x.recompute_every}", flops - usual - x.microbatches * again))
    return differing


def test_what_is_computed_again_is_what_the_planner_counts(pool: Pool) -> None:
    """Also with the backward split: dgrad has computed it, and wgrad reads it."""
    assert not wrong(pool.run(2, all_flops, list(CASES)))


def flops_with_a_second_forward_for_wgrad() -> dict[str, list[tuple[int, int]]]:
    """Bug: dgrad and wgrad go through the graph one after the other, and each computes again what it needs."""
    right = Pipeline._gradient_of_input

    def twice(self: Pipeline, action: Action, deferring: object) -> Tensor | None:
        kept = self._kept[action.stage, action.microbatch]
        if action.kind == "I" and action.stage == self.last:
            with deferring:
                torch.autograd.backward(kept.exit, retain_graph=True)
            deferring.take()
        return right(self, action, deferring)

    any_masks = patch.object(SampleMasks, "contexts", lambda self: (nullcontext(), nullcontext()))  # else it stops
    with patch.object(Pipeline, "_gradient_of_input", twice), any_masks:
        return all_flops(["zb-h1"])


def flops_of_the_first_of_every_three() -> dict[str, list[tuple[int, int]]]:
    """Bug: off by one."""
    with patch.object(recompute, "is_recomputed", lambda layer, every: layer % every == 0):
        return all_flops(["sp"])


def flops_with_all_of_the_layer() -> dict[str, list[tuple[int, int]]]:
    """Bug: a policy that keeps too little, and computes products again."""
    right = recompute.recompute_block
    full = lambda block, kind: right(block, "full" if kind == "pointwise" else kind)  # noqa: E731
    with patch.object(recompute, "recompute_block", full):
        return all_flops(["experts"])


@pytest.mark.parametrize(
    ("bug", "shown"),
    [
        (flops_with_a_second_forward_for_wgrad, {"full 1"}),
        (flops_of_the_first_of_every_three, {"full 3"}),
        (flops_with_all_of_the_layer, {"pointwise 1"}),
    ],
)
def test_bugs(pool: Pool, bug: object, shown: set[str]) -> None:
    assert {kind for _, kind, _ in wrong(pool.run(2, bug))} >= shown


# ---- A layer by itself


def layer_calls(kind: str) -> list[int]:
    """How often the nonlinearity of each layer is computed in a forward and backward."""
    model = recompute.recompute(with_numbers(GPT(LLAMA), 0, CPU, torch.float64), "none")
    calls = [0] * LLAMA.layers
    for i, block in enumerate(model.blocks.values()):
        right = block.mlp.activation

        def counted(*x: Tensor, i: int = i, right: object = right) -> Tensor:
            calls[i] += 1
            return right(*x)

        block.mlp.activation = counted
    recompute.recompute(model, kind, 2)
    use_masks(model, SampleMasks(0))
    inputs, targets = Text(None, LLAMA.sequence).batch(0, 0, 2)
    loss = token_loss(model(inputs), targets, targets.numel())
    loss.backward()
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_every_second_layer_computes_its_nonlinearity_twice(kind: str) -> None:
    again = 1 if kind in ("none", "selective") else 2
    assert layer_calls(kind) == [1, again, 1, again]


def test_nothing_is_kept_of_a_forward_without_gradients() -> None:
    model = recompute.recompute(with_numbers(GPT(LLAMA), 0, CPU, torch.float64), "operators")
    use_masks(model, SampleMasks(0))
    inputs, _ = Text(None, LLAMA.sequence).batch(0, 0, 2)
    with torch.no_grad():
        right = model(inputs)
    assert torch.equal(model(inputs), right)


# ---- Which layers, and what is refused


def test_layers_of_stages_that_are_recomputed() -> None:
    """The last of every k, whatever the stages are: 3 stages of 7 layers, the last 4 with experts."""
    model = replace(WITH_EXPERTS, layers=7, dense_layers=3)
    layout = Layout(pp=3, recompute="full", recompute_every=2)
    found = [recomputed_of(model, layout, stage) for stage in range(3)]
    assert tuple(map(sum, zip(*found, strict=True))) == (1, 2)
    assert sum(map(sum, found)) == sum(recompute.is_recomputed(i, 2) for i in range(7))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(recompute_every=2), "no layer is recomputed"),
        (Layout(recompute="full", recompute_every=5), "of fewer layers none is recomputed"),
        (Layout(recompute="full", recompute_every=0), "--recompute-every"),
    ],
)
def test_refusals(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match="--recompute-every") as refused:
        rules.check(layout, CONFIG, world=1, batch=1)
    assert message in str(refused.value)
