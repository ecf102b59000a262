"""All topics together, in every combination: losses, norm, gradients, parameters, moments of one process."""

from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run import worker
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import ALWAYS, Worker
from core.ledger import Ledger
from core.model.gpt import GPT, GPTConfig
from core.model.precision import POLICIES
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, relative_difference, worst_difference
from core.shards import LocalTensor
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import end_step
from expert_parallel.engine.routing import MoEConfig, Routing
from tests.pool import Pool

CPU, SEED, CLIP = torch.device("cpu"), 7, 0.5
CONFIG = GPTConfig(sequence=16, hidden=16, layers=4, heads=4, vocabulary=257)
MOE = MoEConfig(Routing(4, 2, aux=0.01, z=0.001, bias_rate=0.01), shared=8)
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)
Result = tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor], float]


def L(*, moe: bool = False, **sizes: object) -> tuple[Layout, bool]:
    return Layout(**sizes), moe


LAYOUTS = [  # on 4 ranks where that is enough
    L(dp=4),
    L(dp=4, zero=1),
    L(dp=2, zero=2, microbatches=2, tp=2),
    L(dp=4, zero=3),
    L(tp=4, sp=True),
    L(tp=2, pp=2, dp=2, microbatches=2),
    L(tp=2, pp=2, dp=2, microbatches=2, zero=1, sp=True),
    L(tp=2, cp=2, dp=2, zero=1),
    L(tp=2, cp=2, dp=2, sp=True, zero=2),
    L(cp=2, pp=2, microbatches=2),
    L(tp=2, cp=2, pp=2, microbatches=2, sp=True),
    L(cp=4, dp=2, ulysses=2, zero=3),
    L(cp=4),
    L(cp=2, pp=2, microbatches=4, schedule="dualpipe", cp_kind="all-gather"),
    L(tp=2, dp=2, zero=3, sp=True, microbatches=2),
    L(tp=2, dp=2, zero=3, recompute="full"),
    L(pp=4, microbatches=4, schedule="zb-h1"),
    L(pp=2, tp=2, microbatches=2, schedule="interleaved", v=2),
    L(pp=2, cp=2, microbatches=4, schedule="dualpipe"),
    L(pp=2, tp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, sp=True, zero=1),
    L(pp=2, tp=2, microbatches=2, schedule="zb-v", v=2, recompute="selective"),
    L(dp=4, ep=4, moe=True, zero=1),
    L(pp=2, dp=4, ep=4, microbatches=2, moe=True),
    L(tp=2, dp=2, ep=4, sp=True, moe=True, zero=2, microbatches=2),
    L(tp=2, dp=2, ep=2, sp=True, moe=True, zero=1),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True, zero=1),
    L(tp=2, cp=2, pp=2, ep=4, sp=True, microbatches=2, moe=True, schedule="gpipe"),
    L(pp=2, dp=2, ep=2, microbatches=4, moe=True, schedule="zb-h2", zero=1, recompute="full"),
    # The loss in chunks of tokens that do not divide them.
    L(dp=4, zero=3, loss_chunk=7),
    L(tp=2, cp=2, dp=2, zero=1, loss_chunk=5),
    L(tp=4, sp=True, loss_chunk=100),
    L(pp=2, tp=2, sp=True, microbatches=2, schedule="zb-h1", loss_chunk=7),
    L(pp=2, tp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, zero=1, loss_chunk=9),
    L(tp=2, dp=2, ep=4, sp=True, moe=True, zero=2, microbatches=2, loss_chunk=3),
    # Unequal stages, the ends by themselves, empty ones.
    L(pp=4, dp=2, microbatches=4, zero=3, split="E|t*3|t|L"),
    L(pp=2, tp=2, microbatches=2, schedule="interleaved", v=2, zero=2, sp=True, split="E,t||t*2|t,L"),
    L(pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=1, split="E|t*4||L"),
    L(pp=2, cp=2, microbatches=4, schedule="dualpipe", zero=3, split="E,t*4|L"),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, zero=3, split="E,t|t*3||L", reduce="step"),
    L(pp=4, dp=2, ep=2, microbatches=1, moe=True, schedule="zb-h1", zero=3, split="E|t|t*3|L"),
    L(dp=4, zero=2, microbatches=2, reduce="step"),
    L(dp=4, zero=3, microbatches=2, reduce="step", reshard="step"),
    L(pp=2, dp=2, microbatches=4, schedule="gpipe", zero=2),
    L(pp=2, dp=2, microbatches=4, schedule="gpipe", zero=3),
    L(pp=2, dp=2, microbatches=4, zero=2, reduce="step"),
    L(pp=2, dp=2, microbatches=4, zero=3, reduce="step", reshard="step"),
    L(pp=2, dp=2, microbatches=4, zero=3),
    L(pp=2, dp=2, microbatches=4, schedule="interleaved", v=2, zero=2),
    L(pp=2, dp=2, microbatches=4, schedule="interleaved", v=2, zero=3, reshard="step"),
    L(pp=2, dp=2, microbatches=4, schedule="zb-h1", zero=2, reduce="step"),
    L(pp=2, dp=2, microbatches=4, schedule="zb-h1", zero=3),
    L(pp=2, dp=2, microbatches=4, schedule="zb-h2", zero=2),
    L(pp=2, dp=2, microbatches=4, schedule="zb-h2", zero=3, reduce="step"),
    L(pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=2),
    L(pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=3, recompute="full"),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipe", zero=2),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipe", zero=3),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipe", zero=3, reduce="step", reshard="step"),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, zero=2, reduce="step"),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, zero=3, recompute="selective"),
    L(tp=2, cp=2, pp=2, microbatches=4, schedule="zb-h1", sp=True, zero=3, recompute="full"),
    L(dp=4, ep=2, moe=True, zero=3, microbatches=2),
    # Experts beside tp without sp.
    L(tp=4, ep=4, moe=True),
    L(tp=2, dp=2, ep=2, etp=2, moe=True, zero=1, microbatches=2),
    L(tp=2, cp=2, ep=4, moe=True, zero=2, recompute="full"),
    L(tp=2, dp=2, ep=2, moe=True, zero=3, microbatches=2, loss_chunk=5),
    L(tp=2, pp=2, dp=2, ep=4, moe=True, zero=3, microbatches=4, schedule="zb-v", v=2),
    L(tp=2, dp=2, ep=2, sp=True, moe=True, zero=3, reshard="step", reduce="step", microbatches=2),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True, zero=3),
    L(pp=2, dp=2, ep=2, moe=True, microbatches=4, schedule="zb-h1", zero=3),
    L(pp=2, dp=4, ep=2, moe=True, microbatches=4, zero=3, reduce="step"),
    L(pp=2, dp=4, ep=2, moe=True, microbatches=4, schedule="interleaved", v=2, zero=2),
    L(pp=2, dp=4, ep=2, moe=True, microbatches=4, schedule="zb-v", v=2, zero=3, recompute="full"),
    # What norms and nonlinearities make is computed again, beside all that reads or gathers it.
    L(tp=2, dp=2, zero=3, sp=True, microbatches=2, recompute="pointwise"),
    L(cp=2, pp=2, microbatches=4, schedule="dualpipe", recompute="operators"),
    L(pp=2, dp=2, microbatches=4, schedule="dualpipev", v=2, zero=3, recompute="operators"),
    L(pp=2, dp=2, ep=2, moe=True, microbatches=4, schedule="zb-h1", zero=3, recompute="pointwise"),
    L(tp=2, dp=2, ep=2, etp=2, sp=True, moe=True, zero=1, recompute="operators", recompute_every=2),
    L(tp=2, pp=2, microbatches=4, schedule="zb-v", v=2, recompute="full", recompute_every=2),
    # Experts where every layer is on two ranks, and where one direction computes while the other's rows travel.
    L(pp=2, dp=2, ep=2, moe=True, microbatches=4, schedule="dualpipe"),
    L(pp=2, dp=4, ep=4, moe=True, microbatches=4, schedule="dualpipe", zero=1, recompute="full"),
    L(pp=2, dp=2, ep=2, moe=True, microbatches=8, schedule="dualpipe", zero=2),
    L(pp=2, dp=2, ep=2, moe=True, microbatches=4, schedule="dualpipe", zero=3),
    L(pp=4, dp=2, ep=2, moe=True, microbatches=8, schedule="dualpipe", zero=3, reshard="step", reduce="step"),
    L(pp=2, tp=2, dp=2, ep=2, etp=2, sp=True, moe=True, microbatches=4, schedule="dualpipe", zero=1),
    L(pp=2, dp=2, ep=2, moe=True, microbatches=4, schedule="dualpipev", v=2, zero=1, recompute="selective"),
    L(pp=2, dp=4, ep=4, moe=True, microbatches=4, schedule="dualpipev", v=2, zero=2),
    L(pp=2, dp=2, ep=2, moe=True, microbatches=8, schedule="dualpipev", v=2, zero=3),
    L(pp=2, cp=2, tp=2, ep=2, etp=2, sp=True, moe=True, microbatches=4, schedule="dualpipev", v=2, zero=3),
]


def samples_of(layout: Layout) -> Layout:
    """So many samples a microbatch that every layout has the same batch."""
    return replace(layout, microbatch=16 // (layout.dp * layout.microbatches))


def train(layout: Layout, moe: bool, config: GPTConfig = CONFIG) -> Result:
    mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
    spec = TrainSpec(config, MOE if moe else None, layout, SEED, POLICIES["float64"], CPU, optimizer_of, bucket=3000)
    worker = Worker(spec, mesh)
    losses, norms, gradients = [], [], []
    for step in range(2):
        worker.zero_grad()
        share = worker.forward_backward(step, *Text(None, 16).batch(SEED, step, 16))
        gradients = worker.gradients()
        norm, loss = worker.clip(CLIP, share)
        worker.step()
        losses.append(loss)
        norms.append(norm)
    after = worker.evaluate(*Text(None, 16).batch(SEED, 2, 16))
    result = losses, norms, gradients, worker.weights(), worker.states(), after
    worker.close()
    return result


Reference = tuple[list[float], list[float], Oracle, float]


def reference(moe: bool, config: GPTConfig = CONFIG) -> Reference:
    """What one process makes of the same two steps."""
    make = (lambda config: to_moe(GPT(config), MOE)) if moe else GPT
    oracle = Oracle(config, SEED, CPU, optimizer_of, CLIP, make)
    losses, norms = [], []
    for step in range(2):
        losses.append(oracle.step(*Text(None, 16).batch(SEED, step, 16), step))
        norms.append(oracle.norm)
        end_step(oracle.model)
    inputs, targets = Text(None, 16).batch(SEED, 2, 16)
    with torch.no_grad():
        logits = oracle.model(inputs).flatten(0, 1)
    return losses, norms, oracle, torch.nn.functional.cross_entropy(logits, targets.flatten()).item()


@pytest.fixture(scope="module")
def one_process() -> dict[bool, Reference]:
    return {moe: reference(moe) for moe in (False, True)}


@pytest.mark.parametrize(("layout", "moe"), LAYOUTS, ids=[str(layout).replace("--", "") for layout, _ in LAYOUTS])
def test_equals_one_process(pool: Pool, one_process: dict, layout: Layout, moe: bool) -> None:
    layout = samples_of(layout)
    routing = {"experts": MOE.routing.experts, "top_k": MOE.routing.top_k} if moe else {}
    rules.check(layout, replace(CONFIG, **routing), world=layout.ranks, batch=16)
    differing = differences(pool.run(layout.ranks, train, layout, moe), one_process[moe])
    assert max(differing.values()) < 1e-10, differing


def differences(results: list[Result], reference: Reference) -> dict[str, float]:
    """The largest relative difference of each kind, on any rank."""
    losses, norms, oracle, after = reference
    found = dict.fromkeys(("losses", "norms", "gradients", "parameters", "states"), 0.0)
    for rank in results:
        pairs = (("losses", [*rank[0], rank[5]], [*losses, after]), ("norms", rank[1], norms))
        for name, these, those in pairs:
            found[name] = max(found[name], *map(relative_difference, these, those))
    for name, i, right in (
        ("gradients", 2, oracle.gradients), ("parameters", 3, oracle.parameters()), ("states", 4, oracle.states()),
    ):  # fmt: skip
        found[name] = worst_difference(full_tensors(piece for rank in results for piece in rank[i]), right)
    return found


def train_partly_frozen(layouts: list[Layout]) -> list[Result]:
    """Half of the layers, and the tied embedding, are not trained."""
    right = worker.build_model

    def build_model(*arguments: object) -> GPT:
        model = right(*arguments)
        for name, p in model.named_parameters():
            frozen = model.full_name(name) == "embed.token.weight" or name.startswith(("blocks.0.", "blocks.2."))
            p.requires_grad_(not frozen)
        return model

    with patch.object(worker, "build_model", build_model):
        return [train(layout, False) for layout in layouts]


def test_frozen_weights_are_gathered_and_stay(pool: Pool) -> None:
    """Bug: what is not trained is not gathered, or is reduced. Against data parallelism alone."""
    sizes = {"pp": 2, "dp": 2, "microbatches": 4}
    layouts = [Layout(dp=4), *(Layout(**sizes, schedule=name, v=v, zero=zero, reshard=reshard)
                               for name, v, zero, reshard in (("1f1b", 1, 3, "step"), ("zb-v", 2, 3, "forward"),
                                                              ("zb-h1", 1, 2, "forward")))]  # fmt: skip
    results = pool.run(4, train_partly_frozen, [samples_of(layout) for layout in layouts])
    expected = results[0][0]
    for i, layout in enumerate(layouts):
        assert results[0][i][0] == pytest.approx(expected[0], rel=1e-10), layout
        assert results[0][i][1] == pytest.approx(expected[1], rel=1e-10), layout
        for what in (2, 3):
            reference = dict(full_tensors(piece for rank in results for piece in rank[0][what]))
            found = full_tensors(piece for rank in results for piece in rank[i][what])
            assert worst_difference(found, reference) < 1e-10, layout


def test_a_checkpoint_of_before_is_of_the_same_model() -> None:
    """What GPT-2's kind has not is named only where a model has it: a GPT that was saved before goes on."""

    def identity(config: GPTConfig) -> dict[str, object]:
        optimizer = torch.optim.AdamW([torch.zeros(1)])
        worker = SimpleNamespace(
            spec=SimpleNamespace(config=config, moe=None), named_optimizers=lambda: [(optimizer, {})]
        )
        return Worker.identity(worker)

    later = asdict(CONFIG).keys() - ALWAYS
    assert not later & identity(CONFIG).keys()
    assert identity(CONFIG).keys() >= ALWAYS
    other = replace(CONFIG, norm="rms", qk_norm=True)
    assert later & identity(other).keys() == {"norm", "qk_norm"}
