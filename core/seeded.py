"""Random numbers that depend on what they are for, never on which rank draws them.

Every layout must start from the same weights, see the same batches and drop the same activations; otherwise a
comparison with one process means nothing. So each draw has a generator of its own, seeded by its purpose.
"""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def generator(*purpose: object) -> torch.Generator:
    """A fresh CPU generator seeded by `purpose`, for example `generator(seed, "embed.token.weight")`.

    CPU on every machine, so that a GPU run starts from the same numbers as a CPU run.
    """
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


class Draw(NamedTuple):
    """Which samples of which step a microbatch holds: all that a dropout mask may depend on besides its name."""

    seed: int
    step: int
    first_sample: int

    def keep_mask(
        self, shape: torch.Size, drop: float, name: str, split: tuple[int, int, int] | None, device: torch.device
    ) -> Tensor:
        """The dropout mask of one microbatch: bool, `shape` = (samples, ...), True where the activation is kept.

        Each sample has its own generator, so a batch cut into microbatches, or over data-parallel ranks, drops exactly
        what the whole batch in one process drops.

        Args:
            name: of the dropout in the model.
            split: (dimension, index, count) where `shape` is one part of the activation that one process has: the
                mask is drawn whole, and this is its part.
        """
        whole = list(shape)
        if split:
            whole[split[0]] *= split[2]
        samples = range(self.first_sample, self.first_sample + shape[0])
        uniform = [torch.rand(whole[1:], generator=generator(self.seed, self.step, i, name)) for i in samples]
        keep = torch.stack(uniform) >= drop
        if split:  # a copy: a view would keep the whole alive
            keep = keep.chunk(split[2], split[0])[split[1]].clone(memory_format=torch.contiguous_format)
        return keep.to(device)

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For `torch.utils.checkpoint`, which computes twice: the masks are the same anyway."""
        return nullcontext(), nullcontext()
