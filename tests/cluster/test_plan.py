"""The planner: presets, times, the search, and what it prints."""

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from cluster import plan
from cluster.links.messages import all_to_all, link, ring
from cluster.planner.command import commands, folder_of, lacking, write_config
from cluster.planner.counting import model_parameters, step_flops
from cluster.planner.efficiency import product as matrix_product
from cluster.planner.hardware import PRESETS as MACHINES
from cluster.planner.hardware import Link, Machine, measured
from cluster.planner.layout import Layout
from cluster.planner.memory import parameters, rank_memory
from cluster.planner.models import PRESETS
from cluster.planner.options import parser
from cluster.planner.plans import USABLE, fits, plans
from cluster.planner.rulebook import Case, broken
from cluster.planner.software import Software
from cluster.planner.steptime import bubble, step
from cluster.run.arguments import add_all_flags, configured, full_model, layout_of, moe_of
from core.model.config import Llama3Scaling, ModelConfig, YarnScaling
from core.model.published import from_config, from_content
from core.proof.lesson import Lesson
from pipeline.engine.validator import validate
from pipeline.schedules import build
from zero.memory import MEGATRON, formula

H100, A100 = MACHINES["dgx-h100"], MACHINES["dgx-a100"]
SOFTWARE = Software()

PUBLISHED = {  # 10^9 parameters, as their papers and model cards say
    "gpt3-175b": 174.6, "llama3-8b": 8.03, "llama3-70b": 70.6, "llama3-405b": 405.9, "mixtral-8x7b": 46.7,
    "deepseek-v3": 671.0,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_parameters(name: str) -> None:
    digits = len(str(PUBLISHED[name]).partition(".")[2])
    assert round(model_parameters(PRESETS[name]) / 1e9, digits) == PUBLISHED[name]


def test_active_parameters_of_experts() -> None:
    """2 FLOP a weight and token: 12.9 of Mixtral's 46.7 x 10^9 are used by a token, 37 of DeepSeek-V3's 671."""
    for name, active in (("mixtral-8x7b", 12.9), ("deepseek-v3", 37.0)):
        model = replace(PRESETS[name], sequence=1)
        used = step_flops(model, 1) / 6 + (model.vocabulary * model.hidden)  # the embedding is looked up
        assert used / 1e9 == pytest.approx(active, rel=0.02)


LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "llama3-8b": LLAMA,
    "mixtral-8x7b": LLAMA | {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
                             "max_position_embeddings": 32768},
    "deepseek-v3": {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "max_position_embeddings": 163840, "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hugging_face_config(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    model = from_config(str(path))
    expected = model_parameters(PRESETS[name]) if name in PRESETS else 124_439_808  # GPT-2's
    assert model_parameters(model) == expected
    assert from_config(str(path), sequence=512).sequence == 512


ROTARY = [  # what a config.json says, and what it means
    ({}, (10_000.0, None)),
    ({"rope_theta": 5e5}, (5e5, None)),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, (5e5, "linear")),
    ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}},
     (5e5, Llama3Scaling(8.0, 1.0, 4.0, 4096))),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (1e6, None)),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
     (1e6, YarnScaling(4.0, 8192, 0.1 * math.log(4) + 1))),
    ({"rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16}},
     (10_000.0, YarnScaling(40.0, 8192, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), 16))),
    ({"rope_scaling": {"type": "yarn", "factor": 40.0, "attention_factor": 1.5, "truncate": False}},
     (10_000.0, YarnScaling(40.0, 8192, 1.5, truncate=False))),
]  # fmt: skip


@pytest.mark.parametrize(("says", "means"), ROTARY)
def test_the_rotary_positions_of_a_config(
    says: dict[str, object], means: tuple[float, Llama3Scaling | YarnScaling | str | None]
) -> None:
    model = from_content(LLAMA | says, None)
    assert (model.rope_theta, model.rope_scaling) == means
    assert bool(model.unbuilt()) == (means[1] == "linear")


@pytest.mark.parametrize(
    ("content", "why"),
    [("", "Expecting value"), ("[]", "holds no names and values"), ("{}", "has no 'num_hidden_layers'"),
     ('{"n_embd": 8}', "has no 'n_layer'"), ('{"n_embd": "wide"}', "n_embd is 'wide', and must be a whole number"),
     ('{"num_hidden_layers": -1}', "num_hidden_layers is -1, and must"), ('{"model_type": "bert"}', "'bert' is not"),
     ('{"num_hidden_layers": null}', "num_hidden_layers is None, and must")],
)  # fmt: skip
def test_a_bad_config_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=why) as refusal:
        from_config(str(path))
    assert str(refusal.value).startswith(f"--config {path}: ")


# ---- Memory and time -------------------------------------------------------------------------------------------------


def test_states_are_those_of_zeros_paper() -> None:
    model = PRESETS["gpt3-175b"]
    size = model_parameters(model)
    for zero, name in enumerate(("DP", "ZeRO-1", "ZeRO-2", "ZeRO-3")):
        what = rank_memory(model, Layout(dp=64, zero=zero))
        assert what.weights + what.gradients + what.optimizer == pytest.approx(size * formula(name, 64, MEGATRON))


@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe", "dualpipev", "zb-h2"]
)
def test_the_bubble_is_that_of_the_schedule(schedule: str) -> None:
    """By formula where there is one, against the schedule itself on virtual devices."""
    v = {"interleaved": 3, "zb-v": 2, "dualpipev": 2}.get(schedule, 1)
    for p, m, (f, i, w) in product((2, 4), (8, 9, 13), ((1, 1, 1), (1, 2, 1), (1, 1.3, 0.7), (1, 1.2, 1.4))):
        if schedule == "dualpipe" and m % 2:
            continue
        wall = validate(build(schedule, p, m, v), {"F": f, "I": i, "W": w, "B": i + w}).makespan
        assert bubble(schedule, p, m, v, f, i, w) == pytest.approx(wall - m * (f + i + w), abs=1e-9), (p, m, f, i, w)


def test_a_naive_pipeline_uses_one_rank_at_a_time() -> None:
    wall = validate(build("naive", 4, 8)).makespan
    assert bubble("naive", 4, 8, 1, 1, 1, 1) == pytest.approx(wall - 8 * 3)
    assert bubble("1f1b", 1, 8, 1, 1, 1, 1) == 0


def test_matrix_products_come_in_waves_of_tiles() -> None:
    full = matrix_product(256 * 12, 4096, 128 * 9, A100)  # 108 tiles, one wave
    assert full == 2 * 256 * 12 * 4096 * 128 * 9
    assert matrix_product(256 * 12 + 1, 4096, 128 * 9, A100) == 2 * full
    assert matrix_product(64, 4096, 128, A100) == full, "a small one keeps all processors waiting"
    assert matrix_product(100, 10, 10, replace(A100, processors=1)) == 2 * 100 * 10 * 10


def test_a_ring_leaves_a_node_by_as_many_cards_as_it_has_ranks_there() -> None:
    assert link(A100, 8, 1) == A100.inside
    assert link(A100, 32, 8).beta == A100.outside.beta
    assert link(A100, 32, 2).beta == pytest.approx(A100.outside.beta / 4)
    assert link(A100, 4096, 1).beta == pytest.approx(A100.outside.beta / 8)
    whole = Software(links=1.0)
    seconds = ring(1e9, 16, 8, A100, whole)
    assert seconds == pytest.approx(15 * A100.outside.alpha + 15 / 16 * 2e9 / 25e9)
    assert ring(1e9, 1, 1, A100, whole) == 0
    off = all_to_all(1e9, 16, 1, A100, whole)  # half of it leaves the node, by the rank's own card
    assert off == pytest.approx(16 / 8 * A100.outside.alpha + 0.5 * 2e9 / 25e9)


def faster(machine: Machine) -> dict[str, Machine]:
    return {
        "peak": replace(machine, peak=2 * machine.peak),
        "bandwidth": replace(machine, bandwidth=2 * machine.bandwidth),
        "inside": replace(machine, inside=Link(machine.inside.alpha, machine.inside.beta / 2)),
        "outside": replace(machine, outside=Link(machine.outside.alpha, machine.outside.beta / 2)),
    }


def test_a_faster_machine_is_never_slower() -> None:
    """And each of its parts makes some layout faster: nothing is left out of the time."""
    model = replace(PRESETS["mixtral-8x7b"], layers=16)
    some = [
        Layout(tp=4, sp=True, dp=16, ep=8, zero=1, microbatches=2, recompute="full"),
        Layout(tp=2, cp=2, pp=4, dp=4, v=4, schedule="interleaved", microbatches=8, zero=1),
        Layout(pp=4, dp=16, v=2, schedule="zb-v", microbatches=8),
        Layout(dp=64, zero=3, ep=8),
        Layout(cp=8, ulysses=4, dp=8, zero=2, microbatches=2),
    ]
    before = [step(model, layout, H100, SOFTWARE).seconds for layout in some]
    for part, machine in faster(H100).items():
        after = [step(model, layout, machine, SOFTWARE).seconds for layout in some]
        assert all(b <= a for a, b in zip(before, after, strict=True)), part
        assert any(b < a for a, b in zip(before, after, strict=True)), part


def test_each_choice_has_its_price() -> None:
    """What a layout's parts must show, whatever the constants."""
    model = replace(PRESETS["gpt3-175b"], layers=48)

    def parts(**changes: object) -> dict[str, float]:
        return step(model, replace(Layout(tp=8, sp=True, pp=4, dp=4, microbatches=16), **changes), A100, SOFTWARE).parts

    usual, full = parts(), parts(recompute="full")
    assert full["matrix products"] == pytest.approx(4 / 3 * usual["matrix products"], rel=0.03)  # but the head
    assert full["tp"] == pytest.approx(1.5 * usual["tp"])
    assert parts(v=2, schedule="interleaved")["bubble"] == pytest.approx(usual["bubble"] / 2)
    assert parts(schedule="zb-h1")["bubble"] < usual["bubble"]
    assert parts(dp=1)["dp"] == 0 < usual["dp"]
    assert parts(pp=1, microbatches=4)["bubble"] == parts(pp=1, microbatches=4)["pp"] == 0
    assert parts(pp=1, zero=1)["dp"] < usual["dp"] * 4, "hidden behind backward where there is no pipeline"


def test_stages_that_cannot_be_equal() -> None:
    """All wait for the rank with most layers; the head is hidden where its rank has fewer."""
    layout = Layout(tp=8, sp=True, pp=16, dp=128, microbatches=16)

    def seconds(layout: Layout = layout, **sizes: int) -> float:
        return step(replace(PRESETS["llama3-405b"], **sizes), layout, H100, SOFTWARE).parts["matrix products"]

    assert seconds(layers=126) == pytest.approx(seconds(layers=128, vocabulary=8), rel=5e-3)
    assert seconds(layers=127) == pytest.approx(seconds(layers=128)), "the last rank has 8 layers and the head"
    folded = replace(layout, v=2, schedule="zb-v")
    assert seconds(folded, layers=126) == pytest.approx(seconds(layers=128, vocabulary=8), rel=5e-3)


@pytest.mark.parametrize(("name", "world", "batch"), [("llama3-405b", 16384, 2048), ("deepseek-v3", 2048, 15360)])
def test_layers_that_no_power_of_two_divides(name: str, world: int, batch: int) -> None:
    few = {"cp": [2, 4], "ulysses": [1], "zero": [1], "microbatch": [1], "schedule": ["1f1b", "zb-h1"]}
    few["recompute"] = ["none"]  # among these is the best of all
    found, _ = plans(PRESETS[name], H100, world, batch, SOFTWARE, few)
    best = found[0].layout
    assert best.pp >= 16
    assert PRESETS[name].layers % best.pp
    assert found[0].step.parts["matrix products"] > 0.6 * found[0].step.seconds
    assert any(line.startswith("Its ranks have ") for line in plan.why(PRESETS[name], H100, found))


@pytest.mark.parametrize("name", ["deepseek-v3", "llama3-405b", "gpt3-175b"])
@pytest.mark.parametrize(("schedule", "v"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)])
def test_the_rank_that_holds_most_is_found(name: str, schedule: str, v: int) -> None:
    machine = replace(H100, memory=1e13)
    for pp in (8, 12):
        layout = Layout(tp=8, sp=True, pp=pp, dp=8, ep=8 if name == "deepseek-v3" else 1, v=v, schedule=schedule,
                        zero=1, microbatches=64)  # fmt: skip
        everyone = [rank_memory(PRESETS[name], layout, rank).total for rank in range(pp)]
        assert fits(PRESETS[name], layout, machine).total == max(everyone)
        assert fits(PRESETS[name], layout, replace(machine, memory=max(everyone) * 0.99 / USABLE)) is None


def test_gradients_of_the_rank_with_most_experts_set_the_pace() -> None:
    layout = Layout(tp=4, cp=2, ep=8, pp=16, dp=2, sp=True, zero=1, microbatches=32)
    model = PRESETS["deepseek-v3"]
    everywhere = replace(model, dense_layers=0, layers=64)  # 4 on each
    assert parameters(model, layout)[0] == 0, "rank 0 has none"
    seconds = [step(each, layout, H100, SOFTWARE).parts["dp"] for each in (model, everywhere)]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.05)


# ---- The search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [10, 14, 20, 24])
def test_no_tensor_parallel_group_is_on_two_nodes(world: int) -> None:
    model = replace(PRESETS["gpt3-175b"], layers=24, hidden=4096, heads=32, feed_forward=16384)
    found, _ = plans(model, A100, world, 2 * world, SOFTWARE, {})
    line, _ = commands(found[0].layout, A100, model)
    each = int(re.search("nproc_per_node=([0-9]+)", line).group(1))
    assert all(each % p.layout.tp == 0 for p in found)


def test_a_thousand_gpus() -> None:
    model, world, batch = PRESETS["gpt3-175b"], 1024, 1536
    found, considered = plans(model, A100, world, batch, SOFTWARE, {})
    assert considered > 1000
    assert len(found) > 100
    times = [each.step.seconds for each in found]
    assert times == sorted(times)
    for each in found[:50]:
        assert not broken(Case(each.layout, model, A100, world, batch), advice=True)
        most = max(rank_memory(model, each.layout, rank).total for rank in range(each.layout.pp))
        assert most <= 1.02 * USABLE * A100.memory, f"{each.layout}: a rank that was not looked at holds more"
    best = found[0]
    assert 0.4 < plan.rate(model, best) / A100.peak < SOFTWARE.gemm
    assert best.layout.tp <= 8
    fixed, _ = plans(model, A100, world, batch, SOFTWARE, {"tp": [8], "pp": [16]})
    assert fixed
    assert (
        fixed[0].step.seconds
        == next(each for each in found if (each.layout.tp, each.layout.pp) == (8, 16)).step.seconds
    )


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["plan", *flags])
    return plan.main(), *capsys.readouterr()


@pytest.mark.parametrize("name", ["gpt3-175b", "llama3-8b", "llama3-405b", "mixtral-8x7b", "deepseek-v3"])
def test_the_command_trains_a_known_model_by_a_config_that_is_written(tmp_path: Path, name: str) -> None:
    folder, model = str(tmp_path / "model"), PRESETS[name]
    assert lacking(model)
    assert not lacking(model, folder)
    for _ in range(2):
        assert write_config(folder, model) == folder
    line, _ = commands(Layout(dp=8, microbatch=1), A100, model, folder)
    assert f"--hf {folder} --init random --sequence {model.sequence} " in line  # there are no weights
    flags = shlex.split(line)
    frame = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(frame)
    args = frame.parser.parse_args(flags[flags.index("cluster/train.py") + 1 :])
    found = configured(args)
    biases = model.experts * model.moe_layers * (model.score == "sigmoid")  # of the router, which are not trained
    full = sum(p.numel() for p in full_model(found, moe_of(args)).parameters())
    assert full - biases <= model_parameters(model) == model_parameters(found) <= full
    for field in ("query_groups", "head_dim", "norm_eps", "rope_theta", "rope_scaling", "score", "table"):
        assert getattr(found, field) == getattr(model, field), field
    with pytest.raises(ValueError, match="has a config.json of another model; use another folder"):
        write_config(folder, replace(model, layers=model.layers - 1))


def test_a_config_of_another_name_is_not_what_hf_reads(tmp_path: Path) -> None:
    path = Path(write_config(str(tmp_path), PRESETS["llama3-8b"]), "config.json").rename(tmp_path / "8b.json")
    assert folder_of(parser("plan", "").parse_args(["--config", str(path)])) is None


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    flags = ("--model", "ptdp-7.5b", "--machine", "dgx-h100", "--world", "16", "--batch", "64", "--top", "3")
    code, out, _ = run(monkeypatch, capsys, *flags)
    assert code == 0
    assert "It is bound by " in out
    code, text, _ = run(monkeypatch, capsys, *flags, "--json")
    assert code == 0
    written = json.loads(text)
    assert len(written["plans"]) == 3
    assert written["torchrun"] in out
    assert written["sbatch"] in out
    assert subprocess.run(["bash", "-n"], input=written["sbatch"], text=True, check=False).returncode == 0
    words = shlex.split(written["torchrun"])
    assert words[0] == "torchrun"
    best = Layout(**written["plans"][0]["layout"])
    assert "--nnodes=2" in words
    assert "--nproc_per_node=8" in words
    own = words[words.index("cluster/train.py") + 1 :]
    frame = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(frame)
    assert layout_of(frame.parser.parse_args(own), 16) == best
    assert (best.ranks, best.batch) == (16, 64)
    parts = written["plans"][0]["parts"]
    assert written["plans"][0]["seconds"] == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize(
    "flags",
    [("--machine", "pc", "--world", "2", "--batch", "64"), ("--world", "37", "--batch", "64"),
     ("--world", "8", "--batch", "64", "--tp", "3"), ("--world", "8", "--batch", "8", "--pp", "5")],
)  # fmt: skip
def test_where_nothing_fits_what_is_suggested_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: tuple[str, ...]
) -> None:
    code, _, err = run(monkeypatch, capsys, "--model", "llama3-8b", *flags)
    assert code == 2
    assert err.count("\n") == 1
    machine = flags[:2] if "pc" in flags else ()
    decided = () if "and no flag" in err else flags[4:] if not machine else ()
    words = err.partition("; use ")[2].replace("and no flag of the layout", "").split()
    code, out, err = run(monkeypatch, capsys, "--model", "llama3-8b", *machine, *words, *decided)
    assert code == 0, err
    assert "torchrun" in out


def test_this_machine_as_measured(tmp_path: Path) -> None:
    """A file of `cluster/topology.py`: two domains of two ranks, ten times slower between them."""
    near, far = (1e-5, 1e-9), (1e-4, 1e-8)
    links = [[(0.0, 0.0) if a == b else near if a // 2 == b // 2 else far for b in range(4)] for a in range(4)]
    path = tmp_path / "here.json"
    content = {"domains": [[0, 1], [2, 3]], "alpha": [[x for x, _ in row] for row in links],
               "beta": [[x for _, x in row] for row in links], "ranks": 4}  # fmt: skip
    path.write_text(json.dumps(content))
    machine = measured(str(path))
    assert (machine.node, machine.inside, machine.outside) == (2, Link(*near), Link(*far))
    assert machine.peak > 1e9, "measured here"
    assert machine.bandwidth > 1e8
    small = ModelConfig(name="small")
    slow = replace(machine, peak=1e10, bandwidth=1e10)
    found, _ = plans(small, slow, 4, 8, SOFTWARE, {})
    assert found[0].layout.ranks == 4
    one = measured_from(tmp_path, content | {"domains": [[0, 1, 2, 3]], "flops": 5e10, "memory": 4e9})
    assert (one.node, one.peak, one.memory) == (4, 5e10, 4e9)


def measured_from(folder: Path, content: object) -> Machine:
    path = folder / "other.json"
    path.write_text(json.dumps(content))
    return measured(str(path))


TWO = {"domains": [[0, 1]], "alpha": [[0, 1e-5], [1e-5, 0]], "beta": [[0, 1e-9], [1e-9, 0]]}


@pytest.mark.parametrize(
    ("change", "why"),
    [({"memory": "8e9"}, "memory is '8e9', and must be positive"), ({"flops": -1.0}, "flops is -1.0"),
     ({"beta": [[0, -1.0], [1.0, 0]]}, "a time of alpha or beta"),
     ({"alpha": [[0, math.nan], [1, 0]]}, "a time of alpha or beta"), ({"domains": [[0, 1], [1]]}, "a rank is in two"),
     ({"device": "cuda"}, "it is of GPUs, and lacks the memory of one"), ({"alpha": [[0]]}, "no topology")],
)  # fmt: skip
def test_numbers_that_no_machine_has_are_refused(tmp_path: Path, change: dict, why: str) -> None:
    assert measured_from(tmp_path, TWO | {"flops": 1e12, "memory": 1e10, "memory_bandwidth": 1e11}).node == 2
    with pytest.raises(ValueError, match=why):
        measured_from(tmp_path, TWO | change)


@pytest.mark.parametrize("content", [{}, [], {"domains": [[0]], "alpha": [[0]], "beta": [[0]]},
                                     {"domains": [[0, 5]], "alpha": [[0]], "beta": [[0]]}])  # fmt: skip
def test_a_bad_topology_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match=r"--machine .*; use the --json of cluster/topology.py"):
        measured_from(tmp_path, content)
