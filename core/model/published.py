"""`config.json` of a published model (Hugging Face), read into a `ModelConfig`.

Whatever the file says is understood, known to change nothing that is computed, or refused by name: a field that is
ignored would be another model. What changes no count, but is not built, becomes a word of `untrained`: such a model is
planned, and not trained. The names and values of the weights are `core.model.hf`'s.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.model.config import Latent, ModelConfig
from core.model.families import FAMILIES, SAME, STEPS, WRAPPERS
from core.model.fields import HARMLESS, Fields, rotary_of
from core.proof.files import check_readable

LONGEST = 8192  # tokens in a sample, where nobody says how many
# What is built, of fields that would change what is computed, and no count.
BUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "partial_rotary_factor": (1.0,), "rope_interleave": (True,),
    "router_jitter_noise": (0.0,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
}  # fmt: skip
COUNTED: dict[str, tuple[Any, ...]] = {  # and of those that would change counts
    "moe_layer_freq": (1,), "add_cross_attention": (False,), "cross_attention_hidden_size": (),
    "is_decoder": (False, True), "is_encoder_decoder": (False,), "tie_encoder_decoder": (False,), "pruned_heads": ({},),
    "attention_bias": (False,), "mlp_bias": (False,), "use_qk_norm": (False,), "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],), "first_k_dense_replace": (0,),  # of families that do not read them
    "use_sliding_window": (False, True), "tie_word_embeddings": (False, True), "norm_topk_prob": (False, True),
}  # fmt: skip
LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3")
LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
ENCODERS = ("vision_config", "audio_config", "speech_config", "video_config")
NESTED = ("attn_config", "ffn_config")
NO_FIELDS = (*HARMLESS, "architectures", "hidden_size")  # of what is nested
TOP_K = "num_experts_per_tok"
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


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
    kind = SAME.get(str(said), said) or next((guessed[key] for key in guessed if content.get(key)), "llama")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type {said!r} is not known, only {', '.join(FAMILIES)}")
    for architecture in content.get("architectures") or ():
        if architecture != FAMILIES[kind].architecture and FAMILIES[kind].architecture:
            raise ValueError(f"architecture {architecture} is not known, of {kind} only {FAMILIES[kind].architecture}")
    return kind


def text_of(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The fields of the text model, and what they stand beside: pictures' or sounds' encoders, quantized weights."""
    beside = [f"{key} is not of the text model, and not planned" for key in ENCODERS if content.get(key)]
    kind, text = content.get("model_type"), content.get("text_config")
    for key in ("text_config", *NESTED):
        if not isinstance(content.get(key), dict | None):
            raise ValueError(f"{key} {json.dumps(content[key])} is not known, only names and values")
    saved = content.get("quantization_config") or (text or {}).get("quantization_config")
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(f"quantization_config {json.dumps(saved)} is not known, only names and values")
    if saved:
        how = saved.get("quant_method") or saved.get("quantization") or "unknown"
        beside.append(f"quantization_config: the weights are saved in {how}, and trained in 16 bits")
    if text is None and not (beside and kind in WRAPPERS):
        return content, "; ".join(beside)
    if kind not in WRAPPERS:
        raise ValueError(f"model_type {kind!r} with a text_config is not known, only {', '.join(sorted(WRAPPERS))}")
    if text is None:  # as published before both had a name
        text = {key: value for key, value in content.items() if key not in ENCODERS and not key.endswith("_token_id")}
        text = {key: value for key, value in text.items() if key not in ("architectures", "image_size")}
    rule, key = WRAPPERS[kind], "tie_word_embeddings"
    said = content.get(key), text.get(key)
    tied = {"either": said[0] or said[1], "text_config": said[1]}.get(str(rule), rule if said[0] is None else said[0])
    if (None not in said and said[0] != said[1]) or said == (None, not tied):
        beside.append(f"{key} is {json.dumps(tied)}, as transformers takes it, and the file says another thing too")
    return text | {key: tied, "architectures": None}, "; ".join(beside)


def from_content(content: dict[str, Any], sequence: int | None) -> ModelConfig:
    """Raises KeyError or ValueError where a size is missing or makes no sense, or a field says what is not built."""
    content, notes = text_of(content)
    kind = family_of(content)
    family = FAMILIES[kind]
    nested = {key: value for name in NESTED for key, value in (content.get(name) or {}).items()}
    plain = {key: value for key, value in nested.items() if key not in NO_FIELDS}
    fields = Fields({key: value for key, value in content.items() if key not in NESTED} | plain, family)
    fields.read |= {"architectures", *DROPOUTS}  # `dropout_of`
    for key, built in (COUNTED | family.fixed).items():
        if key not in (*family.biases, *family.mixtures, *fields.read):
            fields.check(key, built)
    for key, built in BUILT.items():
        fields.check(key, built, counted=True)
    config = _gpt2(fields, sequence) if kind == "gpt2" else _llama(fields, kind, sequence)
    fields.check_rest()
    return replace(config, untrained=", ".join(fields.odd), notes=notes)


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
        tied=bool(fields.get("tie_word_embeddings", True)),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=ACTIVATIONS[activation],
    )


def _llama(fields: Fields, kind: str, sequence: int | None) -> ModelConfig:
    """And all that descend from it."""
    family, layers = fields.family, fields.size("num_hidden_layers")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    positions = fields.size("max_position_embeddings")
    usual = family.usual.get("intermediate_size")  # 0: four times hidden
    feed_forward = (fields.optional if usual == 0 else fields.size)("intermediate_size") or 4 * hidden
    theta, scaling = rotary_of(fields, positions)
    more = {"gated": True, "biases": False, "learned_positions": False, "norm": "rms"} | family.model
    for key, ours in family.biases.items():
        value = fields.flag(key)
        more |= {name: True for name in ours if value}
        if value and not family.untrained:
            fields.odd.append(f"{key} true")
    if kind == "falcon":
        more |= _falcon(fields, heads)
    elif "multi_query" in family.usual:
        more |= {"kv_heads": 1 if fields.flag("multi_query") else heads}
        fields.check("num_key_value_heads", (more["kv_heads"],))
    if kind == "stablelm" and fields.flag("use_parallel_residual"):
        more |= {"norms": 1}
    if more["learned_positions"]:
        more |= {"positions": positions + (2 if kind == "opt" else 0)}
    if kind == "opt":
        fields.check("word_embed_proj_dim", (hidden,))
    head_size, latent = fields.optional("head_dim") if family.head_dim else None, None
    if fields.content.get("kv_lora_rank") and kind in LATENT:
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent = Latent(fields.optional("q_lora_rank") or 0, *map(fields.size, names))
        fields.check("qk_head_dim", (latent.rope + latent.nope,))
        fields.check("num_key_value_heads", (heads,))
        more |= {"latent": latent}
        head_size = None  # in the file it is that of the part that is rotated
    elif kind in LATENT:
        raise KeyError("kv_lora_rank")
    elif "kv_heads" not in more:
        more |= {"kv_heads": fields.optional("num_key_value_heads") or heads}
    if family.experts:
        more |= _mixture(fields, kind, layers)
    window, share = _window(fields, kind, layers)
    if sequence is None and share == 1.0 and not family.untrained:  # else it is not trained
        sequence = min(LONGEST, positions, window)
    sequence = _tokens(sequence, max_position_embeddings=positions)
    if 0 < window < sequence:
        more |= {"window": window, "windowed": share}
    return ModelConfig(
        name=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        feed_forward=feed_forward,
        vocabulary=fields.size("vocab_size"),
        sequence=sequence,
        head_size=head_size,
        tied=fields.flag("tie_word_embeddings"),
        norm_eps=fields.number(fields.names("rms_norm_eps")[0], family.usual.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        **more,
    )


def _falcon(fields: Fields, heads: int) -> dict[str, Any]:
    """Three generations by three flags: heads of keys, and norms, of which a block may have one for both halves."""
    new, parallel, one = map(fields.flag, ("new_decoder_architecture", "parallel_attn", "multi_query"))
    norms = 1 + (not parallel or (fields.optional("num_ln_in_parallel_attn") or (2 if new else 1)) == 2)
    groups = (fields.optional("num_key_value_heads") or heads) if new else 1 if one else heads
    fields.optional("num_key_value_heads")
    return {"kv_heads": groups, "norms": norms}


def _mixture(fields: Fields, kind: str, layers: int) -> dict[str, Any]:
    """The experts, and which layers have them."""
    family = fields.family
    experts = fields.size(family.experts)
    of_expert, shared = fields.size(family.expert_size), 0
    if family.shared:
        shared = (fields.optional(family.shared, 0) or 0) * (of_expert if family.shared.endswith("experts") else 1)
    found: dict[str, Any] = {"experts": experts, "expert_feed_forward": of_expert, "shared_feed_forward": shared}
    dense: list[int] = []
    for key in family.mixtures:
        if key == "first_k_dense_replace":
            first = fields.optional(key, 0) or 0
            if first > layers:
                raise ValueError(f"{key} is {first}, more than the layers")
            found["dense_layers"] = first
        elif key in (STEPS[0], "interleave_moe_layer_step", "moe_layer_interval"):
            found["sparse_step"] = fields.optional(key) or 1
        elif key == "moe_layer_start_index":
            found["dense_layers"] = fields.size(key, 0)
        elif key == "moe_layer_end_index":
            last = fields.get(key, layers - 1)
            dense += range(layers if last == -1 else last + 1, layers)
        elif key == "moe_layers" and fields.get(key) is not None:
            found["sparse_step"] = 1
            dense += sorted({*range(layers)} - {*fields.indices(key)})
        elif key == STEPS[1]:
            dense += fields.indices(key)
    found["dense_also"] = tuple(sorted({*dense}))
    return found | _routing(fields, kind)


def _routing(fields: Fields, kind: str) -> dict[str, Any]:
    """How the router chooses. Normalised weights of a softmax over all are those of a softmax over the chosen."""
    top_k, normalised = fields.size(TOP_K), fields.get("norm_topk_prob")
    if fields.family.mixtures == ("first_k_dense_replace",):
        if kind == "deepseek_v3" and top_k > 1 and not normalised:
            fields.odd.append("norm_topk_prob false")
        groups, top_groups = fields.optional("n_group") or 1, fields.optional("topk_group") or 1
        if kind == "deepseek_v3" and top_groups < groups and top_k // top_groups != 2:
            raise ValueError(
                f"num_experts_per_tok {top_k}, topk_group {top_groups}: a group is judged by its best 2 experts in the "
                f"published code, but here, as in the paper, by its best {top_k // top_groups}; both are the same "
                f"with num_experts_per_tok {2 * top_groups}"
            )
        scale = fields.number("routed_scaling_factor", 1.0)
        score = "softmax-topk" if kind == "deepseek_v2" else "sigmoid"
        return {"top_k": top_k, "score": score, "weight_scale": scale, "groups": groups, "top_groups": top_groups}
    of_chosen = normalised or kind in ("mixtral", "gpt_oss", "granitemoe", "granitemoeshared")
    return {"top_k": top_k, "score": "topk-softmax" if of_chosen else "softmax-topk"}


def _window(fields: Fields, kind: str, layers: int) -> tuple[int, float]:
    """How many tokens a window of attention has, and the share of layers that see no more."""
    if not fields.family.window_every:
        fields.check("layer_types", (["full_attention"] * layers,))
        return 0, 0.0
    sizes = [fields.optional(key, 0) for key in ("sliding_window", "attention_chunk_size")]
    window, every = next(filter(None, sizes), 0), fields.family.window_every
    every = fields.optional("sliding_window_pattern") or fields.optional("_sliding_window_pattern") or every
    used = fields.get("use_sliding_window", True)
    kinds = fields.get("layer_types") or []
    if unknown := next((each for each in kinds if each not in LAYERS), None):
        raise ValueError(f"layer_types {unknown!r} is not known, only {' and '.join(LAYERS)}")
    if kinds and len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} layers, and num_hidden_layers is {layers}")
    if not (window and used and every):
        return 0, 0.0
    seen = [i for i in range(layers) if every == 1 or (i + 1) % every]
    most = fields.get("max_window_layers")
    if fields.content.get("use_sliding_window") and most is not None and kind != "qwen3_moe":  # which does not read it
        seen = [i for i in seen if (i < most if kind == "qwen2_moe" else i >= most)]
    if kinds:
        seen = [each for each in kinds if each != "full_attention"]
    return window, len(seen) / layers


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
