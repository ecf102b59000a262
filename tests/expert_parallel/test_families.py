"""Mixtral's, Qwen3-MoE's and DeepSeek-V3's kinds on several ranks equal one process; which equals transformers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import megatron_tp.engine.layers
import sequence_parallel.engine.layers
from cluster.planner.counting import model_parameters
from cluster.planner.models import PRESETS
from core import comm
from core.mesh import Axis
from core.model import sharding
from core.model.config import Latent, ModelConfig, YarnScaling
from core.model.gpt import GPT, Block
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.routing import MoEConfig
from sequence_parallel.engine.ulysses import OverlappedUlysses
from tests.expert_parallel.test_comparison_mutations import Bug, Buggy
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool, WorkerError

MIXTRAL = ModelConfig(
    sequence=8, hidden=16, layers=2, heads=4, kv_heads=2, feed_forward=12, gated=True, biases=False,
    learned_positions=False, tied=False, norm="rms", experts=8, top_k=2,
)  # fmt: skip
QWEN = replace(MIXTRAL, head_size=6, qk_norm=True, expert_feed_forward=8, top_k=3, score="softmax-topk")
LATENT = {"latent": Latent(q_rank=10, kv_rank=6, rope=4, nope=6, value=5), "kv_heads": None,
          "rope_scaling": YarnScaling(4.0, 4, 1.1, score_factor=1.7)}  # fmt: skip
DENSE = replace(MIXTRAL, experts=0, top_k=0, **LATENT)
DEEPSEEK = replace(
    MIXTRAL, **LATENT, layers=3, dense_layers=1, expert_feed_forward=8, shared_feed_forward=10, score="sigmoid",
    weight_scale=2.5, groups=4, top_groups=2, top_k=4,
)  # fmt: skip
PLAIN_QUERIES = replace(DEEPSEEK, latent=DEEPSEEK.latent._replace(q_rank=0))
KINDS = {"mixtral": MIXTRAL, "qwen": QWEN, "deepseek": DEEPSEEK}

LAYOUTS = {
    "ep 2": Layout(dp=4, ep=2),
    "ep 4": Layout(dp=4, ep=4),
    "etp 2": Layout(dp=4, ep=2, etp=2),
    "tp 2 with sequence x ep": Layout(tp=2, dp=2, ep=4, sequence=True),
    "tp 2 with sequence x etp": Layout(tp=2, dp=2, etp=2, ep=2, sequence=True),
    "zero bubble": Layout(dp=2, ep=2, pp=2, microbatches=2, schedule="zb-h1"),
    "cp 2 x ep": Layout(cp=2, dp=2, ep=4),
    "recomputed": Layout(dp=2, ep=2, recompute="full"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(pool: Pool, kind: str, layout: Layout) -> None:
    config = KINDS[kind]
    training = {"aux": 0.01, "z": 0.001} | ({"bias_rate": 0.01} if config.score == "sigmoid" else {})
    equals_one_process(pool, config, replace(layout, moe=MoEConfig.of(config, **training)))


OF_LATENT = {
    "tp 2": Layout(tp=2),
    "tp 4": Layout(tp=4),
    "tp 2 with sequence": Layout(tp=2, sequence=True),
    "tp 4 with sequence x dp": Layout(tp=4, dp=2, sequence=True),
    "cp 2 by a ring": Layout(cp=2),
    "cp 2 by Ulysses": Layout(cp=2, ulysses=2),
    "tp x cp x pp": Layout(tp=2, cp=2, pp=2, microbatches=2, sequence=True),
    "zero bubble x tp": Layout(tp=2, pp=2, microbatches=2, schedule="zb-h1"),
    "recomputed": Layout(tp=2, sequence=True, recompute="selective"),
}


@pytest.mark.parametrize("q_rank", [10, 0])
@pytest.mark.parametrize("layout", OF_LATENT.values(), ids=OF_LATENT)
def test_latent_attention(pool: Pool, layout: Layout, q_rank: int) -> None:
    config = replace(DENSE, latent=DENSE.latent._replace(q_rank=q_rank), layers=2)
    equals_one_process(pool, config, layout)


def test_latent_attention_with_every_intermediate_in_sight_and_dropout(pool: Pool) -> None:
    equals_one_process(pool, replace(DENSE, attention="softmax", dropout=0.1), Layout(tp=2, sequence=True))


# ---- Bugs of sharded latent attention that the comparison must see

Message = Callable[[Tensor], Tensor]


def to_heads(
    change: Callable[[Axis, Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]],
) -> AbstractContextManager:
    """The message to all heads is another one than `shard_latent` is given."""

    def wrong(block: Block, axis: Axis, send: Message) -> None:
        sharding.shard_latent(block, axis, change(axis, send))

    stack = ExitStack()
    for topic in (megatron_tp.engine.layers, sequence_parallel.engine.layers):
        stack.enter_context(patch.object(topic, "shard_latent", wrong))
    return stack


def no_f() -> AbstractContextManager:
    return to_heads(lambda axis, send: lambda x: x)


def f_twice() -> AbstractContextManager:
    return to_heads(lambda axis, send: lambda x: send(send(x)))


def gathered_without_the_gradients_of_other_heads() -> AbstractContextManager:
    return to_heads(lambda axis, send: partial(comm.gather_from, axis=axis, dim=1))


def no_f_for_the_key() -> AbstractContextManager:
    key = DENSE.latent.rope
    return to_heads(lambda axis, send: lambda x: torch.cat((send(x[..., :-key]), x[..., -key:]), -1))


def down_projections_not_summed() -> AbstractContextManager:
    """They are replicated, and see other tokens on each rank."""
    layers, right = sequence_parallel.engine.layers, sequence_parallel.engine.layers.sum_replicated_gradients

    def wrong(model: GPT, *axes: Axis) -> None:
        kept = {p: p.grad for name, p in model.named_parameters() if "_down." in name}
        for p in kept:
            p.grad = None
        right(model, *axes)
        for p, gradient in kept.items():
            p.grad = gradient

    return patch.object(layers, "sum_replicated_gradients", wrong)


def scale_lost_in_the_ring() -> AbstractContextManager:
    right = OverlappedUlysses.__call__
    return patch.object(
        OverlappedUlysses, "__call__", lambda self, q, k, v, scale, starts: right(self, q, k, v, None, starts)
    )


SEEN: dict[Bug, Layout] = {
    no_f: Layout(tp=2),
    f_twice: Layout(tp=2),
    no_f_for_the_key: Layout(tp=2),
    gathered_without_the_gradients_of_other_heads: Layout(tp=2, sequence=True),
    down_projections_not_summed: Layout(tp=2, sequence=True),
    scale_lost_in_the_ring: Layout(cp=2),
}


@pytest.mark.parametrize(("bug", "layout"), SEEN.items(), ids=[bug.__name__ for bug in SEEN])
def test_the_comparison_catches(pool: Pool, bug: Bug, layout: Layout) -> None:
    with pytest.raises(AssertionError) as caught:
        equals_one_process(Buggy(pool, bug), DENSE, layout)
    assert not isinstance(caught.value, WorkerError), "a difference, not a bug that no longer fits the code"


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
def test_the_planners_presets_are_built(name: str) -> None:
    """On the meta device, without memory; the biases of selection are no parameters in the published models."""
    model = to_moe(GPT(PRESETS[name]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model_parameters(PRESETS[name])
