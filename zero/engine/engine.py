"""Data parallelism and ZeRO for real runs: in buckets, overlapped with backward, with master weights. Lecture 01.

What it adds to the plain versions in `ddp.py` to `zero3.py`: buckets whose collectives run while backward goes on
(`buckets.py`, `gradients.py`), layers prefetched (`weights.py`), any element-wise optimizer with parameter groups
(`optimizer.py`), parameters that are frozen or unused on some ranks, and other axes over which a model is sharded.

Ψ parameters, N ranks
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core import comm
from core.gradients import clip_by, norm_and_totals
from core.mesh import Axis
from core.proof.memory import live_bytes
from core.shards import LocalTensor
from zero.engine.buckets import BUCKET_ELEMENTS
from zero.engine.optimizer import MakeOptimizer, Owned, ShardOptimizer
from zero.engine.parts import Action, Parts
from zero.engine.sharding import (
    MakeSharding,
    Scope,
    replicate,
    shard_gradients,
    shard_optimizer,
    shard_parameters,
)


class Engine:
    """A model trained by the ranks of `axis`, each with its samples of the batch.

    A step is `zero_grad`, `backward` for each micro-batch, `clip_and_total`, `step`. The loss of a micro-batch is its
    share of the global batch's loss, so gradients are summed, over micro-batches and over ranks. In place of `backward`
    a pipeline calls `begins` and `ends` around each action of its schedule, and `done` after the last.

    Args:
        make_sharding: one of the functions above.
        model: equal on all ranks. Parameters that are not trained (`requires_grad`) when the engine is made never are.
        make_optimizer, groups, master, host: see `ShardOptimizer`.
        elements: of a bucket, about.
        only: the parameters that are this engine's, where another has the rest over other ranks.
        parts: the stages of a pipeline that this rank computes; None for all of the model at a time.
        every, reshard, whole: see `Scope`.
        before_update: of optimizers, buckets and whether they are sharded, what is called when the optimizers have all
            gradients: for one that looks at more than a shard of a parameter (`muon.py`).
    """

    compares_states = True

    def __init__(
        self,
        make_sharding: MakeSharding,
        model: nn.Module,
        axis: Axis,
        make_optimizer: MakeOptimizer,
        groups: Sequence[dict[str, Any]] | None = None,
        master: torch.dtype = torch.float32,
        elements: int = BUCKET_ELEMENTS,
        only: Callable[[nn.Parameter], bool] = lambda _: True,
        host: torch.device | None = None,
        parts: Parts | None = None,
        every: bool = True,
        reshard: bool = True,
        whole: Collection[nn.Parameter] = (),
        before_update: Callable[..., Callable[[], None]] | None = None,
    ):
        self.model, self.axis = model, axis
        self.named = [(name, p) for name, p in model.named_parameters() if only(p)]  # a tied one once
        self.parts = parts or Parts({0: model}, whole_model=True)
        self.sharding = make_sharding(Scope(model, axis, self.named, elements, self.parts, every, reshard, whole))
        self.buckets = self.sharding.buckets
        self.shards_optimizer = self.sharding.shards_optimizer
        self.index = axis.index if self.shards_optimizer else 0  # of this rank's shard of each bucket
        if groups is not None:  # the forms torch takes: an iterator, a tensor, (name, parameter) pairs
            groups = [group | {"params": _listed(group["params"])} for group in groups]
        self.optimizers = [
            ShardOptimizer(bucket, self.index, own, make_optimizer, groups, master, host)
            for bucket, own in zip(self.buckets, self.sharding.weights.own, strict=True)
        ]
        self.before_update = (
            before_update(self.optimizers, self.buckets, self.shards_optimizer) if before_update else None
        )
        self._unused: set[nn.Parameter] = set()  # what no rank has used in this step
        self._has_gradients = False  # whether the optimizers have this step's

    @property
    def owned(self) -> list[Owned]:
        """What this rank updates."""
        return [each for optimizer in self.optimizers for each in optimizer.owned]

    @property
    def own_gradients(self) -> list[Tensor]:
        """This rank's shard of each bucket's, summed over the ranks, after the last backward."""
        return self.sharding.gradients.own

    # ---- A step

    def zero_grad(self) -> None:
        """Before the first micro-batch of a step, also after one whose backward has failed on all ranks."""
        self.sharding.gradients.zero()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward of one micro-batch of the step. After the `last` one the gradients are summed over the ranks."""
        self.before_backward(last)
        if loss.requires_grad:
            loss.backward()
        self.after_backward(last)

    def before_backward(self, last: bool = True) -> None:
        """Be ready for the gradients of a backward, which others may start, for several engines together."""
        self.sharding.gradients.finishing = set(self.parts.models) if last else set()
        self.sharding.order.watch()

    def after_backward(self, last: bool = True) -> None:
        """Finish the collectives that the backward has launched."""
        self.sharding.order.finish()
        self.sharding.gradients.wait()
        if last:
            self.sharding.weights.release()

    def reduce(self) -> None:
        """Sum what others have added to the gradients, a pipeline for example, in place of the last `backward`."""
        self.before_backward()
        self.after_backward()

    # ---- The same under a pipeline. What it computes next is known, so its weights are gathered meanwhile.

    def begins(self, action: Action, then: Sequence[Action], final: bool) -> None:
        """Before an action of a pipeline.

        Args:
            then: the next one that reads weights, or the next two, which are computed by turns.
            final: whether no gradient of its stage comes after it.
        """
        stage, kind, _ = action
        weights = self.sharding.weights
        if final:
            self.sharding.gradients.finishing.add(stage)
        if kind == "F":
            weights.begin_forward(stage, then)
        elif kind == "B":
            self.sharding.order.watch(stage)
        if kind in ("B", "I"):
            weights.begin_backward(stage, then)

    def ends(self, action: Action) -> None:
        """After it. What a B or a W has completed is being reduced while the pipeline goes on."""
        stage, kind, _ = action
        if kind == "F":
            self.sharding.weights.end_forward()
        elif kind == "W":
            self.sharding.gradients.make_room()
            self.sharding.order.reduce(stage)
        elif kind == "B":
            self.sharding.order.finish()
        if kind in ("B", "I"):
            self.sharding.weights.end_backward()

    def done(self) -> None:
        """After the last action."""
        self.sharding.gradients.wait()
        self.sharding.gradients.finishing = set()
        self.sharding.weights.release()

    # ---- Sums, and the update

    def sum_over(self, axis: Axis, choose: Callable[[nn.Parameter], bool]) -> None:
        """Add up over `axis` the gradients of the chosen parameters, of which each of its ranks has a partial sum.

        For what sequence parallelism replicates: LayerNorms, the rows' biases, positions. After the last backward.
        """
        chosen = [
            segment.of(own)
            for bucket, own in zip(self.buckets, self.own_gradients, strict=True)
            for segment in bucket.segments(self.index)
            if choose(segment.member.parameter)
        ]
        if chosen:  # on all ranks of the axis or on none: they have the same shards
            device = self.buckets[0].device  # the gradients may be on the host
            total = comm.all_reduce(torch.cat(chosen).to(device), axis)
            for gradient, summed in zip(chosen, total.split([len(g) for g in chosen]), strict=True):
                gradient.copy_(summed)

    def clip_and_total(
        self,
        clip: float,
        share: Tensor,
        axes: Sequence[Axis] = (),
        counts: Callable[[nn.Parameter], bool] | None = None,
    ) -> tuple[float, float]:
        """Clip by the norm of the full model's gradient; (norm, loss). See `norm_and_total`."""
        norm, loss = self.norm_and_total(share, axes, counts)
        self.clip_by(clip, norm)
        return norm, loss

    def norm_and_total(
        self, share: Tensor, axes: Sequence[Axis] = (), counts: Callable[[nn.Parameter], bool] | None = None
    ) -> tuple[float, float]:
        """The norm of the gradient of what is this engine's, over all ranks, and the loss.

        Args:
            share: this rank's share of the loss, a scalar.
            axes: over which the model itself is sharded as well.
            counts: whether this rank adds a parameter's gradient to the norm; None for all. A parameter that is
                replicated over ranks of `axes` must be counted by one of them.
        """
        members = [member for bucket in self.buckets for member in bucket.members]
        used = self.sharding.gradients.used
        more = torch.tensor([0.0, *(float(m.parameter in used) for m in members)], dtype=torch.float64).to(share.device)
        more[0] = share
        used.clear()
        counted = [
            each.of(own)
            for optimizer, own in zip(self.optimizers, self.own_gradients, strict=True)
            for each in optimizer.owned
            if counts is None or counts(each.member.parameter)
        ]
        if not self.shards_optimizer and self.axis.index:
            counted = []  # every rank has all of it
        norm, (loss, *uses) = norm_and_totals(counted, [self.axis], more)
        if axes:  # whose ranks may have other parameters
            norm, (loss,) = norm_and_totals([more.new_tensor(norm)], axes, more.new_tensor([loss]))
        # One process leaves a parameter that nothing used as it is: no decay, no momentum.
        self._unused = {member.parameter for member, n in zip(members, uses, strict=True) if not n}
        return norm, loss

    def clip_by(self, clip: float, norm: float) -> None:
        """Give the optimizers the gradients, scaled as where the full model's norm is this. After `norm_and_total`."""
        for optimizer, gradient in zip(self.optimizers, self.own_gradients, strict=True):
            optimizer.set_gradient(gradient, self._unused)
        self._has_gradients = True
        clip_by([each.shard for each in self.owned], clip, norm)

    def step(self) -> None:
        """Update this rank's shards, bucket by bucket, while those before travel to where weights are replicated."""
        if not self._has_gradients:  # not clipped
            for optimizer, gradient in zip(self.optimizers, self.own_gradients, strict=True):
                optimizer.set_gradient(gradient)
        self._has_gradients = False
        if self.before_update:
            self.before_update()
        for i, optimizer in enumerate(self.optimizers):
            optimizer.step()
            optimizer.publish()
            self.sharding.weights.gather(i)
        self.sharding.weights.wait()

    def publish(self) -> None:
        """Make the model's weights those of the optimizer, on all ranks."""
        for i, optimizer in enumerate(self.optimizers):
            optimizer.publish()
            self.sharding.weights.gather(i)
        self.sharding.weights.wait()

    # ---- What this rank has

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on this rank now: weights, gradients (full ones and shards, not those in flight), optimizer."""
        parameters = [p for _, p in self.named]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return {
            "weights": live_bytes([*parameters, *self.sharding.weights.own]),
            "gradients": live_bytes([*gradients, *self.own_gradients]),
            "optimizer": live_bytes(t for optimizer in self.optimizers for t in optimizer.tensors()),
        }

    def gradients(self) -> list[LocalTensor]:
        """Copies of this rank's shards, summed over the ranks."""
        pairs = zip(self.buckets, self.own_gradients, strict=True)
        shards = (tensor for bucket, own in pairs for tensor in bucket.local_tensors(self.index, own))
        return [tensor._replace(value=tensor.value.clone()) for tensor in shards]

    def weights(self) -> list[LocalTensor]:
        """All of them where they are replicated, this rank's shards in ZeRO-3."""
        return self.sharding.weights.local_tensors()

    def master_weights(self) -> list[LocalTensor]:
        """In the precision of the update: this rank's shards of those that are trained, and the others as they are."""
        inside = {member.name for bucket in self.buckets for member in bucket.members}
        frozen = [tensor for tensor in self.weights() if tensor.name not in inside]
        return [tensor for optimizer in self.optimizers for tensor in optimizer.master_weights()] + frozen

    def states(self) -> list[LocalTensor]:
        """This rank's shards of the optimizer's state, named (parameter, key)."""
        return [tensor for optimizer in self.optimizers for tensor in optimizer.states()]

    def named_optimizers(self) -> list[tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]]:
        """The optimizers that have this state, each with the full names of its parameters."""
        return [(o.optimizer, {each.shard: each.member.name for each in o.owned}) for o in self.optimizers]


def _listed(parameters: Iterable[Any]) -> list[nn.Parameter]:
    found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [each if isinstance(each, Tensor) else each[1] for each in found]


data_parallel = partial(Engine, replicate)
zero1 = partial(Engine, shard_optimizer)
zero2 = partial(Engine, shard_gradients)
zero3 = partial(Engine, shard_parameters)
