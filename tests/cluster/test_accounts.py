"""The planner's bytes and elements are those that real ranks hold and send, as the ledger counts them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch

from cluster import dry_run
from cluster.dry_run import Account, account, compared, one_step
from cluster.planner import activations, exchanges, memory, stages, traffic
from cluster.planner.activations import in_flight
from cluster.planner.counting import model_parameters
from cluster.planner.layout import Layout
from cluster.planner.memory import parameters, rank_memory
from cluster.planner.traffic import messages, sent
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.config import Latent
from core.model.gpt import GPT, GPTConfig
from core.model.precision import POLICIES, Precision
from core.model.text import Text
from core.proof.memory import SavedActivations
from expert_parallel.engine.routing import MoEConfig, Routing
from pipeline.evidence.claims import messages_by_rule
from pipeline.schedules import build
from pipeline.stages import layers_in
from tests.pool import Pool

CPU, FLOAT64, BF16 = torch.device("cpu"), POLICIES["float64"], POLICIES["bfloat16"]
PLAIN = partial(torch.optim.AdamW, lr=1e-3)


def accounts(cases: list[tuple[GPTConfig, Layout, Precision]]) -> list[tuple[int, Account]]:
    """One step of each case on one rank: its index in the pipeline, and what it held and sent."""
    found = []
    for config, layout, precision in cases:
        mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
        found.append((mesh["pp"].index, one_step(config, layout, mesh, precision, PLAIN)))
    return found


SMALL = {"sequence": 16, "hidden": 32, "layers": 4, "heads": 4, "vocabulary": 256}
EIGHT = {"layers": 8}
ALL = {"attention": "softmax", "dropout": 0.1}
CASES = {  # on 4 ranks, or on 8 where three axes have more than one
    "tp dp zero-0": ({}, Layout(tp=2, dp=2, zero=0, microbatch=2, microbatches=2)),
    "tp dp zero-1, full": (ALL, Layout(tp=2, dp=2, zero=1, microbatches=2, recompute="full")),
    "sp dp zero-2, selective": (ALL, Layout(tp=2, sp=True, dp=2, zero=2, microbatches=3, recompute="selective")),
    "sp dp zero-3, full": (ALL, Layout(tp=2, sp=True, dp=2, zero=3, microbatches=2, recompute="full")),
    "zero-3": ({}, Layout(dp=4, zero=3, microbatches=2)),
    "untied sp, full": ({"tied": False}, Layout(tp=4, sp=True, microbatch=2, recompute="full")),
    "3D 1f1b": ({}, Layout(tp=2, dp=2, pp=2, zero=1, microbatch=2, microbatches=4)),
    "3D interleaved sp": (ALL, Layout(tp=2, sp=True, dp=2, pp=2, v=2, schedule="interleaved", microbatches=4)),
    "interleaved full": (EIGHT, Layout(pp=4, v=2, schedule="interleaved", microbatches=6, recompute="full")),
    "gpipe": ({"tied": False}, Layout(pp=4, schedule="gpipe", microbatches=4)),
    "1f1b": (ALL, Layout(pp=4, microbatches=8)),
    "stages of 1, 2, 2 and 2 layers": ({"layers": 7}, Layout(pp=4, microbatches=8)),
    "stages of 1 and 2 layers, two a rank": ({"layers": 7}, Layout(dp=2, pp=2, v=2, schedule="zb-v", microbatches=4)),
    "dualpipe": ({}, Layout(dp=2, pp=2, zero=1, schedule="dualpipe", microbatches=4)),
    "zb-h1": ({}, Layout(pp=4, schedule="zb-h1", microbatches=8)),
    "zb-v": (EIGHT, Layout(pp=4, v=2, schedule="zb-v", microbatches=8)),
    "ring": ({}, Layout(cp=4, zero=1, microbatch=2)),
    "ring in order, full": ({}, Layout(cp=4, placement="contiguous", microbatches=2, recompute="full")),
    "ulysses, selective": ({}, Layout(cp=4, ulysses=4, zero=2, recompute="selective")),
    "all-gather": ({}, Layout(cp=4, zero=1, microbatch=2, cp_kind="all-gather")),
    "all-gather in order, full": (
        {},
        Layout(cp=4, placement="contiguous", microbatches=2, recompute="full", cp_kind="all-gather"),
    ),
    "hybrid tp pp": ({}, Layout(tp=2, cp=2, pp=2, microbatches=2)),
    "hybrid sp, full": ({}, Layout(tp=2, sp=True, cp=4, ulysses=2, recompute="full")),
    "chunked loss, zero-3": ({}, Layout(dp=4, zero=3, microbatches=2, loss_chunk=5)),
    "chunked loss, tp": ({}, Layout(tp=4, microbatch=2, loss_chunk=5)),
    "chunked loss, sp": ({}, Layout(tp=4, sp=True, microbatch=2, loss_chunk=5)),
    "chunked loss, sp dualpipe": ({}, Layout(tp=2, sp=True, pp=2, schedule="dualpipe", microbatches=4, loss_chunk=5)),
    "chunked loss, sp zb-h1": ({}, Layout(tp=2, sp=True, pp=2, schedule="zb-h1", microbatches=4, loss_chunk=5)),
}
SMALL_LLAMA = {"kv_heads": 2, "gated": True, "biases": False, "learned_positions": False, "tied": False, "norm": "rms",
               "feed_forward": 40}  # fmt: skip
QWEN3 = SMALL_LLAMA | {"qk_norm": True, "head_size": 6}
LATENT = SMALL_LLAMA | {"kv_heads": None, "latent": Latent(14, 10, 4, 6, 8)}
CASES |= {
    "llama": (SMALL_LLAMA, Layout(tp=4, zero=1, microbatch=2)),
    "llama sp pp": (SMALL_LLAMA, Layout(tp=2, sp=True, pp=2, microbatches=4)),
    "llama sp, selective": (QWEN3, Layout(tp=2, sp=True, dp=2, zero=2, microbatches=2, recompute="selective")),
    "llama, full": (SMALL_LLAMA | {"kv_heads": 1}, Layout(tp=4, sp=True, recompute="full")),
    "llama ring tp": (QWEN3 | {"kv_heads": 1}, Layout(tp=2, cp=2, microbatch=2)),
    "llama ulysses, full": (SMALL_LLAMA, Layout(cp=4, ulysses=4, recompute="full")),
    "llama all-gather tp": (QWEN3 | {"kv_heads": 1}, Layout(tp=2, cp=2, microbatch=2, cp_kind="all-gather")),
    "llama hybrid, all-gather, selective": (
        SMALL_LLAMA | {"kv_heads": 1},
        Layout(cp=4, ulysses=2, microbatch=2, recompute="selective", cp_kind="all-gather"),
    ),
    "latent all-gather": (LATENT, Layout(cp=4, cp_kind="all-gather")),
    "latent hybrid, all-gather": (LATENT, Layout(cp=4, ulysses=2, cp_kind="all-gather")),
    "llama hybrid": (SMALL_LLAMA | {"kv_heads": 1}, Layout(cp=4, ulysses=2, microbatch=2)),
    "latent": (LATENT, Layout(tp=2, dp=2, microbatch=2)),
    "latent sp pp, full": (LATENT, Layout(tp=2, sp=True, pp=2, microbatches=4, recompute="full")),
    "latent sp, plain queries": (LATENT | {"latent": Latent(None, 10, 4, 6, 8)}, Layout(tp=2, sp=True, dp=2)),
    "llama zb-h1": (SMALL_LLAMA, Layout(pp=4, schedule="zb-h1", microbatches=8)),
    "llama sp zb-v": (QWEN3 | {"layers": 8}, Layout(tp=2, sp=True, pp=2, v=2, schedule="zb-v", microbatches=4)),
    "latent dualpipe": (LATENT, Layout(tp=2, pp=2, schedule="dualpipe", microbatches=4)),
    "latent ring, selective": (LATENT, Layout(cp=4, recompute="selective")),
    "zero-2, added up": ({}, Layout(dp=4, zero=2, microbatches=2, reduce="step")),
    "zero-3, added up, kept": ({}, Layout(dp=4, zero=3, microbatches=3, reduce="step", reshard="step")),
    "1f1b zero-2": ({"layers": 8}, Layout(pp=2, dp=2, zero=2, microbatches=4)),
    "1f1b zero-2, added up": ({}, Layout(pp=2, dp=2, zero=2, microbatches=4, reduce="step")),
    "1f1b zero-3": ({"layers": 8}, Layout(pp=2, dp=2, zero=3, microbatches=4)),
    "1f1b zero-3, added up, kept": (
        {},
        Layout(pp=2, dp=2, zero=3, microbatches=4, reduce="step", reshard="step"),
    ),
    "gpipe zero-3, untied": ({"tied": False}, Layout(pp=2, dp=2, zero=3, microbatches=4, schedule="gpipe")),
    "interleaved zero-3 tp": (
        {"layers": 12},
        Layout(tp=2, pp=2, dp=2, v=2, schedule="interleaved", zero=3, microbatches=4, sp=True),
    ),
    "zb-h1 zero-3, kept": ({}, Layout(pp=2, dp=2, zero=3, microbatches=4, schedule="zb-h1", reshard="step")),
    "zb-h1 zero-2, added up": (EIGHT, Layout(pp=2, dp=2, zero=2, microbatches=4, schedule="zb-h1", reduce="step")),
    "zb-v zero-3": (EIGHT, Layout(pp=2, dp=2, v=2, zero=3, microbatches=6, schedule="zb-v", reduce="step")),
    "dualpipe zero-3": ({}, Layout(pp=2, dp=2, zero=3, microbatches=4, schedule="dualpipe")),
    "dualpipev zero-3": ({}, Layout(pp=2, dp=2, v=2, zero=3, microbatches=4, schedule="dualpipev")),
    "dualpipev zero-2, full": (
        EIGHT,
        Layout(pp=2, dp=2, v=2, zero=2, microbatches=4, schedule="dualpipev", recompute="full"),
    ),
    "llama zero-3 pp": (SMALL_LLAMA, Layout(pp=2, dp=2, zero=3, microbatches=4)),
    "qwen zero-2 interleaved tp": (
        QWEN3 | {"kv_heads": 1, "layers": 8, "tied": True},
        Layout(tp=2, pp=2, dp=2, v=2, schedule="interleaved", zero=2, microbatches=4),
    ),
    "latent zero-3 pp": (LATENT, Layout(pp=2, dp=2, zero=3, microbatches=4, schedule="gpipe", reduce="step")),
    "ends alone": ({}, Layout(pp=4, microbatches=8, split="E|t|t*3|L")),
    "ends alone, llama sp": (SMALL_LLAMA, Layout(tp=2, sp=True, pp=4, microbatches=4, split="E|t|t*3|L")),
    "unequal zb-h1": ({}, Layout(pp=4, schedule="zb-h1", microbatches=8, split="E|t*3|t|L")),
    "unequal interleaved zero-3": (
        {"layers": 5},
        Layout(dp=2, pp=2, v=2, zero=3, schedule="interleaved", microbatches=4, split="E||t*4|t,L"),
    ),
    "unequal zb-v zero-3, both ends alone": (
        EIGHT,
        Layout(dp=2, pp=2, v=2, zero=3, schedule="zb-v", microbatches=6, split="E|t*5|t*3|L"),
    ),
    "unequal dualpipe zero-2": (
        {"layers": 5},
        Layout(pp=2, dp=2, zero=2, microbatches=4, schedule="dualpipe", split="E,t*4|t,L"),
    ),
    "unequal dualpipev, full": (
        EIGHT,
        Layout(pp=2, dp=2, v=2, microbatches=4, schedule="dualpipev", recompute="full", split="E,t|t*5||t*2,L"),
    ),
}
MIXED = {"experts": 8, "top_k": 2, "expert_feed_forward": 16}
CASES |= {
    "experts tp": (MIXED, Layout(tp=4, ep=4, microbatch=2)),
    "experts tp pp": (SMALL_LLAMA | MIXED, Layout(tp=2, dp=2, pp=2, ep=4, schedule="zb-h1", microbatches=4)),
    "latent experts sp": (
        LATENT
        | MIXED
        | {"score": "sigmoid", "shared_feed_forward": 24, "dense_layers": 1, "groups": 4, "top_groups": 2},
        Layout(tp=2, sp=True, dp=2, ep=2, etp=2, recompute="full"),
    ),
}
CASES |= {
    "sp dp zero-2, pointwise": (ALL, Layout(tp=2, sp=True, dp=2, zero=2, microbatches=3, recompute="pointwise")),
    "tp, operators": (ALL, Layout(tp=4, recompute="operators", microbatch=2)),
    "1f1b, full every third": ({"layers": 7}, Layout(pp=4, microbatches=8, recompute="full", recompute_every=3)),
    "qwen zb-v, operators": (
        QWEN3 | {"layers": 8},
        Layout(tp=2, sp=True, pp=2, v=2, schedule="zb-v", microbatches=4, recompute="operators"),
    ),
    "llama ring, pointwise every second": (
        SMALL_LLAMA, Layout(cp=4, zero=1, recompute="pointwise", recompute_every=2),
    ),
    "qwen ulysses, operators": (QWEN3, Layout(cp=4, ulysses=2, microbatch=2, recompute="operators")),
    "sp zero-3, full every second": (
        {}, Layout(tp=2, sp=True, dp=2, zero=3, microbatches=2, recompute="full", recompute_every=2),
    ),
    "latent dualpipe, pointwise": (
        LATENT, Layout(tp=2, pp=2, schedule="dualpipe", microbatches=4, recompute="pointwise"),
    ),
}  # fmt: skip
SPLIT = ("chunked loss, sp zb-h1", "llama sp zb-v")  # a few numbers a token are left when a dgrad begins

EXPERTS = 8
WITH_EXPERTS = (
    (Layout(dp=4, ep=2, microbatch=4), 2),
    (Layout(dp=4, ep=2, etp=2, microbatch=4), 2),
    (Layout(dp=4, ep=4, microbatch=4, recompute="full"), 3),
    (Layout(dp=4, ep=2, microbatch=4, zero=3), 2),
    (Layout(dp=4, ep=2, microbatch=4, recompute="pointwise"), 2),
)


def accounts_of_experts(config: GPTConfig) -> list[Counter[str]]:
    """The same with experts, in float64, on tokens of a text: which expert takes them depends on them."""
    found = []
    for layout, top_k in WITH_EXPERTS:
        mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
        moe = MoEConfig(Routing(experts=EXPERTS, top_k=top_k, aux=0.0, z=0.0))
        worker = Worker(TrainSpec(config, moe, layout, 0, FLOAT64, CPU, PLAIN), mesh)
        saved = SavedActivations(worker.model.parameters())
        worker.forward_backward(0, *Text(None, config.sequence).batch(0, 0, layout.batch), saved)
        worker.close()
        experts = sum(p.numel() for p in worker.experts)
        others = sum(p.numel() for p in worker.model.parameters() if p.requires_grad) - experts
        count = Counter(experts=experts, others=others, activations=saved.peak)
        for (_, name), entry in mesh["ep"].ledger.traffic.items():
            count["dp" if " x " in name else name] += entry.elements
        found.append(count)
    return found


def test_what_a_rank_with_experts_holds_and_sends(pool: Pool) -> None:
    """Parameters exactly; what hangs on the router's choice as the mean of all ranks, nearly as if it were even."""
    config = GPTConfig(**SMALL)
    model = replace(config, experts=EXPERTS)
    everyone = pool.run(4, accounts_of_experts, config)
    for i, (layout, top_k) in enumerate(WITH_EXPERTS):
        here = replace(model, top_k=top_k)
        experts, others = parameters(here, layout)
        formula = sent(here, layout) | {"experts": experts, "others": others}
        formula["activations"] = rank_memory(here, layout, itemsize=8).activations
        for what, value in formula.items():
            mean = sum(rank[i][what] for rank in everyone) / 4
            near = {"activations": 0.05, "ep": 0.1, "etp": 0.01}.get(what, 1e-9)
            assert mean == pytest.approx(value, rel=near), (layout, what)


SPLIT_EXPERTS = Layout(pp=2, dp=2, ep=2, schedule="zb-h1", microbatch=4, microbatches=4)
SHARED = {"feed_forward": 16, "shared": 96}  # so large that it shows where it is left out


def activations_of_experts(config: GPTConfig) -> tuple[int, int]:
    """Index in the pipeline and peak of activations, with a shared expert and backward split into dgrad and wgrad."""
    mesh = make_mesh(SPLIT_EXPERTS, "cpu", Ledger(), 30.0)
    moe = MoEConfig(Routing(experts=EXPERTS, top_k=2, aux=0.0, z=0.0), **SHARED)
    worker = Worker(TrainSpec(config, moe, SPLIT_EXPERTS, 0, FLOAT64, CPU, PLAIN), mesh)
    saved = SavedActivations(worker.model.parameters())
    worker.forward_backward(0, *Text(None, config.sequence).batch(0, 0, SPLIT_EXPERTS.batch), saved)
    worker.close()
    return mesh["pp"].index, saved.peak


def test_what_a_split_backward_keeps_of_experts(pool: Pool) -> None:
    """Bug: what a W still needs leaves out the shared expert , or the routed ones. Tokens choose nearly evenly."""
    config = GPTConfig(**SMALL)
    model = replace(config, experts=EXPERTS, top_k=2, expert_feed_forward=16, shared_feed_forward=96)
    everyone = pool.run(4, activations_of_experts, config)
    for rank in range(SPLIT_EXPERTS.pp):
        peaks = [peak for index, peak in everyone if index == rank]
        formula = rank_memory(model, SPLIT_EXPERTS, rank, itemsize=8).activations
        assert sum(peaks) / len(peaks) == pytest.approx(formula, rel=0.05), rank


# Every second one in bfloat16.
RUNS = {
    name: (GPTConfig(**SMALL | sizes), layout, (BF16, FLOAT64)[i % 2])
    for i, (name, (sizes, layout)) in enumerate(CASES.items())
}
Measured = dict[str, list[tuple[int, Account]]]


@pytest.fixture(scope="module")
def measured(pool: Pool) -> Measured:
    """Of every case every rank's index in the pipeline and its account."""
    found: Measured = {}
    for ranks in (4, 8):
        some = {name: run for name, run in RUNS.items() if run[1].ranks == ranks}
        everyone = pool.run(ranks, accounts, list(some.values()))
        found |= {name: [rank[i] for rank in everyone] for i, name in enumerate(some)}
    assert found.keys() == RUNS.keys()
    return found


def differences(measured: Measured) -> set[tuple]:
    """Where formula and measurement differ: (case, what, rank, measured, formula)."""
    wrong = set()
    for name, (config, layout, precision) in RUNS.items():
        for rank, (index, count) in enumerate(measured[name]):
            for _, what, formula, value in compared(count, config, layout, index, precision.parameters.itemsize):
                near = 0.001
                if what == "activations" and name in SPLIT:
                    near = 0.01
                if what == "tp" and layout.sp and layout.zero:  # a shard has more or fewer replicated parameters
                    near = 0.015
                positions = 8 * config.sequence * (what == "activations" and layout.cp > 1)  # or only this rank's
                if value != pytest.approx(formula, rel=near, abs=positions):
                    wrong.add((name, what, rank, value, formula))
    return wrong


def test_what_a_rank_holds_and_sends(measured: Measured) -> None:
    """By the ledger: a wrong formula, or a change of the code that it describes, shows here."""
    wrong = differences(measured)
    assert not wrong, "\n".join(map(str, sorted(wrong)))


PRETENDED = (
    "1f1b zero-3",
    "interleaved zero-3 tp",
    "zb-v zero-3",
    "3D interleaved sp",
    "sp dp zero-3, full",
    "untied sp, full",
    "dualpipe",
    "zb-v",
    "ring",
    "all-gather",
    "hybrid sp, full",
    "experts tp pp",
    "latent experts sp",
    "qwen zb-v, operators",
)
UNEVEN = [  # shares of 5, 5, 4 and 4 tokens; rows that cannot be dealt out equally
    (GPTConfig(**SMALL | MIXED | {"sequence": 18}), Layout(tp=4, ep=4, microbatch=2), FLOAT64),
    (GPTConfig(**SMALL | MIXED | {"sequence": 14}), Layout(tp=2, cp=2, ep=2, etp=2, placement="contiguous"), BF16),
]


def as_they_choose(cases: list[tuple[GPTConfig, Layout, Precision]]) -> list[tuple[int, Account]]:
    with patch.object(dry_run, "route_evenly", lambda worker: None):
        return accounts(cases)


def test_a_dry_run_of_a_mixture_equals_real_ranks(pool: Pool) -> None:
    """Whose tokens are dealt out, in everything; of others in all that does not hang on their choice."""
    dealt, chosen = pool.run(4, accounts, UNEVEN), pool.run(4, as_they_choose, UNEVEN)
    for i, (config, layout, precision) in enumerate(UNEVEN):
        for rank in range(layout.ranks):
            found = account(config, layout, rank, precision)
            assert found == dealt[rank][i][1], (layout, rank)
            real = chosen[rank][i][1]
            assert found.held | {"activations": 0} == real.held | {"activations": 0}, (layout, rank)
            free = found.bytes.keys() - {"ep", "etp"}
            assert {axis: found.bytes[axis] for axis in free} == {axis: real.bytes[axis] for axis in free}
        assert any(dealt[rank][i][1] != chosen[rank][i][1] for rank in range(4)), "or it was even by chance"


def test_a_dry_run_equals_real_ranks(measured: Measured) -> None:
    """What a rank holds and sends does not depend on numbers, nor on whether somebody answers."""
    for i, name in enumerate(PRETENDED):
        config, layout, precision = RUNS[name]
        rank = 3 * i % layout.ranks
        assert account(config, layout, rank, precision) == measured[name][rank][1], (layout, rank)


def twice(original: Callable, *sizes: object) -> object:
    return 2 * original(*sizes)


def as_1f1b(original: Callable, layout: Layout, rank: int) -> int:
    return original(replace(layout, v=1, schedule="1f1b"), rank)


def as_gpipe(original: Callable, schedule: str, *sizes: int) -> list:
    return original("gpipe" if schedule == "1f1b" else schedule, *sizes)


def from_the_first(original: Callable, model: GPTConfig, layout: Layout, stage: int) -> tuple[int, int]:
    if layout.recompute_every == 1:
        return original(model, layout, stage)
    here = layers_in(model.layers, layout.stages, stage, layout.split)
    return sum(i % layout.recompute_every == 0 for i in here), 0


def without_pointwise(layout: Layout) -> str:
    return "none" if layout.recompute in ("pointwise", "operators") else layout.recompute


EVERYTHING = {"weights", "gradients", "optimizer", "activations", "gathered", "tp", "dp", "pp"}
MUTATIONS = {
    "the tied embedding is not exchanged": (traffic, "exchanged", lambda *_: 0, {"pp"}),
    "messages as in 1F1B": (traffic, "messages", as_1f1b, {"pp"}),
    "a message is not sharded": (traffic, "message", lambda o, m, x: o(m, replace(x, sp=False)), {"pp"}),
    "gradients are reduced once": (
        traffic, "reduced", lambda o, m, x, *rest: o(m, replace(x, reduce="step"), *rest), {"dp"},
    ),
    "gradients are not reduced": (traffic, "gradients_reduced", lambda *_: 0, {"dp"}),
    "weights are gathered once": (
        traffic, "gathered", lambda o, m, x, *rest: o(m, replace(x, reshard="step"), *rest), {"dp"},
    ),
    "nothing stays for the next action": (exchanges, "_stays", lambda *_: 0, {"dp", "gathered"}),
    "a stage is gathered at once": (
        memory, "most_gathered", lambda o, m, x, *rest: o(m, replace(x, reshard="step"), *rest), {"gathered"},
    ),
    "layers are split equally": (
        stages, "_layers_of", lambda o, layers, kinds, n, split: o(8 if split else layers, kinds, n, ""), EVERYTHING,
    ),
    "no rank has the embedding twice": (
        exchanges, "stage_sizes", lambda o, *sizes: (o(*sizes)[0], 0), {"dp", "gathered"},
    ),
    "replicated parameters' gradients are not summed": (traffic, "replicated_parameters", lambda *_: 0, {"tp"}),
    "nothing is computed again": (
        traffic, "layer_tp", lambda o, m, x, moe: o(m, replace(x, recompute="none"), moe), {"tp"},
    ),
    "sequence parallelism sends as much": (
        traffic, "layer_tp", lambda o, m, x, moe: o(m, replace(x, sp=False), moe), {"tp"},
    ),
    "the ends send nothing": (traffic, "ends_tp", lambda *_: 0, {"tp"}),
    "all microbatches are in flight": (activations, "in_flight", as_gpipe, {"activations"}),
    "no master weights": (memory, "state_sizes", lambda o, size: (size, size, 2 * size), {"optimizer", "gradients"}),
    "gradients are never full": (
        dry_run, "rank_memory", lambda o, m, x, *rest: o(m, replace(x, reduce="microbatch"), *rest), {"gradients"},
    ),
    "every stage has both ends": (memory, "ends_of", lambda *_: (True, True), EVERYTHING - {"activations"}),
    "activations are not sharded": (
        activations, "layer_saved", lambda o, m, x, *rest: o(m, replace(x, sp=False), *rest), {"activations"},
    ),
    "every third layer, from the first": (stages, "recomputed_of", from_the_first, {"activations"}),
    "what is pointwise is kept": (
        activations, "layer_saved", lambda o, m, x, *rest: o(m, replace(x, recompute=without_pointwise(x)), *rest),
        {"activations"},
    ),
    "a layer saves twice as much": (activations, "layer_saved", twice, {"activations"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_formula_is_caught(measured: Measured, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, where, change, shown = MUTATIONS[name]
    monkeypatch.setattr(module, where, partial(change, getattr(module, where)))
    found = {what for _, what, *_ in differences(measured)}
    assert found
    assert found <= shown


def test_messages_and_flight_without_ranks() -> None:
    for schedule, v in (("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-v", 2), ("dualpipe", 1)):
        layout = Layout(pp=4, v=v, schedule=schedule, microbatches=8)
        rule = messages_by_rule(build(schedule, 4, 8, v))
        assert [messages(layout, rank) for rank in range(4)] == rule, schedule
    assert [max(sum(counts) for counts in peaks) for peaks in in_flight("1f1b", 4, 8, 1)] == [4, 3, 2, 1]
    assert [max(sum(counts) for counts in peaks) for peaks in in_flight("interleaved", 4, 8, 2)] == [11, 9, 7, 5]


def test_the_whole_model_is_the_sum_of_its_ranks() -> None:
    config = GPTConfig(vocabulary=256)
    assert model_parameters(config) == sum(p.numel() for p in GPT(config).parameters())
    layout = Layout(pp=4)
    tied = config.vocabulary * config.hidden  # on the last rank again
    assert sum(sum(parameters(config, layout, rank)) for rank in range(4)) == model_parameters(config) + tied


def test_the_first_microbatches_show_what_all_of_them_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's shortcut, on every rank of every schedule."""
    schedules = {"1f1b": 1, "interleaved": 3, "zb-h1": 1, "zb-h2": 1, "zb-v": 2, "dualpipe": 1, "dualpipev": 2,
                 "gpipe": 1, "naive": 1}  # fmt: skip
    model = GPTConfig(layers=48, heads=4)
    for (schedule, v), p, m in product(schedules.items(), (2, 4), (8, 9, 16, 30)):
        if schedule == "dualpipe" and m % 2:
            continue
        layout = Layout(pp=p, v=v, schedule=schedule, microbatches=m)
        first = [activations.saved_at_peak(model, layout, rank) for rank in range(p)]
        with monkeypatch.context() as every_microbatch:
            every_microbatch.setattr(activations, "filling", lambda schedule, p, m: m)
            assert [activations.saved_at_peak(model, layout, rank) for rank in range(p)] == first, (schedule, p, m)
