"""What is trained: published models by name. Lecture 03. Others come from a `config.json`: `core.model.published`."""

from dataclasses import replace

from cluster.planner.ptdp import SEQUENCE, TABLE, VOCABULARY
from core.model.config import Latent, Llama3Scaling, ModelConfig

LLAMA = ModelConfig(
    vocabulary=128_256,
    sequence=8192,
    kv_heads=8,
    gated=True,
    biases=False,
    learned_positions=False,
    tied=False,
    norm="rms",
    rope_theta=500_000.0,
)
MIXTRAL_8X7B = replace(
    LLAMA, layers=32, hidden=4096, heads=32, feed_forward=14336, vocabulary=32_000, experts=8, top_k=2, rope_theta=1e6
)
DEEPSEEK_V3 = replace(
    LLAMA,
    layers=61,
    hidden=7168,
    heads=128,
    kv_heads=None,
    feed_forward=18432,
    vocabulary=129_280,
    sequence=4096,
    latent=Latent(q_rank=1536, kv_rank=512, rope=64, nope=128, value=128),
    experts=256,
    top_k=8,
    expert_feed_forward=2048,
    shared_feed_forward=2048,
    dense_layers=3,
    score="sigmoid",
    weight_scale=2.5,
    groups=8,
    top_groups=4,
    norm_eps=1e-6,
    rope_theta=10_000.0,
)


def gpt(layers: int, hidden: int, heads: int) -> ModelConfig:
    """GPT-3's kind, with the vocabulary and the sequence of the published runs."""
    return ModelConfig(VOCABULARY, SEQUENCE, layers=layers, hidden=hidden, heads=heads)


PUBLISHED = {
    "gpt3-175b": gpt(96, 12288, 96),
    "llama3-8b": replace(LLAMA, layers=32, hidden=4096, heads=32, feed_forward=14336),
    "llama3-70b": replace(LLAMA, layers=80, hidden=8192, heads=64, feed_forward=28672),
    "llama3-405b": replace(
        LLAMA, layers=126, hidden=16384, heads=128, feed_forward=53248, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)
    ),
    "mixtral-8x7b": MIXTRAL_8X7B,
    "deepseek-v3": DEEPSEEK_V3,
} | {row.name: gpt(row.layers, row.hidden, row.heads) for row in TABLE}
PRESETS = {name: replace(model, name=name) for name, model in PUBLISHED.items()}
