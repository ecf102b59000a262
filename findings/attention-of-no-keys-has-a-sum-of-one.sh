#!/usr/bin/env bash
# torch 2.13.0 on a CPU. The kernel behind F.scaled_dot_product_attention returns, besides the output, the logarithm of
# each query's sum of exponentials (lse), by which ring attention merges blocks of keys. Where the mask lets a query see
# no key of a block, the sum is 0 and its logarithm -inf. The kernel says lse 0: a sum of 1, for keys that do not exist.
# Its output is 0, so the block alone looks harmless; merged, it takes weight from the keys that are seen. So
# it is for the second document of a packed sample in the blocks of the first.
#
# Seen: lse 0.0 instead of -inf; merged with the block that is seen, the query's output is 0.91 of what it should be.
# Guarded by tests/sequence_parallel/test_documents.py: queries_that_see_no_key_are_merged_as_0.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 8, 16, dtype=torch.float64)  # each (batch, heads, tokens, size)
seen = torch.ones(1, 1, 8, 8, dtype=torch.bool)
seen[..., 0, :4] = False  # the first query sees no key of the first block, and all of the second
right = torch.softmax((q @ k.mT / 4).masked_fill(~seen, -torch.inf), -1) @ v


def block(keys):
    mask = torch.zeros(1, 1, 8, 4, dtype=torch.float64).masked_fill(~seen[..., keys], -torch.inf)
    return attend(q, k[..., keys, :], v[..., keys, :], 0.0, False, attn_mask=mask)


def merged(one, lse, other, other_lse):
    total = torch.logaddexp(lse, other_lse)
    return (lse - total).exp().unsqueeze(-1) * one + (other_lse - total).exp().unsqueeze(-1) * other


(first, lse), (second, second_lse) = block(slice(0, 4)), block(slice(4, 8))
as_it_is = merged(first, lse, second, second_lse)
repaired = merged(first, lse.masked_fill(~seen[..., :4].any(-1), -torch.inf), second, second_lse)
share = (as_it_is / right)[0, 0, 0]
print("torch", torch.__version__)
print(f"a query that sees no key: lse {lse[0, 0, 0]}, largest output {first[0, 0, 0].abs().max()}")
print(f"merged, its output is {share.mean():.3f} of attention over all keys; with lse -inf within "
      f"{(repaired - right).abs().max():.0e}")
as_seen = lse[0, 0, 0] == 0 and first[0, 0, 0].abs().max() == 0 and bool((share < 0.99).all())
sys.exit(not (as_seen and torch.allclose(repaired, right, rtol=0, atol=1e-12)))
PYTHON
