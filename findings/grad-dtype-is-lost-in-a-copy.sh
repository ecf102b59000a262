#!/usr/bin/env bash
# torch 2.13.0. `parameter.grad_dtype = torch.float32` lets a bfloat16 parameter add up its gradient in float32. A copy
# of the module (copy.deepcopy), one that was saved and loaded, and one that went to the meta device and back, have
# forgotten it without a word, though all else of the parameter is kept: 1,000 gradients of 1 add up to 256 there, where
# bfloat16 cannot count on.
#
# Seen: original float32 1000.0; deepcopy bfloat16 256.0; saved and loaded bfloat16 256.0; meta and back bfloat16.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import io
import sys

import torch
from torch import nn


def added_up(layer):
    """The type of the bias's gradient, and its value after 1,000 backwards that each add 1."""
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    for _ in range(1000):
        layer(x).sum().backward()
    return str(layer.bias.grad.dtype), layer.bias.grad[0].item()


original = nn.Linear(4, 4, dtype=torch.bfloat16)
for parameter in original.parameters():
    parameter.grad_dtype = torch.float32
file = io.BytesIO()
torch.save(original, file)
file.seek(0)
loaded = torch.load(file, weights_only=False)
copied = copy.deepcopy(original)
found = {"original": added_up(original), "deepcopy": added_up(copied), "saved and loaded": added_up(loaded)}
original.zero_grad()
there_and_back = original.to("meta").to_empty(device="cpu")
print("torch", torch.__version__)
for name, (dtype, value) in found.items():
    print(f"{name}: gradient {dtype}, {value}")
print("meta and back:", there_and_back.weight.grad_dtype)
lost = ("torch.bfloat16", 256.0)
expected = {"original": ("torch.float32", 1000.0), "deepcopy": lost, "saved and loaded": lost}
sys.exit(found != expected or there_and_back.weight.grad_dtype != torch.bfloat16)
PYTHON
