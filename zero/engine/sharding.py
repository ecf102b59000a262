"""What each rank has of weights, gradients and optimizer state: data parallelism and ZeRO-1, 2 and 3. Lecture 01.

Ψ parameters, N ranks
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from zero.engine.buckets import Bucket, InOrder, buckets_of
from zero.engine.gathered import GatheredWeights, Unit, units_of
from zero.engine.gradients import DeviceShards, FullGradients, ShardedGradients, Shards, reduce_scatter
from zero.engine.parts import Named, Parts, Users
from zero.engine.weights import ReplicatedWeights


@dataclass(frozen=True)
class Scope:
    """What is to be sharded, and when it is to be exchanged.

    Args:
        axis: the ranks over which.
        named: the parameters, of `model`.
        elements: of a bucket, about.
        every: ZeRO-2 and 3: whether gradients are reduced and freed in every micro-batch. Else they are added up and
            reduced once: for m micro-batches 1/m of the bytes sent, for 2Ψ or 4Ψ bytes of memory.
        reshard: ZeRO-3: whether weights are freed after each forward and backward. Else they are gathered once a step
            and kept: of 2m gathers one is left, for 2Ψ bytes of memory.
        whole: parameters that ZeRO-3 leaves on every rank: what is moved by no gradient, and read between steps.
    """

    model: nn.Module
    axis: Axis
    named: Named
    elements: int
    parts: Parts
    every: bool = True
    reshard: bool = True
    whole: Collection[nn.Parameter] = ()

    def buckets(self, count: int) -> tuple[list[Bucket], list[Users]]:
        """Buckets of `count` shards, and the parts that use each."""
        found = [(b, users) for users, named in self.parts.groups(self.named)
                 for b in buckets_of(named, count, self.elements)]  # fmt: skip
        return [bucket for bucket, _ in found], [users for _, users in found]


class Sharding(NamedTuple):
    """What each rank has of weights, gradients and optimizer state, and when it is exchanged."""

    buckets: list[Bucket]
    weights: ReplicatedWeights | GatheredWeights
    gradients: FullGradients | ShardedGradients
    order: InOrder | GatheredWeights  # tells the gradients, in backward, which buckets are complete
    shards_optimizer: bool = True  # whether this rank updates 1/N of each bucket, or all of it


MakeSharding = Callable[[Scope], Sharding]


def replicate(scope: Scope) -> Sharding:
    """Data parallelism: nothing is sharded. 16Ψ bytes."""
    return _full_gradients(scope, shards_optimizer=False)


def shard_optimizer(scope: Scope) -> Sharding:
    """ZeRO-1: the optimizer state is sharded. 4Ψ + 12Ψ/N bytes."""
    return _full_gradients(scope, shards_optimizer=True)


def _full_gradients(scope: Scope, shards_optimizer: bool) -> Sharding:
    buckets, users = scope.buckets(scope.axis.size if shards_optimizer else 1)
    gradients = FullGradients(buckets, users, scope.axis, scatter=shards_optimizer, first=scope.parts.whole_model)
    order = InOrder(buckets, users, gradients.launch, gradients.complete)
    weights = ReplicatedWeights(scope.named, buckets, scope.axis, shards_optimizer)
    return Sharding(buckets, weights, gradients, order, shards_optimizer)


def shard_gradients(
    scope: Scope,
    make_shards: Callable[[list[Bucket]], Shards] = DeviceShards,
    make_weights: type[ReplicatedWeights] = ReplicatedWeights,
) -> Sharding:
    """ZeRO-2: the gradients too. 2Ψ + 14Ψ/N bytes.

    Args:
        make_shards, make_weights: where they are; ZeRO-Offload has them on the host.
    """
    buckets, users = scope.buckets(scope.axis.size)
    gradients = ShardedGradients(buckets, users, scope.axis, make_shards(buckets), scope.every)
    order = InOrder(buckets, users, gradients.launch, gradients.complete)
    return Sharding(buckets, make_weights(scope.named, buckets, scope.axis, True), gradients, order)


def shard_parameters(
    scope: Scope,
    make_unit: Callable[[Named, Axis], Unit] = Unit,
    reduce: Callable[[Tensor, Axis], comm.Pending] = reduce_scatter,
) -> Sharding:
    """ZeRO-3: the parameters too; a layer is a bucket, and both ends of the model are one. 16Ψ/N bytes.

    Args:
        make_unit, reduce: how they are gathered and reduced; ZeRO++ does it otherwise.
    """
    sharded = [(name, p) for name, p in scope.named if p not in scope.whole]
    whole = [(name, p) for name, p in scope.named if p in scope.whole]
    units, walks = units_of(scope.parts, sharded, lambda named: make_unit(named, scope.axis))
    trained = {unit: users for unit, users in units.items() if unit.trained}
    buckets = [unit.trained for unit in trained]
    shards = DeviceShards(buckets)
    gradients = ShardedGradients(buckets, list(trained.values()), scope.axis, shards, scope.every, reduce)
    weights = GatheredWeights(scope.parts, list(units), walks, gradients.launch, whole, keep=not scope.reshard)
    return Sharding(buckets, weights, gradients, order=weights)
