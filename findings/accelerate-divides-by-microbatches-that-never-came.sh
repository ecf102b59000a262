#!/usr/bin/env bash
# accelerate 1.12.0 with torch 2.13.0. Accelerator(gradient_accumulation_steps=4) divides each loss by 4, so that 4
# backwards add up to the mean. At the end of the data accumulate() rightly makes a step of what is left; but those
# losses have been divided by 4 too. With 6 batches the second step has 2 backwards, and half of the gradient.
#
# Seen, where each batch's gradient is 1: 1.0 in the first step, 0.5 in the last.
# The project's steps all have as many microbatches: a batch is a multiple of them (core/proof/rulebook.py, BATCH; tests/zero/test_lessons.py).
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 accelerate==1.12.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import accelerate
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
layer = nn.Linear(2, 1, bias=False)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
layer, optimizer, batches = accelerator.prepare(layer, optimizer, DataLoader(torch.ones(6, 2), batch_size=1))
found = []
for x in batches:
    with accelerator.accumulate(layer):
        accelerator.backward(layer(x).mean())
        if accelerator.sync_gradients:
            found.append(layer.weight.grad[0, 0].item())
        optimizer.step()
        optimizer.zero_grad()
print("accelerate", accelerate.__version__, "torch", torch.__version__)
print("gradients of the steps:", found)
sys.exit(found != [1.0, 0.5])
PYTHON
