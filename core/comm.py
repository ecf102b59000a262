"""Collectives over one axis of the mesh, plain and under autograd. Every call enters the ledger of that axis.

Counting follows the standard ring algorithms, per rank, for N ranks and a full tensor of S elements: all-reduce
2(N-1)/N S, all-gather and reduce-scatter (N-1)/N S, all-to-all its off-rank part; a message (`core.p2p`) S.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.engine import direct
from core.mesh import Axis
from core.proof import host
from core.proof.flight import FLIGHT, Call
from core.proof.peers import peer_errors

empty, wait_until_read = direct.empty, direct.wait_until_read  # memory that a reduce-scatter sends without a copy


def wait(work: dist.Work, axis: Axis, x: Tensor, what: str, call: Call | None = None, background: bool = False) -> None:
    """Wait for `work` on tensor `x` over `axis`, at most the timeout of the axis; the flight record has it as `call`.

    Raises:
        PeerError: it did not finish.
    """
    phase = FLIGHT.wait(call, background)
    with peer_errors(what):
        if x.device.type == "cpu":
            work.wait(axis.timeout)
        else:
            work.wait()  # with a timeout it would stop the CPU; NCCL's own watchdog has the timeout of the group
    FLIGHT.done(call, phase, x.device)


# ---- Collectives. Those with `_async` return at once: compute, then `.wait()` for the result ------------------------


@dataclass
class Pending:
    """A collective on its way. It reads and writes its buffers until `wait` returns.

    `landing` is where the values for `buffer` arrive, if that is elsewhere: on the host.
    """

    work: dist.Work | None  # None where the axis has one rank
    axis: Axis
    buffer: Tensor
    what: str
    finish: Callable[[Tensor], Tensor] = lambda result: result
    call: Call | None = None  # in the flight record
    landing: Tensor | None = None

    def wait(self) -> Tensor:
        """The result.

        Raises:
            PeerError: the other ranks did not join within the timeout of the axis.
        """
        if self.work is not None:
            landing = self.buffer if self.landing is None else self.landing
            wait(self.work, self.axis, landing, f"{self.what} over {self.axis.name}", self.call)
            host.fill(self.buffer, landing)
        return self.finish(self.buffer)


def all_reduce_async(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM, in_order: bool = False) -> Pending:
    """Reduce contiguous `x` over the axis, in place, on every rank; `in_order` if all wait for such sums in one."""
    if axis.size == 1:
        return Pending(None, axis, x, "")
    call = _record("all-reduce", axis, x, 2 * (axis.size - 1) / axis.size, op)
    sent = host.outgoing(x, axis.group)
    work = direct.all_reduce(sent, op, axis, direct.neighbours(x, axis), in_order)
    return Pending(work, axis, x, "all-reduce", call=call, landing=sent)


def all_gather_async(x: Tensor, axis: Axis, dim: int = 0, label: str = "all-gather") -> Pending:
    """The ranks' tensors of equal shape, joined along `dim` in the order of the axis. The ledger calls it `label`."""
    if axis.size == 1:
        return Pending(None, axis, x, "")
    if near := direct.neighbours(x, axis):
        full = x.new_empty(*x.shape[:dim], axis.size * x.shape[dim], *x.shape[dim:][1:])
        call, parts = _record(label, axis, full, (axis.size - 1) / axis.size), full.chunk(axis.size, dim)
        parts[axis.index].copy_(x.detach())
        return Pending(direct.all_gather(parts, axis, near), axis, full, label, call=call)
    rows = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    call = _record(label, axis, rows, (axis.size - 1) / axis.size)
    landing, sent = host.landing(rows, axis.group), host.outgoing(x.contiguous(), axis.group)
    work = dist.all_gather_single(landing, sent, axis.group, async_op=True)
    joined = lambda r: r if dim == 0 else torch.cat(r.chunk(axis.size), dim)  # noqa: E731
    return Pending(work, axis, rows, label, joined, call, landing)


def all_gather_in_place_async(x: Tensor, axis: Axis) -> Pending:
    """Fill `x`, of which this rank has its own equal shard of the rows, with the other ranks' shards."""
    if axis.size == 1:
        return Pending(None, axis, x, "")
    call, shards = _record("all-gather", axis, x, (axis.size - 1) / axis.size), x.chunk(axis.size)
    if near := direct.neighbours(x, axis):
        return Pending(direct.all_gather(shards, axis, near), axis, x, "all-gather", call=call)
    landing, sent = host.landing(x, axis.group), host.outgoing(shards[axis.index], axis.group)
    work = dist.all_gather_single(landing, sent, axis.group, async_op=True)
    return Pending(work, axis, x, "all-gather", call=call, landing=landing)


def reduce_scatter_async(x: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """Sum `x`, which must stay until the wait is over (from `empty`: `wait_until_read`); keep a shard along `dim`.

    On CPUs the sum is in the order of the axis: for gloo an all-to-all, faster than its own, an all-reduce underneath.
    """
    if axis.size == 1:
        return Pending(None, axis, x, "")
    assert x.shape[dim] % axis.size == 0, f"{tuple(x.shape)} does not divide into {axis.size} along {dim}"
    call, parts = _record("reduce-scatter", axis, x, (axis.size - 1) / axis.size), x.chunk(axis.size, dim)
    mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    if near := direct.neighbours(x, axis):
        return Pending(direct.reduce_scatter(parts, mine, axis, near), axis, mine, "reduce-scatter", call=call)
    sent = host.outgoing(x.contiguous() if dim == 0 else torch.cat(parts, 0), axis.group)
    if sent.device.type == "cpu":
        rows = mine.new_empty(axis.size * len(mine), *mine.shape[1:])
        landing, summed = host.landing(rows, axis.group), lambda r: r.view(axis.size, *mine.shape).sum(0)
        work = dist.all_to_all_single(landing, sent, group=axis.group, async_op=True)
        return Pending(work, axis, rows, "reduce-scatter", summed, call, landing)
    work = dist.reduce_scatter_single(mine, sent, group=axis.group, async_op=True)
    return Pending(work, axis, mine, "reduce-scatter", call=call)


def all_to_all_async(
    x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int], label: str = "all-to-all"
) -> Pending:
    """Give `send[i]` rows of `x` to rank i of the axis and get `receive[i]` rows from it, in the order of the axis."""
    if axis.size == 1:
        return Pending(None, axis, x, "")
    received = x.new_empty(sum(receive), *x.shape[1:])
    off_rank = (sum(send) - send[axis.index]) * x.shape[1:].numel()
    axis.ledger.record(label, axis.name, off_rank, x.element_size())
    call = FLIGHT.start(label, axis, x, rows=(send, receive))
    if near := direct.neighbours(x, axis):
        work = direct.all_to_all(x.split([*send]), received.split([*receive]), axis, near)
        return Pending(work, axis, received, label, call=call)
    landing, sent = host.landing(received, axis.group), host.outgoing(x.contiguous(), axis.group)
    work = dist.all_to_all_single(landing, sent, list(receive), list(send), axis.group, async_op=True)
    return Pending(work, axis, received, label, call=call, landing=landing)


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`all_reduce_async`, waited for."""
    return all_reduce_async(x, axis, op, in_order=True).wait()


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """`all_gather_async`, waited for."""
    return all_gather_async(x, axis, dim).wait()


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """`reduce_scatter_async`, waited for."""
    return reduce_scatter_async(x, axis, dim).wait()


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """`all_to_all_async`, waited for."""
    return all_to_all_async(x, axis, send, receive).wait()


def _record(operation: str, axis: Axis, full: Tensor, share: float, more: object = "") -> Call:
    axis.ledger.record(operation, axis.name, share * full.numel(), full.element_size())
    return FLIGHT.start(operation, axis, full, more)


# ---- Collectives under autograd: each pair is the other's backward ---------------------------------------------------


class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _summed(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def _own_shard(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.index].clone(memory_format=torch.contiguous_format)  # no view of x


def conjugate(x: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """`ahead` of x forward, `back` of the gradient backward."""
    return _Conjugate.apply(x, ahead, back)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's f: identity forward, all-reduce backward."""
    return conjugate(x, lambda t: t.view_as(t), lambda g: _summed(g, axis))


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's g: all-reduce forward, identity backward."""
    return conjugate(x, lambda t: _summed(t, axis), lambda g: g)


def split_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's shard along `dim` forward, all-gather backward: for a tensor that is replicated on the axis."""
    return conjugate(x, lambda t: _own_shard(t, axis, dim), lambda g: all_gather(g, axis, dim))


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All-gather along `dim` forward, this rank's shard backward: for a result that every rank uses alike."""
    return conjugate(x, lambda t: all_gather(t, axis, dim), lambda g: _own_shard(g, axis, dim))


def gather_for(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All-gather along `dim` forward, reduce-scatter backward: for a result that each rank uses differently."""
    return conjugate(x, lambda t: all_gather(t, axis, dim), lambda g: reduce_scatter(g, axis, dim))


def scatter_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Reduce-scatter along `dim` forward, all-gather backward."""
    return conjugate(x, lambda t: reduce_scatter(t, axis, dim), lambda g: all_gather(g, axis, dim))
