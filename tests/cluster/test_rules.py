"""The rules as data: the lessons refuse the same configurations for the same reasons, and what is suggested works."""

import argparse
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import core.proof.arguments
import pipeline.evidence.training
import pipeline.stages
import zero.evidence.training
from cluster import rules
from cluster.planner.hardware import PRESETS as MACHINES
from cluster.planner.layout import FOLDED, Layout, add_flags
from cluster.planner.layout import given as decided
from cluster.planner.models import PRESETS
from cluster.planner.options import case_of, parser
from cluster.planner.rulebook import MEANINGFUL, REFUSING, RULES, Case, broken, keeps_all
from cluster.planner.search import legal
from cluster.rules import check, explain, nearest
from cluster.run import arguments as run_arguments
from cluster.run import data as run_data
from cluster.run.recipe import RECIPE
from core.mesh import axis_sizes
from core.model.config import ModelConfig
from core.proof import rulebook
from core.proof.arguments import TRAINING
from core.proof.lesson import Lesson
from core.proof.rules import Rule
from expert_parallel.engine.routing import ROUTING, Routing
from pipeline.schedules import SCHEDULES
from sequence_parallel.engine.ulysses import CP_KINDS
from sequence_parallel.evidence.rules import check_context, check_sequence_parallel

BY_NAME = {rule.name: rule for rule in RULES}
GPT = ModelConfig()


def lesson_args(**sizes: object) -> Namespace:
    """The arguments of a lesson that trains the GPT, with these."""
    lesson = Lesson("pipeline/x.py", "07", "", "", "")
    core.proof.arguments.add_model_flags(lesson)
    usual = vars(lesson.parser.parse_args([])) | {"microbatches": 1, "bucket": 64, "chunks": 2, "schedule": "dualpipe"}
    return Namespace(**(usual | sizes))


def case(layout: Layout, args: Namespace | None = None, **more: object) -> Case:
    args = args or lesson_args()
    sizes = ("layers", "hidden", "heads", "sequence", "feed_forward", "attention", "dropout")
    return Case(layout, replace(GPT, **{size: getattr(args, size) for size in sizes}), **more)


Pair = tuple[Case, Callable[[], object]]


def sharded_heads() -> Iterator[Pair]:
    for heads, f, t in product((2, 4, 8), (64, 96, 100), (2, 3, 4)):
        args = lesson_args(heads=heads, feed_forward=f)
        yield case(Layout(tp=t), args), lambda a=args, t=t: core.proof.arguments.check_cuts(a, t)


def sharded_kv_heads() -> Iterator[Pair]:
    for kv_heads, t in product((1, 2, 3, 4, 12), (2, 3, 4, 6)):
        args = lesson_args(model="llama", heads=12, hidden=48, kv_heads=kv_heads)
        model = core.proof.arguments.configuration(args)
        yield Case(Layout(tp=t), model), lambda a=args, t=t: core.proof.arguments.check_cuts(a, t)


def sharded_sequence() -> Iterator[Pair]:
    for sequence, t in product((48, 64, 100), (2, 4, 8)):
        args = lesson_args(sequence=sequence, heads=8)
        yield case(Layout(tp=t, sp=True), args), lambda a=args, t=t: check_sequence_parallel(a, t)


def one_rank_of_sp() -> Iterator[Pair]:
    for t in (1, 2):
        yield case(Layout(tp=t, sp=True)), lambda t=t: check_sequence_parallel(lesson_args(), t)


def layers() -> Iterator[Pair]:
    for n, p, v in product((4, 6, 8, 12), (2, 3, 4), (1, 2)):
        layout = Layout(pp=p, v=v, schedule="interleaved" if v > 1 else "1f1b", microbatches=8)
        yield case(layout, lesson_args(layers=n)), lambda n=n, s=p * v: pipeline.stages.layers_in(n, s, 0)


def batches() -> Iterator[Pair]:
    for batch, n, m in product((8, 12, 16), (1, 2, 3), (1, 2, 4)):
        args = lesson_args(batch=batch, microbatches=m)
        layout = Layout(dp=n, microbatches=m, microbatch=max(1, batch // (n * m)))
        yield case(layout, args, batch=batch), lambda a=args, n=n: zero.evidence.training.check(a, n)


def no_microbatch() -> Iterator[Pair]:
    for m in (0, 1):
        yield case(Layout(microbatches=m)), lambda m=m: pipeline.evidence.training.check(lesson_args(microbatches=m), 2)


def axes() -> Iterator[Pair]:
    for world, tp, dp, pp in product((4, 8), (0, 1, 2), (1, 2), (2, 4)):
        layout = Layout(tp=tp, dp=dp, pp=pp, microbatches=8)
        yield case(layout, world=world), lambda w=world, t=tp, d=dp, p=pp: axis_sizes(w, tp=t, dp=d, pp=p)


def experts() -> Iterator[Pair]:
    for dp, ep, etp in product((2, 4, 6), (1, 2, 4), (1, 2)):
        layout = Layout(dp=dp, ep=ep, etp=etp)
        moe = replace(GPT, experts=8, top_k=2)
        yield Case(layout, moe), lambda d=dp, e=ep, x=etp: axis_sizes(d, dp=d, ep=e, etp=x)


def dualpipes() -> Iterator[Pair]:
    from pipeline import dualpipe

    for name, p, m in product(("dualpipe", "dualpipev"), (2, 3, 4), (4, 6, 7, 8, 9, 16)):
        args = lesson_args(schedule=name, microbatches=m, layers=24, batch=m)
        layout = Layout(pp=p, v=1 + (name in FOLDED), schedule=name, microbatches=m)
        yield case(layout, args), lambda a=args, p=p: dualpipe.check(a, p)


def stages_of_a_rank() -> Iterator[Pair]:
    from pipeline import interleaved

    for v in (0, 2):
        args, layout = lesson_args(chunks=v), Layout(pp=2, v=v, schedule="interleaved", microbatches=2)
        yield case(layout, args), lambda a=args: interleaved.check(a, 2)


def cp_lessons() -> Iterator[Pair]:
    for c, u, heads, sequence, attention in product((2, 4), (1, 2, 3, 4), (4, 6), (48, 60, 64), ("sdpa", "softmax")):
        args = lesson_args(heads=heads, hidden=96, sequence=sequence, attention=attention)

        def lesson(args: Namespace = args, c: int = c, u: int = u) -> None:
            check_context(args, c, u, "zigzag")

        yield case(Layout(cp=c, ulysses=u), args), lesson


def moe_lessons() -> Iterator[Pair]:
    training = import_module("expert_parallel.evidence.flags")
    lesson = Lesson("expert_parallel/x.py", "CODE 04", "", "", "")
    training.add_flags(lesson)
    training.add_parallel_flags(lesson)
    usual = vars(lesson.parser.parse_args([]))
    for ranks, ep, etp, e, k in product((4, 6), (2, 3, 4), (1, 2, 3), (4, 6), (2, 5)):
        args = Namespace(**(usual | {"ep": ep, "etp": etp, "experts": e, "top_k": k, "batch": 12, "feed_forward": 128}))
        model = replace(case(Layout(), args).model, experts=e, top_k=k, expert_feed_forward=128)
        yield Case(Layout(dp=ranks, ep=ep, etp=etp), model), lambda a=args, n=ranks: training.check(a, n)


LESSONS = {
    "tensor parallelism": (sharded_heads, {"tp: heads", "tp: feed-forward"}),
    "tensor parallelism of a Llama": (sharded_kv_heads, {"tp: key and value heads"}),
    "sequence parallelism": (sharded_sequence, {"sp: sequence"}),
    "sequence parallelism, one rank": (one_rank_of_sp, {"sp: tp"}),
    "stages": (layers, {"pp: layers"}),
    "data parallelism": (batches, {"batch"}),
    "no microbatch": (no_microbatch, {"microbatches"}),
    "mesh": (axes, {"tp: ranks", "ranks"}),
    "mesh, experts": (experts, {"experts: ranks"}),
    "dualpipe": (dualpipes, {"dualpipe: ranks", "dualpipe: microbatches", "dualpipev: microbatches"}),
    "interleaved": (stages_of_a_rank, {"stages a rank"}),
    "context parallelism": (cp_lessons, {"cp: attention", "cp: ulysses", "cp: heads", "cp: sequence"}),
    "experts": (moe_lessons, {"experts: ep", "experts: etp", "experts: top k"}),
}


@pytest.mark.parametrize("name", LESSONS)
def test_the_lesson_refuses_the_same_for_the_same_reason(name: str) -> None:
    pairs, about = LESSONS[name]
    seen: set[str] = set()
    kept = 0
    for refused, lesson in pairs():
        failing = [rule for rule in broken(refused) if rule.name in about]
        if not failing:
            lesson()  # refuses nothing that the rules allow
            kept += 1
            continue
        with pytest.raises(ValueError) as refusal:
            lesson()
        reasons = [rule.reason.format_map(vars(refused.sizes)) for rule in failing]
        assert any(reason in str(refusal.value) for reason in reasons), f"{refusal.value} has none of {reasons}"
        seen |= {rule.name for rule in failing}
    assert seen == about, "every rule was broken by something"
    assert kept, "and not by everything"


def test_the_model_and_the_planner_refuse_by_the_same_rules() -> None:
    for heads, dropout, attention in product((3, 4), (0.0, 0.1), ("sdpa", "softmax")):
        args = lesson_args(heads=heads, dropout=dropout, attention=attention, head_size=None)
        failing = [rule for rule in (rulebook.HEADS, rulebook.DROPOUT) if not rule.holds(args)]
        assert (rulebook.HEADS in failing, rulebook.DROPOUT in failing) == (heads == 3, dropout and attention == "sdpa")
        if not failing:
            core.proof.arguments.configuration(args)
            continue
        with pytest.raises(ValueError) as refusal:
            core.proof.arguments.configuration(args)
        assert str(refusal.value).startswith(failing[0].message(args))
    shared = {rule for rule in vars(rulebook).values() if isinstance(rule, Rule)} | {*rulebook.AXES}
    of_models = {rulebook.ATTENTION, rulebook.DROPOUT_SHARE, rulebook.NORM, rulebook.KV_HEADS, rulebook.ROTARY_PAIRS}
    assert shared - {*RULES} == of_models, "which only a model can break"


BROKEN = {
    "tp: ranks": Layout(tp=0), "ulysses: ranks": Layout(ulysses=0), "stages a rank": Layout(v=0),
    "microbatches": Layout(microbatches=0), "loss-chunk": Layout(loss_chunk=-1),
    "tp: heads": Layout(tp=3), "tp: key and value heads": Layout(tp=3), "tp: feed-forward": Layout(tp=32),
    "tp: fast links": Layout(tp=16), "sp: tp": Layout(sp=True), "sp: sequence": Layout(tp=8, sp=True, cp=2048),
    "cp: ulysses": Layout(cp=4, ulysses=3), "cp: heads": Layout(cp=64, ulysses=64), "cp: sequence": Layout(cp=3),
    "pp: layers": Layout(pp=18, microbatches=18), "pp: several stages": Layout(v=2, schedule="interleaved"),
    "pp: stages": Layout(pp=2, microbatches=2, split="E t*16|m L"),
    "pp: layers of stages": Layout(pp=2, microbatches=2, split="E t*16|t*15 L"),
    "pp: number of stages": Layout(pp=2, microbatches=2, split="E t*16|t*8|t*8 L"),
    "pp: idle ranks": Layout(pp=4, microbatches=4, split="E t*16||t*8|t*8 L"),
    "pp: schedule": Layout(pp=2, v=2, microbatches=2), "pp: microbatches": Layout(pp=4, microbatches=2),
    "dualpipe: ranks": Layout(pp=1, schedule="dualpipe", microbatches=2),
    "dualpipe: microbatches": Layout(pp=4, schedule="dualpipe", microbatches=7),
    "dualpipev: microbatches": Layout(pp=4, v=2, schedule="dualpipev", microbatches=7),
    "experts: ranks": Layout(dp=4, ep=8),
    "experts: ep": Layout(dp=3, ep=3), "experts: etp": Layout(dp=3, etp=3),
}  # fmt: skip


PEERS = ("Megatron-LM, ", "torchtitan, ", "torch, ", "torch.", "DeepSpeed, ", "DeepSeek's DualPipe, ", "transformers, ")


def looks_at(rule: Rule) -> set[str]:
    """The sizes and choices of a run that decide on it."""
    every = vars(Case(Layout(), GPT).sizes).keys() | vars(Routing()).keys() | {
        action.dest for action in train_flags()._actions
    }  # fmt: skip
    return every & set(rule.holds.__code__.co_names)


def train_flags() -> argparse.ArgumentParser:
    frame = Lesson("cluster/train.py", "02", "", "", "")
    run_arguments.add_all_flags(frame)
    return frame.parser


def test_what_is_refused_together_a_peer_refuses_too_or_it_cannot_be() -> None:
    """Bug: a combination is refused that is only not built."""
    of_a_run = (*run_arguments.RULES, *RECIPE, *run_data.RULES, *TRAINING, *ROUTING)
    combined = {*REFUSING, *(rule for rule in of_a_run if len(looks_at(rule)) > 1)}
    values = {"min-lr", "init"}  # a value's bounds, and whether a file is there
    without = {rule.name for rule in combined if not rule.peer.startswith((*PEERS, "cannot be: "))}
    assert without - values - {"experts: dualpipe"} == set()
    assert {"pack", "world", "tokens and data", "top k: softmax"} <= {rule.name for rule in combined}
    silent = replace(BY_NAME["tp: heads"], peer="")
    assert not silent.peer.startswith((*PEERS, "cannot be: "))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused_says_why_and_what_works(name: str) -> None:
    model = replace(PRESETS["mixtral-8x7b"], feed_forward=14336 + 16, expert_feed_forward=14336)
    refused = Case(BROKEN[name], model, MACHINES["dgx-a100"])
    assert name in [rule.name for rule in broken(refused, advice=True)]
    found = nearest(refused)
    assert found is not None
    assert keeps_all(replace(refused, layout=found), MEANINGFUL)
    if not BY_NAME[name].advice:
        with pytest.raises(ValueError, match="; use --tp") as refusal:
            check(BROKEN[name], model, MACHINES["dgx-a100"])
        assert shlex.join(found.flags(after=BROKEN[name])) in str(refusal.value)
    assert "NO" in explain(refused) or "advice" in explain(refused)


def test_a_batch_is_all_microbatches_of_all_pipelines() -> None:
    layout = Layout(dp=2, microbatches=2)
    check(layout, GPT, world=2, batch=4)
    with pytest.raises(ValueError, match="--batch 8: --dp 2 x --microbatches 2 x --microbatch 1 = 4 samples; use "):
        check(layout, GPT, world=2, batch=8)


sizes = st.sampled_from([1, 1, 2, 3, 4])
layouts = st.builds(
    Layout, tp=sizes, cp=sizes, ep=sizes, etp=sizes, pp=sizes, dp=sizes, v=sizes, sp=st.booleans(), ulysses=sizes,
    schedule=st.sampled_from(list(SCHEDULES)), zero=st.integers(0, 3), microbatch=sizes, microbatches=sizes,
    cp_kind=st.sampled_from(CP_KINDS), split=st.sampled_from(["", "", "E t*48|t*48 L", "E (t*8|)*15 t*6 L", "E|L m"]),
)  # fmt: skip


@given(layouts, st.sampled_from(["gpt3-175b", "mixtral-8x7b", "deepseek-v3", "llama3-405b"]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_check_refuses_what_breaks_a_rule_and_suggests_what_keeps_all(layout: Layout, name: str, advice: bool) -> None:
    refused = Case(layout, PRESETS[name], MACHINES["dgx-h100"])
    assert keeps_all(refused, MEANINGFUL if advice else REFUSING) == (not broken(refused, advice))
    if not broken(refused):
        check(layout, PRESETS[name], MACHINES["dgx-h100"])
        assert nearest(refused) == layout or broken(refused, advice=True), "nothing is nearer than itself"
        return
    with pytest.raises(ValueError) as refusal:
        check(layout, PRESETS[name], MACHINES["dgx-h100"])
    words = shlex.split(str(refusal.value).partition("; use ")[2])
    if words:
        args = parser("rules", "").parse_args(["--model", name, *layout.flags(), *words])  # as a user adds them
        assert not broken(case_of(args)), f"the suggestion {' '.join(words)} breaks a rule"
    else:
        assert "no layout of" in str(refusal.value)


@given(layouts)
@settings(max_examples=50, deadline=None)
def test_flags_say_the_layout(layout: Layout) -> None:
    made = argparse.ArgumentParser()
    add_flags(made)
    assert Layout(**decided(made.parse_args(layout.flags()))) == layout


def test_the_search_keeps_what_flags_say_of_its_layouts() -> None:
    """Each in its own field: a choice at another's place would be a layout that nobody asked for."""
    said = {"placement": "contiguous", "cp_kind": "all-gather", "loss_chunk": 7, "reduce": "step", "reshard": "step"}
    found = list(legal(GPT, None, 4, 8, {"cp": [2], "zero": [3]} | {name: [value] for name, value in said.items()}))
    assert found
    for layout in found:
        assert {name: getattr(layout, name) for name in said} == said
    assert {layout.loss_chunk for layout in legal(GPT, None, 4, 8, {})} == {0}


def test_every_rule_is_complete() -> None:
    assert len(BY_NAME) == len(RULES)
    sizes = case(Layout()).sizes
    for rule in RULES:
        assert rule.holds(sizes), f"{rule.name}: one process breaks nothing"
        assert rule.message(sizes)
        assert rule.source


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rules", *flags])
        return rules.main(), *capsys.readouterr()

    code, out, _ = run("--world", "64", "--batch", "512", "--tp", "3", "--pp", "4")
    assert code == 2
    assert "refused: --tp 3 --cp 1 --dp 5 --pp 4: tp x cp x dp x pp = 60 ranks, but 64" in out
    assert out.splitlines()[-1] == "use --tp 4 --pp 4 --dp 4 --microbatches 128"
    code, out, _ = run("--world", "64", "--batch", "512", "--tp", "8", "--pp", "4")
    assert code == 0
    assert out.splitlines()[-1] == "every rule holds"
    for flags, why in (
        (("--machine", "nowhere"), "--machine nowhere: No such file"),
        (("--heads", "0"), "--heads 0: must be at least 1; use --heads 8"),
        (("--schedule", "zigzag"), "--schedule: invalid choice"),
        (("--world", str(10**18)), f"--world {10**18}: is more than 10000000; use --world 10000000"),
        (("--experts", "4", "--top-k", "0"), "--top-k 0: a token needs an expert; use --top-k 1"),
        (("--config", "/nowhere"), "--config /nowhere: nowhere: No such file"),
    ):
        code, out, err = run(*flags)
        assert (code, out) == (2, "")
        assert err.startswith(f"cluster/rules.py: {why}")
        assert err.count("\n") == 1
