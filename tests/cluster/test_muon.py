"""Muon in the combined run: matrices that tp, ep, etp, ZeRO and pp have sharded, at once, equal to one process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run import build, recipe
from cluster.run.arguments import full_model
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.recipe import groups_by_module
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.config import Latent
from core.model.gpt import GPTConfig
from core.model.precision import POLICIES
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, relative_difference, worst_difference
from core.shards import shard_of
from expert_parallel.engine.router import end_step
from tests.cluster.resuming import ELSEWHERE, job_here
from tests.cluster.resuming import train as train_steps
from tests.cluster.test_llama import ONE, QWEN, UNTIED
from tests.cluster.test_mutations import failing_claims, instead
from tests.cluster.test_worker import CLIP, CONFIG, CPU, MOE, SEED, L, Result, samples_of
from tests.pool import Pool
from zero.engine import muon
from zero.engine.muon import Matrices, Muon
from zero.evidence.muon import OneProcess, named_groups
from zero.evidence.muon import one_process as torchs_muon
from zero.newton_schulz import MuonSettings

SETTINGS = MuonSettings(momentum=0.9)
LR = 1e-2
MUON = partial(Muon, lr=LR, momentum=SETTINGS.momentum)

LAYOUTS = [
    L(dp=2, tp=2),
    L(dp=2, tp=2, zero=1, sp=True),
    L(dp=2, zero=2, microbatches=2, tp=2),
    L(dp=2, tp=2, zero=3, sp=True, microbatches=2),
    L(tp=2, cp=2, dp=2, zero=1),
    L(tp=2, pp=2, dp=2, microbatches=2, zero=1, sp=True),
    L(pp=2, cp=2, microbatches=4, schedule="dualpipe"),
    L(pp=2, dp=2, microbatches=2, schedule="zb-h1", zero=1),
    L(dp=4, ep=4, moe=True, zero=1),
    L(dp=2, tp=2, ep=2, sp=True, moe=True),
    L(tp=2, dp=2, ep=2, etp=2, sp=True, moe=True, zero=2, microbatches=2),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True, zero=1),
    L(tp=2, dp=2, cp=2, ep=2, etp=2, sp=True, moe=True),
    L(pp=2, dp=4, ep=2, etp=2, microbatches=2, moe=True, zero=1),
]


def worker_of(layout: Layout, moe: bool, seed: int = SEED, **spec: Any) -> Worker:
    mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
    usual = {"config": CONFIG, "moe": MOE if moe else None, "bucket": 3000, "muon": SETTINGS, "make_optimizer": MUON}
    spec = usual | {"layout": layout, "seed": seed, "precision": POLICIES["float64"], "device": CPU} | spec
    return Worker(TrainSpec(**spec), mesh)


def train(layout: Layout, moe: bool, **spec: Any) -> Result:
    worker = worker_of(layout, moe, **spec)
    losses, norms, gradients = [], [], []
    for step in range(2):
        worker.zero_grad()
        share = worker.forward_backward(step, *Text(None, 16).batch(SEED, step, 16))
        gradients = worker.gradients()
        norm, loss = worker.clip(CLIP, share)
        worker.step()
        losses.append(loss)
        norms.append(norm)
    result = losses, norms, gradients, worker.weights(), worker.states()
    worker.close()
    return result


Reference = tuple[list[float], list[float], Oracle]


def trained(oracle: Oracle) -> Reference:
    losses, norms = [], []
    for step in range(2):
        losses.append(oracle.step(*Text(None, 16).batch(SEED, step, 16), step))
        norms.append(oracle.norm)
        end_step(oracle.model)
    return losses, norms, oracle


@pytest.fixture(scope="module")
def one_process() -> dict[bool, Reference]:
    found = {}
    for moe in (False, True):
        make = partial(full_model, moe=MOE if moe else None)
        optimizer = torchs_muon(partial(make, CONFIG), SETTINGS, lr=LR)
        found[moe] = trained(Oracle(CONFIG, SEED, CPU, optimizer, CLIP, make))
    return found


@pytest.mark.parametrize(("layout", "moe"), LAYOUTS, ids=[str(layout).replace("--", "") for layout, _ in LAYOUTS])
def test_equals_torchs_muon_in_one_process(pool: Pool, one_process: dict, layout: Layout, moe: bool) -> None:
    layout = samples_of(layout)
    routing = {"experts": MOE.routing.experts, "top_k": MOE.routing.top_k} if moe else {}
    rules.check(layout, replace(CONFIG, **routing), world=layout.ranks, batch=16)
    assert worst(pool.run(layout.ranks, train, layout, moe), one_process[moe]) < 1e-10


def worst(results: list[Result], reference: Reference) -> float:
    losses, norms, oracle = reference
    apart = [relative_difference(a, b) for rank in results
             for pair in ((rank[0], losses), (rank[1], norms)) for a, b in zip(*pair, strict=True)]  # fmt: skip
    for i, right in ((2, oracle.gradients), (3, oracle.parameters()), (4, oracle.states())):
        apart.append(worst_difference(full_tensors(piece for rank in results for piece in rank[i]), right))
    return max(apart)


# ---- Llamas, where what decays is said, too. Keys and values have fewer heads than tp has ranks.

LATENT = replace(UNTIED, kv_heads=None, qk_norm=False, head_size=None, latent=Latent(14, 10, 4, 6, 8))
DECAY = 0.3
LLAMAS = [
    (QWEN, *L(tp=4)),
    (QWEN, *L(tp=4, sp=True)),
    (QWEN, *L(tp=4, dp=2, zero=1)),
    (QWEN, *L(tp=4, dp=2, zero=3, sp=True)),
    (ONE, *L(tp=2, dp=2, zero=2, microbatches=2)),
    (QWEN, *L(tp=4, pp=2, microbatches=4, schedule="zb-h1")),
    (UNTIED, *L(tp=2, pp=2, dp=2, microbatches=4, schedule="zb-v", v=2, zero=3)),
    (LATENT, *L(tp=2, dp=2, sp=True, zero=1)),
    (LATENT, *L(tp=4)),
    (QWEN, *L(tp=2, dp=2, ep=2, etp=2, sp=True, zero=3, moe=True)),
    (LATENT, *L(pp=2, dp=2, ep=2, microbatches=2, zero=2, moe=True)),
]


@cache
def reference(config: GPTConfig, moe: bool) -> Reference:
    groups = partial(named_groups, partial(groups_by_module, weight_decay=DECAY))
    optimizer = partial(OneProcess, head_size=config.head_dim, settings=SETTINGS, lr=LR)
    return trained(Oracle(config, SEED, CPU, optimizer, CLIP, partial(full_model, moe=MOE if moe else None), groups))


@pytest.mark.parametrize(
    ("config", "layout", "moe"),
    LLAMAS,
    ids=[f"{'latent' if c.latent else c.kv_heads} {str(x).replace('--', '')}" for c, x, _ in LLAMAS],
)
def test_llamas_equal_one_process(pool: Pool, config: GPTConfig, layout: Layout, moe: bool) -> None:
    layout = samples_of(layout)
    routing = {"experts": MOE.routing.experts, "top_k": MOE.routing.top_k} if moe else {}
    rules.check(layout, replace(config, **routing), world=layout.ranks, batch=16)
    results = pool.run(layout.ranks, partial(train, config=config, weight_decay=DECAY), layout, moe)
    assert worst(results, reference(config, moe)) < 1e-10


def copies_apart(right: Callable, self: Matrices, matrix: Any, rank: int) -> tuple[int, int]:
    return right(self, matrix, rank)[::-1] if 1 < matrix.count < self.inner else right(self, matrix, rank)


def to_one_copy(right: Callable, self: Matrices, directions: list[torch.Tensor]) -> None:
    right(self, directions)
    for each in self.shards.values():
        if getattr(shard_of(each.member.parameter), "copy", None):
            each.shard.grad.zero_()


OF_COPIES = {
    "copies are not on neighbours": (Matrices, "place", copies_apart),
    "the direction goes to one copy": (Matrices, "to_shards", to_one_copy),
    "keys and values go by AdamW": (muon, "is_matrix", lambda right, name, p: right(name, p) and ".k." not in name),
    "matrices do not decay": (build, "groups_of", lambda right, model, decay: right(model, 0.0)),
    "everything decays": (recipe, "decays", lambda *_: True),
}


def with_bugs_of_copies(layout: Layout) -> dict[str, Result]:
    found = {}
    for name, bug in {"": None, **OF_COPIES}.items():
        with instead(*bug) if bug else nullcontext():
            found[name] = train(layout, False, config=QWEN, weight_decay=DECAY)
    return found


def test_bugs_of_copies_are_seen(pool: Pool) -> None:
    ranks = pool.run(4, with_bugs_of_copies, samples_of(Layout(tp=4)), timeout=100)
    apart = {name: worst([rank[name] for rank in ranks], reference(QWEN, False)) for name in ranks[0]}
    assert apart.pop("") < 1e-10
    assert min(apart.values()) > 1e-6, apart


# ---- Checkpoints


def save(layout: Layout, moe: bool, folder: str) -> None:
    worker = worker_of(layout, moe)
    train_steps(worker, [0])
    checkpoints = worker.checkpoints(folder, job_here())
    checkpoints.save(1, {})
    checkpoints.wait()
    worker.close()


def go_on(layout: Layout, moe: bool, folder: str) -> tuple[list[float], list, list]:
    worker = worker_of(layout, moe, ELSEWHERE)
    checkpoints = worker.checkpoints(folder, job_here())
    checkpoints.load(checkpoints.latest())
    losses = train_steps(worker, [1])
    worker.close()
    return losses, worker.weights(), worker.states()


ROADS = [(3, 5), (5, 0), (1, 7), (11, 8), (8, 10)]


@pytest.mark.parametrize(("first", "second"), ROADS)
def test_goes_on_in_another_layout(pool: Pool, tmp_path: Any, one_process: dict, first: int, second: int) -> None:
    """With the momentum of every matrix."""
    (one, moe), (other, same) = LAYOUTS[first], LAYOUTS[second]
    assert moe == same
    pool.run(one.ranks, save, samples_of(one), moe, str(tmp_path))
    results = pool.run(other.ranks, go_on, samples_of(other), moe, str(tmp_path))
    losses, _, oracle = one_process[moe]
    for rank in results:
        assert rank[0] == pytest.approx(losses[1:], rel=1e-10)
    full = full_tensors(piece for _, *pieces in results for each in pieces for piece in each)
    assert worst_difference(full, oracle.parameters() | oracle.states()) < 1e-10


# ---- Bugs


def only_the_local_shard(right: Callable, self: Matrices, matrix: Any, parts: Any) -> torch.Tensor:
    """Each rank of tp by itself, as blocks: what a group of its own would orthogonalise."""
    full = right(self, matrix, parts)
    if matrix.count == 1:
        return full
    blocks = [muon.direction(block, matrix.head_size, self.settings) for block in full.chunk(matrix.count, matrix.dim)]
    return torch.cat(blocks, matrix.dim)


def scaled_by_the_shard(right: Callable, update: torch.Tensor, head_size: int, settings: MuonSettings) -> torch.Tensor:
    rows, columns = update.shape
    return right(update, head_size, settings) * (max(rows / 2, columns) / max(rows, columns)) ** 0.5


def not_sent_back(right: Callable, self: Matrices, directions: list[torch.Tensor]) -> None:
    right(self, [each * (self.group.index != 1) for each in directions])


def in_another_order(right: Callable, self: Matrices, matrix: Any, parts: Any) -> torch.Tensor:
    return right(self, matrix, parts[::-1])


def momentum_of_another_rank(right: Callable, self: Muon) -> dict:
    """Of the neighbour in tp, where there is any yet."""
    mine = [self.state[p].get("momentum_buffer") for group in self.param_groups for p in group["params"]]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for own, other in zip(mine, everyone[dist.get_rank() ^ 1], strict=True):
        if own is not None:
            own.copy_(other)
    return right(self)


def with_two_moments(right: Callable, self: Muon) -> dict:
    found = right(self)
    for p in found:
        self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
    return found


def without_momentum(right: Callable, self: Muon) -> dict:
    right(self)
    return {p: p.grad for group in self.param_groups for p in group["params"] if group["muon"]}


def without(kind: str) -> Callable:
    return lambda right, name, p: kind not in name and right(name, p)


PARAMETER, STATE, SENT, MOMENTS = "every parameter", "the optimizer's state", "elements sent a step for Muon", "moments"
Bug = tuple[str, Callable[[], AbstractContextManager], str]
BUGS: dict[str, Bug] = {  # layout of test_mutations, bug, the claim that fails
    "only the local shard": ("dense", lambda: instead(Matrices, "full", only_the_local_shard), PARAMETER),
    "the scale of the shard": ("dense", lambda: instead(muon, "direction", scaled_by_the_shard), PARAMETER),
    "a rank's matrices are not sent back": ("dense", lambda: instead(Matrices, "to_shards", not_sent_back), PARAMETER),
    "shards in another order": ("dense", lambda: instead(Matrices, "full", in_another_order), PARAMETER),
    "the momentum of another rank": ("dense", lambda: instead(Muon, "nesterov", momentum_of_another_rank), STATE),
    "all matrices on one rank": ("dense", lambda: patch.object(muon, "deal", lambda costs, n: [0] * len(costs)), SENT),
    "both moments of Adam": ("pipeline", lambda: instead(Muon, "nesterov", with_two_moments), MOMENTS),
    "AdamW for one matrix": ("experts", lambda: instead(muon, "is_matrix", without("router")), PARAMETER),
    "AdamW for one matrix, dense": ("dense", lambda: instead(muon, "is_matrix", without("mlp.up")), STATE),
    "queries, keys and values as one": (
        "dense", lambda: instead(muon, "direction", lambda right, x, _, s: right(x, 0, s)), PARAMETER,
    ),
    "no momentum": ("pipeline", lambda: instead(Muon, "nesterov", without_momentum), PARAMETER),
}  # fmt: skip
FLAGS = ("--optimizer", "muon", "--momentum", "0.9")


def with_every_bug() -> dict[str, list[str]]:
    layouts = dict.fromkeys(layout for layout, *_ in BUGS.values())  # in one order on all ranks
    found = {layout: failing_claims(layout, nullcontext, *FLAGS) for layout in layouts}
    return found | {name: failing_claims(layout, bug, *FLAGS) for name, (layout, bug, _) in BUGS.items()}


@pytest.fixture(scope="module")
def failed(pool: Pool) -> dict[str, list[str]]:
    return pool.run(4, with_every_bug, timeout=100)[0]


def test_without_a_bug_every_claim_holds(failed: dict[str, list[str]]) -> None:
    assert [failed[layout] for layout in ("dense", "experts", "pipeline")] == [[]] * 3


@pytest.mark.parametrize("name", BUGS)
def test_the_claims_catch(failed: dict[str, list[str]], name: str) -> None:
    assert any(claim.startswith(BUGS[name][2]) for claim in failed[name]), failed[name]


# ---- Without the other ranks


DRY = ["--tp 2 --pp 2 --zero 1 --hidden 256", "--tp 4 --zero 3 --hidden 128 --dtype bfloat16", "--cp 2 --tp 2 --sp"]


@pytest.mark.parametrize("flags", DRY)
def test_a_dry_run_sends_and_holds_what_is_planned(pool: Pool, flags: str) -> None:
    """By fake tensors, of Muon too."""
    dry = ("--dry-run", "--world", "8", "--optimizer", "muon", "--layers", "2")
    outcome = pool.script(1, "cluster/train.py", *dry, *flags.split())
    assert outcome.codes == [0], outcome.out + outcome.err
    assert "bytes sent in a step: muon" in outcome.out
