"""The planner against the runs published since 2021; and that a model of time or memory that lacks something is caught.

Bars are claims of `cluster/accuracy.py`; here each is broken once.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from cluster.evidence.todays_runs import BARS, MEMORY, PAIRS, by_source
from cluster.links import messages
from cluster.planner import fitting, overlap, steptime
from cluster.planner.answers import RUNS, WITHIN
from cluster.planner.counting import model_parameters
from cluster.planner.fitting import fit, fitted_to, predict
from cluster.planner.machines import PRESETS
from cluster.planner.rows import FILE, published, row_of, rows
from cluster.planner.software import BEGIN, CONSTANTS, FITTED, FITTED_TO, NAMED, constants_of
from cluster.planner.validation import holdings, outcomes, pairs, quantiles, too_large, with_committed, without_sources

FEW = 4  # constants of a program
LIMIT = 0.085  # median error of the memory of Megatron-Core's runs


@cache
def found() -> list:
    return outcomes(published())[0]


def test_constants_are_few_and_those_that_fit() -> None:
    """Refitted from the table. Bugs: a constant changed by hand; one of many, so that each run has its own."""
    assert all(len(names) <= FEW for names in FITTED.values())
    assert set(CONSTANTS) == set(FITTED) == set(NAMED) == {software.name for software in BEGIN}
    for name in FITTED:
        if few := fitted_to(published(), name):
            again = fit(few, name, steps=1).software
            for constant, value in zip(FITTED[name], CONSTANTS[name], strict=True):
                assert getattr(again, constant) == pytest.approx(value, rel=0.01), (name, constant)


def test_parameters_are_those_that_are_printed_to_the_unit() -> None:
    counted = 0
    for row in published():
        if printed := re.search(r"(\d{8,}) params", row.cells["model"]):
            assert model_parameters(row.model) == int(printed[1])
            counted += 1
    assert counted == 61


def test_what_is_left_out_has_a_reason() -> None:
    left = [row for row in published() if row.why]
    assert len(published()) == 460
    assert len(left) <= 100
    assert not [row for row in left if row.cells["gpu"].startswith("H100") and row.cells["precision"] == "BF16"
                and re.match(r"Llama|MPT|GPT-\d|Nemotron4|Qwen3-2|DeepSeek", row.cells["model"])
                and row.cells["tokens_per_s_per_gpu"] and row.cells["gbs"]]  # fmt: skip


def test_a_run_is_predicted_without_its_like() -> None:
    """The ten runs of one model on 8 GPUs, sped up ten times, change what is predicted of others only."""
    few = fitted_to(published(), "nanotron")
    group = few[0].group
    lied = [replace(row, seconds=row.seconds / 10) if row.group == group else row for row in few]
    honest, told = fit(few, "nanotron", 1), fit(lied, "nanotron", 1)
    alone, again = honest.without(group), told.without(group)
    for name in FITTED["nanotron"]:
        assert getattr(again, name) == pytest.approx(getattr(alone, name), rel=0.02)
    assert told.software != honest.software


# ---- The bars, and what breaks them ----------------------------------------------------------------------------------


def within_bars(several: list) -> dict[str, bool]:
    holds = {}
    for kind, (middle_bar, ninth_bar) in BARS.items():
        middle, ninth, _ = quantiles(x.error for x in several if x.counts and x.dense == (kind == "dense"))
        holds[kind] = middle <= middle_bar and ninth <= ninth_bar
    return holds


def test_bars() -> None:
    assert within_bars(found()) == dict.fromkeys(BARS, True)
    assert within_bars(with_committed(published())) == dict.fromkeys(BARS, True)


def test_what_is_said_of_errors_is_what_they_are() -> None:
    """In --help and both READMEs. Bug: figures that are of an older model of time."""
    assert len(found()) == RUNS
    for kind, said in WITHIN.items():
        errors = [each.error for each in found() if each.counts and each.dense == (kind == "dense")]
        for value, upper in zip(quantiles(errors), said, strict=False):
            assert upper - 0.012 < value < upper + 0.002, kind
    (a, b), (c, d) = ((round(100 * x) for x in WITHIN[kind]) for kind in ("dense", "mixtures"))
    root = FILE.parents[2]
    english, chinese = ((root / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert f"{RUNS} published runs" in english
    assert f"{a} % in the median and {b} % for nine of ten dense runs, {c} % and {d} % for mixtures" in english
    assert f"{RUNS} 次公开的训练" in chinese
    assert f"误差中位数为 {a} %，九成在 {b} % 以内；混合专家为 {c} % 与 {d} %" in chinese
    for name, count in FITTED_TO.items():
        assert len(fitted_to(published(), name)) == (0 if name == "megatron-2021" else count)
        assert ("borrowed" in constants_of(name)) == (count == 0)


def test_errors_stay_small_without_a_whole_source() -> None:
    """Overfitting: constants or policies that are of one source. Dense and mixtures, all runs of a source left out."""
    fits = {name: fit(few, name, steps=1) for name in FITTED if (few := fitted_to(published(), name))}
    harder = [each for each in without_sources(published(), fits) if each.counts]
    for dense, (middle, ninth) in ((True, (0.065, 0.17)), (False, (0.05, 0.17))):
        found = quantiles(each.error for each in harder if each.dense == dense)
        assert found[0] < middle
        assert found[1] < ninth


def test_pairs() -> None:
    right, wrong = pairs(found())
    assert len(right) + len(wrong) >= 40
    assert len(right) >= PAIRS * (len(right) + len(wrong))


def test_pairs_need_recomputation_to_cost_the_host_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steptime, "CHECKPOINT", 0)
    _forget()
    right, wrong = pairs(with_committed([row for row in published() if row.software == "megatron-core"]))
    assert len(right) < PAIRS * (len(right) + len(wrong))


def times(part: int, factor: float) -> Callable:
    """A function whose result, or a part of it, is multiplied."""

    def change(original: Callable) -> Callable:
        def wrong(*args: object, **options: object) -> object:
            result = original(*args, **options)
            if part < 0:
                return result * factor
            return (*result[:part], result[part] * factor, *result[part + 1 :])

        return wrong

    return change


def all_computed_again(original: Callable) -> Callable:
    def wrong(model: object, layout: object, *rest: object) -> object:
        return original(model, replace(layout, recompute="none"), *rest)

    return wrong


BREAKS = {  # where, what, how, and the bar that falls
    "a wrong peak": (steptime, "speed", times(-1, 1.2), "dense"),
    "attention costs nothing backward": (steptime, "attention_time", times(1, 0.0), "dense"),
    "nothing is computed again": (steptime, "layer_times", all_computed_again, "dense"),
    "tp costs three times": (steptime, "ring", times(-1, 3.0), "dense"),
    "dp is not hidden": (overlap, "not_hidden", lambda original: lambda *x: (x[1] + x[2],) * 2, "dense"),
    "the host is as fast as it likes": (steptime, "operators", times(-1, 0.0), "mixtures of experts"),
    "all-to-alls are slow": (steptime, "all_to_all", times(-1, 3.0), "mixtures of experts"),
    "the bubble is twice": (steptime, "bubble", times(-1, 4.0), "mixtures of experts"),
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    _forget()


def _forget() -> None:
    """What a mutation has computed must not outlive it."""
    fitting.possible.cache_clear()
    steptime.forget()


@pytest.mark.parametrize("name", BREAKS)
def test_a_model_of_time_that_lacks_something_breaks_a_bar(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, what, change, bar = BREAKS[name]
    monkeypatch.setattr(module, what, change(getattr(module, what)))
    _forget()
    counted = [row for row in published() if row.bits == 16 and row.cells["gpu"].startswith("H100")]
    assert not within_bars(with_committed(counted))[bar]


def test_memory() -> None:
    every = holdings(published())
    assert len(every) >= 50
    assert quantiles(each.error for each in every)[0] <= MEMORY
    assert not too_large(published())


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("gradient_held", 6.0),  # gradients of 4 bytes beside those of 2
        ("state_held", 16.0),  # float32 gradients counted with the states
        ("logits_held", 30.0),  # each step of the loss kept
        ("fused_gate", False),  # the gate's product saved too
    ],
)
def test_memory_that_programs_do_not_hold_is_seen(monkeypatch: pytest.MonkeyPatch, what: str, change: float) -> None:
    """By the runs of Megatron-Core that print what they hold, or by a layout that ran and is called too large."""
    wrong = replace(NAMED["megatron-core"], **{what: change})
    monkeypatch.setitem(NAMED, "megatron-core", wrong)
    fitting.possible.cache_clear()
    of = [row for row in published() if row.software == "megatron-core"]
    middle = quantiles(each.error for each in holdings(of))[0]
    assert middle > LIMIT or too_large(of), middle


# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_a_row_that_does_not_say_enough_means_several_layouts() -> None:
    row = next(row for row in published() if row.source == "Megatron-LM" and "GPT-70B" in row.cells["model"])
    assert row.open == ("mbs", "vpp", "recompute")
    assert {layout.microbatch for layout in row.layouts} == {1, 2, 4, 8}
    assert {layout.v for layout in row.layouts} == {1, 2, 3, 6, 7, 14, 21, 42}
    made = predict(row)
    assert made.slowest > 1.5 * made.seconds


def test_sources_count_flop_differently() -> None:
    """The same run of Qwen3 235B by tokens and by TFLOP/s, which count half of attention's products there."""
    row = next(r for r in published() if "qwen3/readme" in r.cells["source"] and r.cells["tokens_per_s_per_gpu"])
    by_flop = row_of(row.cells | {"tokens_per_s_per_gpu": "", "notes": ""})
    assert by_flop.seconds == pytest.approx(row.seconds, rel=0.03)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "Wonder-7B"}, "not understood"),
        ({"gpus": "7", "tp": "2"}, "no layout"),
        ({"gpu": "abacus"}, "no cluster"),
        ({"tokens_per_s_per_gpu": "99999", "notes": ""}, "the device's peak"),
        ({"notes": "LoRA"}, "adapters"),
    ],
)
def test_a_row_that_cannot_be_is_left_out_with_its_reason(change: dict[str, str], why: str) -> None:
    row = next(row for row in published() if row.source == "torchtitan" and row.bits == 16)
    assert not row.why
    assert why in row_of(row.cells | change).why


def test_other_runs_in_the_same_columns(tmp_path: Path) -> None:
    lines = FILE.read_text().splitlines()
    path = tmp_path / "others.csv"
    path.write_text("\ufeff" + "\n".join(lines[:12]) + "\n")
    assert "llm-foundry" in by_source(with_committed(rows(path)))
    path.write_text("model,gpu\nx,y\n")
    with pytest.raises(ValueError, match=r"has no column .*; use a file with the columns of planner/published_runs"):
        rows(path)
    with pytest.raises(ValueError, match="cannot be read"):
        rows(tmp_path / "none.csv")


# ---- Messages --------------------------------------------------------------------------------------------------------


def test_a_tree_has_fewer_steps_than_a_ring() -> None:
    """A small sum over 512 ranks; a large one takes as long. Bug: a ring's steps for every sum."""
    h100, software = PRESETS["dgx-h100"], NAMED["megatron-core"]
    small, large = (messages.all_reduce(n, 512, 1, h100, software) for n in (1e3, 1e10))
    assert small < 0.1 * 2 * messages.ring(1e3, 512, 1, h100, software)
    assert large == pytest.approx(2 * messages.ring(1e10, 512, 1, h100, software), rel=0.04)


def test_a_token_is_sent_once_to_a_node() -> None:
    """8 experts on 8 nodes: 5.25 nodes in the mean, 4 where the router keeps to 4."""
    h100, software = PRESETS["dgx-h100"], NAMED["automodel"]
    each = [messages.all_to_all(1e9, 64, 1, h100, x, 8, most)
            for x, most in ((replace(software, once_a_node=False), 0), (software, 0), (software, 4))]  # fmt: skip
    assert each[1] / each[0] == pytest.approx((8 * (1 - (7 / 8) ** 8)) / 8, rel=0.01)
    assert each[2] / each[0] == pytest.approx(4 / 8, rel=0.01)
