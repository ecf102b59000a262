"""Mesh, collectives, their autograd pairs and the ledger, on real ranks."""

import time
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import comm, p2p
from core.engine import direct
from core.ledger import Ledger
from core.mesh import Axis, Mesh, axis_groups, axis_sizes
from core.proof.peers import PeerError
from tests.core.sharing import far
from tests.pool import Pool, WorkerError

# ---- Mesh: the course's example and Megatron's order string


def test_the_groups_of_the_slide() -> None:
    sizes = axis_sizes(16, tp=4, dp=2, pp=2)
    assert axis_groups(sizes, "tp") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert axis_groups(sizes, "dp")[:5] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12]]
    assert axis_groups(sizes, "pp") == [[r, r + 8] for r in range(8)]
    folded = axis_sizes(16, tp=4, dp=2, pp=2, ep=4)
    assert folded["edp"] == 2
    assert axis_groups(folded, "ep")[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert axis_groups(folded, "edp")[:2] == [[0, 4], [1, 5]]
    assert axis_groups(folded, "pp") == axis_groups(sizes, "pp"), "both worlds have the same pipelines"


def test_the_order_string_decides_who_are_neighbours() -> None:
    sizes = axis_sizes(8, tp=2, cp=2, dp=2)
    assert axis_groups(sizes, "tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_groups(sizes, "cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_groups(sizes, "dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert axis_groups(sizes, "dp", "dp-tp-cp-ep-pp") == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("sizes", "why"),
    [({"tp": 3}, "use torchrun --nproc_per_node=3"), ({"tp": 0}, "--tp 0"), ({"tp": 8, "ep": 3}, "--ep 3")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        axis_sizes(8, **sizes)


def test_a_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match="--order tp-pp"):
        axis_groups(axis_sizes(2, tp=2), "tp", "tp-pp")


def sums_over_axes(sizes: dict) -> dict[str, float]:
    mesh = Mesh("cpu", Ledger(), 30.0, **sizes)
    names = ["tp", "cp", "dp", "pp"] + (["etp", "ep", "edp"] if "ep" in sizes else [])
    return {n: comm.all_reduce(torch.tensor([2.0 ** dist.get_rank()]), mesh[n]).item() for n in names}


@pytest.mark.parametrize(
    "sizes", [{"pp": 8}, {"tp": 2, "pp": 4}, {"tp": 2, "cp": 2, "dp": 2}, {"dp": 4, "pp": 2, "ep": 2}]
)
def test_groups_join_the_right_ranks(pool: Pool, sizes: dict) -> None:
    for rank, sums in enumerate(pool.run(8, sums_over_axes, sizes)):
        for name, total in sums.items():
            line = next(g for g in axis_groups(axis_sizes(8, **sizes), name) if rank in g)
            assert total == sum(2.0**r for r in line), name


def sums_over_made_axes(order: str) -> list[tuple[float, tuple[int, ...]]]:
    mesh = Mesh("cpu", Ledger(), 30.0, order, cp=4, dp=2)
    axes = [
        *mesh["cp"].split(2),
        *mesh["cp"].split(1),
        *mesh["cp"].split(4),
        mesh.joined("dp", "cp"),
        mesh.joined("tp", "dp"),
    ]
    with pytest.raises(ValueError, match="4 ranks cannot be split into groups of 3; use a divisor of 4"):
        mesh["cp"].split(3)
    assert all(axis.ranks[axis.index] == dist.get_rank() for axis in axes)
    return [(comm.all_reduce(torch.tensor([2.0 ** dist.get_rank()]), axis).item(), axis.ranks) for axis in axes]


def test_axes_are_split_and_joined(pool: Pool) -> None:
    for rank, found in enumerate(pool.run(8, sums_over_made_axes, "tp-cp-ep-dp-pp")):
        first, place = rank // 4 * 4, rank % 4
        pair, pairs = first + place // 2 * 2, first + place % 2
        whole = range(first, first + 4)
        lines = [(pair, pair + 1), (pairs, pairs + 2), (rank,), whole, whole, (rank,), range(8), (place, place + 4)]
        assert found == [(sum(2.0**r for r in line), (*line,)) for line in lines]
    for rank, found in enumerate(pool.run(8, sums_over_made_axes, "tp-dp-ep-cp-pp")):
        other, pair = rank % 2, rank // 4 * 4
        assert found[0][1] == (pair + other, pair + other + 2)
        assert found[1][1] == tuple(sorted((rank, (rank + 4) % 8)))
        assert found[6] == (255.0, tuple(range(8)))


# ---- Collectives: result, and what the ledger counted


def world() -> Axis:
    return Mesh("cpu", Ledger(), 30.0, tp=dist.get_world_size())["tp"]


def collectives_over_gloo() -> tuple[dict[str, Tensor], dict[str, tuple[int, float, float]]]:
    with far():
        return collectives()


def collectives() -> tuple[dict[str, Tensor], dict[str, tuple[int, float, float]]]:
    axis = world()
    n, r = axis.size, axis.index
    x = (torch.arange(12.0).reshape(4, 3) + 100 * r).double()
    wide = torch.arange(2.0 * n).reshape(2, n).T.contiguous() + 100 * r  # (n, 2)
    results = {
        "all_reduce": comm.all_reduce(x.clone(), axis),
        "max": comm.all_reduce(x.clone(), axis, dist.ReduceOp.MAX),
        "gather_rows": comm.all_gather(x, axis),
        "gather_columns": comm.all_gather(x, axis, dim=1),
        "scatter_rows": comm.reduce_scatter(wide, axis),
        "scatter_columns": comm.reduce_scatter(wide.T, axis, dim=1),
        # rank r gives i rows to rank i: rows that say whose they are
        "all_to_all": comm.all_to_all(torch.full((n * (n - 1) // 2, 2), float(r)), axis, list(range(n)), [r] * n),
        "exchange": p2p.exchange(x, axis, n - 1 - r) if r in (0, n - 1) and n > 1 else x,
    }
    return results, {op: (t.messages, t.elements, t.bytes) for (op, _), t in axis.ledger.traffic.items()}


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("call", [collectives, collectives_over_gloo])
def test_collectives(pool: Pool, n: int, call: Callable) -> None:
    xs = [(torch.arange(12.0).reshape(4, 3) + 100 * r).double() for r in range(n)]
    wides = [torch.arange(2.0 * n).reshape(2, n).T + 100 * r for r in range(n)]
    for r, (results, counted) in enumerate(pool.run(n, call)):
        assert (results["all_reduce"] == sum(xs)).all()
        assert (results["max"] == xs[-1]).all()
        assert (results["gather_rows"] == torch.cat(xs)).all()
        assert (results["gather_columns"] == torch.cat(xs, 1)).all()
        assert (results["scatter_rows"] == sum(wides)[r : r + 1]).all()
        assert (results["scatter_columns"] == sum(wides).T[:, r : r + 1]).all()
        expected = torch.arange(n).repeat_interleave(r) if n > 1 else torch.zeros(0)
        assert results["all_to_all"][:, 0].tolist() == expected.tolist()
        if n == 1:
            assert counted == {}, "nothing is sent where there is nobody else"
            continue
        assert (results["exchange"] == xs[n - 1 - r if r in (0, n - 1) else r]).all()
        ring = (n - 1) / n
        sent = n * (n - 1) // 2 - r  # rows to others
        assert counted["all-reduce"] == pytest.approx((2, 2 * 2 * ring * 12, 2 * 2 * ring * 12 * 8))
        assert counted["all-gather"] == pytest.approx((2, 2 * ring * 12 * n, 2 * ring * 12 * n * 8))
        assert counted["reduce-scatter"] == pytest.approx((2, 2 * ring * 2 * n, 2 * ring * 2 * n * 4))
        assert counted["all-to-all"] == (1, sent * 2, sent * 2 * 4)
        assert counted.get("exchange") == ((1, 12, 12 * 8) if r in (0, n - 1) else None)


# ---- The autograd pairs: against the same computation in one process


def region(pair: str) -> tuple[Tensor, Tensor, Tensor]:
    """Each rank's y = region(x) and the gradients of sum(w y) w.r.t. x, with x and w as the pair expects them."""
    axis = world()
    whole = torch.arange(24.0, dtype=torch.float64).reshape(2, 4, 3).sin()
    shared = pair in ("copy_to", "split_to")
    own = whole if shared else whole * (axis.index + 1)
    x = own.clone().requires_grad_()
    call = getattr(comm, pair)
    y = call(x, axis) if pair in ("copy_to", "reduce_from") else call(x, axis, 1)
    alike = pair in ("reduce_from", "gather_from")  # a result that all ranks use in the same way
    w = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape).cos() * (1 if alike else axis.index + 2)
    y.backward(w)
    return y.detach(), w, x.grad


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("pair", ["copy_to", "reduce_from", "split_to", "gather_from", "gather_for", "scatter_from"])
def test_autograd_pairs(pool: Pool, pair: str, n: int) -> None:
    whole = torch.arange(24.0, dtype=torch.float64).reshape(2, 4, 3).sin()
    results = pool.run(n, region, pair)
    shared = pair in ("copy_to", "split_to")
    xs = [whole.clone().requires_grad_()] * n if shared else [(whole * (r + 1)).requires_grad_() for r in range(n)]
    match pair:
        case "copy_to":
            ys = xs
        case "split_to":
            ys = [part.contiguous() for part in xs[0].chunk(n, 1)]
        case "reduce_from":
            ys = [sum(xs)] * n
        case "scatter_from":
            ys = [part.contiguous() for part in sum(xs).chunk(n, 1)]
        case "gather_from" | "gather_for":
            ys = [torch.cat(xs, 1)] * n
    alike = pair in ("reduce_from", "gather_from")
    weights = [w for _, w, _ in results]
    for x in dict.fromkeys(xs):
        x.retain_grad()
    total = (ys[0] * weights[0]).sum() if alike else sum((y * w).sum() for y, w in zip(ys, weights, strict=True))
    total.backward()
    for (y, _, gradient), expected, x in zip(results, ys, xs, strict=True):
        assert torch.allclose(y, expected, rtol=1e-14, atol=1e-14)
        assert torch.allclose(gradient, x.grad, rtol=1e-14, atol=1e-14)


def reuse_of_a_gradient() -> Tensor:
    """The gradient that enters copy_to's backward is used elsewhere too: the all-reduce must not write to it."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = comm.copy_to(x, world())
    (y + x).backward(torch.full((3,), 2.0, dtype=torch.float64))
    return x.grad


def test_backward_does_not_overwrite(pool: Pool) -> None:
    assert pool.run(3, reuse_of_a_gradient)[0].tolist() == [3 * 2.0 + 2.0] * 3


def a_peer_is_silent() -> str:
    axis = Mesh("cpu", Ledger(), 2.0, tp=2, dp=dist.get_world_size() // 2)["tp"]
    said = ""
    if axis.index == 0:
        began = time.monotonic()
        arrive = p2p.PointToPoint(axis, [], torch.device("cpu")).receive(torch.empty(1), 1, "F", 0)
        with pytest.raises(PeerError) as error:
            arrive()
        said = f"{error.value} after {time.monotonic() - began:.0f} s"
    return said  # a worker's last barrier keeps the silent ones


def test_a_wait_ends_with_the_axis_timeout_and_names_the_peer(pool: Pool) -> None:
    said = pool.run(4, a_peer_is_silent)
    assert said[0].startswith("receive (F) from rank 1 failed: timed out")
    assert said[2].startswith("receive (F) from rank 3 failed: timed out")
    assert "after 2 s" in said[0]


class Broken:
    """A message whose sending ends with an error that nobody expected."""

    def wait(self, timeout: object) -> None:
        raise KeyError("unexpected")


def a_send_that_breaks() -> None:
    with far(), patch.object(p2p.dist, "isend", lambda *_: Broken()):
        mail = p2p.PointToPoint(world(), [], torch.device("cpu"))
        mail.send(torch.ones(1), 1, "F", 0)
    with pytest.raises(KeyError, match="unexpected"):
        mail.flush()
    with pytest.raises(KeyError, match="unexpected"):
        mail.send(torch.ones(1), 1, "F", 0)


def test_a_failed_send_is_told_and_does_not_hang(pool: Pool) -> None:
    pool.run(2, a_send_that_breaks, timeout=20)


def pipelines_of_both_worlds() -> None:
    Mesh("cpu", Ledger(), 30.0, order="tp-cp-pp-ep-dp", tp=2, dp=2, pp=2, ep=2)


def test_an_order_that_puts_experts_across_stages_is_refused(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="--order tp-cp-pp-ep-dp: pp must be the same in both worlds"):
        pool.run(8, pipelines_of_both_worlds)


def a_message_one_way_and_one_that_does_not_come() -> tuple[list[float], int, float]:
    axis = Mesh("cpu", Ledger(), 2.0, tp=2, dp=2)["tp"]  # a group of its own, which the timeout closes
    x = torch.arange(3.0) if axis.index == 0 else torch.zeros(3)
    if axis.index == 0:
        p2p.send(x, axis, 1)
        time.sleep(4)
    else:
        assert p2p.receive(x, axis, 0) is x
        with pytest.raises(PeerError, match=f"receive from rank {axis.ranks[0]} failed: timed out"):
            p2p.receive(x.clone(), axis, 0)
    sent = axis.ledger.traffic["send", "tp"]
    return x.tolist(), sent.messages, sent.bytes


def test_a_message_one_way(pool: Pool) -> None:
    results = pool.run(4, a_message_one_way_and_one_that_does_not_come)
    assert results == [([0, 1, 2], 1, 12), ([0, 1, 2], 0, 0)] * 2


# ---- Directly, as messages


def sums_and_gathers() -> list[list[float]]:
    """Gathers in flight, among them sums of every size; then all that is in flight, in an order of each rank's own."""
    axis = Mesh("cpu", Ledger(), 10.0, dp=dist.get_world_size())["dp"]
    generator, found = torch.Generator().manual_seed(7), []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        close = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        flying = []
        for size in (0, 1, 2, 5, 64, 1000):
            x = torch.randn(axis.size, size, generator=generator).mul(8).to(dtype)
            own = torch.where(torch.arange(axis.size)[:, None] == axis.index, x, 0)
            flying.append((comm.all_gather_async(x[axis.index], axis), x.flatten()))
            flying.append((comm.all_gather_in_place_async(own, axis), x))
            flying.append((comm.all_reduce_async(x[axis.index].clone(), axis), x.sum(0)))
            summed = comm.all_reduce(x[axis.index].clone(), axis)
            torch.testing.assert_close(summed, x.sum(0), **close)
            found.append(summed.double().tolist())
            largest = comm.all_reduce(x[axis.index].clone(), axis, dist.ReduceOp.MAX)
            torch.testing.assert_close(largest, x.amax(0), rtol=0, atol=0)
        order = torch.randperm(len(flying), generator=torch.Generator().manual_seed(axis.index)).tolist()
        for pending, right in (flying[i] for i in [*order, *order]):  # each twice
            torch.testing.assert_close(pending.wait(), right, **close)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("way", ["sums_and_gathers", "in_two_turns", "over_gloo"])
def test_sums_and_gathers(pool: Pool, way: str, ranks: int) -> None:
    first, *others = pool.run(ranks, globals()[way])
    assert all(other == first for other in others), "all ranks have the same bits"


def always_in_two_turns() -> list[list[float]]:
    right = direct.all_reduce
    with patch.object(direct, "all_reduce", lambda x, op, axis, near, _: right(x, op, axis, near, True)):
        return in_two_turns()


def without_an_own_part() -> list[list[float]]:
    right = direct._reduce
    with patch.object(direct, "_reduce", lambda come, mine, *more: right(come, torch.zeros_like(mine), *more)):
        return sums_and_gathers()


def in_two_turns() -> list[list[float]]:
    with patch.object(direct, "IN_TWO", 0):
        return sums_and_gathers()


def over_gloo() -> list[list[float]]:
    with far():
        return sums_and_gathers()


@pytest.mark.parametrize("wrong", [always_in_two_turns, without_an_own_part])
def test_wrong_direct_sums_are_seen(pool: Pool, wrong: Callable) -> None:
    """Sums in flight that go on only when all ranks wait for them; a part left out."""
    with pytest.raises(WorkerError):
        pool.run(3, wrong, timeout=20)
