"""How tensors are compared with one process."""

import torch

from core.proof.comparison import keys_by_queries
from core.proof.oracle import worst


def test_a_bias_of_keys_is_measured_by_that_of_queries() -> None:
    """And by itself where it is the larger; no other tensor is."""
    q, k, out = (f"blocks.0.attention.{name}.bias" for name in ("q", "k", "out"))
    reference = {q: torch.tensor([8.0]), k: torch.tensor([1.0]), out: torch.tensor([1.0])}
    found = [(name, value + (name != q)) for name, value in reference.items()]
    scales = keys_by_queries(reference)
    assert scales == {k: q}
    assert worst(found[:2], {q: reference[q], k: reference[k]}, scales) == (1 / 8, k)
    assert worst(found, reference, scales) == (1.0, out)
    assert worst(found[:2], {q: torch.tensor([8.0]), k: torch.tensor([16.0])}, scales) == (14 / 16, k)
    assert worst(found[:1], reference, scales) == (float("inf"), k)
    assert worst(found, reference)[0] == 1.0
