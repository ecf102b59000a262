#!/usr/bin/env bash
# torch 2.13.0 on a CPU. For backward nn.LayerNorm keeps its input and two numbers of each token. nn.RMSNorm, which does
# less, is computed in single operations there and keeps more: the input, and the normalised input besides. Of bfloat16
# it keeps both in float32, so 8 bytes of each element where LayerNorm keeps 2.
#
# Seen, bytes kept of an element: LayerNorm 8, 4, 2 in float64, float32, bfloat16; RMSNorm 16, 8, 8.
# Guarded by tests/core/test_llama.py: test_rms_norm_saves_its_input_as_it_is.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn

TOKENS, WIDTH = 128, 1024


def kept(layer, x):
    """Bytes that autograd keeps for each element of x, each storage once, without what it keeps for a token."""
    storages = {}

    def keep(saved):
        if saved.numel() == x.numel():
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = layer(x)
    return sum(each.nbytes() for each in storages.values()) / y.numel()


print("torch", torch.__version__)
found = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    found[dtype] = [kept(kind(WIDTH, dtype=dtype), x) for kind in (nn.LayerNorm, nn.RMSNorm)]
    print(f"{dtype}: LayerNorm keeps {found[dtype][0]:g} bytes of an element, RMSNorm {found[dtype][1]:g}")
sys.exit(found != {torch.float64: [8, 16], torch.float32: [4, 8], torch.bfloat16: [2, 8]})
PYTHON
