"""CODE 04: tokens that the ranks of an axis have alike, as those of tp without sp: each routes its share of them.

If all of them routed all tokens, each would be sent, and computed, t times. Megatron-LM asks for sp instead, which
shards everything between the matrix products; here only the mixture is sharded: an all-gather of its results forward,
and one of the gradients of its inputs backward. Shares differ by one token where they cannot be equal; nothing is
padded.

B samples, S tokens of a sample, H hidden, t ranks of the axis
"""

from torch import Tensor

from core import comm
from core.mesh import Axis

TOKENS = 1  # the dimension of (B, S, H) that is shared out


def sizes(tokens: int, ranks: int) -> list[int]:
    """The tokens of each rank: the first have one more, as `torch.tensor_split` does it."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


def share_of(x: Tensor, axis: Axis) -> Tensor:
    """(B, S, H), equal on all ranks, to this rank's (B, S/t, H); in backward all tokens' gradients, on all of them."""
    tokens = x.shape[TOKENS]
    return comm.conjugate(x, lambda t: _own(t, axis), lambda g: _joined(g, axis, tokens))


def join(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """This rank's (B, S/t, H) to all S = `tokens` of them, (B, S, H); in backward its own, which all have alike."""
    return comm.conjugate(x, lambda t: _joined(t, axis, tokens), lambda g: _own(g, axis))


def _own(x: Tensor, axis: Axis) -> Tensor:
    return x.tensor_split(axis.size, TOKENS)[axis.index].clone()  # no view of x


def _joined(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    if tokens % axis.size == 0:
        return comm.all_gather(x, axis, TOKENS)
    rows = x.transpose(0, TOKENS).repeat(axis.size, 1, 1)
    found = comm.all_to_all(rows, axis, [x.shape[TOKENS]] * axis.size, sizes(tokens, axis.size))
    return found.transpose(0, TOKENS).contiguous()
