"""Random numbers that depend on what they are for, never on which rank draws them.

Every layout must start from the same weights, see the same batches and drop the same activations; otherwise a
comparison with one process means nothing. So each draw has a generator of its own, seeded by its purpose.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def generator(*purpose: object) -> torch.Generator:
    """A fresh CPU generator seeded by `purpose`, for example `generator(seed, "embed.token.weight")`.

    CPU on every machine, so that a GPU run starts from the same numbers as a CPU run.
    """
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


class SampleMasks:
    """Dropout masks that depend on (seed, step, sample, name of the dropout) only, so that every layout drops the same.

    One object for all dropouts of a model (`core.model.gpt.use_masks`). Who runs the model says where it is in the
    data: `seek` before a step, `at` before a micro-batch.
    """

    def __init__(self, seed: int, step: int = 0, first_sample: int = 0):
        self.seed = seed
        self.seek(step, first_sample)

    def seek(self, step: int, first_sample: int = 0) -> None:
        """This rank's samples of `step` begin with this one of the global batch."""
        self.step, self.first_sample, self.offset = step, first_sample, 0

    def at(self, offset: int) -> None:
        """The micro-batch that is computed next begins so many samples after this rank's first."""
        self.offset = offset

    def keep_mask(
        self, shape: torch.Size, drop: float, name: str, split: tuple[int, int, int] | None, device: torch.device
    ) -> Tensor:
        """The dropout mask of one micro-batch: bool, `shape` = (samples, ...), True where the activation is kept.

        Each sample has its own generator, so a batch split into micro-batches, or over data-parallel ranks, drops
        exactly what the global batch in one process drops.

        Args:
            name: of the dropout in the model.
            split: (dimension, index, count) where `shape` is one shard of the activation that one process has: the
                mask is drawn in full, and this is its shard.
        """
        full = list(shape)
        if split:
            full[split[0]] *= split[2]
        first = self.first_sample + self.offset
        samples = range(first, first + shape[0])
        uniform = [torch.rand(full[1:], generator=generator(self.seed, self.step, i, name)) for i in samples]
        keep = torch.stack(uniform) >= drop
        if split:  # a copy: a view would keep the full mask alive
            keep = keep.chunk(split[2], split[0])[split[1]].clone(memory_format=torch.contiguous_format)
        return keep.to(device)

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For `torch.utils.checkpoint`, whose second forward may come when other micro-batches have been computed."""
        return nullcontext(), self._again(self.step, self.first_sample, self.offset)

    @contextmanager
    def _again(self, step: int, first_sample: int, offset: int) -> Iterator[None]:
        present = self.step, self.first_sample, self.offset
        self.step, self.first_sample, self.offset = step, first_sample, offset
        try:
            yield
        finally:
            self.step, self.first_sample, self.offset = present
