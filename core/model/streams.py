"""Random numbers in a tensor-parallel region: the tracker of lecture 05. Shoeybi et al. 2019 (1909.08053), section 3.

Dropout outside the region acts on a replicated tensor, so every rank must drop the same; inside it acts on
each rank's own shard, so every rank must drop something else. Hence two streams of numbers, as in Megatron-LM's
`CudaRNGStatesTracker`. Recomputation runs a forward twice, and must meet the same numbers again.

A lesson that compares with one process cannot train with it: there a rank's masks must be shards of the
one-process masks (`SampleMasks`, whose place the tracker takes). It is what one trains with: no mask is drawn in full.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from core.mesh import Axis
from core.model.seeded import generator

REPLICATED, SHARDED = "replicated", "sharded"


class RandomTracker:
    """The two streams of one rank. Give it to the model with `use_masks`, in place of `SampleMasks`.

    Args:
        seed: of the replicated stream, equal on all ranks of `axis`.
    """

    def __init__(self, seed: int, axis: Axis, device: torch.device):
        purposes = {REPLICATED: (seed, REPLICATED), SHARDED: (seed, SHARDED, axis.index)}
        seeds = {name: generator(*purpose).initial_seed() for name, purpose in purposes.items()}
        self.streams = {name: torch.Generator(device).manual_seed(value) for name, value in seeds.items()}

    def keep_mask(
        self, shape: torch.Size, drop: float, name: str, split: tuple[int, int, int] | None, device: torch.device
    ) -> Tensor:
        """The next mask of the stream that fits: bool, True where kept; see `SampleMasks.keep_mask`."""
        stream = self.streams[SHARDED if split else REPLICATED]
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - drop, generator=stream)

    @contextmanager
    def replay(self, states: dict[str, Tensor]) -> Iterator[None]:
        """Draw what was drawn from `states` on; afterwards the streams go on where they were."""
        present = self.states()
        self._set(states)
        try:
            yield
        finally:
            self._set(present)

    def states(self) -> dict[str, Tensor]:
        return {name: stream.get_state() for name, stream in self.streams.items()}

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=tracker.contexts)`.

        torch restores its own default generator only.
        """
        return nullcontext(), self.replay(self.states())

    def _set(self, states: dict[str, Tensor]) -> None:
        for name, stream in self.streams.items():
            stream.set_state(states[name])
