#!/usr/bin/env bash
# transformers 5.24.0. sliding_window, use_sliding_window and max_window_layers have the same names, and one would guess
# the same meaning, in Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE. With max_window_layers 2 of 4 layers the window is that of
#   Qwen2, Qwen3: the layers from the third on (max_window_layers is how many have none);
#   Qwen2-MoE: each second layer of the first two (it is where windows end);
#   Qwen3-MoE: all layers (it is not read).
# Attention's FLOP, and which key a query sees, counted by one rule for all four are wrong for the others.
#
# Seen: the last two; the first; all.
# Guarded by core/model/published.py, _window; tests/cluster/test_config_families.py: test_which_layers_have_a_window.
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
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {"qwen2": {}, "qwen3": {"head_dim": 8}, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
         "qwen3_moe": EXPERTS | {"head_dim": 8}}


def windows(kind, more):
    """The layers whose tokens do not see the first of 12 ones: its key changes nothing."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda _, __, out, i=index: seen.update({i: out[1]}))
    with torch.no_grad():
        model(torch.arange(12)[None])
    return [i for i, weights in seen.items() if bool((weights[0, :, -1, 0] == 0).all())]


print("torch", torch.__version__, "transformers", transformers.__version__)
found = {kind: windows(kind, more) for kind, more in KINDS.items()}
for kind, layers in found.items():
    print(kind, "layers with a window:", layers)
sys.exit(found != {"qwen2": [2, 3], "qwen3": [2, 3], "qwen2_moe": [0], "qwen3_moe": [0, 1, 2, 3]})
PYTHON
