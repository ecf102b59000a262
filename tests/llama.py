"""Small models of Llama's, Mistral's and Qwen's kinds, with sizes that are easily got wrong."""

from core.model.gpt import GPTConfig

LLAMA = GPTConfig(
    vocabulary=257, sequence=12, hidden=24, layers=2, heads=4, kv_heads=2, feed_forward=36, gated=True, biases=False,
    learned_positions=False, norm="rms", tied=False, name="llama",
)  # fmt: skip
QWEN2 = {"qkv_bias": True, "tied": True}
QWEN3 = {"qk_norm": True, "head_size": 10}
BOTH = QWEN2 | QWEN3
DROPOUT = {"dropout": 0.3, "attention": "softmax"}
NINE_HEADS = {"heads": 9, "kv_heads": 3, "head_size": 4}
CASES: list[tuple[int, dict[str, object]]] = [  # ranks, and what differs from LLAMA
    (1, {}),
    (2, {}),
    (2, {"kv_heads": 1} | BOTH),  # both ranks hold the one head of keys and values
    (2, QWEN2),
    (2, QWEN3 | DROPOUT),
    (3, NINE_HEADS),
    (3, NINE_HEADS | BOTH),
    (3, {"heads": 6, "kv_heads": 1} | DROPOUT),
    (4, {"kv_heads": 1}),
    (4, {"heads": 8} | BOTH | DROPOUT),  # each head on two ranks, read by two heads of each
    (4, QWEN3),
    (6, {"heads": 12, "kv_heads": 3, "head_size": 4} | BOTH),
]
