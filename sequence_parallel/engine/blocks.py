"""Attention over a block of keys, by torch's kernel. Liu et al. 2023 (2310.01889); Dao et al. 2022 (2205.14135).

What it adds to the plain block of `ring_attention.py`: on a CPU torch's fused kernel. What is held of the scores while
one block is computed:

    CPU, any type       nothing that grows with A N M: the kernel goes through them in tiles of a fixed size. It returns
                        the log-sum-exp, has a backward from it, and is five times faster in float64
    other devices       the (N, M) scores and their softmax for every head, twice that in backward; N = M = s/c, less
                        with zigzag. The fused kernels there have no float64
    documents           on both a mask (B, 1, N, M), for all heads together

torch's public attention that returns the log-sum-exp, `flex_attention`, has no backward on a CPU, and without
torch.compile it makes the matrix too.

B batch, A heads, K key and value heads (a divisor of A), N queries, M keys, D head size
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.model.precision import wide

aten = torch.ops.aten


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale QK^T) V and its lse, (B, A, N, D of v) and (B, A, N); 0 and -inf where a query sees no key.

    On a CPU by torch's fused kernel, elsewhere as `attend_in_products`.

    Args:
        q: (B, A, N, D).
        k, v: (B, K, M, D); v may have another D.
        causal: query i sees the keys up to i; N = M.
        scale: None: 1 / sqrt(D).
        seen: bool (B, 1, N, M), the keys that a query sees of those that it sees without; None: all.

    Raises:
        ValueError: K does not divide A.
    """
    k, v = for_each_head(k, q), for_each_head(v, q)
    if q.device.type != "cpu":
        return attend_in_products(q, k, v, causal, scale, seen)
    options = _options(q, scale, seen)
    size = max(q.shape[-1], v.shape[-1])
    rows = (_by_rows(x, size) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, causal, **options)
    if seen is not None:
        lse = lse.masked_fill(~seen.any(-1), -math.inf)  # the kernel's is 0
    return out[..., : v.shape[-1]], lse


def attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this block adds to the gradients of q, k and v, in their shapes, unrounded as far as the kernel allows.

    Args:
        gradient: of the merged output, (B, A, N, D of v).
        out, lse: merged over all blocks of keys.
    """
    each_k, each_v = for_each_head(k, q), for_each_head(v, q)
    if q.device.type == "cpu":
        options, size = _options(q, scale, seen), max(q.shape[-1], v.shape[-1])
        rows = [_by_rows(x, size) for x in (gradient, q, each_k, each_v, out)]
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_q, of_k, of_v = backward(*rows, lse, 0.0, causal, **options)
        of_q, of_k, of_v = (g[..., : x.shape[-1]] for g, x in ((of_q, q), (of_k, k), (of_v, v)))
    else:
        of_q, of_k, of_v = backward_in_products(gradient, q, each_k, each_v, out, lse, causal, scale, seen)
    return of_q, of_all_heads(of_k.to(lse.dtype), k), of_all_heads(of_v.to(lse.dtype), v)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add to `out` and `lse`, in place, what the same queries have found among more keys."""
    total = torch.logaddexp(lse, more_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_((more_lse - total).exp_().unsqueeze(-1), more.to(out.dtype))
    lse.copy_(total)


def attend_in_products(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` in a few products, with K = A and an (N, M) matrix for each head."""
    scores = _scores(q, k, causal, scale, seen)
    lse = scores.logsumexp(-1)
    finite = lse.clamp_min(torch.finfo(lse.dtype).min)  # of a query that sees no key all exponentials are 0
    return ((scores - finite.unsqueeze(-1)).exp_() @ v.to(lse.dtype)).to(q.dtype), lse


def backward_in_products(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in a few products: the softmax over all keys is known from the lse."""
    softmax = (_scores(q, k, causal, scale, seen) - lse.unsqueeze(-1)).exp_()
    divisor = _divisor(q, scale)
    q, k, v, out, gradient = (x.to(lse.dtype) for x in (q, k, v, out, gradient))
    of_scores = softmax * (gradient @ v.mT - (gradient * out).sum(-1, keepdim=True)) / divisor
    return of_scores @ k, of_scores.mT @ q, softmax.mT @ gradient


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None, seen: Tensor | None) -> Tensor:
    scores = wide(q) @ wide(k).mT / _divisor(q, scale)
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores if seen is None else scores.masked_fill_(~seen, -math.inf)


def _divisor(q: Tensor, scale: float | None) -> float:
    return math.sqrt(q.shape[-1]) if scale is None else 1.0 / scale


def _options(q: Tensor, scale: float | None, seen: Tensor | None) -> dict[str, object]:
    """Of torch's kernel, forward and backward: its mask is added to the scores."""
    mask = seen if seen is None else torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -math.inf)
    return {"attn_mask": mask, "scale": 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale}


def _by_rows(x: Tensor, size: int) -> Tensor:
    """`x`, each row contiguous and of `size` numbers, more of them 0: torch's kernel takes that for granted."""
    if x.shape[-1] < size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def for_each_head(x: Tensor, q: Tensor) -> Tensor:
    """(B, K, M, D) to (B, A, M, D): query head i uses key and value head i // (A/K)."""
    heads, shared = q.shape[1], x.shape[1]
    if heads % shared:  # torch's kernel would read beyond the last
        raise ValueError(f"{heads} heads cannot share {shared} of keys and values equally; use a divisor of {heads}")
    return x if heads == shared else x.repeat_interleave(heads // shared, 1)


def of_all_heads(gradient: Tensor, x: Tensor) -> Tensor:
    """The backward of `for_each_head`."""
    return gradient if gradient.shape[1] == x.shape[1] else gradient.unflatten(1, (x.shape[1], -1)).sum(2)
