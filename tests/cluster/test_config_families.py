"""Every family of `config.json`: random fields, counted by the planner and by the model that transformers builds.

python -m tests.cluster.test_config_families 200    # so many of each family, by hand
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.planner import hardware
from cluster.planner.command import commands, lacking
from cluster.planner.counting import model_parameters
from cluster.planner.layout import Layout
from cluster.planner.options import model_of, parser
from cluster.planner.stages import layers_of, recomputed_of
from core.model.families import FAMILIES
from core.model.published import LATENT, from_content

transformers = pytest.importorskip("transformers")

BOOL = [False, True]
SIZES: dict[str, list[Any]] = {  # values to draw; ABSENT: the file says nothing
    "hidden_size": [48, 96], "n_embd": [48, 96], "d_model": [48, 96], "num_hidden_layers": [2, 3, 6], "n_layer": [2, 5],
    "n_layers": [2, 3], "num_layers": [2, 4], "num_attention_heads": [4, 8], "n_head": [4, 8], "n_heads": [4, 8],
    "num_heads": [4, 8], "num_key_value_heads": [1, 2, 4, None], "num_kv_heads": [1, 2, 4],
    "head_dim": [8, 16, 20, None],
    "intermediate_size": [40, 56], "intermediate_size_mlp": [72, 44], "n_inner": [None, 40], "ffn_dim": [40, 56],
    "ffn_hidden_size": [None, 40], "vocab_size": [120, 131], "max_position_embeddings": [64, 128], "n_positions": [64],
    "max_seq_len": [64], "moe_intermediate_size": [24, 32], "num_local_experts": [4, 6], "num_experts": [4, 6],
    "n_routed_experts": [4, 8], "moe_num_experts": [4, 6], "num_experts_per_tok": [2], "moe_k": [2],
    "n_shared_experts": [1, 2], "moe_num_shared_experts": [1, 2], "shared_expert_intermediate_size": [24, 40],
    "shared_intermediate_size": [0, 24], "first_k_dense_replace": [0, 1, 2], "decoder_sparse_step": [1, 2, 3],
    "mlp_only_layers": [[], [0], [1]], "interleave_moe_layer_step": [1, 2], "moe_layers": [None, [0], [1]],
    "moe_layer_interval": [1, 2], "moe_layer_start_index": [0, 1], "moe_layer_end_index": [-1, 1],
    "q_lora_rank": [None, 12], "kv_lora_rank": [16], "qk_rope_head_dim": [4, 8], "qk_nope_head_dim": [8, 12],
    "v_head_dim": [8, 12], "n_group": [1, 2], "topk_group": [1], "sliding_window": [None, 8, 4096],
    "pad_token_id": [1], "bos_token_id": [2], "eos_token_id": [3], "scoring_func": ["sigmoid"],
    "num_ln_in_parallel_attn": [None, 1, 2], "word_embed_proj_dim": [48, 96], "max_window_layers": [1, 2],
}  # fmt: skip
FLAGS = """tie_word_embeddings attention_bias mlp_bias use_bias bias qkv_bias use_qkv_bias qk_layernorm use_qk_norm
    use_parallel_residual multi_query parallel_attn new_decoder_architecture lm_head_bias attention_out_bias enable_bias
    use_sliding_window norm_topk_prob do_layer_norm_before layer_norm_elementwise_affine alibi""".split()  # noqa: SIM905
OPTIONAL = {*FLAGS, "num_key_value_heads", "head_dim", "sliding_window", "use_sliding_window", "max_window_layers",
            "num_kv_heads", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers",
            "interleave_moe_layer_step", "moe_layers", "n_group", "topk_group", "n_inner", "ffn_hidden_size",
            "num_ln_in_parallel_attn", "word_embed_proj_dim", "scoring_func"}  # fmt: skip
TEXT = {"qwen3_vl_text": "qwen3_vl", "qwen3_vl_moe_text": "qwen3_vl_moe", "qwen2_5_vl_text": "qwen2_5_vl",
        "llama4_text": "llama4"}  # fmt: skip


def known(kind: str) -> dict[str, Any]:
    """The fields of a family, with what transformers takes for them."""
    config = transformers.AutoConfig.for_model(TEXT.get(kind, kind)).get_text_config()
    return config.to_dict()


def drawn(kind: str, dice: random.Random) -> dict[str, Any]:
    """A random `config.json` of a family."""
    content = {"model_type": kind}
    for key in known(kind):
        values = BOOL if key in FLAGS else SIZES.get(key)
        if values and not (key in OPTIONAL and dice.random() < 0.3):
            content[key] = dice.choice(values)
    if kind in LATENT:
        content["num_key_value_heads"] = content["num_attention_heads"]
    if kind == "gpt_neo":
        content["attention_types"] = [[["global", "local"], content["num_layers"] // 2]]
    if kind == "dbrx":
        content.pop("num_key_value_heads", None)
        content |= {"attn_config": {"kv_n_heads": dice.choice([1, 2]), "clip_qkv": 8, "rope_theta": 5e5}}
        content |= {"ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2}}
    if kind in TEXT:  # in what it is published with, which says whether the head is the embedding, or not
        content = {"model_type": TEXT[kind], "text_config": content, "vision_config": {}}
        content |= dice.choice([{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
    return content


def theirs(content: dict[str, Any]) -> int:
    """Parameters of the model that transformers builds."""
    config = transformers.AutoConfig.for_model(**content)
    pictures = "text_config" in content
    of_class = transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = of_class.from_config(config)
    outside = ("visual.", "vision_model.", "vision_tower.", "multi_modal_projector.")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in outside))


def differences(kind: str, count: int, seed: int) -> tuple[list[str], dict[str, int]]:
    """What is counted otherwise, and how many were refused, by the reason; or counted."""
    dice, found, said = random.Random(f"{kind} {seed}"), [], {}
    for _ in range(count):
        content = drawn(kind, dice)
        try:
            right = theirs(content)
        except Exception as error:
            reason = f"not built by transformers: {str(error).splitlines()[-1][:110]}"
            said[reason] = said.get(reason, 0) + 1
            continue
        try:
            ours = model_parameters(from_content(content, None))
        except (KeyError, ValueError) as error:
            said[str(error)[:90]] = said.get(str(error)[:90], 0) + 1
            continue
        said["counted"] = said.get("counted", 0) + 1
        if ours != right:
            found.append(f"{content}: {ours:,}, and of transformers {right:,}")
    return found, said


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_counted_as_transformers_builds_it(kind: str) -> None:
    """Bugs, each seen: a flag of biases left out, another usual value, layers with experts miscounted."""
    wrong, said = differences(kind, 3, 1)
    assert not wrong
    assert said["counted"]


USUAL = """num_key_value_heads head_dim first_k_dense_replace tie_word_embeddings sliding_window use_sliding_window
    norm_topk_prob q_lora_rank n_shared_experts multi_query parallel_attn n_group topk_group routed_scaling_factor
    moe_num_shared_experts moe_layer_start_index shared_expert_intermediate_size""".split()  # noqa: SIM905
NEUTRAL = (None, False, 0, 1, 1.0)  # where nothing is said: as if there were none of it


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_file_does_not_say_is_what_transformers_takes(kind: str) -> None:
    family = FAMILIES[kind]
    config = transformers.AutoConfig.for_model(TEXT.get(kind, kind)).get_text_config()
    for key in (*USUAL, *family.biases):
        theirs = getattr(type(config), family.names.get(key, key).split("|")[0], None)
        if kind in ("gpt2", *LATENT) and key in ("tie_word_embeddings", "num_key_value_heads"):
            continue  # read otherwise
        ours = family.usual.get(key)
        read = (key != "head_dim" or family.head_dim) and (key != "sliding_window" or family.window_every > 1)
        read &= (kind, key) != ("qwen2_moe", "sliding_window")  # which `use_sliding_window` turns on
        assert ours == theirs or not read or (ours in NEUTRAL and theirs in NEUTRAL), key


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # what the files say of sizes
    "gpt-oss 20b": ({"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "initial_context_length": 4096, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_key_value_heads": 8, "experts_per_token": 4,
        "num_experts_per_tok": 4, "num_local_experts": 32, "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                         "original_max_position_embeddings": 4096}, "router_aux_loss_coef": 0.9,
        "quantization_config": {"quant_method": "mxfp4"}, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088}, 20_914_757_184),
    "llama 4 scout": ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200080, "vision_config": {"hidden_size": 1408}, "tie_word_embeddings": False,
        "text_config": {"model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 8192,
            "attn_scale": 0.1, "attn_temperature_tuning": True, "floor_scale": 8192, "head_dim": 128,
            "for_llm_compressor": False, "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760,
            "moe_layers": list(range(48)), "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16, "router_jitter_noise": 0.0,
            "use_qk_norm": True, "vocab_size": 202048, "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0,
            "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}}},
        107_769_861_120),
    "qwen2.5-vl 7b": ({"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_start_token_id": 151652, "image_token_id": 151655, "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False,
        "vision_config": {"depth": 32}, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064}, 7_615_616_512),
    "phi-3 mini": ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
        "embd_pdrop": 0.0, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "sliding_window": 262144, "vocab_size": 32064,
        "rope_scaling": {"long_factor": [1.1] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "tie_word_embeddings": False}, 3_821_079_552),
    "gemma 2 9b": ({"model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584,
        "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 14336, "max_position_embeddings": 8192,
        "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 224,
        "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000}, 9_241_705_984),
    "gemma 3 4b": ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152}, "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}, 3_880_263_168),
    "falcon 7b": ({"model_type": "falcon", "architectures": ["FalconForCausalLM"], "alibi": False, "bias": False,
        "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "hidden_size": 4544,
        "layer_norm_epsilon": 1e-5, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True,
        "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 65024}, 6_921_720_704),
    "olmoe": ({"model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "vocab_size": 50304,
        "tie_word_embeddings": False}, 6_919_161_856),
    "command-r": ({"model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
        "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64, "use_qk_norm": False,
        "max_position_embeddings": 8192, "model_max_length": 131072, "vocab_size": 256000}, 34_980_831_232),
    "qwen3-moe, each second": ({"model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128,
        "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 2, "vocab_size": 1000, "max_position_embeddings": 512, "num_experts": 8,
        "num_experts_per_tok": 2, "decoder_sparse_step": 2}, 227_200),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_counted_to_the_unit(name: str) -> None:
    content, count = PUBLISHED[name]
    assert model_parameters(from_content(content, 512)) == count


def test_layers_with_experts_are_where_the_file_says() -> None:
    """Bug: of a stage those after the dense ones, so that memory is on the wrong rank."""
    content = PUBLISHED["qwen3-moe, each second"][0] | {"num_hidden_layers": 8, "mlp_only_layers": [3]}
    model = from_content(content, 64)
    assert [i for i in range(8) if model.has_experts(i)] == [1, 5, 7]
    layout = Layout(pp=4, microbatches=4)
    assert [layers_of(model, layout, stage) for stage in range(4)] == [(1, 1), (2, 0), (1, 1), (1, 1)]
    again = Layout(pp=2, microbatches=4, recompute="full", recompute_every=2)
    assert [recomputed_of(model, again, stage) for stage in range(2)] == [(1, 1), (0, 2)]


def test_a_window_shortens_attention() -> None:
    content = {"model_type": "mistral"} | {key: PUBLISHED["qwen2.5-vl 7b"][0][key] for key in (
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "vocab_size")}  # fmt: skip
    full, half = from_content(content, 8192), from_content(content | {"sliding_window": 4096}, 8192)
    assert (full.keys, half.keys) == (8192, 6144)  # pairs: 8192^2 / 2, and of a triangle and a band
    assert half.unbuilt() == "a window of 4096 tokens"
    assert not from_content(content | {"sliding_window": 4096}, None).unbuilt()  # as many as the window


@pytest.mark.parametrize(("kind", "layers"), [("qwen2", 2), ("qwen3", 2), ("qwen2_moe", 1), ("qwen3_moe", 4)])
def test_which_layers_have_a_window(kind: str, layers: int) -> None:
    """Three meanings of `max_window_layers`: findings/one-name-of-a-window-has-three-meanings.sh."""
    content = {"model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "num_hidden_layers": 4,
               "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}  # fmt: skip
    if "moe" in kind:
        content |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert from_content(content, 64).windowed == layers / 4


def test_a_model_that_no_flag_describes_is_planned_and_said(tmp_path: Path) -> None:
    """Heads of their own size. Bug, seen: "use a smaller model", and then a traceback where the command was printed."""
    content = {"model_type": "llama", "hidden_size": 1792, "num_attention_heads": 24, "num_key_value_heads": 8,
               "head_dim": 128, "intermediate_size": 4864, "num_hidden_layers": 32, "vocab_size": 128256,
               "max_position_embeddings": 8192}  # fmt: skip
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    model = model_of(parser("plan", "").parse_args(["--config", str(path)]))
    layer = 1792 * (24 + 2 * 8 + 24) * 128 + 3 * 1792 * 4864 + 2 * 1792
    assert model_parameters(model) == 32 * layer + 2 * 128256 * 1792 + 1792
    line, _ = commands(Layout(dp=8), hardware.PRESETS["dgx-h100"], model)
    assert "--hidden 1792 --heads 8 " in line
    assert lacking(model).startswith("a vocabulary of 128,256, 24 heads, heads of 128")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"vocab_size": ...}, "has no 'vocab_size'"),
    "no hidden": ({"hidden_size": ...}, "has no 'hidden_size'"),
    "no experts": ({"num_experts": ...}, "has no 'num_experts'"),
    "no features of experts": ({"moe_intermediate_size": ...}, "has no 'moe_intermediate_size'"),
    "a word": ({"hidden_size": "64"}, "hidden_size is '64', and must be a whole number"),
    "a fraction": ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, and must be a whole"),
    "yes": ({"vocab_size": True}, "vocab_size is True, and must be a whole"),
    "null": ({"num_attention_heads": None}, "num_attention_heads is None, and must be a whole"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and must be a whole number, 1 or more"),
    "heads": ({"num_key_value_heads": 3}, "--kv-heads 3: must divide --heads 4"),
    "an expert too many": ({"num_experts_per_tok": 9}, "--top-k 9: a token cannot choose more than the --experts 8"),
    "two sizes": ({"num_local_experts": 4}, "num_experts 8 and num_local_experts 4: which is meant"),
    "layers of experts": ({"mlp_only_layers": "0"}, 'mlp_only_layers "0" is not known, only a list of layers'),
    "frequency": ({"moe_layer_freq": 2}, "moe_layer_freq 2 is not built, only 1"),
    "linear attention": ({"layer_types": ["linear_attention"] * 2}, "layer_types 'linear_attention' is not known"),
    "kinds of layers": ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, and num_hidden_layers is 2"),
    "scaling": ({"rope_scaling": "yarn"}, 'rope_scaling "yarn" is not known, only names and values'),
    "no factor": ({"rope_scaling": {"rope_type": "llama3"}}, "has no 'factor'"),
    "jamba": ({"model_type": "jamba"}, "model_type 'jamba' is not known"),
    "no name": ({"model_type": 7}, "model_type 7 is not known"),
    "another text": ({"text_config": {"model_type": "llama"}}, "model_type 'qwen3_moe' with a text_config is not"),
    "a new field": ({"expert_dropout_share": 0.1}, "expert_dropout_share 0.1 is not known here"),
    "a list of names": ({"model_type": ["llama"]}, "model_type ['llama'] is not known"),
    "a list of text": ({"text_config": [1]}, "text_config [1] is not known, only names and values"),
    "eps": ({"rms_norm_eps": "small"}, 'rms_norm_eps is "small", and must be a number'),
    "theta": ({"rope_theta": [1]}, "rope_theta is [1], and must be a number"),
    "factor": ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, 'factor is "4", and must be a number'),
    "type of scaling": ({"rope_scaling": {"rope_type": ["yarn"]}}, 'rope_type ["yarn"] is not known, only a word'),
    "quantized": ({"quantization_config": "fp8"}, 'quantization_config "fp8" is not known'),
}


@pytest.mark.parametrize("why", BAD)
def test_what_is_no_model_is_refused_by_the_field(tmp_path: Path, why: str, capsys: pytest.CaptureFixture) -> None:
    says, message = BAD[why]
    content = {k: v for k, v in (PUBLISHED["qwen3-moe, each second"][0] | says).items() if v is not ...}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        model_of(parser("plan", "").parse_args(["--config", str(path)]))
    assert "; use " in str(refusal.value)
    assert "\n" not in str(refusal.value)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for kind in sys.argv[2:] or FAMILIES:
        wrong, said = differences(kind, int(sys.argv[1]), 0)
        print(kind, said, f"WRONG {len(wrong)}" if wrong else "", *wrong[:2], sep="\n    ", flush=True)
