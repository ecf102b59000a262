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


def llama(layers: int, hidden: int, heads: int, feed_forward: int, **more: object) -> ModelConfig:
    return replace(LLAMA, layers=layers, hidden=hidden, heads=heads, feed_forward=feed_forward, **more)


def qwen3_moe(layers: int, hidden: int, heads: int, feed_forward: int) -> ModelConfig:
    return llama(layers, hidden, heads, 3 * hidden, kv_heads=4, head_size=128, vocabulary=151_936, experts=128,
                 top_k=8, expert_feed_forward=feed_forward, qk_norm=True, sequence=4096, norm_eps=1e-6,
                 rope_theta=1e6)  # fmt: skip


def nemotron(layers: int, hidden: int, heads: int) -> ModelConfig:
    """Nemotron-4's kind (2402.16819, 2406.11704): squared ReLU, no biases but the norms'."""
    return ModelConfig(256_000, 4096, hidden, layers, heads, 4 * hidden, tied=False, kv_heads=8, biases=False,
                       learned_positions=False)  # fmt: skip


PUBLISHED = {
    "gpt3-175b": gpt(96, 12288, 96),
    "llama3-8b": llama(32, 4096, 32, 14336),
    "llama3-70b": llama(80, 8192, 64, 28672),
    "llama3-405b": llama(126, 16384, 128, 53248, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "mixtral-8x7b": MIXTRAL_8X7B,
    "mixtral-8x22b": replace(MIXTRAL_8X7B, layers=56, hidden=6144, heads=48, feed_forward=16384, vocabulary=32_768),
    "qwen3-30b-a3b": qwen3_moe(48, 2048, 32, 768),
    "qwen3-235b-a22b": qwen3_moe(94, 4096, 64, 1536),
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": replace(DEEPSEEK_V3, heads=64, vocabulary=163_840, experts=384, groups=1, top_groups=1, dense_layers=1,
                       weight_scale=2.827, rope_theta=50_000.0),
} | {row.name: gpt(row.layers, row.hidden, row.heads) for row in TABLE}  # fmt: skip
GPT_OSS = llama(24, 2880, 64, 2880, head_size=64, vocabulary=201_088, experts=32, top_k=4, biases=True, norm="rms")
# Of the published runs, by a pattern of their names in small letters.
FAMILIES = {
    r"llama318b|llama38b": PUBLISHED["llama3-8b"],
    r"llama3170b|llama370b": PUBLISHED["llama3-70b"],
    r"llama31405b|llama3405b": PUBLISHED["llama3-405b"],
    r"llama27b": llama(32, 4096, 32, 11008, kv_heads=None, vocabulary=32_000),
    r"llama213b": llama(40, 5120, 40, 13824, kv_heads=None, vocabulary=32_000),
    r"llama234b": llama(48, 8192, 64, 22016, vocabulary=32_000),
    r"llama270b": llama(80, 8192, 64, 28672, vocabulary=32_000),
    r"gpt3175b": PUBLISHED["gpt3-175b"],
    r"gpt7b": gpt(32, 4096, 32),
    r"nemotron415b": nemotron(32, 6144, 48),
    r"nemotron4340b": nemotron(96, 18432, 96),
    r"mixtral8x22b": PUBLISHED["mixtral-8x22b"],
    r"grok1314bmoe": replace(MIXTRAL_8X7B, layers=64, hidden=6144, heads=48, feed_forward=32768, vocabulary=131_072,
                             tied=True),
    r"deepseekv3(67\d|68\d)?b?": DEEPSEEK_V3,
    r"kimik2": PUBLISHED["kimi-k2"],
    r"moonlight16b": replace(
        DEEPSEEK_V3, layers=27, hidden=2048, heads=16, feed_forward=11264, vocabulary=163_840, experts=64, top_k=6,
        latent=Latent(0, 512, 64, 128, 128), expert_feed_forward=1408, shared_feed_forward=2816, dense_layers=1,
        groups=1, top_groups=1,
    ),
    r"qwen330ba3b": PUBLISHED["qwen3-30b-a3b"],
    r"qwen3235ba22b": PUBLISHED["qwen3-235b-a22b"],
    r"smollm17b": llama(24, 2048, 32, 8192, kv_heads=None, vocabulary=49_152, tied=True),
    r"gptoss20b": GPT_OSS,
    r"gptoss120b": replace(GPT_OSS, layers=36, experts=128),
}  # fmt: skip
PRESETS = {name: replace(model, name=name) for name, model in PUBLISHED.items()}
