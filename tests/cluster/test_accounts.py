"""The planner's bytes and elements are those that real ranks hold and send, as the ledger counts them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from einops import rearrange

import megatron_tp.layers
import megatron_tp.loss
import pipeline.stages
import sequence_parallel.layers
import sequence_parallel.loss
from cluster import memory, traffic
from cluster.layout import Layout
from cluster.memory import held, in_flight, parameters, whole_parameters
from cluster.models import of_gpt
from cluster.traffic import messages, sent
from core.gpt import GPT, GPTConfig, materialize, token_loss
from core.ledger import Ledger, SavedActivations, VirtualClock
from core.mesh import Mesh
from core.seeded import Draw
from core.shards import shard_of
from core.text import Text
from pipeline.evidence import messages_by_rule
from pipeline.runtime import Pipeline, Trace
from pipeline.schedules import build
from sequence_parallel.recompute import recompute
from tests.pool import Pool
from tests.zero.test_stages import STAGES

CPU, FLOAT64 = torch.device("cpu"), torch.float64
ZERO = ("ddp", "zero1", "zero2", "zero3")
Account = tuple[dict[str, float], dict[str, float]]


def account(config: GPTConfig, layout: Layout, dtype: torch.dtype) -> tuple[int, Account]:
    """One step on one rank: its place in the pipeline, what it holds in bytes, and what it sent, by axis."""
    ledger = Ledger()
    mesh = Mesh("cpu", ledger, 30.0, tp=layout.tp, cp=layout.cp, dp=layout.dp, pp=layout.pp)
    tp, dp, pp = mesh["tp"], mesh["dp"], mesh["pp"]
    data = dp  # whose ranks have seen other tokens
    topic, loss_of = megatron_tp.layers, megatron_tp.loss.token_loss
    if layout.sp:
        topic, loss_of = sequence_parallel.layers, sequence_parallel.loss.token_loss
    m, tokens = layout.microbatches, layout.batch * config.sequence
    loss = partial(token_loss, tokens=tokens)
    if layout.tp > 1:
        loss = partial(loss_of, tokens=tokens, axis=tp, vocabulary=config.vocabulary)
    schedule = build(layout.schedule, layout.pp, m, layout.v)
    model = GPT(config)
    if layout.pp > 1:
        model = pipeline.stages.cut(model, layout.held(pp.index), layout.stages)
    model = topic.parallelize(model, tp) if layout.tp > 1 else model
    attention = None
    if layout.cp > 1:
        cp_module, hybrid = (import_module(f"sequence_parallel.{name}") for name in ("context", "hybrid"))
        attention = hybrid.context_parallel(mesh["cp"], CPU, layout.ulysses, layout.placement == "zigzag")
        model, data = cp_module.parallelize(model, attention), mesh.joined("cp", "dp")
    materialize(recompute(model, layout.recompute), 0, CPU, dtype)
    count = {"parameters": sum(p.numel() for p in model.parameters())}
    count["whole"] = sum(p.numel() for p in model.parameters() if layout.tp > 1 and shard_of(p) is None)
    master = torch.float32 if dtype == torch.bfloat16 else dtype
    zero = STAGES[ZERO[layout.zero]](model, data, partial(torch.optim.AdamW, lr=1e-3), None, master)
    batch = (t.chunk(layout.dp)[dp.index] for t in Text(None, config.sequence).batch(0, 0, layout.batch))
    batch = (t if attention is None else cp_module.part(t, attention) for t in batch)
    inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch)
    draw, saved = Draw(0, 0, 0), SavedActivations([*model.parameters(), inputs, targets])
    zero.zero_grad()
    if layout.pp > 1:
        shape = (layout.microbatch, config.sequence // layout.sequence_parts, config.hidden)
        stages = pipeline.stages.each_stage(model, layout.held(pp.index), layout.stages)
        copies = pipeline.stages.Copies(model, pp, [layout.held(r) for r in range(layout.pp)])
        runtime = Pipeline(stages, loss, schedule, pp, shape, dtype, CPU)
        trace = Trace(VirtualClock(CPU), saved)
        runtime.step(inputs, targets, draw, trace)
        copies.sum_gradients()
        zero.reduce()
        runtime.close()
    else:
        for i in range(m):
            with saved:
                value = loss(model(inputs[i], draw), targets[i])
            zero.backward(value, last=i == m - 1)
            del value
    if attention is not None:
        attention.close()
    if layout.sp:
        zero.sum_over(tp, lambda p: shard_of(p) is None)
    count |= zero.held()
    zero.clip_and_total(1.0, torch.zeros(()), [tp, pp])
    zero.step()
    count["optimizer"] = zero.held()["optimizer"]
    count["activations"] = saved.peak
    found: Counter[str] = Counter()
    for (operation, name), entry in ledger.traffic.items():
        if not name.endswith("norm") and operation != "send clock":
            found["dp" if " x " in name else name.split()[0]] += entry.elements
    return pp.index, (count, dict(found))


def predicted(config: GPTConfig, layout: Layout, rank: int, itemsize: int) -> Account:
    model, experts_and_others = of_gpt(config), parameters(of_gpt(config), layout, rank)
    what = held(model, layout, rank, itemsize)
    count = {"parameters": sum(experts_and_others), "weights": what.weights, "gradients": what.gradients}
    count["whole"] = whole_parameters(model, layout, rank) if layout.tp > 1 else 0
    count |= {"optimizer": what.optimizer, "activations": what.activations}
    return count, sent(model, layout, rank)


def accounts(cases: list[tuple[GPTConfig, Layout, torch.dtype]]) -> list[tuple[int, Account]]:
    return [account(*case) for case in cases]


SMALL = {"sequence": 16, "hidden": 32, "layers": 8, "heads": 4, "vocabulary": 256}
ALL = {"attention": "softmax", "dropout": 0.1}
CASES = {
    "tp dp zero-0": ({}, Layout(tp=2, dp=4, zero=0, microbatch=2, microbatches=2)),
    "tp dp zero-1, full": (ALL, Layout(tp=4, dp=2, zero=1, microbatches=2, recompute="full")),
    "sp dp zero-2, selective": (ALL, Layout(tp=2, sp=True, dp=4, zero=2, microbatches=3, recompute="selective")),
    "sp dp zero-3, full": (ALL, Layout(tp=2, sp=True, dp=4, zero=3, microbatches=2, recompute="full")),
    "zero-3": ({}, Layout(dp=8, zero=3, microbatches=2)),
    "untied sp, full": ({"tied": False}, Layout(tp=8, sp=True, microbatch=2, recompute="full")),
    "3D 1f1b": ({}, Layout(tp=2, dp=2, pp=2, zero=1, microbatch=2, microbatches=4)),
    "3D interleaved sp": (ALL, Layout(tp=2, sp=True, dp=2, pp=2, v=2, schedule="interleaved", microbatches=4)),
    "3D interleaved full": ({}, Layout(tp=2, pp=4, v=2, schedule="interleaved", microbatches=6, recompute="full")),
    "gpipe": ({"tied": False}, Layout(dp=2, pp=4, schedule="gpipe", microbatches=4)),
    "1f1b": (ALL, Layout(pp=8, microbatches=16)),
    "dualpipe": ({}, Layout(dp=2, pp=4, zero=1, schedule="dualpipe", microbatches=8)),
    "zb-h1": ({}, Layout(dp=2, pp=4, schedule="zb-h1", microbatches=8)),
    "zb-v": ({}, Layout(dp=2, pp=4, v=2, schedule="zb-v", microbatches=8)),
}
if Path(sequence_parallel.layers.__file__).with_name("hybrid.py").exists():
    CASES |= {
        "ring": ({}, Layout(cp=4, dp=2, zero=1, microbatch=2)),
        "ring in order, full": ({}, Layout(cp=8, placement="contiguous", microbatches=2, recompute="full")),
        "ulysses, selective": ({}, Layout(cp=4, ulysses=4, dp=2, zero=2, recompute="selective")),
        "hybrid tp pp": ({}, Layout(tp=2, cp=2, pp=2, microbatches=2)),
        "hybrid sp, full": ({}, Layout(tp=2, sp=True, cp=4, ulysses=2, recompute="full")),
    }
SPLIT = ("dualpipe", "zb-h1", "zb-v")  # what of a layer is left at the end of an I, to a few numbers a token


def account_of_experts(config: GPTConfig, layout: Layout, top_k: int) -> tuple[int, Account]:
    """The same of a mixture of experts over dp ranks, in float64."""
    layers, moe, gating = (import_module(f"expert_parallel.{name}") for name in ("layers", "moe", "gating"))
    ledger = Ledger()
    mesh = Mesh("cpu", ledger, 30.0, dp=layout.dp, ep=layout.ep, etp=layout.etp)
    dp, etp = mesh["dp"], mesh["etp"]
    routing = gating.Routing(experts=EXPERTS, top_k=top_k, aux=0.0, z=0.0)
    model = moe.to_moe(GPT(config), moe.MoEConfig(routing))
    model = layers.parallelize(model, mesh["ep"], etp, gating.Spread((dp,)))
    materialize(recompute(model, layout.recompute), 0, CPU, FLOAT64)
    experts = layers.expert_parameters(model)
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not e for e in experts)]
    inputs, targets = (t.chunk(dp.size)[dp.index] for t in Text(None, config.sequence).batch(0, 0, layout.batch))
    saved = SavedActivations([*model.parameters(), inputs, targets])
    with saved:
        loss = token_loss(model(inputs, Draw(0, 0, 0)), targets, targets.numel())
    loss.backward()
    layers.sum_gradients(rest, dp)
    layers.sum_expert_gradients(model, mesh["edp"], etp)
    found: Counter[str] = Counter()
    for (_, name), entry in ledger.traffic.items():
        found[name] += entry.elements
    sizes = {"experts": sum(p.numel() for p in experts), "others": sum(p.numel() for p in rest)}
    return dp.index, (sizes | {"activations": saved.peak}, dict(found))


EXPERTS = 8
WITH_EXPERTS = (
    (Layout(dp=8, ep=4, microbatch=2), 2),
    (Layout(dp=8, ep=2, etp=2, microbatch=2), 2),
    (Layout(dp=8, ep=8, microbatch=2, recompute="full"), 3),
)


def experts_accounts(config: GPTConfig) -> list[tuple[int, Account]]:
    return [account_of_experts(config, layout, top_k) for layout, top_k in WITH_EXPERTS]


@pytest.mark.skipif(not Path(__file__).parents[2].joinpath("expert_parallel", "layers.py").exists(), reason="not here")
def test_what_a_rank_with_experts_holds_and_sends(pool: Pool) -> None:
    """Parameters exactly; what hangs on the router's choice as the mean of all ranks, nearly as if it were even."""
    config = GPTConfig(**SMALL)
    model = replace(of_gpt(config), experts=EXPERTS)
    everyone = pool.run(8, experts_accounts, config)
    for i, (layout, top_k) in enumerate(WITH_EXPERTS):
        here = replace(model, top_k=top_k)
        experts, others = parameters(here, layout)
        formula = sent(here, layout) | {"experts": experts, "others": others}
        formula["activations"] = held(here, layout, itemsize=8).activations
        # The sum of the second biases over etp, once a step.
        formula["etp"] = formula.get("etp", 0) + here.layers * EXPERTS / layout.ep * here.hidden * (layout.etp > 1)
        for what, value in formula.items():
            mean = sum((count | sent_).get(what, 0) for _, (count, sent_) in (rank[i] for rank in everyone)) / 8
            near = {"activations": 0.05, "ep": 0.1, "etp": 0.01}.get(what, 1e-9)
            assert mean == pytest.approx(value, rel=near), (layout, what)


RUNS = [
    (GPTConfig(**(SMALL | ({"heads": 8} if layout.tp == 8 else {}) | sizes)), layout, (torch.bfloat16, FLOAT64)[i % 2])
    for i, (sizes, layout) in enumerate(CASES.values())
]


@pytest.fixture(scope="module")
def measured(pool: Pool) -> list[list[tuple[int, Account]]]:
    """Every rank's account of every case."""
    return pool.run(8, accounts, RUNS)


def differences(measured: list[list[tuple[int, Account]]]) -> set[tuple]:
    """Where formula and measurement differ: (case, what, rank, measured, formula)."""
    wrong = set()
    for rank, found in enumerate(measured):
        for name, (config, layout, dtype), (place, (count, sent_)) in zip(CASES, RUNS, found, strict=True):
            expected, elements = predicted(config, layout, place, dtype.itemsize)
            for what in count.keys() | sent_.keys() | elements.keys():
                value, formula = (each.get(what, 0) for each in (count | sent_, expected | elements))
                near = 0.001
                if what == "activations" and name in SPLIT:
                    near = 0.01
                if what == "tp" and layout.sp and layout.zero:  # a rank's part has more or fewer whole parameters
                    near = 0.01
                positions = 8 * config.sequence * (what == "activations" and layout.cp > 1)  # or only this rank's
                if value != pytest.approx(formula, rel=near, abs=positions):
                    wrong.add((name, what, rank, value, formula))
    return wrong


def test_what_a_rank_holds_and_sends(measured: list[list[tuple[int, Account]]]) -> None:
    """By the ledger: a wrong formula, or a change of the code that it describes, shows here."""
    wrong = differences(measured)
    assert not wrong, "\n".join(map(str, sorted(wrong)))


def twice(original: Callable, *sizes: object) -> object:
    return 2 * original(*sizes)


def as_1f1b(original: Callable, layout: Layout, rank: int) -> int:
    return original(replace(layout, v=1, schedule="1f1b"), rank)


def as_gpipe(original: Callable, schedule: str, *sizes: int) -> list:
    return original("gpipe" if schedule == "1f1b" else schedule, *sizes)


EVERYTHING = {"parameters", "whole", "weights", "gradients", "optimizer", "activations", "tp", "dp", "pp"}
MUTATIONS = {
    "the tied embedding is not exchanged": (traffic, "exchanged", lambda *_: 0, {"pp"}),
    "messages as in 1F1B": (traffic, "messages", as_1f1b, {"pp"}),
    "a message is not cut": (traffic, "message", lambda o, m, x: o(m, replace(x, sp=False)), {"pp"}),
    "gradients are reduced once": (traffic, "times_reduced", lambda *_: 2, {"dp"}),
    "whole parameters' gradients are not summed": (traffic, "whole_parameters", lambda *_: 0, {"tp"}),
    "nothing is computed again": (traffic, "layer_tp", lambda o, m, x: o(m, replace(x, recompute="none")), {"tp"}),
    "sequence parallelism sends as much": (traffic, "layer_tp", lambda o, m, x: o(m, replace(x, sp=False)), {"tp"}),
    "the ends send nothing": (traffic, "ends_tp", lambda *_: 0, {"tp"}),
    "all microbatches are in flight": (memory, "in_flight", as_gpipe, {"activations"}),
    "no master weights": (memory, "state_sizes", lambda o, size: (size, size, 2 * size), {"optimizer"}),
    "every stage has both ends": (memory, "ends_of", lambda *_: (True, True), EVERYTHING - {"activations"}),
    "activations are not cut": (
        memory, "layer_saved", lambda o, m, x, *rest: o(m, replace(x, sp=False), *rest), {"activations"},
    ),
    "a layer saves twice as much": (memory, "layer_saved", twice, {"activations"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_formula_is_caught(
    measured: list[list[tuple[int, Account]]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
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
    model = of_gpt(config)
    assert model.parameters() == sum(p.numel() for p in GPT(config).parameters())
    layout = Layout(pp=4)
    tied = model.vocabulary * model.hidden  # on the last rank again
    assert sum(sum(parameters(model, layout, rank)) for rank in range(4)) == model.parameters() + tied


def test_the_first_microbatches_show_what_all_of_them_hold() -> None:
    """The planner's shortcut, on every rank of every schedule."""
    schedules = {"1f1b": 1, "interleaved": 3, "zb-h1": 1, "zb-h2": 1, "zb-v": 2, "dualpipe": 1, "dualpipev": 2}
    model = of_gpt(GPTConfig(layers=48, heads=4))
    for (schedule, v), p, m in product(schedules.items(), (2, 4), (8, 9, 16, 30)):
        if schedule == "dualpipe" and m % 2:
            continue
        layout = Layout(pp=p, v=v, schedule=schedule, microbatches=m)
        for rank in range(p):
            every = memory.saved_at_peak(model, layout, rank)
            assert memory.saved_at_peak(model, layout, rank, quick=True) == every, (schedule, p, m, rank)
