"""The flight record: what is started has a number on its axis, and what does not fit is refused before it is sent."""

import json
import time

import pytest
import torch
import torch.distributed as dist

from core import comm, p2p
from core.engine import direct
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.p2p import PointToPoint
from core.proof.diagnosis import Record
from core.proof.flight import FLIGHT, OUTSIDE, Group, Where
from core.proof.matching import LEFT, Checker, MismatchError
from core.proof.peers import PeerError
from core.proof.places import follow_backward
from core.proof.stragglers import slowest_of
from tests.pool import Pool

CPU = torch.device("cpu")


def axis_of_all(name: str = "tp") -> Axis:
    return Mesh("cpu", Ledger(), 10.0, **{name: dist.get_world_size()})[name]


def begin(check: bool = False) -> Axis:
    FLIGHT.reset()
    if check:
        FLIGHT.checker = Checker(dist.distributed_c10d._get_default_store(), dist.get_rank())
    return axis_of_all()


def everything() -> Record:
    axis, x = begin(), torch.ones(2, 4)
    comm.all_reduce(x, axis)
    comm.all_gather(x, axis)
    comm.reduce_scatter(x, axis)
    comm.all_to_all(x, axis, [1, 1], [1, 1])
    comm.all_gather_in_place_async(torch.ones(2, 4), axis).wait()
    p2p.exchange(x, axis, 1 - axis.index)
    if axis.index == 0:
        p2p.send(x, axis, 1)
    else:
        p2p.receive(x, axis, 0)
    messages = PointToPoint(axis, [(0, 1, "F")], CPU)
    for tag in range(2):
        if axis.index == 0:
            messages.send(torch.ones(3), 1, "F", tag)
        else:
            messages.receive(torch.ones(3), 0, "F", tag)()
    messages.close()
    return Record.read(FLIGHT.snapshot(full=True))


def test_every_collective_and_message_has_a_number(pool: Pool) -> None:
    for rank, record in enumerate(pool.run(2, everything)):
        by_axis = {tuple(map(str, calls)) for calls in record.lanes.values()}
        me, way, peer = (("send", "to"), ("receive", "from"))[rank], None, 1 - rank
        way = f"{me[0]}{{}} {{}} {me[1]} rank {peer}"
        operations = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "all-gather")
        assert tuple(f"{name} {i} over tp" for i, name in enumerate(operations)) in by_axis
        assert (way.format("", 0),) in by_axis
        assert (way.format(" (F)", 0), way.format(" (F)", 1)) in by_axis
        assert (f"send (exchange) 0 to rank {peer}",) in by_axis
        assert (f"receive (exchange) 0 from rank {peer}",) in by_axis
        assert record.waits == []
        assert str(record.finished) == way.format(" (F)", 1)
        assert record.finished.shape == (3,)


def unfinished() -> Record:
    axis = begin()
    FLIGHT.at("forward", microbatch=3, stage=1, step=7)
    if axis.index == 0:
        pending = comm.all_reduce_async(torch.ones(3), axis)
        started = Record.read(FLIGHT.snapshot())
        assert started.waits == []  # started, and not waited for
        assert str(started.last) == "all-reduce 0 over tp"
        with pytest.raises(PeerError):
            comm.wait(pending.work, axis.__class__(**vars(axis) | {"timeout": axis.timeout / 100}), pending.buffer, "",
                      pending.call)  # fmt: skip
    found = Record.read(FLIGHT.snapshot())
    if axis.index == 1:
        time.sleep(0.3)
        comm.all_reduce_async(torch.ones(3), axis).wait()
    else:
        pending.work.wait(axis.timeout)
    return found


def test_a_wait_that_fails_stays_in_the_record(pool: Pool) -> None:
    waiting, elsewhere = pool.run(2, unfinished)
    assert str(waiting.waits[0]) == "all-reduce 0 over tp"
    assert waiting.waits[0].where == "forward of micro-batch 3, stage 1, step 7"
    assert waiting.waits[0].waited >= 0.1
    assert elsewhere.waits == []
    assert elsewhere.lanes == {}


# ---- What does not fit ----------------------------------------------------------------------------------------------

CASES = {
    "shape": lambda axis, odd: comm.all_reduce(torch.ones(4, 5 if odd else 6), axis),
    "same bytes": lambda axis, odd: comm.all_reduce(torch.ones((2, 3) if odd else (3, 2)), axis),
    "type": lambda axis, odd: comm.all_gather(torch.ones(4, dtype=torch.float64 if odd else torch.int64), axis),
    "operation": lambda axis, odd: (comm.all_gather if odd else comm.all_reduce)(torch.ones(4), axis),
    "reduction": lambda axis, odd: comm.all_reduce(
        torch.ones(4), axis, dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM
    ),
    "rows": lambda axis, odd: comm.all_to_all(
        torch.ones(axis.size, 2), axis, [1] * axis.size, [1 + odd, *[1] * (axis.size - 1)]
    ),
    "columns": lambda axis, odd: comm.all_to_all(
        torch.ones(axis.size, 2 + odd), axis, [1] * axis.size, [1] * axis.size
    ),
}  # fmt: skip


def run_case(case: str) -> str:
    axis = begin(check=True)
    comm.all_reduce(torch.ones(3), axis)  # all ranks alike
    odd = axis.index == axis.size - 1
    if case == "message":
        messages = PointToPoint(axis, [(0, 1, "F")], CPU)
        try:
            if axis.index == 0:
                messages.send(torch.ones(2, 3), 1, "F", 5)
            elif axis.index == 1:
                time.sleep(0.1)
                messages.receive(torch.ones(3, 3), 0, "F", 5)
        except MismatchError as error:
            return str(error)
        return ""
    try:
        if not odd:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("all_reduce", "all_gather_single", "all_to_all_single"):
                    patch.setattr(dist, name, lambda *args, **more: None)
                for name in ("all_reduce", "all_gather", "all_to_all"):
                    patch.setattr(direct, name, lambda *args, **more: None)
                CASES[case](axis, odd)
            return ""
        time.sleep(0.3)
        CASES[case](axis, odd)
    except MismatchError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", [*CASES, "message"])
def test_what_does_not_fit_is_refused_before_it_is_sent(case: str, ranks: int, pool: Pool) -> None:
    said = pool.run(ranks, run_case, case)
    if case == "message":
        tensors = "rank 1 has (3, 3) torch.float32, rank 0 has (2, 3) torch.float32"
        assert said[1] == f"receive (F) 0 from rank 0 over tp: {tensors}"
        return
    assert said[:-1] == [""] * (ranks - 1)
    assert f"rank {ranks - 1}" in said[-1]
    assert " 1 over tp: " in said[-1]
    if case == "rows":
        assert f"rank 0 sends 1 rows to rank {ranks - 1}, which expects 2" in said[-1]


def healthy(calls: int) -> tuple[int, int]:
    axis = begin(check=True)
    before = FLIGHT.checker.store.num_keys()
    dist.barrier()
    messages = PointToPoint(axis, [(0, 1, "F")], CPU)
    for i in range(calls):
        comm.all_reduce(torch.ones(3), axis)
        send = [i % 2, 1]  # rank r sends send[s] rows to s
        comm.all_to_all(torch.ones(sum(send), 2), axis, send, [send[axis.index]] * 2)
        if axis.index == 0:
            messages.send(torch.ones(3), 1, "F", i % 2)
        else:
            messages.receive(torch.ones(3), 0, "F", i % 2)()
    messages.close()
    dist.barrier()
    return before, FLIGHT.checker.store.num_keys()


def test_what_fits_passes_and_the_store_does_not_grow(pool: Pool) -> None:
    for before, after in pool.run(2, healthy, 400):
        assert after - before <= 2 * LEFT + 20  # of 1200


# ---- Where, and how long ---------------------------------------------------------------------------------------------


def test_a_call_costs_microseconds() -> None:
    """What is shown is put into words when the heart beats, twice a second, not at each call: 1.4 and 60 measured."""
    FLIGHT.reset()
    over, x = Group("dp", (0, 1)), torch.ones(2, 3)

    def calls(n: int = 500) -> float:
        began = time.thread_time()
        for _ in range(n):
            call = FLIGHT.start("all-reduce", over, x)
            FLIGHT.done(call, FLIGHT.wait(call), CPU)
        return (time.thread_time() - began) / n

    def record() -> float:
        began = time.thread_time()
        json.dumps(FLIGHT.snapshot())
        return time.thread_time() - began

    assert min(calls() for _ in range(10)) < 5e-6
    assert min(record() for _ in range(10)) < 1e-3
    FLIGHT.reset()


def test_where_in_words() -> None:
    assert str(Where("forward", 2, 3, 1, "5")) == "forward of micro-batch 3, stage 1, layer 5, step 2"
    assert str(Where()) == OUTSIDE


def test_a_backward_is_one_and_stays_one_where_it_fails() -> None:
    FLIGHT.reset()
    follow_backward()
    follow_backward()
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: seen.append(str(FLIGHT.where)))
    FLIGHT.at("forward", 1)
    x.sum().backward()
    assert seen == ["backward of micro-batch 1"]
    assert str(FLIGHT.where) == "forward of micro-batch 1"

    def fail(g: torch.Tensor) -> None:
        raise ValueError("a bug")

    x.register_hook(fail)
    with pytest.raises(ValueError, match="a bug"):
        x.sum().backward()
    assert str(FLIGHT.where) == "backward of micro-batch 1"
    FLIGHT.reset()


def test_time_is_spent_in_one_phase_at_a_time() -> None:
    FLIGHT.reset()
    FLIGHT.at("forward")
    FLIGHT.spent()
    began = time.perf_counter()
    time.sleep(0.02)
    before = FLIGHT.count_as("waiting, dp")
    time.sleep(0.04)
    FLIGHT.count_as(before)
    FLIGHT.at("optimizer")
    found, elapsed = FLIGHT.spent(), time.perf_counter() - began
    assert found["forward"] >= 0.02
    assert found["waiting, dp"] >= 0.04
    assert sum(found.values()) == pytest.approx(elapsed, abs=0.005)
    assert set(found) == {"forward", "waiting, dp", "optimizer"}


def test_the_slowest_rank_is_who_does_not_wait() -> None:
    """A rank that waits long is not slow; and its phase is where it lies behind, not where it is longest."""
    usual = {"forward": 1.0, "backward": 2.0, "waiting, dp": 9.0}
    ranks = [usual, usual | {"forward": 8.0, "waiting, dp": 0.0}, usual, usual | {"waiting, dp": 20.0}]
    found = slowest_of(ranks)
    assert (found.rank, found.phase, found.seconds, found.median) == (1, "forward", 10.0, 3.0)
    assert found.notable
    assert not slowest_of([usual, usual]).notable
    assert slowest_of([usual]) is None


def test_the_phase_of_the_slowest_rank_is_where_it_loses_most_seconds() -> None:
    """Neither its longest phase, nor that which has grown by the largest factor; others may have no such phase."""
    ranks = [
        {"forward": 1.0, "backward": 4.0, "waiting, dp": 9.0},
        {"forward": 3.0, "backward": 5.0, "optimizer": 0.4},
        {"forward": 1.0, "backward": 4.5, "optimizer": 0.05},
    ]
    found = slowest_of(ranks)
    assert not found.notable  # less than thrice the median
    assert str(found) == (
        "the slowest rank is 1: 8.40 s at work, the median 5.55 s; most of it in forward, 3.00 s, the median 1.00 s"
    )
