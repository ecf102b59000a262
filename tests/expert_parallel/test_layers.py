"""The layer across ranks: the order of what travels and what is computed, ZeRO for experts, refusals."""

import weakref
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.oracle import Oracle, worst_difference
from core.shards import LocalTensor, shard_of
from expert_parallel.engine.layers import expert_parameters, gather_rows, parallelize, scatter_rows
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import Spread, end_step
from expert_parallel.engine.routing import MoEConfig, Routing
from tests.pool import Pool
from zero.engine.engine import data_parallel, zero1, zero2

CPU, SEED, CLIP, SAMPLES = torch.device("cpu"), 7, 0.5, 8
CONFIG = GPTConfig(sequence=8, hidden=16, layers=2, heads=4)
MOE = MoEConfig(Routing(8, 2, aux=0.01), feed_forward=24, shared=12)
STAGES = {"ddp": data_parallel, "zero1": zero1, "zero2": zero2}
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def order() -> list[str]:
    """Forward and backward of one layer on this rank."""
    mesh = Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size(), ep=dist.get_world_size())
    model = parallelize(to_moe(GPT(replace(CONFIG, layers=1)), MOE), mesh["ep"], mesh["etp"], Spread((mesh["dp"],)))
    layer = materialize(model, SEED, CPU, torch.float64).blocks["0"].mlp
    happened: list[str] = []
    post, wait = comm.all_to_all_async, comm.Pending.wait

    def posting(x: torch.Tensor, axis: Axis, send: list, receive: list) -> comm.Pending:
        happened.append(f"posts {axis.name}")
        return post(x, axis, send, receive)

    def waiting(pending: comm.Pending) -> torch.Tensor:
        if pending.what == "all-to-all":
            happened.append(f"waits for {pending.axis.name}")
        return wait(pending)

    comm.all_to_all_async, comm.Pending.wait = posting, waiting
    try:
        layer.shared.up.register_forward_hook(lambda *_: happened.append("shared"))
        layer.shared.up.register_full_backward_hook(lambda *_: happened.append("shared backward"))
        layer.experts.register_forward_hook(lambda *_: happened.append("experts"))
        x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        happened.append("backward")
        y.sum().backward()
    finally:
        comm.all_to_all_async, comm.Pending.wait = post, wait
    return happened


def test_the_shared_expert_runs_while_rows_are_in_flight(pool: Pool) -> None:
    for happened in pool.run(2, order):
        forward, backward = (part.split(", ") for part in ", ".join(happened).split(", backward, "))
        assert forward == ["posts ep counts", "waits for ep counts", "posts ep", "shared", "waits for ep", "experts",
                           "posts ep", "waits for ep"]  # fmt: skip
        assert backward == ["posts ep", "waits for ep", "posts ep", "shared backward", "waits for ep"]


def buffers_kept() -> tuple[int, int]:
    """All-to-alls of a forward, and those whose buffers something holds until the backward."""
    n = dist.get_world_size()
    mesh = Mesh("cpu", Ledger(), 30.0, dp=n, ep=n)
    model = parallelize(to_moe(GPT(replace(CONFIG, layers=1)), MOE), mesh["ep"], mesh["etp"], Spread((mesh["dp"],)))
    layer = materialize(model, SEED, CPU, torch.float64).blocks["0"].mlp
    started: list[weakref.ref] = []
    start = comm.all_to_all_async

    def starting(*arguments: Any) -> comm.Pending:
        pending = start(*arguments)
        started.append(weakref.ref(pending))
        return pending

    with patch.object(comm, "all_to_all_async", starting):
        y = layer(torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True))
    kept = sum(pending() is not None for pending in started)
    y.sum().backward()
    return len(started), kept


def test_the_buffers_of_messages_are_not_kept_for_the_backward(pool: Pool) -> None:
    """The hooks that count what autograd saves would not see them."""
    assert pool.run(2, buffers_kept) == [(3, 0)] * 2


def uneven() -> None:
    axis = Mesh("cpu", Ledger(), 30.0, tp=dist.get_world_size())["tp"]
    counts = [2, 0, 3]
    everyone = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = everyone.split(counts)[axis.index].clone().requires_grad_()
    full = gather_rows(own, axis, counts)
    assert torch.equal(full, everyone)
    (full * (axis.index + 1)).sum().backward()
    assert torch.equal(own.grad, torch.full_like(own, 6.0)), "the sum of what all ranks made of it"
    partial_ = (everyone * (axis.index + 1)).requires_grad_()
    summed = scatter_rows(partial_, axis, counts)
    torch.testing.assert_close(summed, everyone.split(counts)[axis.index] * 6)
    (summed * (axis.index + 1)).sum().backward()
    assert torch.equal(partial_.grad, torch.tensor([1.0, 1, 3, 3, 3]).double().unsqueeze(1).expand(5, 4))


def test_uneven_rows(pool: Pool) -> None:
    pool.run(3, uneven)


def with_zero(kind: str) -> tuple[list[float], list[float], list[LocalTensor], list[LocalTensor], list[LocalTensor]]:
    """What is no expert over dp, experts over edp: each a stage of its own, clipped by one norm."""
    mesh = Mesh("cpu", Ledger(), 30.0, dp=4, ep=2)
    dp, ep, edp = (mesh[name] for name in ("dp", "ep", "edp"))
    model = parallelize(to_moe(GPT(CONFIG), MOE), ep, mesh["etp"], Spread((dp,)))
    materialize(model, SEED, CPU, torch.float64)
    experts = set(expert_parameters(model))
    stages = [
        STAGES[kind](model, axis, optimizer_of, None, torch.float64, 1000, only)
        for axis, only in ((dp, lambda p: p not in experts), (edp, experts.__contains__))
    ]
    losses, norms, gradients = [], [], []
    for step in range(2):
        for stage in stages:
            stage.zero_grad()
        inputs, targets = (t.chunk(4)[dp.index] for t in Text(None, 8).batch(SEED, step, SAMPLES))
        loss = token_loss(model(inputs), targets, SAMPLES * 8)
        for stage in stages:
            stage.before_backward()
        loss.backward()
        for stage in stages:
            stage.after_backward()
        gradients = [piece for stage in stages for piece in stage.gradients()]
        rest, total = stages[0].norm_and_total(loss.detach())
        of_experts, _ = stages[1].norm_and_total(torch.zeros(()), [ep])
        norm = (rest**2 + of_experts**2) ** 0.5
        for stage in stages:
            stage.clip_by(CLIP, norm)
            stage.step()
        end_step(model)
        losses.append(total)
        norms.append(norm)
    weights = [p for stage in stages for p in stage.weights()]
    return losses, norms, gradients, weights, [p for s in stages for p in s.states()]


@pytest.mark.parametrize("kind", STAGES)
def test_zero_over_the_expert_data_parallel_ranks(pool: Pool, kind: str) -> None:
    oracle = Oracle(CONFIG, SEED, CPU, optimizer_of, CLIP, lambda config: to_moe(GPT(config), MOE))
    losses, norms = [], []
    for step in range(2):
        losses.append(oracle.step(*Text(None, 8).batch(SEED, step, SAMPLES), step))
        norms.append(oracle.norm)
        end_step(oracle.model)
    results = pool.run(4, with_zero, kind)
    for rank in results:
        assert rank[0] == pytest.approx(losses, rel=1e-10)
        assert rank[1] == pytest.approx(norms, rel=1e-10)
    for i, reference in ((2, oracle.gradients), (3, oracle.parameters()), (4, oracle.states())):
        assert worst_difference(full_tensors(piece for rank in results for piece in rank[i]), reference) < 1e-10


def lone(name: str, size: int) -> Axis:
    return Axis(name, tuple(range(size)), 0, None, Ledger(), timedelta(0))


@pytest.mark.parametrize(
    ("ep", "etp", "dispatch", "message"),
    [(3, 1, "all-to-all", "8 experts cannot be sharded equally over 3"), (1, 5, "all-to-all", "24 features .* over 5"),
     (1, 2, "all-gather", "--dispatch all-gather"), (1, 1, "post", "--dispatch post")],
)  # fmt: skip
def test_refusals(ep: int, etp: int, dispatch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(to_moe(GPT(CONFIG), MOE), lone("ep", ep), lone("etp", etp), Spread(), dispatch)


def test_experts_are_marked(pool: Pool) -> None:
    model = parallelize(to_moe(GPT(CONFIG), MOE), lone("ep", 4), lone("etp", 2), Spread())
    experts: nn.Module = model.blocks["0"].mlp.experts
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "up.weight": (2, 12, 16), "up.bias": (2, 12), "down.weight": (2, 16, 12), "down.bias": (2, 16)
    }  # fmt: skip
    assert shard_of(experts.up.weight).full_shape(experts.up.weight.shape) == (8, 24, 16)
