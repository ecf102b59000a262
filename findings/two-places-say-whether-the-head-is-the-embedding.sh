#!/usr/bin/env bash
# transformers 5.24.0. A model of pictures and text has tie_word_embeddings twice: in config.json, and in its
# text_config. One would guess that one of them counts. Which one depends on the family: only the outer one (Gemma 3,
# where nothing is said is true; Qwen3-VL, where it is false), only the inner one (Llama 4), or either of them (LLaVA,
# Qwen2.5-VL). So a tool that reads one of them is wrong by a table of the vocabulary for some families: 1.0 of the
# 8 x 10^9 parameters of a Llama 3 text model.
#
# Seen, whether the head is tied, for outer/inner none/none, none/true, false/true, true/false: see `expected` below.
# Guarded by core/model/families.py, WRAPPERS; tests/cluster/test_config_families.py builds them and compares counts.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy pillow
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

transformers.logging.set_verbosity_error()
SAID = [(None, None), (None, True), (False, True), (True, False)]
expected = {
    "gemma3": [True, True, False, True],
    "qwen3_vl": [False, False, False, True],
    "llama4": [False, True, True, False],
    "llava": [False, True, True, True],
    "qwen2_5_vl": [False, True, True, True],
}


def tied(kind, outer, inner):
    text = {"model_type": AutoConfig.for_model(kind).text_config.model_type, "vocab_size": 300, "hidden_size": 32,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text |= {} if inner is None else {"tie_word_embeddings": inner}
    more = {} if outer is None else {"tie_word_embeddings": outer}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, text_config=text, **more))
    return not any("lm_head" in name for name, _ in model.named_parameters())


print("torch", torch.__version__, "transformers", transformers.__version__)
found = {kind: [tied(kind, *said) for said in SAID] for kind in expected}
for kind, each in found.items():
    print(kind, *(f"{outer}/{inner}: {'tied' if t else 'own head'}" for (outer, inner), t in zip(SAID, each)), sep="; ")
sys.exit(found != expected)
PYTHON
