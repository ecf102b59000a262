"""`config.json` as published: parameters counted exactly, and the command that trains the model."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.planner import hardware
from cluster.planner.command import commands, folder_of, lacking
from cluster.planner.counting import model_parameters
from cluster.planner.layout import Layout
from cluster.planner.options import model_of, parser
from cluster.run.arguments import configured, full_model, moe_of
from core.model.config import ModelConfig
from core.model.hf import to_published
from core.model.publish import to_content
from core.model.published import from_content
from tests.cluster.test_published import MODELS, parsed

transformers = pytest.importorskip("transformers")

COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02,
          "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.40.0", "attention_dropout": 0.0}  # fmt: skip


def llama(
    kind: str, hidden: int, feed_forward: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral",
             "qwen3_moe": "Qwen3Moe", "deepseek_v3": "DeepseekV3"}  # fmt: skip
    return COMMON | {
        "model_type": kind, "architectures": [f"{names[kind]}ForCausalLM"], "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_theta": 500000.0,
    } | more  # fmt: skip


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}  # fmt: skip
QWEN = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}  # fmt: skip
QWEN3 = QWEN | {"head_dim": 128, "attention_bias": False, "rope_scaling": None, "sliding_window": None}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # what the file says, and how many parameters that are
    "llama 3 8b": (llama("llama", 4096, 14336, 32, 32, 8, 128256, pretraining_tp=1, rope_scaling=None), 8_030_261_248),
    "llama 3 70b": (llama("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "llama 3.1 405b": (llama("llama", 16384, 53248, 126, 128, 8, 128256, rope_scaling=LLAMA3, mlp_bias=False,
                             attention_bias=False, max_position_embeddings=131072), 405_853_388_800),
    "mistral 7b": (llama("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096, rope_theta=10000.0),
                   7_241_732_096),
    "qwen2.5 0.5b": (llama("qwen2", 896, 4864, 24, 14, 2, 151936, **QWEN | {"tie_word_embeddings": True}), 494_032_768),
    "qwen2.5 7b": (llama("qwen2", 3584, 18944, 28, 28, 4, 152064, **QWEN), 7_615_616_512),
    "qwen3 8b": (llama("qwen3", 4096, 12288, 36, 32, 8, 151936, **QWEN3), 8_190_735_360),
    "mixtral 8x7b": (llama("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2,
                           rope_theta=1e6, sliding_window=None, router_aux_loss_coef=0.02, output_router_logits=False),
                     46_702_792_704),
    "qwen3 30b a3b": (llama("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, **QWEN3, num_experts=128, num_experts_per_tok=8,
                            moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
                            router_aux_loss_coef=0.001), 30_532_122_624),
    "deepseek v3": (llama("deepseek_v3", 7168, 18432, 61, 128, 128, 129280, moe_intermediate_size=2048, ep_size=1,
                          n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3,
                          q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
                          n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True, moe_layer_freq=1,
                          scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=1,
                          rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=163840,
                          quantization_config={"quant_method": "fp8"},
                          rope_scaling={"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                                        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}),
                    671_026_404_352),
    "gpt-2 xl": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_layer": 48,
                  "n_head": 25, "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257,
                  "activation_function": "gelu_new",
                  "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
                  "initializer_range": 0.02, "output_past": True, "summary_type": "cls_index",
                  "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}, 1_557_611_200),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_is_counted_and_has_its_name(tmp_path: Path, name: str) -> None:
    content, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    args = parser("plan", "").parse_args(["--config", str(tmp_path / "config.json")])
    model = model_of(args)
    assert model_parameters(model) == count
    config = transformers.AutoConfig.for_model(**{k: v for k, v in content.items() if k != "quantization_config"})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in theirs.parameters()) == count

    folder = folder_of(args)
    assert folder == str(tmp_path)
    assert lacking(model, folder) == ""
    line, _ = commands(Layout(dp=8, microbatch=1), hardware.PRESETS["dgx-h100"], model, folder)
    flags = shlex.split(line)
    flags = parsed(*flags[flags.index("cluster/train.py") + 1 :], *["--dropout", "0"])
    trained = configured(flags)
    assert trained == model
    full = full_model(trained, moe_of(flags))
    published = [v.numel() for n, p in full.named_parameters() for _, v in to_published(n, p.detach(), trained)]
    biases = model.experts * model.moe_layers * (model.score == "sigmoid")
    assert sum(published) == count + biases


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_again(name: str) -> None:
    """By us, and by transformers with the same meaning."""
    kind, options = MODELS[name]
    theirs = transformers.AutoConfig.for_model(kind, **options)
    model = from_content(theirs.to_dict(), 16)
    content = to_content(model)
    again = transformers.AutoConfig.for_model(**content)
    known = {key: value for key, value in theirs.to_dict().items() if key in content}
    different = {key for key in known if again.to_dict()[key] != known[key]}
    may = "architectures model_type max_position_embeddings sliding_window bos_token_id eos_token_id rope_parameters"
    assert different <= {*may.split(), "head_dim", "norm_topk_prob"}
    found = from_content(again.to_dict(), 16)
    assert replace(found, head_size=found.head_dim, name="") == replace(model, head_size=model.head_dim, name="")


def test_heads_are_overridden_and_their_size_stays() -> None:
    """transformers writes `head_dim` though nobody gave it."""
    content = transformers.AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=8).to_dict()
    assert content["head_dim"] == 8
    assert from_content(content | {"num_attention_heads": 4}, 16).head_dim == 8


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_experts_of_qwen3_under_either_name(key: str) -> None:
    content, _ = PUBLISHED["qwen3 30b a3b"]
    content = {k: v for k, v in content.items() if k != "num_experts"} | {key: 128}
    assert from_content(content, 16).experts == 128


def test_json_and_back() -> None:
    """Named tuples come back as lists."""
    for name in ("llama 3.1 405b", "deepseek v3"):
        model = from_content(PUBLISHED[name][0], 16)
        assert ModelConfig(**json.loads(json.dumps(model.__dict__))) == model
