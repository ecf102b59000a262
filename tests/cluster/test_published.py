"""Published models (Hugging Face) in and out of a combined run, in every layout that the topics have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pool import Pool

transformers = pytest.importorskip("transformers")

LLAMA = {"vocab_size": 263, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 10,
         "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
         "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}}  # fmt: skip
GPT2 = {"vocab_size": 263, "n_positions": 32, "n_embd": 36, "n_layer": 4, "n_head": 6, "n_inner": 52,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 16}),
    "qwen2": ("qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": ("qwen3", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
}
RUN = ("--steps", "0", "--batch", "8", "--sequence", "16", "--sample", "0")
KEPT = ("--no-verify", *RUN)


def published(name: str, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small random model of transformers, saved as it saves it."""
    kind, content = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **content))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.to(dtype).eval().save_pretrained(folder, **options)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def trained(pool: Pool, ranks: int, *flags: str) -> None:
    outcome = pool.script(ranks, "cluster/train.py", *flags)
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err


LAYOUTS = {
    "one process": (1, ()),
    "stages": (4, ("--pp", "2", "--dp", "2", "--schedule", "interleaved")),
    "zero-1": (3, ("--dp", "3", "--zero", "1", "--batch", "9")),
    "zero-3": (3, ("--dp", "3", "--zero", "3", "--batch", "9")),
}
OF_GPT2 = {"tp": (4, ("--tp", "2", "--pp", "2", "--zero", "1"))}


@pytest.mark.parametrize("layout", LAYOUTS | OF_GPT2)
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_keeps_every_bit(pool: Pool, tmp_path: Path, name: str, layout: str) -> None:
    if layout in OF_GPT2 and not name.startswith("gpt2"):
        pytest.skip("not yet")
    into, out = tmp_path / "in", tmp_path / "out"
    theirs = published(name, into, max_shard_size="40KB")
    ranks, flags = (LAYOUTS | OF_GPT2)[layout]
    trained(pool, ranks, *KEPT, *flags, "--hf", str(into), "--export", str(out), "--shard-size", "40KB")
    before, after = tensors(into), tensors(out)
    assert before.keys() == after.keys()
    for each in before:
        assert torch.equal(before[each].view(torch.uint8), after[each].view(torch.uint8)), each
    assert len(list(out.glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    tokens = torch.randint(263, (2, 16))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
