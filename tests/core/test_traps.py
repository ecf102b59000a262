"""What real versions of other software do without saying so (transformers 5.24, safetensors 0.8, torch 2.13), and what
keeps us from it. Each test fails with the trap in place.
"""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.run.export import plan, write_piece
from cluster.run.hf import Piece
from core.model.config import ModelConfig
from core.model.gpt import GPT, materialize
from core.model.hf import to_published
from core.model.published import from_content
from core.shards import Shard
from tests.pool import FOLDERS, ROOT

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip


def content_of(kind: str, **options: Any) -> dict[str, Any]:
    return json.loads(transformers.AutoConfig.for_model(kind, **SMALL | options).to_json_string(use_diff=False))


def test_names_are_those_of_the_file(tmp_path: Path) -> None:
    """A Mixtral's saved tensors are other than those of its state dict: experts are single, the router renamed."""
    content = content_of("mixtral", num_local_experts=2)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**content))
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != theirs.state_dict().keys()
    config = from_content(content, None)
    ours = {f"blocks.0.mlp.experts.{name}.weight" for name in ("gate", "up", "down")} | {"blocks.0.mlp.router.weight"}
    sizes = {"gate": (2, 20, 24), "up": (2, 20, 24), "down": (2, 24, 20), "router": (2, 24)}
    for name in ours:
        shape = sizes[name.split(".")[-2]]
        for published, value in to_published(name, torch.zeros(shape), config):
            assert saved[published].shape == value.shape


def test_the_size_of_a_head_is_what_the_file_says() -> None:
    """`head_dim` is written as a plain value, and stays where the number of heads is changed afterwards."""
    content = content_of("llama")
    assert content["head_dim"] == 6
    other = content | {"num_attention_heads": 8}
    assert from_content(other, None).head_dim == 6 != SMALL["hidden_size"] // 8


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_have_two_names(name: str) -> None:
    """A Qwen3-MoE is given `num_experts` and may write `num_local_experts`."""
    content = content_of("qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8)
    content = {key: value for key, value in content.items() if key not in ("num_experts", "num_local_experts")}
    assert from_content(content | {name: 6}, None).experts == 6


LAZY = {
    "negated": lambda x: torch._neg_view(x),
    "conjugated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "transposed": lambda x: x.T.contiguous().T,
    "a row of larger": lambda x: torch.stack((x, x), 1)[:, 0],
}


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_view_is_written_as_what_it_is(tmp_path: Path, kind: str) -> None:
    """safetensors writes the memory of a view that is negated or conjugated when it is read."""
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    view = LAZY[kind](x)
    expected = view.clone().contiguous()
    ranges, files = plan({"x": (2, 3)}, {"x": torch.float32}, 10**6)
    (name, file), path = next(iter(files.items())), tmp_path / "model.safetensors"
    path.write_bytes(file.header + bytes(file.size - len(file.header)))
    with path.open("r+b") as opened:
        write_piece(opened.fileno(), Piece(view, "x", (slice(0, 2), slice(0, 3)), False), ranges["x"])
    assert name == "model.safetensors"
    assert torch.equal(load_file(path)["x"], expected)


def test_safetensors_still_writes_the_memory_of_a_negated_view(tmp_path: Path) -> None:
    """If it no longer does, the copy before writing can go."""
    x = torch.arange(3.0)
    save_file({"x": torch._neg_view(x)}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], x)


def test_nothing_is_broadcast() -> None:
    """gloo's broadcast sends memory, not elements, where the strides of the ranks differ; objects have no strides."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
            assert not [n for n in calls if n.attr == "broadcast"], path


def test_plain_values_are_in_no_checkpoint_of_tensors() -> None:
    """torch's distributed checkpoint keeps one rank's plain value, not always the same rank's; its writer of
    safetensors saves one without an error, and the file cannot be read. Here it gets tensors, and JSON the rest.
    """
    source = (ROOT / "core/proof/chunks.py").read_text()
    assert "HuggingFaceStorageWriter" not in source
    saved = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "dcp().save"]
    assert [ast.unparse(call.args[0]) for call in saved] == ["dict(chunks)"]  # of `Chunks`, each of one tensor


def test_shards_are_cut_from_a_whole_that_is_drawn() -> None:
    """A sharded initialisation with one seed repeats the same block on every rank."""
    config = ModelConfig(hidden=16, heads=2, layers=1, sequence=8, vocabulary=32)
    whole = materialize(GPT(config), 3, torch.device("cpu"), torch.float64).embed.token.weight

    def part(index: int) -> Tensor:
        model = GPT(config)
        mark = Shard(0, index, 2, 32)
        model.embed.token.weight = torch.nn.Parameter(mark.local(model.embed.token.weight.detach()))
        model.embed.token.weight.shard = mark
        model.head = None
        return materialize(model, 3, torch.device("cpu"), torch.float64).embed.token.weight.detach()

    assert torch.equal(torch.cat((part(0), part(1))), whole)
    assert not torch.equal(part(0), part(1))
