"""What data parallelism and ZeRO's three stages share; what differs is in `ddp.py` and `zero1.py` to `zero3.py`.

Ψ parameters, N ranks
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core import comm
from core.ledger import live_bytes
from core.mesh import Axis
from core.shards import Piece, Segment, shard_of
from core.training import clip_by, norm_and_totals
from zero.flat import BUCKET_ELEMENTS, Bucket, InOrder, buckets_of
from zero.optimizer import MakeOptimizer, PartOptimizer


class Stage(ABC):
    """A model trained by the ranks of `axis`, each with its part of the batch.

    A step is `zero_grad`, `backward` for each microbatch, `clip_and_total`, `step`. The loss of a microbatch is its
    share of the global batch's loss, so gradients are summed, over microbatches and over ranks.

    Args:
        model: equal on all ranks. Parameters that are not trained (`requires_grad`) when the stage is made never are.
        make_optimizer, groups, master: see `PartOptimizer`.
        elements: of a bucket, about.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        make_optimizer: MakeOptimizer,
        groups: Sequence[dict[str, Any]] | None = None,
        master: torch.dtype = torch.float32,
        elements: int = BUCKET_ELEMENTS,
    ):
        self.model, self.axis = model, axis
        self.parts = axis.size if self.shards_optimizer else 1  # of each bucket; this rank updates one
        self.index = axis.index if self.shards_optimizer else 0
        self.used: set[nn.Parameter] = set()  # what got a gradient in this step
        self.buckets = self._make_buckets(elements)
        self._pending: list[comm.Pending] = []
        self.own_gradients: list[Tensor] = []  # this rank's part of each bucket's, summed, after the last backward
        self._own_weights = self._allocate()
        self.optimizer = PartOptimizer(self.buckets, self.index, self._own_weights, make_optimizer, groups, master)

    shards_optimizer = True

    def _make_buckets(self, elements: int) -> list[Bucket]:
        buckets = buckets_of(self.model, self.parts, elements)
        self.order = InOrder(buckets, self._launch, self.used)
        return buckets

    @abstractmethod
    def _allocate(self) -> list[Tensor]:
        """Make this stage's buffers; this rank's part of each bucket's weights, which the optimizer updates."""

    @abstractmethod
    def _launch(self, i: int) -> None:
        """Start to sum the gradients of bucket i, which are complete, over the ranks."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward of one microbatch of the step. After the `last` one `own_gradients` is there."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Before the first microbatch of a step."""

    def step(self) -> None:
        """Update this rank's part, and bring the others' where all ranks hold the weights."""
        self.optimizer.step()
        self._share_weights()

    def _share_weights(self) -> None:  # noqa: B027  neither data parallelism nor stage 3 has anything to share
        pass

    def sum_over(self, axis: Axis, choose: Callable[[nn.Parameter], bool]) -> None:
        """Add up over `axis` the gradients of the chosen parameters, of which each of its ranks has a term.

        For what sequence parallelism leaves whole: LayerNorms, the rows' biases, positions. After the last backward.
        """
        chosen = [
            part[at : at + end - first]
            for bucket, part in zip(self.buckets, self.own_gradients, strict=True)
            for member, first, end, at in bucket.in_part(self.index)
            if choose(member.parameter)
        ]
        if chosen:  # on all ranks of the axis or on none: they have the same parts
            total = comm.all_reduce(torch.cat(chosen), axis)
            for gradient, summed in zip(chosen, total.split([len(g) for g in chosen]), strict=True):
                gradient.copy_(summed)

    def clip_and_total(
        self,
        clip: float,
        share: Tensor,
        axes: Sequence[Axis] = (),
        counts: Callable[[nn.Parameter], bool] | None = None,
    ) -> tuple[float, float]:
        """Clip by the norm of the whole model's gradient; (norm, loss).

        Args:
            share: this rank's share of the loss, a scalar.
            axes: over which the model itself is cut as well.
            counts: whether this rank adds a parameter's gradient to the norm; None for all. A parameter that several
                ranks of `axes` hold must be counted by one of them.
        """
        members = [member for bucket in self.buckets for member in bucket.members]
        used = [float(member.parameter in self.used) for member in members]
        self.used.clear()
        self.optimizer.take_gradients(self.own_gradients)
        counted = [
            each.piece.grad for each in self.optimizer.owned() if counts is None or counts(each.member.parameter)
        ]
        if not self.shards_optimizer and self.axis.index:
            counted = []  # every rank has all of it
        more = torch.tensor([0.0, *used], dtype=torch.float64, device=share.device)
        more[0] = share
        norm, (loss, *uses) = norm_and_totals(counted, [self.axis], more)
        if axes:  # whose ranks may have other parameters
            norm, (loss,) = norm_and_totals([more.new_tensor(norm)], axes, more.new_tensor([loss]))
        # One process leaves a parameter that nothing used as it is: no decay, no momentum.
        self.optimizer.drop({member.parameter for member, n in zip(members, uses, strict=True) if not n})
        clip_by(self.optimizer.pieces, clip, norm)
        return norm, loss

    def held(self) -> dict[str, int]:
        """Bytes on this rank now: weights, gradients (whole ones and parts, not those on their way), optimizer."""
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return {
            "weights": live_bytes([*parameters, *self._own_weights]),
            "gradients": live_bytes([*gradients, *self.own_gradients]),
            "optimizer": live_bytes(self.optimizer.tensors()),
        }

    # What `core.training.train` compares.

    compares_states = True

    def gradients(self) -> list[Piece]:
        """This rank's part, summed over the ranks."""
        return self._segments(self.buckets, self.own_gradients)

    def _segments(self, buckets: Iterable[Bucket], parts: Iterable[Tensor]) -> list[Piece]:
        """Copies of this rank's parts of `buckets`, by parameter."""
        name = self._names()
        return [
            Piece(name[m.parameter], part[at : at + end - first].clone(), Segment(first, end, m.parameter.shape))
            for bucket, part in zip(buckets, parts, strict=True)
            for m, first, end, at in bucket.in_part(self.index)
        ]

    def weights(self) -> list[Piece]:
        """What this rank has of the weights: all, but in stage 3."""
        name = self._names()
        return [Piece(name[p], p.detach(), shard_of(p)) for p in self.model.parameters()]

    def states(self) -> list[Piece]:
        """This rank's part of the optimizer's state, named (parameter, key)."""
        name, found = self._names(), []
        for each in self.optimizer.owned():
            for key, value in self.optimizer.optimizer.state[each.piece].items():
                mark = Segment(each.first, each.end, each.member.parameter.shape)
                found.append(Piece((name[each.member.parameter], key), value, mark if value.dim() else None))
        return found

    def _names(self) -> dict[nn.Parameter, str]:
        return {p: name for name, p in self.model.named_parameters()}


def wait_all(pending: Iterable[comm.Pending]) -> list[Tensor]:
    return [each.wait() for each in pending]
