"""What decays, in every layout as in one process, which groups by the kinds of modules; schedules; going on."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.planner.layout import Layout
from cluster.run import build
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.recipe import decays, groups_by_module, groups_of, learning_rate
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.gpt import GPT
from core.model.precision import POLICIES
from core.model.text import Text
from core.model.tokens import Tokens
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import end_step
from tests.cluster.test_train import parsed
from tests.cluster.test_worker import CLIP, CONFIG, CPU, MOE, SEED, Result
from tests.pool import Pool

LLAMA = {"kv_heads": 2, "gated": True, "biases": False, "learned_positions": False, "norm": "rms", "tied": False}
MODELS = {
    "gpt": CONFIG,
    "untied": replace(CONFIG, tied=False, head_bias=True),
    "llama": replace(CONFIG, **LLAMA),
    "qwen": replace(CONFIG, **LLAMA, qkv_bias=True, qk_norm=True),
}
adamw = partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)


@pytest.mark.parametrize("name", [*MODELS, "experts"])
def test_what_decays_by_name_is_what_decays_by_module(name: str) -> None:
    """Norms, biases and embeddings do not, in any kind of model, and all other weights do."""
    model = to_moe(GPT(CONFIG), MOE) if name == "experts" else GPT(MODELS[name])
    names = {p: n for n, p in model.named_parameters()}
    by_name = {names[p]: group["weight_decay"] for group in groups_of(model, 0.1) for p in group["params"]}
    by_module = {names[p]: group["weight_decay"] for group in groups_by_module(model, 0.1) for p in group["params"]}
    assert by_name == by_module
    assert by_name.keys() == set(names.values())
    assert by_name["norm.weight"] == by_name["embed.token.weight"] == 0.0
    assert by_name["blocks.0.attention.out.weight"] == 0.1
    assert by_name.get("head.weight", 0.1) == 0.1
    if name == "experts":
        assert by_name["blocks.0.mlp.experts.up.bias"] == 0.0  # a matrix, of all experts
        assert by_name["blocks.0.mlp.experts.up.weight"] == by_name["blocks.0.mlp.router.weight"] == 0.1


def test_a_tied_head_is_an_embedding_on_every_stage() -> None:
    model = GPT(CONFIG)
    model.embed = None  # the last stage
    assert not decays(model.full_name("head.weight"))
    assert decays(GPT(MODELS["untied"]).full_name("head.weight"))


LAYOUTS = {
    "ddp": (Layout(dp=4), "gpt"),
    "zero-1": (Layout(dp=4, zero=1), "untied"),
    "zero-2 tp": (Layout(dp=2, tp=2, zero=2, microbatches=2), "gpt"),
    "zero-3": (Layout(dp=4, zero=3, microbatches=2), "qwen"),
    "sp pp": (Layout(tp=2, sp=True, pp=2, dp=2, microbatches=2, zero=1), "gpt"),
    "pp": (Layout(pp=4, microbatches=4, schedule="zb-h1"), "llama"),
    "pp zero-3": (Layout(pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=3), "qwen"),
    "experts": (Layout(tp=2, sp=True, dp=2, ep=4, zero=1, microbatches=2), "experts"),
}


def spec_of(layout: Layout, name: str, precision: str = "float64") -> TrainSpec:
    layout = replace(layout, microbatch=16 // (layout.dp * layout.microbatches))
    config, moe = MODELS.get(name, CONFIG), MOE if name == "experts" else None
    return TrainSpec(config, moe, layout, SEED, POLICIES[precision], CPU, adamw, 3000, weight_decay=0.5)


def train(layout: Layout, name: str) -> Result:
    spec = spec_of(layout, name)
    worker = Worker(spec, make_mesh(spec.layout, "cpu", Ledger(), 30.0))
    losses = []
    for step in range(2):
        worker.zero_grad()
        share = worker.forward_backward(step, *Text(None, 16).batch(SEED, step, 16))
        losses.append(worker.clip(CLIP, share)[1])
        worker.step()
    result = losses, worker.master_weights(), worker.states()
    worker.close()
    return result


def reference(name: str) -> tuple[list[float], Oracle]:
    spec = spec_of(Layout(), name)
    make = (lambda config: to_moe(GPT(config), MOE)) if name == "experts" else GPT
    groups = partial(groups_by_module, weight_decay=0.5)
    oracle = Oracle(spec.config, SEED, CPU, adamw, CLIP, make, groups)
    losses = []
    for step in range(2):
        losses.append(oracle.step(*Text(None, 16).batch(SEED, step, 16), step))
        end_step(oracle.model)
    return losses, oracle


@pytest.mark.parametrize("case", LAYOUTS)
def test_updates_equal_one_process(pool: Pool, case: str) -> None:
    """A sharded bias, a flat shard, a stage without the embedding: none decays that does not in one process."""
    layout, name = LAYOUTS[case]
    losses, oracle = reference(name)
    ranks = pool.run(layout.ranks, train, layout, name)
    assert all(rank[0] == pytest.approx(losses, rel=1e-10) for rank in ranks)
    for i, expected in ((1, oracle.parameters()), (2, oracle.states())):
        assert worst_difference(full_tensors(each for rank in ranks for each in rank[i]), expected) < 1e-10


def by_dimension(model: GPT, weight_decay: float) -> list[dict]:
    found = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": found, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def trained_wrong(layout: Layout, name: str) -> Result:
    right, build.groups_of = build.groups_of, by_dimension
    try:
        return train(layout, name)
    finally:
        build.groups_of = right


def test_what_decays_by_dimension_is_caught(pool: Pool) -> None:
    """Bug: as usual elsewhere, what has two dimensions decays: positions, and the biases of a layer's experts."""
    layout, name = LAYOUTS["experts"]
    _, oracle = reference(name)
    ranks = pool.run(layout.ranks, trained_wrong, layout, name)
    assert worst_difference(full_tensors(each for rank in ranks for each in rank[1]), oracle.parameters()) > 1e-4


def rates(*flags: str) -> list[float]:
    args = parsed("--steps", "12", "--warmup", "2", "--lr", "1", *flags)
    return [learning_rate(args, step) for step in range(13)]


def test_schedules() -> None:
    for decay in ("cosine", "linear", "constant", "wsd"):
        found = rates("--decay", decay, "--min-lr", "0.2", "--cooldown", "4")
        assert found[:3] == [0.5, 1.0, 1.0]
        assert found[12] == pytest.approx(1.0 if decay == "constant" else 0.2)
        assert sorted(found[2:], reverse=True) == found[2:]
    assert rates("--decay", "linear", "--min-lr", "0")[7] == pytest.approx(0.5)
    assert rates("--decay", "wsd", "--min-lr", "0", "--cooldown", "4")[8:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates("--decay", "wsd")[11] == 1.0  # a tenth of 12 steps is the last one
    assert rates()[12] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--beta1", "1"), "--beta1 1.0: must be at least 0 and below 1; use --beta1 0.9"),
        (("--beta2", "-0.1"), "--beta2"),
        (("--eps", "0"), "--eps 0.0: must be positive"),
        (("--weight-decay", "-1"), "--weight-decay -1.0: must not be negative; use --weight-decay 0.01"),
        (("--min-lr", "1"), "--min-lr 1.0 --lr 0.001: must be at least 0 and at most --lr"),
        (("--cooldown", "-1"), "--cooldown"),
    ],
)
def test_refusals(pool: Pool, flags: tuple[str, ...], named: str) -> None:
    outcome = pool.script(1, "cluster/train.py", *flags, started=1)
    assert outcome.codes == [2], outcome.err
    assert named in outcome.err


TOKENS = ("--batch", "8", "--sequence", "16", "--hidden", "16", "--heads", "4", "--sample", "4", "--vocabulary", "97",
          "--eos", "0", "--pack", "--lr", "0.02", "--decay", "wsd", "--weight-decay", "0.3", "--beta2", "0.9",
          "--steps", "5", "--save-every", "1")  # fmt: skip


def losses_of(pool: Pool, ranks: int, report: Path, *flags: str) -> tuple[list[float], str]:
    """Of all steps, and what was said."""
    outcome = pool.script(ranks, "cluster/train.py", *TOKENS, *flags, "--report", str(report))
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    return json.loads(report.read_text())["losses"], outcome.out


def test_a_run_goes_on_in_another_layout_with_the_same_tokens_and_rates(pool: Pool, tmp_path: Path) -> None:
    """Three layouts one after the other have the losses of one that was never stopped, the moments' groups included."""
    tokens, folder, report = tmp_path / "ids.npy", tmp_path / "run", tmp_path / "report.json"
    np.save(tokens, np.random.default_rng(0).integers(0, 97, 4000).astype(np.uint16))
    flags = ("--tokens", str(tokens), "--save", str(folder), "--keep", "9")
    whole, _ = losses_of(pool, 1, report, *flags)
    for done, ranks, layout in ((1, 2, "--dp 2 --zero 3"), (2, 4, "--tp 2 --pp 2"), (4, 2, "--dp 2 --zero 1")):
        for later in range(done + 1, 6):  # as if the run before had been stopped
            shutil.rmtree(folder / f"step-{later:08}")
        losses, said = losses_of(pool, ranks, report, *flags, *layout.split())
        assert f"step {done}\n" in said
        assert losses == pytest.approx(whole, rel=1e-10)
    other, _ = losses_of(pool, 1, report, "--tokens", str(tokens), "--seed", "1")
    assert other != pytest.approx(whole, rel=1e-3)


def test_tokens_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    """What the data ranks read is together what one process reads, step by step, from any step on."""
    path = str(tmp_path / "ids.bin")
    np.random.default_rng(0).integers(0, 97, 1000).astype(np.uint32).tofile(path)
    data = Tokens(path, 16, 97, "uint32")
    for step in (0, 3, 9):
        whole = data.batch(5, step, 8)
        for dp in (2, 4):
            rows = (range(8 // dp * i, 8 // dp * (i + 1)) for i in range(dp))
            parts = [Tokens(path, 16, 97, "uint32").batch(5, step, 8, mine) for mine in rows]
            for i, expected in enumerate(whole):
                assert torch.equal(sum(part[i] for part in parts), expected)
