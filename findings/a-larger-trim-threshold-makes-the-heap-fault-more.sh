#!/usr/bin/env bash
# torch 2.13.0 on the CPU with glibc. MALLOC_TRIM_THRESHOLD_ is set by those who want freed memory kept, so that the
# next step need not fault it in again. But that it is set at all also ends glibc's own raising of the size from which
# on a block is mapped by itself: it stays at 128 KiB, so every activation and gradient above that is mapped, faulted
# in page by page and unmapped, in every step. With MALLOC_MMAP_THRESHOLD_ set too it is as it was meant.
#
# Seen, page faults of a step of a small MLP after ten others: 500 to 2,100 without it, 6,948 with it, 0 to 25 with
# both. ZeRO's step of the benchmark, where a fault costs 3.6 us, takes 1.36 times as long with it.
# The project sets neither; its benchmark writes down what is set (tests/bench/__main__.py, machine).
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/step.py" <<'PYTHON'
import resource

import torch
from torch import nn

torch.set_num_threads(1)
model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))))
x = torch.randn(256, 256)


def step() -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


for _ in range(10):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
PYTHON
python="$folder/venv/bin/python"
plain=$("$python" "$folder/step.py")
trim=$(MALLOC_TRIM_THRESHOLD_=1000000000 "$python" "$folder/step.py")
both=$(MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 "$python" "$folder/step.py")
"$python" -c 'import platform, torch; print("torch", torch.__version__, *platform.libc_ver())'
echo "page faults a step: $plain; with MALLOC_TRIM_THRESHOLD_ $trim; with MALLOC_MMAP_THRESHOLD_ too $both"
[[ $trim -gt $((2 * plain)) && $both -lt 200 ]]
