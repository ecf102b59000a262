#!/usr/bin/env bash
# transformers 5.24.0. Fields that a published configuration has, that the class names and documents or accepts and that
# are saved again, need not be read by the model. MPT's expansion_ratio, no_bias, learned_pos_emb, norm_type, qk_ln and
# attn_type change nothing: a file that asks for four times fewer features gets the model with the usual ones.
# DeepSeek's moe_layer_freq (layers with experts) changes nothing either, and mlp_bias does in V2 and not in V3. So two
# files that describe different models build the same one, and parameters counted from the file are wrong.
#
# Seen: 27,936 parameters of an MPT whatever these say; 41,440 of a DeepSeek-V3 with moe_layer_freq 1 or 2.
# Guarded by core/model/published.py: another value is refused by name; tests/cluster/test_config_families.py, BAD.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 100}
MPT_SAYS = [{}, {"expansion_ratio": 2}, {"no_bias": False}, {"norm_type": "rmsnorm"}, {"learned_pos_emb": False},
            {"attn_config": {"qk_ln": True}}, {"attn_config": {"attn_type": "multiquery_attention"}}]
DEEPSEEK = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "bos_token_id": 1, "eos_token_id": 2,
}
SAYS = [{}, {"moe_layer_freq": 2}, {"mlp_bias": True}]


def parameters(kind, **fields):
    config = AutoConfig.for_model(kind, **fields)
    assert all(key in config.to_dict() for key in fields)
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


print("torch", torch.__version__, "transformers", transformers.__version__)
found = {"mpt": [parameters("mpt", **MPT, **says) for says in MPT_SAYS]}
found |= {kind: [parameters(kind, **DEEPSEEK, **says) for says in SAYS] for kind in ("deepseek_v2", "deepseek_v3")}
for kind, counts in found.items():
    print(kind, counts)
same = len({*found["mpt"]}) == 1 and len({*found["deepseek_v3"]}) == 1
v2 = found["deepseek_v2"]
sys.exit(not (same and v2[0] == v2[1] < v2[2]))
PYTHON
