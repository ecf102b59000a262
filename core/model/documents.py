"""Several documents in one sample: a token attends only to its own document, where positions begin at 0 again.

So a packed sample is computed as its documents would be alone, whatever shares the sample, and wherever the sequence is
sharded.

B batch, S sequence, N queries, M keys
"""

import torch
from torch import Tensor, nn

from core.model.seeded import SampleMasks


class Documents:
    """Where the documents of a step's samples begin. One object for all of a model (`use_documents`).

    Args:
        place: what says which micro-batch is computed (`at`), and which is computed again; the model's masks.
    """

    def __init__(self, place: SampleMasks):
        self.place = place
        self.starts: Tensor | None = None

    def seek(self, ids: Tensor | None) -> None:
        """The samples of this step, or of an evaluation. Before its first forward; until the next call.

        Args:
            ids: integers (samples, S) of all of this rank's samples in full, though it may have a shard of the sequence
                and computes them in micro-batches: neighbours with the same number are of one document. None: each
                sample is one document, at no cost.
        """
        self.starts = None if ids is None else starts_of(ids)

    def of(self, samples: int, device: torch.device) -> Tensor | None:
        """`starts_of` the micro-batch that is computed now, (samples, S)."""
        if self.starts is None:
            return None
        found = self.starts[self.place.offset : self.place.offset + samples]
        assert len(found) == samples, f"documents of {len(self.starts)} samples, not of {self.place.offset} + {samples}"
        return found.to(device)


def starts_of(ids: Tensor) -> Tensor:
    """Of each token the index in its sample of the first token of its document, int64 (B, S), from numbers (B, S)."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return (begins * torch.arange(ids.shape[1], device=ids.device)).cummax(-1).values


def restarted(here: Tensor, starts: Tensor) -> Tensor:
    """Positions (B, N) in their documents of the tokens `here` (N) of the samples, from `starts` (B, S)."""
    here = here.to(starts.device)
    return here - starts[:, here]


def visible(starts: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether the tokens `queries` (N) see `keys` (M) of their sample: bool (B, 1, N, M), from `starts` (B, S).

    Each is its index in the sample. A query sees no later key, and none before its document.
    """
    queries, keys = queries.to(starts.device), keys.to(starts.device)
    return ((keys <= queries.unsqueeze(-1)) & (keys >= starts[:, queries].unsqueeze(-1))).unsqueeze(1)


def use_documents(model: nn.Module, documents: Documents) -> Documents:
    """Let a model, or what is sharded of it, keep documents apart as `documents` says; returns it."""
    for module in model.modules():
        if hasattr(module, "documents"):
            module.documents = documents
    return documents
