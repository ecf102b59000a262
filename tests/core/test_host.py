"""Messages of ranks that share a GPU, without one: what would be on the host is marked, and no kernel may read it."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm, p2p
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof import host
from tests.core.sharing import OnHost, seen, shared
from tests.pool import Pool, WorkerError


def everything(axis: Axis) -> list[Tensor]:
    """What each function that sends gives, of values that differ by rank."""
    n, me = axis.size, axis.index
    x = torch.arange(4.0 * n).reshape(2 * n, 2) * (me + 1)
    found = [comm.all_reduce(x.clone(), axis), comm.all_reduce(x.clone(), axis, dist.ReduceOp.MAX)]
    found += [comm.all_gather(x, axis, dim) for dim in (0, 1)]
    found += [comm.all_gather(x.T, axis)]
    found += [comm.reduce_scatter(x, axis), comm.reduce_scatter(x.T, axis, 1), comm.reduce_scatter(x.T, axis, 1)]
    in_place = torch.zeros(2 * n, 2)
    in_place.chunk(n)[me].copy_(x[:2])
    assert comm.all_gather_in_place_async(in_place, axis).wait() is in_place
    found.append(in_place)
    rows = [1 + (me + to) % 2 for to in range(n)]
    found.append(comm.all_to_all(x[: sum(rows)], axis, rows, rows))
    waited = [comm.all_reduce_async(x * k, axis) for k in range(3)]  # several at once, in another order
    found += [pending.wait() for pending in reversed(waited)]
    w = x.clone().requires_grad_()
    for function in (comm.copy_to, comm.reduce_from):
        function(w, axis).square().sum().backward()
    comm.gather_for(comm.scatter_from(w, axis, 0), axis, 0).square().sum().backward()
    found.append(w.grad)
    peer = me ^ 1
    found.append(p2p.exchange(x, axis, peer))
    if me % 2:
        found.append(p2p.receive(torch.empty_like(x), axis, peer))
    else:
        p2p.send(x, axis, peer)
    lane = p2p.PointToPoint(axis, [(a, a ^ 1, "F") for a in range(n)], torch.device("cpu"))
    arriving = [lane.receive(torch.empty(3), peer, "F", tag) for tag in range(3)]
    for tag in (2, 0, 1):
        lane.send(torch.full((3,), 10.0 * me + tag), peer, "F", tag)
    found += [arrive() for arrive in arriving]
    lane.close()
    return found


def both() -> tuple[list[Tensor], list[Tensor], dict[str, int], bool]:
    ledgers = Ledger(), Ledger()
    axes = [Mesh("cpu", ledger, 30.0, dp=dist.get_world_size())["dp"] for ledger in ledgers]
    plain = everything(axes[0])
    seen.clear()
    with shared():
        staged = everything(axes[1])
    assert not any(isinstance(x, OnHost) for x in staged), "left on the host"
    return plain, staged, dict(seen), ledgers[0].traffic == ledgers[1].traffic


def test_every_message_goes_through_the_host_and_all_values_are_the_same(pool: Pool) -> None:
    for plain, staged, calls, same_traffic in pool.run(4, both):
        assert len(plain) == len(staged)
        assert all(torch.equal(a, b) for a, b in zip(plain, staged, strict=True))
        assert same_traffic, "claims on bytes do not change"
        assert {"all_reduce", "all_gather_single", "all_to_all_single", "isend", "irecv"} <= set(calls)


BUGS: dict[str, tuple[str, Callable, str]] = {
    "sent from the device": ("outgoing", lambda x, group: x, "of a tensor on the device"),
    "received on the device": ("landing", lambda into, group: into, "of a tensor on the device"),
    "received on the host, and left there": ("fill", lambda into, landing: landing, "host|is in_place"),
    "never copied back": ("fill", lambda into, landing: into, "values differ"),
}


def with_bug(name: str) -> None:
    where, wrong, _ = BUGS[name]
    with patch.object(host, where, wrong):
        plain, staged, *_ = both()
    assert all(map(torch.equal, plain, staged)), "values differ"


@pytest.mark.parametrize("name", BUGS)
def test_what_forgets_a_copy_is_noticed(pool: Pool, name: str) -> None:
    """The bugs: a tensor of the device handed to gloo; one of the host to a kernel; a result that never arrives."""
    with pytest.raises(WorkerError, match=BUGS[name][2]):
        pool.run(2, with_bug, name)


def test_nothing_is_copied_on_a_cpu() -> None:
    x = torch.ones(3, 2).T
    assert host.outgoing(x, None) is x
    assert host.landing(x, None) is x
    assert host.fill(x, x) is x


@pytest.mark.parametrize(
    ("ranks", "lesson"),
    [(8, "cluster/train.py --tp 2 --pp 2 --dp 2 --zero 3"), (2, "zero/zeropp.py"), (2, "pipeline/dualpipe.py"),
     (2, "sequence_parallel/ring_attention.py"), (2, "expert_parallel/moe.py")],
)  # fmt: skip
def test_lessons_hold_all_their_claims_with_every_message_through_the_host(pool: Pool, ranks: int, lesson: str) -> None:
    outcome = pool.script(ranks, "tests/core/sharing.py", *lesson.split(), "--steps", "2")
    assert outcome.codes == [0] * ranks, outcome.err
    assert "claims held" in outcome.out
    assert outcome.err.count("messages through the host") == ranks
