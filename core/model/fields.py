"""The fields of a Hugging Face `config.json`: which of them have been read, and what each may be."""

import json
import math
from typing import Any

from core.model.config import Llama3Scaling, YarnScaling
from core.model.families import Family

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
ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor",
        "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        "partial_rotary_factor"}  # fmt: skip


class Fields:
    """What a `config.json` says, which of it has been read, and what of it is not built."""

    def __init__(self, content: dict[str, Any], family: Family):
        self.content, self.family = content, family
        self.read = {*HARMLESS, *family.free.split()}
        self.odd = [family.untrained] if family.untrained else []

    def get(self, key: str, usual: Any = None) -> Any:
        """A field, or the family's usual; what is `usual` where there is none, or null."""
        self.read.add(key)
        value = self.content.get(key, self.family.usual.get(key))
        return usual if value is None else value

    def size(self, key: str, least: int = 1) -> int:
        """A whole number, under the family's names of it.

        Raises:
            KeyError, ValueError: it is not there; it is something else; or two names of it say different things.
        """
        value = self.optional(key, least)
        if value is None:
            own = self.names(key)[0]
            if own in self.content:
                raise ValueError(f"{own} is None, and must be a whole number, {least} or more")
            raise KeyError(own)
        return value

    def optional(self, key: str, least: int = 1) -> int | None:
        """The same, or None where neither the file nor the family's usual says it."""
        own = self.names(key)
        self.read |= {*own}
        said = {name: self.content[name] for name in own if self.content.get(name) is not None}
        for name, value in said.items():
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, and must be a whole number, {least} or more")
        if len({*said.values()}) > 1:
            raise ValueError(" and ".join(f"{name} {value}" for name, value in said.items()) + ": which is meant?")
        absent = None if any(name in self.content for name in own) else self.family.usual.get(key)
        return next(iter(said.values()), absent)

    def names(self, key: str) -> list[str]:
        return self.family.names.get(key, key).split("|")

    def number(self, key: str, usual: float) -> float:
        """Raises ValueError where the field is something else."""
        return _number(key, self.get(key, usual))

    def flag(self, key: str) -> bool:
        """Raises ValueError unless the field is true, false, or left to the family's usual."""
        value = self.get(key, self.family.usual.get(key, False))
        if not isinstance(value, bool):
            raise ValueError(f"{key} {json.dumps(value)} is not built, only false or true")
        return value

    def indices(self, key: str) -> list[int]:
        """Of layers. Raises ValueError where they are none."""
        value = self.get(key, [])
        if not (isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)):
            raise ValueError(f"{key} {json.dumps(value)} is not known, only a list of layers, from 0 on")
        return value

    def check(self, key: str, built: tuple[Any, ...], counted: bool = False) -> None:
        """Raises ValueError unless the field is absent, null, or one of these; or, if it is `counted`, notes it."""
        value = self.get(key)
        if value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in built):
            return
        if counted:
            self.odd.append(f"{key} {json.dumps(value)}")
            return
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


def rotary_of(fields: Fields, positions: int) -> tuple[float, Llama3Scaling | YarnScaling | str | None]:
    """The base of the frequencies, and how they are scaled: in one group since transformers 5, in two before."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    fields.read |= {"rope_scaling", "rope_theta"}
    usual = 1e6 if fields.content.get("model_type") == "mixtral" else 10_000.0
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling {json.dumps(rope)} is not known, only names and values")
    if any(isinstance(each, dict) for each in rope.values()):  # by kind of layer
        rope = rope.get("full_attention") or {}
    theta = _number("rope_theta", rope.get("rope_theta") or fields.get("rope_theta") or usual)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"rope_type {json.dumps(kind)} is not known, only a word")
    if fields.family.untrained or kind not in ("default", "llama3", "yarn"):
        return theta, None if fields.family.untrained else str(kind)
    if unknown := sorted(rope.keys() - ROPE):
        raise ValueError(f"rope_parameters: {unknown[0]} is not known here")
    if (part := rope.get("partial_rotary_factor")) not in (None, 1.0):
        fields.odd.append(f"partial_rotary_factor {part}")
    for key in rope.keys() - {"rope_type", "type", "truncate"}:
        if rope[key] is not None:
            _number(key, rope[key])
    if kind == "default":
        return theta, None
    original = rope.get("original_max_position_embeddings") or positions
    if kind == "llama3":
        return theta, Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    factor = rope.get("factor") or positions / original
    attention, of_scores = rope.get("attention_factor"), 1.0
    if attention is None:
        attention = yarn_attention(factor, 1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
            attention = yarn_attention(factor, rope["mscale"]) / yarn_attention(factor, rope["mscale_all_dim"])
    if fields.content.get("kv_lora_rank") and rope.get("mscale_all_dim"):  # with latent attention only
        of_scores = yarn_attention(factor, rope["mscale_all_dim"]) ** 2
    borders = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0, rope.get("truncate", True)
    return theta, YarnScaling(factor, original, attention, *borders, of_scores)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {json.dumps(value)}, and must be a number")
    return float(value)


def yarn_attention(factor: float, scale: float) -> float:
    """What cosines and sines are multiplied by. 2309.00071, section 3.4."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
