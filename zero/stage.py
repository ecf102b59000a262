"""What data parallelism and ZeRO's three stages share; what differs is in `ddp.py` and `zero1.py` to `zero3.py`.

Ψ parameters, N ranks
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core import comm
from core.gradients import clip_by, norm_and_totals
from core.mesh import Axis
from core.proof.memory import live_bytes
from core.shards import FlatShard, LocalTensor, shard_of
from zero.flat import BUCKET_ELEMENTS, Bucket, InOrder, buckets_of
from zero.optimizer import MakeOptimizer, Owned, PartOptimizer


class Stage(ABC):
    """A model trained by the ranks of `axis`, each with its part of the batch.

    A step is `zero_grad`, `backward` for each microbatch, `clip_and_total`, `step`. The loss of a microbatch is its
    share of the global batch's loss, so gradients are summed, over microbatches and over ranks.

    Args:
        model: equal on all ranks. Parameters that are not trained (`requires_grad`) when the stage is made never are.
        make_optimizer, groups, master: see `PartOptimizer`.
        elements: of a bucket, about.
        only: the parameters that are this stage's, where another stage has the rest over other ranks; stages 0 to 2.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        make_optimizer: MakeOptimizer,
        groups: Sequence[dict[str, Any]] | None = None,
        master: torch.dtype = torch.float32,
        elements: int = BUCKET_ELEMENTS,
        only: Callable[[nn.Parameter], bool] = lambda _: True,
    ):
        self.model, self.axis, self._only = model, axis, only
        self.parts = axis.size if self.shards_optimizer else 1  # of each bucket; this rank updates one
        self.index = axis.index if self.shards_optimizer else 0
        self.used: set[nn.Parameter] = set()  # what got a gradient in this step
        self._taken = False  # whether the optimizers have this step's gradients
        self.buckets = self._make_buckets(elements)
        self._pending: list[comm.Pending] = []
        self.own_gradients: list[Tensor] = []  # this rank's part of each bucket's, summed, after the last backward
        self._own_weights = self._allocate()
        if groups is not None:  # the forms torch takes: an iterator, a tensor, (name, parameter) pairs
            groups = [group | {"params": _listed(group["params"])} for group in groups]
        self.optimizers = [
            PartOptimizer(bucket, self.index, own, make_optimizer, groups, master, self.host)
            for bucket, own in zip(self.buckets, self._own_weights, strict=True)
        ]

    shards_optimizer = True
    host: torch.device | None = None  # where the update is made, if not where the model is

    @property
    def owned(self) -> list[Owned]:
        """What this rank updates."""
        return [each for optimizer in self.optimizers for each in optimizer.owned]

    def _make_buckets(self, elements: int) -> list[Bucket]:
        buckets = buckets_of(self.named(), self.parts, elements)
        self.order = InOrder(buckets, self._launch, self.used)
        return buckets

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are this stage's, trained or not; a tied one once."""
        return [(name, p) for name, p in self.model.named_parameters() if self._only(p)]

    @abstractmethod
    def _allocate(self) -> list[Tensor]:
        """Make this stage's buffers; this rank's part of each bucket's weights, which the optimizer updates."""

    @abstractmethod
    def _launch(self, i: int) -> None:
        """Start to sum the gradients of bucket i, which are complete, over the ranks."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward of one microbatch of the step. After the `last` one `own_gradients` is there."""
        self.before_backward(last)
        if loss.requires_grad:
            loss.backward()
        self.after_backward(last)

    @abstractmethod
    def before_backward(self, last: bool = True) -> None:
        """Be ready for the gradients of a backward, which others may start, for several stages together."""

    @abstractmethod
    def after_backward(self, last: bool = True) -> None:
        """Finish with what has come."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Before the first microbatch of a step."""

    def step(self) -> None:
        """Update this rank's part, bucket by bucket, while those before travel to where all ranks hold the weights."""
        if not self._taken:  # not clipped
            for optimizer, part in zip(self.optimizers, self.own_gradients, strict=True):
                optimizer.take_gradient(part)
        self._taken = False
        for i, optimizer in enumerate(self.optimizers):
            optimizer.step()
            self._publish(i)
        self._wait()

    def publish(self) -> None:
        """Make the model's weights those of the optimizer, on all ranks."""
        for i in range(len(self.buckets)):
            self._publish(i)
        self._wait()

    def _publish(self, i: int) -> None:
        """Put bucket i's updated part into the model, and start to bring the others'."""
        self.optimizers[i].publish()

    def _wait(self) -> list[Tensor]:
        """For all that is on its way; the results."""
        results = [pending.wait() for pending in self._pending]
        self._pending.clear()
        return results

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
            total = comm.all_reduce(torch.cat(chosen).to(self._own_weights[0].device), axis)  # from the host, if there
            for gradient, summed in zip(chosen, total.split([len(g) for g in chosen]), strict=True):
                gradient.copy_(summed)

    def clip_and_total(
        self,
        clip: float,
        share: Tensor,
        axes: Sequence[Axis] = (),
        counts: Callable[[nn.Parameter], bool] | None = None,
    ) -> tuple[float, float]:
        """Clip by the norm of the whole model's gradient; (norm, loss). See `norm_and_total`."""
        norm, loss = self.norm_and_total(share, axes, counts)
        self.clip_by(clip, norm)
        return norm, loss

    def norm_and_total(
        self, share: Tensor, axes: Sequence[Axis] = (), counts: Callable[[nn.Parameter], bool] | None = None
    ) -> tuple[float, float]:
        """The norm of the gradient of what is this stage's, over all ranks, and the loss.

        Args:
            share: this rank's share of the loss, a scalar.
            axes: over which the model itself is cut as well.
            counts: whether this rank adds a parameter's gradient to the norm; None for all. A parameter that several
                ranks of `axes` hold must be counted by one of them.
        """
        members = [member for bucket in self.buckets for member in bucket.members]
        used = [float(member.parameter in self.used) for member in members]
        self.used.clear()
        places = zip(self.optimizers, self.own_gradients, strict=True)
        gradients = [(e, part[e.at : e.at + e.end - e.first]) for optimizer, part in places for e in optimizer.owned]
        counted = [gradient for each, gradient in gradients if counts is None or counts(each.member.parameter)]
        if not self.shards_optimizer and self.axis.index:
            counted = []  # every rank has all of it
        more = torch.tensor([0.0, *used], dtype=torch.float64, device=share.device)
        more[0] = share
        norm, (loss, *uses) = norm_and_totals(counted, [self.axis], more)
        if axes:  # whose ranks may have other parameters
            norm, (loss,) = norm_and_totals([more.new_tensor(norm)], axes, more.new_tensor([loss]))
        # One process leaves a parameter that nothing used as it is: no decay, no momentum.
        self._unused = {member.parameter for member, n in zip(members, uses, strict=True) if not n}
        return norm, loss

    def clip_by(self, clip: float, norm: float) -> None:
        """Give the optimizers the gradients, scaled as where the whole model's norm is this. After `norm_and_total`."""
        for optimizer, part in zip(self.optimizers, self.own_gradients, strict=True):
            optimizer.take_gradient(part, self._unused)
        self._taken = True
        clip_by([each.piece for each in self.owned], clip, norm)

    def held(self) -> dict[str, int]:
        """Bytes on this rank now: weights, gradients (whole ones and parts, not those on their way), optimizer."""
        parameters = [p for _, p in self.named()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return {
            "weights": live_bytes([*parameters, *self._own_weights]),
            "gradients": live_bytes([*gradients, *self.own_gradients]),
            "optimizer": live_bytes(t for optimizer in self.optimizers for t in optimizer.tensors()),
        }

    # What `core.proof.training.train` compares.

    compares_states = True

    def gradients(self) -> list[LocalTensor]:
        """This rank's part, summed over the ranks."""
        return self._segments(self.buckets, self.own_gradients)

    def _segments(self, buckets: Iterable[Bucket], parts: Iterable[Tensor]) -> list[LocalTensor]:
        """Copies of this rank's parts of `buckets`, by parameter."""
        name = self._names()
        return [
            LocalTensor(name[m.parameter], part[at : at + end - first].clone(), _segment(m.parameter, first, end))
            for bucket, part in zip(buckets, parts, strict=True)
            for m, first, end, at in bucket.in_part(self.index)
        ]

    def weights(self) -> list[LocalTensor]:
        """What this rank has of the weights: all, but in stage 3."""
        name = self._names()
        return [LocalTensor(name[p], p.detach(), shard_of(p)) for _, p in self.named()]

    def master_weights(self) -> list[LocalTensor]:
        """The weights in the precision of the update: this rank's part of those that are trained, and the others."""
        name = self._names()
        trained = [
            LocalTensor(name[e.member.parameter], e.piece.detach(), _segment(e.member.parameter, e.first, e.end))
            for e in self.owned
        ]
        inside = {member.name for bucket in self.buckets for member in bucket.members}
        return trained + [piece for piece in self.weights() if piece.name not in inside]

    def load_frozen(self, read: Callable[[str, torch.Size], Tensor]) -> None:
        """Set what is not trained to `read(name, shape)`."""
        inside = {member.parameter for bucket in self.buckets for member in bucket.members}
        for name, p in self.named():
            if p not in inside and p.numel():
                p.data.copy_(read(name, p.shape))

    def states(self) -> list[LocalTensor]:
        """This rank's part of the optimizer's state, named (parameter, key)."""
        name, found = self._names(), []
        for optimizer in self.optimizers:
            for each in optimizer.owned:
                mark = _segment(each.member.parameter, each.first, each.end)
                for key, value in optimizer.optimizer.state[each.piece].items():
                    found.append(LocalTensor((name[each.member.parameter], key), value, mark if value.dim() else None))
        return found

    def _names(self) -> dict[nn.Parameter, str]:
        return {p: name for name, p in self.model.named_parameters()}


def _segment(parameter: nn.Parameter, first: int, end: int) -> FlatShard:
    return FlatShard(first, end, parameter.shape, shard_of(parameter))


def _listed(parameters: Any) -> list[nn.Parameter]:
    found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [each if isinstance(each, Tensor) else each[1] for each in found]
