"""Lecture 06: context parallelism. The sequence is sharded over the ranks of an axis (cp), attention included.

A model treats each token by itself in all but attention, so a rank can have some of a sample's tokens and compute as
always. Three things know of the others: positions (learned or rotary, a token keeps its own), the loss (divided by the
tokens of the global batch), and attention, which is given to `parallelize`: `Ulysses` (ulysses.py), `RingAttention`
(ring_attention.py), or both (hybrid.py). To everything else cp is like dp: ranks with the same parameters have seen
different tokens, so the gradients of *all* parameters are summed over dp x cp, whatever the size of dp:

    here = attention.positions(sequence)  # this rank's tokens
    loss = token_loss(model(inputs[:, here]), targets[:, here], tokens_of_the_global_batch)
    loss.backward()
    sum_gradients(model.parameters(), mesh.joined("cp", "dp"))  # or ZeRO over that axis

Between the stages of a pipeline travels (B, S/c, H). The ranks' shares of the loss add up.

B batch, S sequence, H hidden, A heads, K key and value heads (a divisor of A), D head size, c ranks of the axis
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from core.mesh import Axis
from core.model.gpt import GPT, token_loss

NEEDS_SDPA = "cp computes attention in its own way, without the full matrix of scores and without dropout"


class SequenceAttention(ABC):
    """Causal attention over a sequence of which this rank has some tokens.

    Attributes:
        ranks: how many have a shard of the sequence, c.
        multiple: a sequence must be a multiple of it.
        heads_over: over how many of the ranks the heads are sharded while attention is computed.
    """

    ranks: int
    multiple: int
    heads_over: int = 1

    @abstractmethod
    def positions(self, sequence: int) -> Tensor:
        """Which tokens of the sequence this rank has, int64 (S/c), ascending.

        Raises:
            ValueError: the sequence has no equal shards.
        """

    @abstractmethod
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """This rank's (B, A, S/c, D), from q of that shape and k, v of (B, K, S/c, D).

        Args:
            v: may have another D, and so has the output.
            scale: of the scores; None: 1 / sqrt(D of q).
            starts: (B, S) of `core.model.documents`, of all tokens, where samples have several documents.

        Raises:
            ValueError: the heads have no equal shards.
            PeerError: a rank of the axis died or was silent for the timeout.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to end
        """End what sends messages."""


def check_length(sequence: int, multiple: int) -> None:
    """Raises ValueError unless `sequence` is one or more times `multiple`."""
    if sequence % multiple or sequence < 1:
        raise ValueError(
            f"--sequence {sequence}: must be a multiple of {multiple}, so that the shards of all ranks are equal; "
            f"use --sequence {max(1, sequence // multiple) * multiple}"
        )


class Placed(SequenceAttention):
    """Whose tokens are one or two runs of neighbours.

    Args:
        zigzag: rank r has chunks r and 2c-1-r of 2c; otherwise chunk r of c.
    """

    def __init__(self, axis: Axis, zigzag: bool = True):
        self.axis, self.ranks, self.zigzag = axis, axis.size, zigzag and axis.size > 1
        self.multiple = 2 * axis.size if self.zigzag else axis.size

    def positions(self, sequence: int) -> Tensor:
        return self.positions_of(self.axis.index, sequence)

    def positions_of(self, rank: int, sequence: int) -> Tensor:
        """Which tokens of the sequence that rank has."""
        check_length(sequence, self.multiple)
        chunks = torch.arange(sequence).chunk(self.multiple)
        return torch.cat([chunks[i] for i in self.chunks_of(rank)])

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Which of the `multiple` chunks of a sequence that rank has."""
        return (rank, self.multiple - 1 - rank) if self.zigzag else (rank,)


def local(x: Tensor, attention: SequenceAttention) -> Tensor:
    """This rank's tokens (B, S/c) of (B, S) inputs or targets; any dimensions may follow.

    Raises:
        ValueError: the sequence has no equal shards.
    """
    return x[:, attention.positions(x.shape[1]).to(x.device)]


def loss_of(model: GPT, attention: SequenceAttention, inputs: Tensor, targets: Tensor) -> Tensor:
    """This rank's share of the loss of the global batch, (B, S) each."""
    return token_loss(model(local(inputs, attention)), local(targets, attention), targets.numel())


def parallelize(model: GPT, attention: SequenceAttention) -> GPT:
    """Make the model, or a pipeline stage of it, compute on this rank's tokens: (B, S/c) or (B, S/c, H), to the same.

    After tensor parallelism, Megatron's sequence parallelism included; before recomputation.

    Raises:
        ValueError: this rank's heads have no equal shards, or the model computes attention in another way.
    """

    def positions(length: int) -> Tensor:
        return attention.positions(length * attention.ranks)

    if model.config.attention != "sdpa":
        raise ValueError(f"--attention {model.config.attention}: {NEEDS_SDPA}; use --attention sdpa --dropout 0")
    for block in model.blocks.values():
        heads = block.attention.out.weight.shape[1] // model.config.value_dim  # of this rank of tp
        if heads % attention.heads_over:
            raise ValueError(
                f"{heads} heads have no {attention.heads_over} equal shards; use a multiple of {attention.heads_over}"
            )
        block.attention.core = attention
        if block.attention.rotary is not None:
            block.attention.rotary.positions = positions
    if model.embed is not None:
        model.embed.positions = positions
    return model
