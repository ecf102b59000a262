"""`config.json` of a published model (Hugging Face), read into a `ModelConfig`.

Whatever the file says is understood, known to change nothing that is computed, or refused by name: a field that is
ignored would be another model. The names and values of the weights are `core.model.hf`'s.
"""

import json
import math
from pathlib import Path
from typing import Any

from core.model.config import Latent, Llama3Scaling, ModelConfig, YarnScaling
from core.proof.files import check_readable

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    # Only counted, see `PLANNED`.
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
SAME = {"kimi_k2": "deepseek_v3"}  # another name for the same code
PLANNED = {  # families that the planner counts, and what of them is not built
    "qwen2_moe": "a gate of the shared expert",
    "deepseek_v2": "weights of experts that are a softmax over all, times a scale",
}
KEY_VALUE_HEADS = {"mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}  # where the file says nothing
LONGEST = 8192  # tokens in a sample, where nobody says how many
# How text is made into tokens and generated, how weights are stored and first drawn, what is returned besides logits.
HARMLESS = frozenset(
    """model_type transformers_version _name_or_path auto_map dtype torch_dtype initializer_range use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    model_max_length n_ctx output_past id2label label2id num_labels problem_type task_specific_params
    finetuning_task return_dict return_dict_in_generate output_hidden_states output_attentions output_scores
    torchscript use_bfloat16 output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux ep_size
    num_nextn_predict_layers pretraining_tp summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout chunk_size_feed_forward max_window_layers _attn_implementation
    attn_implementation _attn_implementation_autoset do_sample early_stopping max_length min_length num_beams
    num_beam_groups num_return_sequences diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size bad_words_ids prefix encoder_no_repeat_ngram_size forced_bos_token_id
    forced_eos_token_id remove_invalid_values suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty quantization_config""".split()  # noqa: SIM905
)
# What is built, of fields that would change what is computed.
BUILT: dict[str, tuple[Any, ...]] = {  # of a sliding window see `_window`
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "partial_rotary_factor": (1.0,),
    "rope_interleave": (True,), "router_jitter_noise": (0.0,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
    "moe_layer_freq": (1,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,), "add_cross_attention": (False,),
    "cross_attention_hidden_size": (), "is_decoder": (False, True), "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,), "pruned_heads": ({},), "use_sliding_window": (False, True),
    "tie_word_embeddings": (False, True), "norm_topk_prob": (False, True),
}  # fmt: skip
OTHERS = {  # of families that are only counted
    "deepseek_v2": {"scoring_func": ("softmax", "sigmoid"), "topk_method": ("greedy", "group_limited_greedy")},
    "qwen2_moe": {"qkv_bias": (True,)},
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor",
        "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        "partial_rotary_factor"}  # fmt: skip


class Fields:
    """What a `config.json` says, and which of it has been read."""

    def __init__(self, content: dict[str, Any]):
        self.content, self.read = content, set(HARMLESS)

    def get(self, key: str, usual: Any = None) -> Any:
        """A field; what is `usual` where the file has none, or null."""
        self.read.add(key)
        value = self.content.get(key)
        return usual if value is None else value

    def size(self, *keys: str) -> int:
        """Of the first key that the file has."""
        self.read |= set(keys)
        key = next((key for key in keys if self.content.get(key)), keys[-1])
        if type(self.content[key]) is not int or self.content[key] < 1:
            raise ValueError(f"{key} is {self.content[key]!r}, and must be a whole number, 1 or more")
        return self.content[key]

    def optional(self, *keys: str) -> int | None:
        self.read |= set(keys)
        return self.size(*keys) if any(self.content.get(key) for key in keys) else None

    def check(self, key: str, built: tuple[Any, ...]) -> None:
        """Raises ValueError unless the field is absent, null, or one of these."""
        value = self.get(key)
        if value is not None and value not in built:
            works = " or ".join(json.dumps(each) for each in built) or "null"
            raise ValueError(f"{key} {json.dumps(value)} is not built, only {works}")

    def check_rest(self) -> None:
        """Raises ValueError where a field is left that nobody has read."""
        for key, value in self.content.items():
            if key not in self.read and value is not None:
                raise ValueError(
                    f"{key} {json.dumps(value)} is not known here, and could change what is computed; take it out if "
                    f"it does not"
                )


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """A file's names and values.

    Args:
        flag: with its value, what the file is for.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    use = f"use the path of a {path.name}" if path.suffix else "use the path of a config.json"
    check_readable(f"{flag}: {path.name}", path, use)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{flag}: {path.name} is no JSON: {error}; {use}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{flag}: {path.name} holds no names and values; {use}")
    return content


def from_config(path: str | Path, sequence: int | None = None, flag: str = "") -> ModelConfig:
    """A model from a Hugging Face `config.json`.

    Args:
        sequence: tokens in a sample; else as many as the model can attend to, or `LONGEST`.
        flag: with its value, as errors begin; `--config` and the path if nothing is said.

    Raises:
        ValueError: the file cannot be read, lacks a size, is of another kind, or has a field that is not built.
    """
    flag, use = flag or f"--config {path}", "use a model of one of the families that are built, as published"
    content = read_json(Path(path), flag)
    try:
        return from_content(content, sequence)
    except KeyError as error:
        raise ValueError(f"{flag}: has no {error}; {use}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{flag}: {error}; {use}") from None


def family_of(content: dict[str, Any]) -> str:
    """`model_type`, or the one that the sizes tell. Raises ValueError for another one, or another kind of head."""
    guessed = {"n_embd": "gpt2", "kv_lora_rank": "deepseek_v3", "num_local_experts": "mixtral"}
    said = content.get("model_type")
    kind = SAME.get(said, said) or next((guessed[key] for key in guessed if content.get(key)), "llama")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not built, only {', '.join(ARCHITECTURES)}")
    for architecture in content.get("architectures") or ():
        if architecture != ARCHITECTURES[kind]:
            raise ValueError(f"architecture {architecture} is not built, of {kind} only {ARCHITECTURES[kind]}")
    return kind


def from_content(content: dict[str, Any], sequence: int | None) -> ModelConfig:
    """Raises KeyError or ValueError where a size is missing or makes no sense, or a field says what is not built."""
    kind, fields = family_of(content), Fields(content)
    fields.read |= {"architectures", *DROPOUTS}  # `dropout_of`
    for key, built in (BUILT | OTHERS.get(kind, {})).items():
        fields.check(key, built)
    for layer in fields.get("layer_types", ()):
        if layer != "full_attention":
            raise ValueError(f"layer_types {layer!r} is not built, only 'full_attention'")
    config = _gpt2(fields, sequence) if kind == "gpt2" else _llama(fields, kind, sequence)
    fields.check_rest()
    return config


def _gpt2(fields: Fields, sequence: int | None) -> ModelConfig:
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_function {activation!r} is not built, only {', '.join(ACTIVATIONS)}")
    return ModelConfig(
        name="gpt2",
        hidden=fields.size("n_embd"),
        feed_forward=fields.optional("n_inner") or 0,
        layers=fields.size("n_layer"),
        heads=fields.size("n_head"),
        vocabulary=fields.size("vocab_size"),
        sequence=_tokens(sequence, n_positions=fields.size("n_positions")),
        positions=fields.size("n_positions"),
        tied=fields.get("tie_word_embeddings", True),
        norm_eps=float(fields.get("layer_norm_epsilon", 1e-5)),
        activation=ACTIVATIONS[activation],
    )


def _llama(fields: Fields, kind: str, sequence: int | None) -> ModelConfig:
    """And all that descend from it."""
    layers = fields.size("num_hidden_layers")
    dense_layers = fields.optional("first_k_dense_replace") or 0
    if dense_layers > layers:
        raise ValueError(f"first_k_dense_replace is {dense_layers}, more than the layers")
    heads = fields.size("num_attention_heads")
    experts = fields.optional("num_local_experts", "n_routed_experts", "num_experts") or 0
    feed_forward, expert_feed_forward = fields.size("intermediate_size"), fields.optional("moe_intermediate_size")
    shared = fields.optional("shared_expert_intermediate_size")
    if shared is None:
        shared = (fields.optional("n_shared_experts") or 0) * (expert_feed_forward or feed_forward)
    theta, scaling = rotary_of(fields)
    head_size, latent = fields.optional("head_dim"), None
    if fields.get("kv_lora_rank"):
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent = Latent(fields.optional("q_lora_rank") or 0, *map(fields.size, names))
        fields.check("qk_head_dim", (latent.rope + latent.nope,))
        fields.check("num_key_value_heads", (heads,))
        head_size = None  # in the file it is that of the part that is rotated
    limits = {"max_position_embeddings": fields.size("max_position_embeddings")} | _window(fields)
    return ModelConfig(
        name=kind,
        layers=layers,
        hidden=fields.size("hidden_size"),
        heads=heads,
        feed_forward=feed_forward,
        vocabulary=fields.size("vocab_size"),
        sequence=_tokens(sequence, **limits),
        kv_heads=None if latent else fields.optional("num_key_value_heads") or KEY_VALUE_HEADS.get(kind, heads),
        head_size=head_size,
        gated=True,
        biases=False,
        learned_positions=False,
        tied=bool(fields.get("tie_word_embeddings", False)),
        latent=latent,
        experts=experts,
        expert_feed_forward=expert_feed_forward,
        shared_feed_forward=shared,
        dense_layers=dense_layers,
        norm="rms",
        norm_eps=float(fields.get("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6)),
        qkv_bias=kind in ("qwen2", "qwen2_moe"),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        shared_gate=kind == "qwen2_moe" and shared > 0,
        rope_theta=theta,
        rope_scaling=scaling,
        **(_routing(fields, kind) if experts else {}),
    )


def _routing(fields: Fields, kind: str) -> dict[str, Any]:
    """How the router chooses. Normalised weights of a softmax over all are those of a softmax over the chosen."""
    top_k, normalised = fields.size("num_experts_per_tok"), fields.get("norm_topk_prob", kind == "deepseek_v3")
    if kind in ("deepseek_v2", "deepseek_v3"):
        if kind == "deepseek_v3" and top_k > 1 and not normalised:
            raise ValueError("norm_topk_prob false is not built, of deepseek_v3 only true")
        groups, top_groups = fields.optional("n_group") or 1, fields.optional("topk_group") or 1
        if top_groups < groups and top_k // top_groups != 2:
            raise ValueError(
                f"num_experts_per_tok {top_k}, topk_group {top_groups}: a group is judged by its best 2 experts in the "
                f"published code, but here, as in the paper, by its best {top_k // top_groups}; both are the same "
                f"with num_experts_per_tok {2 * top_groups}"
            )
        scale = float(fields.get("routed_scaling_factor", 1.0))
        return {"top_k": top_k, "score": "sigmoid", "weight_scale": scale, "groups": groups, "top_groups": top_groups}
    return {"top_k": top_k, "score": "topk-softmax" if normalised or kind == "mixtral" else "softmax-topk"}


def _window(fields: Fields) -> dict[str, int]:
    """The sliding window of attention, where there is one."""
    window = fields.get("sliding_window")
    return {"sliding_window": window} if window and fields.get("use_sliding_window", True) else {}


def _tokens(sequence: int | None, **limits: int) -> int:
    """Of a sample. Raises ValueError where it is longer than one of the limits."""
    for name, limit in limits.items():
        if sequence and sequence > limit:
            raise ValueError(f"--sequence {sequence}: {name} is {limit}, and what goes beyond is not built; "
                             f"use --sequence {limit}")  # fmt: skip
    return sequence or min(LONGEST, *limits.values())


def dropout_of(content: dict[str, Any]) -> dict[str, float]:
    """The dropouts of a `config.json` that are not 0, by field."""
    return {name: content[name] for name in DROPOUTS if content.get(name)}


def rotary_of(fields: Fields) -> tuple[float, Llama3Scaling | YarnScaling | str | None]:
    """The base of the frequencies, and how they are scaled: in one group since transformers 5, in two before."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    fields.read |= {"rope_scaling", "rope_theta"}
    usual = 1e6 if fields.content.get("model_type") == "mixtral" else 10_000.0
    theta = float(rope.get("rope_theta") or fields.get("rope_theta") or usual)
    if unknown := sorted(rope.keys() - ROPE):
        raise ValueError(f"rope_parameters: {unknown[0]} is not known here")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not built, only 1.0")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    positions = fields.size("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or positions
    if kind == "llama3":
        return theta, Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind != "yarn":
        return theta, str(kind)
    factor = rope.get("factor") or positions / original
    attention, of_scores = rope.get("attention_factor"), 1.0
    if attention is None:
        attention = yarn_attention(factor, 1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
            attention = yarn_attention(factor, rope["mscale"]) / yarn_attention(factor, rope["mscale_all_dim"])
    if fields.get("kv_lora_rank") and rope.get("mscale_all_dim"):  # with latent attention only
        of_scores = yarn_attention(factor, rope["mscale_all_dim"]) ** 2
    borders = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0, rope.get("truncate", True)
    return theta, YarnScaling(factor, original, attention, *borders, of_scores)


def yarn_attention(factor: float, scale: float) -> float:
    """What cosines and sines are multiplied by. 2309.00071, section 3.4."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
