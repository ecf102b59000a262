"""Bytes of live tensors, and of the activations that autograd saves for backward; each storage counted once."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage counted once however many views share it."""
    return sum({_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _key(tensor: Tensor) -> int:
    """The same for all tensors on one storage, and not its address, which changes where ZeRO-3 frees and gathers."""
    return tensor.untyped_storage()._cdata


class SavedActivations:
    """Bytes that autograd keeps for backward, now and at the peak; each storage counted once.

    Use as a context manager around the forward passes; tensors leave the count when backward frees them. A storage that
    is marked `emptied` does not count: it is about to be, and computed again for backward.

    Args:
        excluded: tensors that do not count: parameters, which linear layers save too, and the batch.
    """

    def __init__(self, excluded: Iterable[Tensor]):
        self.live = self.peak = 0
        self._references: dict[int, int] = defaultdict(int)
        self._ignored: set[int] = set()
        self.ignore(excluded)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, self), lambda saved: saved.tensor)

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def ignore(self, excluded: Iterable[Tensor]) -> None:
        """Nor do these count, from now on."""
        self._ignored |= {_key(t) for t in excluded}

    def keep(self, tensors: Iterable[Tensor]) -> list["_Saved"]:
        """Count these too, as long as what is returned lives."""
        return [_Saved(t, self) for t in tensors]

    def counts(self, tensor: Tensor) -> bool:
        return _key(tensor) not in self._ignored and not getattr(tensor.untyped_storage(), "emptied", False)

    def _change(self, tensor: Tensor, step: int) -> None:
        key = _key(tensor)
        before = self._references[key]
        self._references[key] += step
        if before == 0 or before + step == 0:
            self.live += step * tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.live)


class _Saved:
    """A saved tensor; autograd drops this object when it frees the graph node that saved it."""

    def __init__(self, tensor: Tensor, account: SavedActivations):
        self.tensor, self.account, self.counted = tensor, account, account.counts(tensor)
        if self.counted:
            account._change(tensor, +1)

    def __del__(self) -> None:
        if self.counted:
            self.account._change(self.tensor, -1)
