"""Cross entropy over a large vocabulary: only the logits of a chunk of tokens exist at a time, forward and backward.

Of 8,192 tokens and 128,256 words the logits are 4 GB in float32, and backward makes as much again. But the loss needs
two numbers a token, the logarithm of the sum of exponentials (lse) and the logit of the target; and with the lse known,
a chunk's gradient of the logits, softmax minus one-hot, needs no other chunk.

Backward computes a chunk's logits again: a fourth product beside the head's three. The other way, as fused kernels do
(2410.10989, section 3.2), is to compute the gradients in the forward, where the logits are. It saves that product and
costs a gradient of the head's weight, V H numbers, for each micro-batch between forward and backward, of which a
pipeline has many; and its F would have done what a zero-bubble schedule plans as W. So here what is kept of a token is
its hidden state, which the norm before keeps anyhow, and two numbers. What W needs it computes again.

N tokens, n of a chunk; H hidden, V vocabulary, R rows of the head's weight on this rank: V, or a shard and its padding
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.model.linear import Gradients, deferring
from core.model.precision import wide
from core.shards import Shard

LOGITS = 2**26  # of a micro-batch on a rank: more are not made at once

Move = Callable[[Tensor], Tensor]


def chunk_of(tokens: float, rows: int, wanted: int = 0) -> int:
    """Tokens of a chunk; 0: the logits (tokens, rows) are made whole.

    Args:
        wanted: tokens of a chunk that the user wants; 0: none where there are few logits, else equal chunks of them.
    """
    if not wanted and tokens * rows > LOGITS:
        chunks = -(-tokens * rows // LOGITS)
        wanted = max(1, int(-(-tokens // chunks)))
    return wanted if wanted < tokens else 0


class InHead(NamedTuple):
    """A loss that is computed within the model: `of(head, x, targets)`, where x (B, S, H) is the head's input."""

    of: Callable[[nn.Module, Tensor, Tensor], Tensor]


def loss_of(model: nn.Module, x: Tensor, targets: Tensor, loss: InHead | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss of a model, or of the last stage of one: from its logits, or within it, where it makes none."""
    if isinstance(loss, InHead):
        return model(x, partial(loss.of, targets=targets))
    return loss(model(x), targets)


@dataclass(frozen=True)
class _Head:
    """This rank's rows of the head, and what is computed with them of one chunk after another.

    Of the tokens' hidden states x (N, H), and of their targets `row` (N) in `weight`, if they are `here` (N).
    """

    weight: Tensor
    bias: Tensor | None
    real: int  # rows without padding
    chunk: int

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(t.split(self.chunk) for t in tensors), strict=True)

    def logits(self, x: Tensor) -> Tensor:
        """(n, H) to (n, rows without padding), a tensor of its own."""
        return wide(F.linear(x, self.weight[: self.real], None if self.bias is None else self.bias[: self.real]))

    def statistics(self, x: Tensor, row: Tensor, here: Tensor) -> Tensor:
        """(2, N): each token's lse over this rank's rows, and its target's logit, 0 where that is on another rank."""
        found = []
        for part, at, mine in self.chunks(x, row, here):
            logits = self.logits(part)
            target = logits.gather(-1, at.unsqueeze(-1)).squeeze(-1) if self.real else logits.new_zeros(len(part))
            found.append(torch.stack([logits.logsumexp(-1), target.masked_fill_(~mine, 0.0)]))
        return torch.cat(found, 1)

    def gradients_of_logits(
        self, gradient: Tensor, lse: Tensor, x: Tensor, row: Tensor, here: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunk by chunk x and the gradient of its logits, in the precision of the weight."""
        of_lse, of_target = gradient
        columns = (t.unsqueeze(-1) for t in (of_lse, of_target * here, lse, row))
        for part, of_sum, of_one, total, at in self.chunks(x, *columns):
            of_logits = self.logits(part).sub_(total).exp_().mul_(of_sum)
            if self.real:
                of_logits.scatter_add_(-1, at, of_one)
            yield part, of_logits.to(self.weight.dtype)

    def backward(self, of_x: bool, of_weight: bool, of_bias: bool, *saved: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are wanted of x, weight and bias. The chunks' are added up in float32 at least."""
        of_chunks, weight = [], self.weight
        wide_type = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros_like(weight, dtype=wide_type) if of_weight else None
        total_bias = torch.zeros_like(self.bias, dtype=wide_type) if of_bias else None
        for part, gradient in self.gradients_of_logits(*saved):
            if of_x:
                of_chunks.append(gradient @ weight[: self.real])
            if of_weight and total.dtype == weight.dtype:
                total[: self.real].addmm_(gradient.T, part)
            elif of_weight:
                total[: self.real] += gradient.T @ part
            if of_bias:
                total_bias[: self.real] += gradient.sum(0, dtype=wide_type)
        return torch.cat(of_chunks) if of_x else None, total, total_bias


class _Statistics(torch.autograd.Function):
    """Hidden states (..., H) to the two numbers of each token, (2, N): see `statistics`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mark: Shard, chunk: int,
        ahead: Move, back: Move,
    ) -> Tensor:  # fmt: skip
        head = _Head(weight, bias, mark.unpadded, chunk)
        full = ahead(x)
        found = head.statistics(full.flatten(0, -2), *_rows(targets, mark))
        ctx.save_for_backward(x, targets, found)
        ctx.head, ctx.mark, ctx.ahead, ctx.back, ctx.shape = head, mark, ahead, back, full.shape
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, targets, found), head, mark, ahead = ctx.saved_tensors, ctx.head, ctx.mark, ctx.ahead
        weight, bias = head.weight, head.bias
        trained = weight.requires_grad, bias is not None and bias.requires_grad

        def compute(of_x: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor | None, ...]:
            full = ahead(x).flatten(0, -2)
            return head.backward(of_x, of_weight, of_bias, gradient, found[0], full, *_rows(targets, mark))

        def later() -> Gradients:
            return compute(False, *trained)[1:]

        deferred = deferring(weight)
        if deferred and deferred.weights_leave:  # before W, which computes with them here
            of_x, *found_now = compute(ctx.needs_input_grad[0], *trained)
            of_parameters = deferred.put((weight, bias), lambda: found_now, [g for g in found_now if g is not None])
        elif deferred:
            of_x = compute(True, False, False)[0] if ctx.needs_input_grad[0] else None
            of_parameters = deferred.put((weight, bias), later, (gradient, x, found))
        else:
            of_x, *of_parameters = compute(ctx.needs_input_grad[0], *trained)
        of_x = None if of_x is None else ctx.back(of_x.view(ctx.shape))
        return of_x, *of_parameters, None, None, None, None, None


def _rows(targets: Tensor, mark: Shard) -> tuple[Tensor, Tensor]:
    """Of each target its row in this rank's shard of the vocabulary, and whether it is there; both (N)."""
    row = targets.flatten() - mark.start
    here = (row >= 0) & (row < mark.unpadded)
    return row.masked_fill_(~here, 0), here


def statistics(
    head: nn.Module, x: Tensor, targets: Tensor, mark: Shard, chunk: int,
    ahead: Move = lambda x: x, back: Move = lambda x: x,
) -> Tensor:  # fmt: skip
    """(2, N), at least float32: of each token the lse over this rank's rows of the vocabulary, and its target's logit.

    The loss is the lse over all ranks less the target's logit, which is 0 here where the target is on another rank.

    Args:
        head: with this rank's rows as `weight` (R, H), and `bias` (R) or None.
        x: this rank's (B, S', H), S' = S or its shard of the tokens.
        targets: (B, S), int64 in [0, vocabulary). Not checked: that would wait for the device.
        mark: of the vocabulary; its `size` is that without padding.
        chunk: tokens.
        ahead: makes (B, S, H) of x. Computed again in backward, and not kept.
        back: makes a gradient of x of that of (B, S, H), of this rank's rows only.
    """
    return _Statistics.apply(x, head.weight, head.bias, targets, mark, chunk, ahead, back)


def token_loss(head: nn.Module, x: Tensor, targets: Tensor, tokens: int, chunk: int) -> Tensor:
    """The loss of `core.model.gpt.token_loss`, from the head and its input."""
    lse, target = statistics(head, x, targets, Shard(0, 0, 1, len(head.weight)), chunk)
    return (lse - target).sum() / tokens
