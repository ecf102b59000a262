"""The decoder against Hugging Face transformers: the same weights, every logit and every gradient, in float64.

Their code is run as it is, but for its roundings to float32, in RMSNorm and softmax, which are left out.
"""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cluster.planner.counting import model_parameters
from cluster.planner.models import from_config
from core.model.config import ModelConfig
from core.model.gpt import GPT, Attention, Block, materialize, token_loss
from core.model.hf import from_published, to_published

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-10
LLAMA = {
    "vocab_size": 101, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 160, "rms_norm_eps": 3e-3, "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_theta": 700.0, "rope_type": "default"}
LLAMA3 = {"rope_theta": 700.0, "rope_type": "llama3", "factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_theta": 700.0, "rope_type": "yarn", "factor": 5.0, "beta_fast": 4.0, "beta_slow": 0.5,
        "original_max_position_embeddings": 32}  # fmt: skip
GPT2 = {"vocab_size": 101, "n_positions": 11, "n_embd": 36, "n_layer": 2, "n_head": 9, "n_inner": 52,
        "activation_function": "gelu", "layer_norm_epsilon": 3e-3, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], int]] = {  # model type, what its configuration says, tokens of a sample
    "llama": ("llama", {"rope_parameters": ROPE}, 11),
    "llama, tied": ("llama", {"rope_parameters": ROPE, "tie_word_embeddings": True}, 7),
    "llama, large heads": ("llama", {"rope_parameters": ROPE, "head_dim": 10}, 11),
    "llama, as many keys as heads": ("llama", {"rope_parameters": ROPE, "num_key_value_heads": 9}, 7),
    "llama, one key": ("llama", {"rope_parameters": ROPE, "num_key_value_heads": 1}, 7),
    "llama, scaled as llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 10}, 11),
    "llama, scaled by yarn": ("llama", {"rope_parameters": YARN, "head_dim": 34}, 11),
    "mistral": ("mistral", {"rope_parameters": ROPE, "sliding_window": None, "head_dim": 6}, 11),
    "qwen2": ("qwen2", {"rope_parameters": ROPE, "tie_word_embeddings": True}, 11),
    "qwen3": ("qwen3", {"rope_parameters": ROPE, "head_dim": 10}, 11),
    "qwen3, tied, scaled by yarn": (
        "qwen3", {"rope_parameters": YARN | {"truncate": False}, "head_dim": 6, "tie_word_embeddings": True}, 7,
    ),
    "gpt2": ("gpt2", GPT2, 11),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}, 7),
}  # fmt: skip


class InFloat64(TorchFunctionMode):
    """`x.to(torch.float32)` and `softmax(x, dtype=torch.float32)` of a float64 x stay float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.to and args[1:] == (torch.float32,):
                return args[0]
            if func in (F.softmax, Tensor.softmax, torch.softmax):
                kwargs = kwargs | {"dtype": None}
        return func(*args, **kwargs)


def theirs_of(case: str) -> Any:
    """A small random model of transformers, far enough from its start for every nonlinearity to count."""
    kind, options, _ = CASES[case]
    options = options if kind == "gpt2" else LLAMA | options
    config = transformers.AutoConfig.for_model(kind, **options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def ours_of(theirs: Any, sequence: int, folder: Path) -> GPT:
    """The same model here, from what transformers writes into `config.json` and from its parameters by their names."""
    (folder / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    config = from_config(str(folder / "config.json"), None if theirs.config.model_type == "gpt2" else sequence)
    model = materialize(GPT(config), 0, torch.device("cpu"), torch.float64)
    parameters = dict(model.named_parameters())
    names = set()
    for name, p in theirs.named_parameters():
        name, value = from_published(name, p.detach(), config)
        assert parameters[name].shape == value.shape, name
        parameters[name].data.copy_(value)
        names.add(name)
    assert names == parameters.keys()
    return model


def apart(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def differences(case: str, folder: Path, bug: Callable[[Block], None] | None = None) -> tuple[float, float, str]:
    """Of the logits, the largest of a gradient and the name of its parameter; each relative to theirs."""
    sequence, theirs = CASES[case][2], theirs_of(case)
    ours = ours_of(theirs, sequence, folder)
    for block in ours.blocks.values() if bug else ():
        bug(block)
    tokens, targets = torch.randint(101, (2, 3, sequence), generator=torch.Generator().manual_seed(1))
    with InFloat64():
        exact = theirs(tokens, use_cache=False).logits
        token_loss(exact, targets, 40).backward()
    logits = ours(tokens)
    token_loss(logits, targets, 40).backward()
    assert exact.dtype == logits.dtype == torch.float64
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    found = dict(to_published(name, p.grad, ours.config) for name, p in ours.named_parameters())
    assert found.keys() == gradients.keys()
    worst = max((apart(found[name], gradients[name]), name) for name in gradients)
    return apart(logits, exact), *worst


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    of_logits, of_gradient, name = differences(case, tmp_path)
    print(f"{case:32} logits {of_logits:.1e}  gradients {of_gradient:.1e}  {name}")  # pytest -rP
    assert of_logits < TOLERANCE
    assert of_gradient < TOLERANCE, name


# ---- The bugs


def pairs_of_neighbours(block: Block) -> None:
    """Features (2i, 2i + 1) are turned, as in GPT-J and in Meta's own files, not (i, i + D/2)."""
    block.attention.rotary = copy(block.attention.rotary)  # layers share one
    rotary = block.attention.rotary.forward

    def interleaved(q: Tensor, k: Tensor, starts: None = None) -> tuple[Tensor, ...]:
        halves = rotary(*(rearrange(x, "... (i two) -> ... (two i)", two=2) for x in (q, k)))
        return tuple(rearrange(x, "... (two i) -> ... (i two)", two=2) for x in halves)

    block.attention.rotary.forward = interleaved


def turned_backwards(block: Block) -> None:
    block.attention.rotary.positions = lambda length: length - 1 - torch.arange(length)


def no_turn(block: Block) -> None:
    block.attention.rotary.forward = lambda q, k, starts=None: (q, k)


def turned_before_the_norms(block: Block) -> None:
    attention = block.attention
    attention.rotary = copy(attention.rotary)
    rotary, q_norm, k_norm = attention.rotary.forward, attention.q_norm.forward, attention.k_norm.forward
    attention.q_norm.forward = attention.k_norm.forward = lambda x: x

    def turned_first(q: Tensor, k: Tensor, starts: None = None) -> tuple[Tensor, Tensor]:
        q, k = rotary(q, k)
        return q_norm(q), k_norm(k)

    attention.rotary.forward = turned_first


def other_base(block: Block) -> None:
    block.attention.rotary.config = replace(block.attention.rotary.config, rope_theta=10_000.0)


def not_scaled(block: Block) -> None:
    block.attention.rotary.config = replace(block.attention.rotary.config, rope_scaling=None)


def scaled_wrongly(block: Block) -> None:
    """Fewer turns in the original sequence: another pair is between slow and fast."""
    scaling = block.attention.rotary.config.rope_scaling
    scaling = scaling._replace(original=scaling.original // 2)
    block.attention.rotary.config = replace(block.attention.rotary.config, rope_scaling=scaling)


def rounded_borders(block: Block) -> None:
    scaling = block.attention.rotary.config.rope_scaling._replace(truncate=True)
    block.attention.rotary.config = replace(block.attention.rotary.config, rope_scaling=scaling)


def without_yarns_factor(block: Block) -> None:
    scaling = block.attention.rotary.config.rope_scaling._replace(attention_factor=1.0)
    block.attention.rotary.config = replace(block.attention.rotary.config, rope_scaling=scaling)


def keys_of_head_i_mod_k(block: Block) -> None:
    def core(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
        return Attention.core(self, q, k, v)

    block.attention.core = MethodType(core, block.attention)


def no_query_norm(block: Block) -> None:
    norm = block.attention.q_norm
    norm.forward = lambda x: x + 0.0 * norm.weight


def one_norm_for_both(block: Block) -> None:
    attention = block.attention
    k_norm = attention.k_norm.forward
    attention.k_norm.forward = lambda x: attention.q_norm(x) + 0.0 * k_norm(x)


def usual_eps(block: Block) -> None:
    for norm in (block.attention_norm, block.mlp_norm):
        norm.eps = 1e-6


def usual_eps_of_heads(block: Block) -> None:
    block.attention.k_norm.eps = 1e-6


def centred(block: Block) -> None:
    norm = block.mlp_norm.forward
    block.mlp_norm.forward = lambda x: norm(x - x.mean(-1, keepdim=True))


def gate_and_up_exchanged(block: Block) -> None:
    mlp = block.mlp
    mlp.forward = lambda x: mlp.down(F.silu(mlp.up(x)) * mlp.gate(x))


def gelu_gate(block: Block) -> None:
    mlp = block.mlp
    mlp.forward = lambda x: mlp.down(F.gelu(mlp.gate(x)) * mlp.up(x))


def tanh_gelu(block: Block) -> None:
    mlp = block.mlp
    mlp.forward = lambda x: mlp.down(F.gelu(mlp.up(x), approximate="tanh"))


def no_bias_of_values(block: Block) -> None:
    v = block.attention.v
    v.forward = lambda x: F.linear(x, v.weight) + 0.0 * v.bias


def all_queries_first(block: Block) -> None:
    """The fused rows as GPT-2's file has them."""
    for p in block.attention.qkv.parameters():
        p.data = rearrange(p.data, "(a three d) ... -> (three a d) ...", three=3, d=4)


BUGS = [
    (pairs_of_neighbours, "llama"), (turned_backwards, "llama"), (no_turn, "mistral"), (other_base, "qwen2"),
    (turned_before_the_norms, "qwen3"), (not_scaled, "llama, scaled as llama 3"), (not_scaled, "llama, scaled by yarn"),
    (scaled_wrongly, "llama, scaled as llama 3"), (scaled_wrongly, "llama, scaled by yarn"),
    (scaled_wrongly, "qwen3, tied, scaled by yarn"), (rounded_borders, "qwen3, tied, scaled by yarn"),
    (without_yarns_factor, "llama, scaled by yarn"), (keys_of_head_i_mod_k, "llama"),
    (keys_of_head_i_mod_k, "llama, large heads"), (no_query_norm, "qwen3"), (one_norm_for_both, "qwen3"),
    (usual_eps, "llama"), (usual_eps, "gpt2"), (usual_eps_of_heads, "qwen3"), (centred, "mistral"),
    (gate_and_up_exchanged, "llama, tied"), (gelu_gate, "qwen2"), (tanh_gelu, "gpt2"), (no_bias_of_values, "qwen2"),
    (all_queries_first, "gpt2"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "case"), BUGS, ids=lambda each: getattr(each, "__name__", each))
def test_a_bug_is_seen(bug: Callable[[Block], None], case: str, tmp_path: Path) -> None:
    of_logits, of_gradient, name = differences(case, tmp_path, bug)
    print(f"{bug.__name__:24} {case:26} logits {of_logits:.1e}  gradients {of_gradient:.1e}  {name}")
    assert of_logits > 1e4 * TOLERANCE
    assert of_gradient > 1e4 * TOLERANCE


# ---- Names and counts


@pytest.mark.parametrize("case", CASES)
def test_the_planner_counts_its_parameters(case: str, tmp_path: Path) -> None:
    theirs = theirs_of(case)
    config = ours_of(theirs, CASES[case][2], tmp_path).config
    assert model_parameters(config) == sum(p.numel() for p in theirs.parameters())


def test_names_and_values_come_back() -> None:
    for config in (ModelConfig(layers=12, tied=False), replaced(layers=12)):
        for name, p in GPT(config).named_parameters():
            value = torch.randn(p.shape)
            again, back = from_published(*to_published(name, value, config), config)
            assert again == name
            assert torch.equal(back, value)


def replaced(**options: Any) -> ModelConfig:
    llama = {"kv_heads": 2, "gated": True, "biases": False, "learned_positions": False, "tied": False, "norm": "rms"}
    return ModelConfig(**llama | {"qk_norm": True, "qkv_bias": True} | options)
