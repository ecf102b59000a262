"""Collectives on gloo as messages from each rank to each other one, all at once: half of the CPU time of its own.

Gloo's all-gather and all-reduce go around a ring: N-1 turns, one after another, on a thread of their own. Sent
directly, the same bytes take one turn (an all-reduce two), and a sum has one order, that of the axis. On other devices,
and where ranks share a GPU, nothing changes. N ranks.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from core.mesh import Axis

LARGEST_SUM = 2**21  # bytes of an all-reduce that is sent directly; gloo's own is as fast for more, and needs no memory
TAG = 2**20  # of these messages; those of `core.p2p` have smaller ones


class Messages(dist.Work):
    """What goes to and comes from the other ranks of an axis, in flight; waited for as a `dist.Work` is.

    Args:
        send, receive: for each rank of the axis, contiguous. What is empty is not sent, nor is this rank's own.
    """

    def __init__(self, axis: Axis, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int):
        super().__init__()
        self._works: list[dist.Work] = []
        self._lost: RuntimeError | None = None
        me = axis.group.rank()
        try:
            for step in range(1, axis.size):  # so that not all send to the same one first
                to, of = (me + step) % axis.size, (me - step) % axis.size
                if receive[of].numel():
                    self._works.append(dist.irecv(receive[of], group=axis.group, tag=tag, group_src=of))
                if send[to].numel():
                    self._works.append(dist.isend(send[to], group=axis.group, tag=tag, group_dst=to))
        except RuntimeError as error:
            self._lost = error  # of a rank that is gone already: raised where it is waited for

    def wait(self, *timeout: timedelta) -> bool:
        if self._lost:
            raise self._lost
        while self._works:  # each once: gloo would wait for a second message
            self._works.pop().wait(*timeout)
        return True


class Sum(Messages):
    """An all-reduce in place: each rank sums its shard in the order of the axis, and sends it to the others.

    It is sent in `wait`: every rank must wait at once, or one would wait for another that does something else first.
    """

    def __init__(self, x: Tensor, axis: Axis):
        self._axis, self._parts = axis, x.view(-1).tensor_split(axis.size)
        mine = self._parts[axis.group.rank()]
        self._received: Tensor | None = mine.new_empty(axis.size, len(mine))
        self._received[axis.group.rank()] = mine
        super().__init__(axis, self._parts, self._received.unbind(0), TAG)

    def wait(self, *timeout: timedelta) -> bool:
        super().wait(*timeout)
        if self._received is not None:
            mine = self._parts[self._axis.group.rank()]
            mine.copy_(ordered_sum(self._received))
            self._received = None
            Messages(self._axis, [mine] * self._axis.size, self._parts, TAG + 1).wait(*timeout)
        return True


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, axis: Axis, at_once: bool) -> dist.Work:
    """Start to reduce contiguous `x` over the axis, in place; `at_once` where every rank waits for it next."""
    if at_once and x.device.type == "cpu" and op == dist.ReduceOp.SUM and x.nbytes <= LARGEST_SUM:
        return Sum(x, axis)
    return dist.all_reduce(x, op, axis.group, async_op=True)


def all_gather(full: Tensor, own: Tensor, axis: Axis, near: bool) -> dist.Work:
    """Start to fill contiguous `full` with the ranks' shards, equal parts of its rows. `own` may be that part of it.

    `near` where the values belong to the CPU, and are not on it just to be sent.
    """
    if full.device.type != "cpu" or not near:
        return dist.all_gather_single(full, own, axis.group, async_op=True)
    parts = full.view(axis.size, *own.shape).unbind(0)
    mine = parts[axis.group.rank()]
    if own.untyped_storage()._cdata != full.untyped_storage()._cdata:  # no part of it yet
        mine.copy_(own)
    return Messages(axis, [mine] * axis.size, parts, TAG + 2)


def ordered_sum(parts: Tensor) -> Tensor:
    """Of (N, ...) over the first dimension, one after another: a third of the time of `sum`, which goes across."""
    if parts.element_size() < 4:
        return parts.sum(0)  # which adds in float32, and rounds once
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
