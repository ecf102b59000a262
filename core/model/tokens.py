"""Batches of a file of token ids that is never read whole: memory-mapped, each window of it read when it is trained on.

Windows do not overlap, and each pass over the file has an order of its own, in which every window comes once. So the
place in the data follows from the step, and a run that goes on in another layout goes on there.

S tokens of a sample
"""

import hashlib
from copy import copy
from pathlib import Path
from tokenize import TokenError  # by which numpy reads a header

import numpy as np
import torch
from torch import Tensor

from core.proof.files import check_readable

TYPES = ("uint16", "uint32")
SCANNED = 2**28  # ids of a file that are all looked at before a run; in a larger one each batch is, when it is read
BLOCK = 2**24  # of them at a time


class Tokens:
    """A file of token ids, of which windows of S + 1 make a batch.

    Args:
        path: a 1-D .npy of integers, or a .bin of nothing but ids.
        kind: the data type of a .bin, one of TYPES.
        vocabulary: ids are below it.

    Raises:
        ValueError: the file is missing, of another form, or shorter than one sample and its shifted target.
    """

    def __init__(self, path: str, sequence: int, vocabulary: int, kind: str | None = None):
        check_readable(f"--tokens {path}", path, "use the path of a readable file")
        self.path, self.sequence, self.vocabulary = path, sequence, vocabulary
        self.ids = _npy(path, kind) if Path(path).suffix == ".npy" else _bin(path, kind)
        self.first = 0  # where the ids are in the file
        if len(self.ids) < sequence + 1:
            raise ValueError(
                f"--tokens {path}: {len(self.ids)} ids are too few: a sample of --sequence {sequence} and its target "
                f"need {sequence + 1}; use a longer file or --sequence {max(1, len(self.ids) - 1)}"
            )

    def split(self, share: float) -> tuple["Tokens", "Tokens"]:
        """All but the last `share` of the file, to train on, and the rest.

        Raises:
            ValueError: one of them is shorter than a sample and its target.
        """
        end = len(self.ids) - int(share * len(self.ids))
        training, rest = copy(self), copy(self)
        training.ids, rest.ids, rest.first = self.ids[:end], self.ids[end:], end
        if min(len(training.ids), len(rest.ids)) < self.sequence + 1:
            raise ValueError(
                f"--sequence {self.sequence}: {share:.0%} of --tokens {self.path}, {len(rest.ids)} ids, are kept for "
                f"validation, too few for a sample; use a longer file or --sequence {max(1, len(rest.ids) - 1)}"
            )
        return training, rest

    def scan(self) -> None:
        """Look at all ids of a file that is not too large for it, block by block.

        Raises:
            ValueError: one is outside the vocabulary.
        """
        if len(self.ids) <= SCANNED:
            for start in range(0, len(self.ids), BLOCK):
                self._check(self.ids[start : start + BLOCK], start)

    def batch(self, seed: int, step: int, samples: int, rows: range | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the global batch of `step`, int64 of shape (samples, S).

        Depends on (seed, step) alone, whoever reads it. The target of a position is the token that follows it.

        Args:
            rows: those that are read; the others are zeros. None: all.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        windows = (len(self.ids) - 1) // self.sequence
        found = torch.zeros(samples, self.sequence + 1, dtype=torch.int64)
        for row in range(samples) if rows is None else rows:
            again, place = divmod(step * samples + row, windows)
            start = shuffled(place, windows, seed, "tokens", again) * self.sequence
            window = self.ids[start : start + self.sequence + 1]
            self._check(window, start)
            found[row] = torch.from_numpy(window.astype(np.int64))
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()

    def _check(self, ids: np.ndarray, start: int) -> None:
        if int(ids.max()) < self.vocabulary and int(ids.min()) >= 0:
            return
        at = int(np.argmax((ids >= self.vocabulary) | (ids < 0)))
        least = f"--vocabulary {int(ids.max()) + 1}" if ids.max() >= self.vocabulary else "ids from 0"
        raise ValueError(
            f"--tokens {self.path}: id {ids[at]} at position {self.first + start + at} is outside the vocabulary of "
            f"{self.vocabulary}; use {least}"
        )


def documents_of(inputs: Tensor, eos: int) -> Tensor:
    """Of each token (B, S) the number of its document in the sample: `eos` ends one, and is its last token."""
    ends = (inputs == eos).long()
    return ends.cumsum(-1) - ends


def shuffled(place: int, count: int, *purpose: object) -> int:
    """Where `place` of range(count) goes in a permutation of it, which depends on `purpose`; nothing is kept.

    A Feistel network of four rounds permutes the numbers of 2b bits; what falls outside the range is permuted again.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    while True:
        left, right = divmod(place, 1 << half)
        for turn in range(4):
            digest = hashlib.blake2b(repr((purpose, turn, right)).encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") % (1 << half)
        place = (left << half) + right
        if place < count:
            return place


def _npy(path: str, kind: str | None) -> np.ndarray:
    if kind is not None:
        raise ValueError(f"--token-type {kind}: {path} says its own; leave it out, or use a .bin")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ValueError(f"--tokens {path!r}: {error.strerror or error}; use the path of a readable file") from None
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, TokenError) as error:
        raise ValueError(
            f"--tokens {path!r}: is no .npy file, or truncated ({error}); use one that numpy wrote"
        ) from None
    if ids.ndim != 1:
        raise ValueError(f"--tokens {path}: has {ids.ndim} dimensions, {ids.shape}; use one, of {ids.size}")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"--tokens {path}: holds {ids.dtype}, not integers; use uint16 or uint32")
    return ids


def _bin(path: str, kind: str | None) -> np.ndarray:
    if Path(path).suffix != ".bin":
        raise ValueError(f"--tokens {path!r}: is neither .npy nor .bin; use a file with one of these names")
    if kind is None:
        raise ValueError(f"--tokens {path}: a .bin does not say its data type; use --token-type uint16 or uint32")
    try:
        size, each = Path(path).stat().st_size, np.dtype(kind).itemsize
        if size % each or not size:
            whole = max(1, size // each) * each
            raise ValueError(f"--tokens {path}: {size} bytes are no {kind} ids of {each} each; use a file of {whole}")
        return np.memmap(path, dtype=np.dtype(kind).newbyteorder("<"), mode="r")
    except OSError as error:
        raise ValueError(f"--tokens {path!r}: {error.strerror or error}; use the path of a readable file") from None
