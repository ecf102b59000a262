#!/usr/bin/env bash
# torch 2.13.0 on a CPU. F.scaled_dot_product_attention(q, k, v, is_causal=True) makes no (S, S) matrix of scores,
# unless a value has fewer features than a key, as in multi-head latent attention (DeepSeek: 128 and 192). Then it falls
# back to plain products without a word, and keeps every head's matrix for backward. With the values padded by zeros
# to the keys' size, and the output truncated, the result is the same, and the matrix is never made.
#
# Seen, kept for backward, of 4 heads and S = 512, 1024: 8.4, 25.2 MB as it is; 6.3, 12.6 MB padded.
# Guarded by tests/core/test_llama.py: test_values_shorter_than_keys_need_no_matrix_of_scores.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

HEADS, KEY, VALUE = 4, 192, 128


def as_it_is(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def padded(q, k, v):
    return as_it_is(q, k, F.pad(v, (0, KEY - VALUE)))[..., :VALUE]


def kept(attention, q, k, v):
    """Bytes of the storages that autograd keeps, and the output."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = attention(q, k, v)
    return sum(each.nbytes() for each in storages.values()), y


torch.manual_seed(0)
print("torch", torch.__version__)
as_seen, found = True, []
for tokens in (512, 1024):
    q, k, v = (torch.randn(1, HEADS, tokens, size, requires_grad=True) for size in (KEY, KEY, VALUE))
    (plain, y), (less, same) = kept(as_it_is, q, k, v), kept(padded, q, k, v)
    scores = HEADS * tokens**2 * q.element_size()
    print(f"{tokens} tokens: keeps {plain / 1e6:.1f} MB, with padded values {less / 1e6:.1f} MB; the scores are "
          f"{scores / 1e6:.1f} MB, the outputs within {(y - same).abs().max():.0e}")
    found.append((plain, less))
    as_seen &= plain > scores and torch.allclose(y, same, atol=1e-5)
(plain, less), (plain_of_twice, less_of_twice) = found  # tokens: one grows with their square, the other with them
sys.exit(not (as_seen and plain_of_twice > 2.8 * plain and less_of_twice < 2.2 * less))
PYTHON
