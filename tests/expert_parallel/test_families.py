"""Mixtral's, Qwen3-MoE's and DeepSeek-V3's kinds on several ranks equal one process; which equals transformers."""

from dataclasses import replace

import pytest

from core.model.config import Latent, ModelConfig, YarnScaling
from expert_parallel.engine.routing import MoEConfig
from tests.layouts import Layout, equals_one_process
from tests.pool import Pool

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
