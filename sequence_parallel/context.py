"""Lecture 06: the sequence itself is cut over the ranks of an axis, attention included. The axis is called cp.

Everything of a GPT but attention treats each token by itself, so a rank can have some of a sample's tokens and compute
as always. Attention needs all of them: it is given to `parallelize`, as one of

    Ulysses(axis)                        `ulysses.py`: heads in place of tokens while attention is computed
    RingAttention(axis, device)          `ring.py`: keys and values travel round the ranks
    context_parallel(axis, ...)          `hybrid.py`: either, or both in one

It must also be told which tokens are here. To everything else cp is like dp: ranks with the same parameters have seen
different tokens, so a rank's share of the loss is the sum over its tokens divided by the tokens of the global batch,
and the gradients of *all* parameters are summed over dp x cp, whatever the size of dp. The whole of it:

    cp, every = mesh["cp"], mesh.joined("cp", "dp")
    attention = context_parallel(cp, device, ulysses=2)
    model = materialize(parallelize(GPT(config), attention), ...)  # after tensor parallelism, where there is any
    loss = token_loss(model(part(inputs, attention)), part(targets, attention), tokens)
    loss.backward()
    sum_gradients(model.parameters(), every)  # or ZeRO: a stage with the axis `every` does the rest
    ...
    attention.close()

Between the stages of a pipeline travels (B, S/c, H). After the sum all ranks of the axis have the same gradients: the
global norm counts one of them. The shares of the loss add up over all.

B batch, S sequence, H hidden, A heads, K key and value heads (a divisor of A), D head size, c ranks of the axis
"""

import argparse
from abc import ABC, abstractmethod

from torch import Tensor

from core.model.gpt import GPT
from core.proof.clock import VirtualClock

NO_MATRIX = (
    "--attention {}: cp computes attention in its own way, without the whole matrix of scores and without dropout; "
    "use --attention sdpa --dropout 0"
)


class SequenceAttention(ABC):
    """Causal attention of a sequence of which this rank has some tokens.

    Attributes:
        ranks: how many have a part of a sequence, c.
        pieces: a sequence must be a multiple of it.
        heads_over: over how many of the ranks the heads are cut while attention is computed.
        clock: where it is set, records what is done in which order.
    """

    ranks: int
    pieces: int
    heads_over: int = 1
    clock: VirtualClock | None = None

    @abstractmethod
    def positions(self, sequence: int) -> Tensor:
        """The places in the sequence of this rank's tokens, int64 (S/c), ascending.

        Raises:
            ValueError: the sequence cannot be cut.
        """

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """This rank's (B, A, S/c, D), from q of that shape and k, v of (B, K, S/c, D).

        Raises:
            ValueError: the heads cannot be cut.
            PeerError: a rank of the axis died or was silent for the whole timeout.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to end
        """End what sends messages."""


def check_length(sequence: int, pieces: int) -> None:
    """Raises ValueError unless `sequence` can be cut into so many equal pieces."""
    if sequence % pieces or sequence < 1:
        raise ValueError(
            f"--sequence {sequence}: must be a multiple of {pieces}, so that the pieces of all ranks are equal; "
            f"use --sequence {max(1, sequence // pieces) * pieces}"
        )


def check(args: argparse.Namespace, heads_over: int, pieces: int) -> None:
    """Raises ValueError unless heads can be cut into `heads_over` equal parts and a sample into so many `pieces`.

    Says what would do for all of them together, sizes below 1 included.
    """
    if args.attention != "sdpa":
        raise ValueError(NO_MATRIX.format(args.attention))
    heads, hidden, sequence = args.heads, args.hidden, args.sequence
    use: dict[str, int] = {}
    rules = []
    if min(heads, hidden) < 1 or heads % heads_over or hidden % heads:
        fitting = [a for a in range(heads_over, hidden + 1, heads_over) if hidden % a == 0]
        use["heads"] = min(fitting, key=lambda a: abs(a - heads), default=heads_over)
        if hidden < 1 or hidden % use["heads"]:
            use["hidden"] = max(1, round(hidden / use["heads"])) * use["heads"]
        cut = f" and be a multiple of the {heads_over} ranks over which they are cut" if heads_over > 1 else ""
        rules.append(f"heads must divide --hidden{cut}")
    if sequence < 1 or sequence % pieces:
        use["sequence"] = max(1, sequence // pieces) * pieces
        rules.append(f"the sequence is cut and must be a multiple of {pieces}")
    if use:
        now = " ".join(f"--{name} {getattr(args, name)}" for name in use)
        raise ValueError(
            f"{now}: {' and '.join(rules)}, so that each rank gets as much; "
            f"use {' '.join(f'--{name} {value}' for name, value in use.items())}"
        )


def part(x: Tensor, attention: SequenceAttention) -> Tensor:
    """This rank's tokens (B, S/c) of (B, S) inputs or targets; any dimensions may follow.

    Raises:
        ValueError: the sequence cannot be cut.
    """
    return x[:, attention.positions(x.shape[1]).to(x.device)]


def parallelize(model: GPT, attention: SequenceAttention) -> GPT:
    """Make the GPT, or a pipeline stage of it, compute on this rank's tokens: (B, S/c) or (B, S/c, H), to the same.

    After tensor parallelism, Megatron's sequence parallelism included; before recomputation.

    Raises:
        ValueError: the heads that this rank has cannot be cut, or the model computes attention in some other way.
    """
    if model.config.attention != "sdpa":
        raise ValueError(NO_MATRIX.format(model.config.attention))
    for block in model.blocks.values():
        inside = block.attention
        heads = inside.qkv.weight.shape[0] // (3 * inside.head_size)  # of this rank of tp
        if heads % attention.heads_over:
            raise ValueError(
                f"{heads} heads cannot be cut into {attention.heads_over} equal parts; use a multiple of "
                f"{attention.heads_over}"
            )
        inside.core = attention
    if model.embed is not None:
        # Whatever looks a position up, whole or cut by Megatron's sequence parallelism, is asked for these.
        model.embed.position.register_forward_pre_hook(
            lambda _, here: (attention.positions(here[0].numel() * attention.ranks).to(here[0].device),)
        )
    return model
