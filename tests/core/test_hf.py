"""The decoder against Hugging Face transformers: the same weights, every logit and every gradient, in float64.

Their code is run as it is, but for its roundings to float32, in RMSNorm and softmax, which are left out.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cluster.planner.counting import model_parameters
from core.ledger import Ledger
from core.mesh import Axis
from core.model.config import Latent, ModelConfig
from core.model.gpt import GPT, Attention, Block, materialize, token_loss
from core.model.hf import from_published, to_published
from core.model.published import from_config, from_content
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import Router
from expert_parallel.engine.routing import choose
from expert_parallel.moe import with_experts

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
QWEN3_MOE = {"rope_parameters": ROPE, "head_dim": 10, "num_experts": 6, "num_experts_per_tok": 2,
             "moe_intermediate_size": 20}  # fmt: skip
DEEPSEEK = {
    "rope_parameters": ROPE, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 20, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "q_lora_rank": 14, "kv_lora_rank": 10, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 9,
}  # fmt: skip
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
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
    "mixtral": ("mixtral", {"rope_parameters": ROPE, "num_local_experts": 5, "num_experts_per_tok": 2}, 11),
    "mixtral, 3 experts a token": (
        "mixtral", {"rope_parameters": ROPE, "num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 6}, 7,
    ),
    "qwen3 moe": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}, 11),
    "qwen3 moe, weights as they are": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": False}, 11),
    "deepseek": ("deepseek_v3", DEEPSEEK, 11),
    "deepseek, plain queries": ("deepseek_v3", DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 0}, 7),
    "deepseek, scaled by yarn": ("deepseek_v3", DEEPSEEK | {"rope_parameters": MSCALE}, 11),
    "deepseek, one expert a group": (
        "deepseek_v3", DEEPSEEK | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 2}, 7,
    ),
    "gpt2": ("gpt2", GPT2, 11),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}, 7),
}  # fmt: skip


class InFloat64(TorchFunctionMode):
    """`x.to(torch.float32)`, `x.float()` and `softmax(x, dtype=torch.float32)` of a float64 x stay float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func in (Tensor.to, Tensor.type) and args[1:] == (torch.float32,)):
                return args[0]
            if func in (F.softmax, Tensor.softmax, torch.softmax):
                kwargs = kwargs | {"dtype": None}
        return func(*args, **kwargs)


def theirs_of(case: str) -> Any:
    kind, options, _ = CASES[case]
    return built_by(kind, options if kind == "gpt2" else LLAMA | options)


def built_by(kind: str, options: dict[str, Any]) -> Any:
    """A small random model of transformers, far enough from its start for every nonlinearity to count."""
    config = transformers.AutoConfig.for_model(kind, **options)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # so that some scores are negative, and decided by it
            b.data += 0.5 * torch.randn_like(b)
    return model


def saved(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """What transformers writes of a model, by the names in its file; besides a `config.json`."""
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def ours_of(theirs: Any, sequence: int, folder: Path, experts: Callable[[GPT], GPT] = to_moe) -> GPT:
    """The same model here, from what transformers writes."""
    tensors = saved(theirs, folder)
    config = from_config(str(folder / "config.json"), None if theirs.config.model_type == "gpt2" else sequence)
    model = GPT(config)
    model = materialize(experts(model) if config.experts else model, 0, torch.device("cpu"), torch.float64)
    missing = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.fill_(torch.nan)
    parameters = dict(model.named_parameters())
    for published, tensor in tensors.items():
        name, expert, value = from_published(published, tensor, config)
        here = parameters[name].data if expert is None else parameters[name].data[expert]
        assert here.shape == value.shape, name
        here.copy_(value)
        missing.pop(name, None)
    assert not missing
    assert not any(p.isnan().any() for p in model.parameters())
    return model


def apart(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()  # an expert may have no token


def differences(
    case: str, folder: Path, bug: Callable[[Block], None] | None = None, experts: Callable[[GPT], GPT] = to_moe
) -> tuple[float, float, str]:
    """Of the logits, the largest of a gradient and the name of its parameter; each relative to theirs."""
    sequence, theirs = CASES[case][2], theirs_of(case)
    ours = ours_of(theirs, sequence, folder, experts)
    for block in ours.blocks.values() if bug else ():
        bug(block)
    tokens, targets = torch.randint(101, (2, 3, sequence), generator=torch.Generator().manual_seed(1))
    with InFloat64():
        exact = theirs(tokens, use_cache=False).logits
        token_loss(exact, targets, 40).backward()
    logits = ours(tokens)
    token_loss(logits, targets, 40).backward()
    assert exact.dtype == logits.dtype == torch.float64
    for p in theirs.parameters():
        p.data = p.grad
    gradients = saved(theirs, folder)  # by the names in the file, as it knows how to write a parameter
    trained = [(name, p.grad) for name, p in ours.named_parameters() if p.requires_grad]
    found = dict(pair for name, gradient in trained for pair in to_published(name, gradient, ours.config))
    assert found.keys() == {name for name in gradients if not name.endswith("e_score_correction_bias")}
    worst = max((apart(found[name], gradients[name]), name) for name in found)
    return apart(logits, exact), *worst


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    of_logits, of_gradient, name = differences(case, tmp_path)
    print(f"{case:32} logits {of_logits:.1e}  gradients {of_gradient:.1e}  {name}")  # pytest -rP
    assert of_logits < TOLERANCE
    assert of_gradient < TOLERANCE, name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("mixtral", "qwen3 moe", "deepseek"))])
def test_so_are_those_of_the_plain_mixtures(case: str, tmp_path: Path) -> None:
    """One expert after another; and with every intermediate of attention in sight."""

    def plain(model: GPT) -> GPT:
        for block in model.blocks.values():
            block.attention.explicit = True
        return with_experts(model, None, Axis("dp", (0,), 0, None, Ledger(), timedelta(0)))

    of_logits, of_gradient, name = differences(case, tmp_path, experts=plain)
    assert of_logits < TOLERANCE
    assert of_gradient < TOLERANCE, name


def test_groups_that_the_published_code_and_the_paper_judge_otherwise_are_refused() -> None:
    theirs = transformers.AutoConfig.for_model("deepseek_v3", **LLAMA | DEEPSEEK | {"topk_group": 1}).to_dict()
    with pytest.raises(ValueError, match="a group is judged by its best 2 .* with num_experts_per_tok 2"):
        from_content(theirs | {"architectures": ["DeepseekV3ForCausalLM"]}, 11)


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


def routed_otherwise(**routing: Any) -> Callable[[Block], None]:
    def bug(block: Block) -> None:
        if hasattr(block.mlp, "router"):
            block.mlp.router.routing = replace(block.mlp.router.routing, **routing)

    bug.__name__ = "_".join(f"{name}_{value}" for name, value in routing.items())
    return bug


def bias_in_the_weights(block: Block) -> None:
    if hasattr(block.mlp, "router"):
        router = block.mlp.router
        weights = router._weights
        router._weights = lambda logits, scores, experts: weights(logits, scores + router.bias, experts)


def other_groups_get_0(block: Block) -> None:
    """Not minus infinity: they are chosen where what is in the best groups is negative."""

    def decide(self: Router, scores: Tensor, _: int | None) -> tuple[Tensor, None]:
        biased, r = scores + self.bias, self.routing
        open_to = choose(biased, replace(r, top_k=r.experts // r.groups * r.top_groups))  # all of the best groups
        return torch.zeros_like(biased).scatter(-1, open_to, biased.gather(-1, open_to)).topk(r.top_k).indices, None

    if hasattr(block.mlp, "router"):
        block.mlp.router.decide = MethodType(decide, block.mlp.router)


def groups_by_their_best_expert(block: Block) -> None:
    if hasattr(block.mlp, "router"):
        router, top_k = block.mlp.router, block.mlp.router.routing.top_k
        biased = router._biased

        def first_of_each_group(scores: Tensor) -> Tensor:
            """Where the other experts of a group are left out of its sum, but can be chosen."""
            grouped = biased(scores).unflatten(-1, (4, 3))
            best = grouped.amax(-1).topk(2).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            return grouped.masked_fill(closed.unsqueeze(-1), -1e9).flatten(-2)

        assert top_k == 4
        router._biased = first_of_each_group


def no_shared_expert(block: Block) -> None:
    if hasattr(block.mlp, "router"):
        shared = block.mlp.shared.forward
        block.mlp.shared.forward = lambda x: 0.0 * shared(x)


def shared_expert_scaled(block: Block) -> None:
    """As if it were one of the routed."""
    if hasattr(block.mlp, "router"):
        shared = block.mlp.shared.forward
        block.mlp.shared.forward = lambda x: 2.5 * shared(x)


def gates_of_experts_and_up_exchanged(block: Block) -> None:
    if hasattr(block.mlp, "router"):
        experts = block.mlp.experts
        experts.gate, experts.up = experts.up, experts.gate
        names = experts._modules
        names["gate"].weight, names["up"].weight = names["up"].weight, names["gate"].weight
        experts.forward = lambda rows, counts: experts.down(
            F.silu(experts.up(rows, counts)) * experts.gate(rows, counts), counts
        )


def pairs_of_halves(block: Block) -> None:
    """Of latent attention: features (i, i + D/2) of the rotary ones."""
    block.attention.rotary = copy(block.attention.rotary)
    rotary = block.attention.rotary.forward

    def halves(q: Tensor, k: Tensor, starts: None) -> tuple[Tensor, Tensor]:
        return rotary(*(rearrange(x, "... (two i) -> ... (i two)", two=2) for x in (q, k)))

    block.attention.rotary.forward = halves


def values_before_keys(block: Block) -> None:
    """In the rows of a head."""
    a = block.attention
    a.kv_up.weight.data = rearrange(a.kv_up.weight.data, "(a d) h -> a d h", a=3).roll(9, 1).flatten(0, 1)


def scaled_by_the_size_of_values(block: Block) -> None:
    block.attention.scale *= (14 / 9) ** 0.5


def without_mscale(block: Block) -> None:
    block.attention.scale = 14**-0.5


def eps_of_the_layers(block: Block) -> None:
    block.attention.q_down_norm.eps = block.attention.kv_down_norm.eps = 3e-3


def key_is_normed_too(block: Block) -> None:
    a = block.attention
    compress = a.compress

    def all_normed(x: Tensor) -> tuple[Tensor, ...]:
        q, kv, key = compress(x)
        return q, kv, key * key.square().mean(-1, keepdim=True).rsqrt()

    a.compress = all_normed


def latent_is_not_normed(block: Block) -> None:
    norm = block.attention.kv_down_norm
    norm.forward = lambda x: x + 0.0 * norm.weight


BUGS = [
    (routed_otherwise(score="softmax-topk"), "mixtral"), (routed_otherwise(score="softmax-topk"), "qwen3 moe"),
    (routed_otherwise(score="topk-softmax"), "qwen3 moe, weights as they are"),
    (routed_otherwise(weight_scale=1.0), "deepseek"), (routed_otherwise(top_groups=4), "deepseek"),
    (routed_otherwise(groups=2, top_groups=1), "deepseek"), (groups_by_their_best_expert, "deepseek"),
    (bias_in_the_weights, "deepseek"), (other_groups_get_0, "deepseek"), (no_shared_expert, "deepseek"),
    (shared_expert_scaled, "deepseek"), (gates_of_experts_and_up_exchanged, "mixtral"),
    (gates_of_experts_and_up_exchanged, "deepseek"), (pairs_of_halves, "deepseek"),
    (values_before_keys, "deepseek, plain queries"),
    (scaled_by_the_size_of_values, "deepseek"), (without_mscale, "deepseek, scaled by yarn"),
    (without_yarns_factor, "deepseek, scaled by yarn"), (eps_of_the_layers, "deepseek"),
    (key_is_normed_too, "deepseek"), (latent_is_not_normed, "deepseek"),
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
    experts = {"experts": 12, "top_k": 2, "qkv_bias": False}
    latent = {"latent": Latent(4, 4, 2, 2, 2), "kv_heads": None, "qk_norm": False}
    deepseek = experts | latent | {"score": "sigmoid", "shared_feed_forward": 8, "dense_layers": 1}
    kinds = {}, experts, experts | {"qk_norm": False}, deepseek, deepseek | {"latent": Latent(0, 4, 2, 2, 2)}
    for config in (ModelConfig(layers=12, tied=False), *(replaced(layers=12, **kind) for kind in kinds)):
        model = to_moe(GPT(config)) if config.experts else GPT(config)
        for name, p in model.named_parameters():
            value, back = torch.randn(p.shape), torch.zeros(p.shape)
            for published, tensor in to_published(name, value, config):
                again, expert, found = from_published(published, tensor, config)
                assert again == name
                (back if expert is None else back[expert]).copy_(found)
            assert torch.equal(back, value)
            if ".experts." in name:  # some of them
                some = dict(to_published(name, value[3:5], config, first=3))
                assert [from_published(*each, config).expert for each in some.items()] == [3, 4]


def replaced(**options: Any) -> ModelConfig:
    llama = {"kv_heads": 2, "gated": True, "biases": False, "learned_positions": False, "tied": False, "norm": "rms"}
    return ModelConfig(**llama | {"qk_norm": True, "qkv_bias": True} | options)


@pytest.mark.parametrize("field", ["tie_word_embeddings", "norm_topk_prob", "use_sliding_window"])
def test_a_word_where_true_or_false_should_be_is_refused(field: str) -> None:
    content = transformers.AutoConfig.for_model("qwen3_moe").to_dict() | {field: "false"}
    with pytest.raises(ValueError, match=f'{field} "false" is not built, only false or true'):
        from_content(content, 16)
