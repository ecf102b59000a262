"""Lecture 03: the groups of ranks, against the slide, Megatron-LM and their definition; what is refused; and bugs."""

import itertools
import json
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import core.mesh
from cluster import ranks
from cluster.evidence import ranks as evidence
from cluster.evidence.ranks import by_definition, coordinates
from cluster.ranks import KINDS, SLIDE, all_groups, groups_of
from core import comm
from core.mesh import ORDER, axis_groups, axis_sizes, check_pipelines, is_expert
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from tests.pool import Pool

SCRIPT = "cluster/ranks.py"
ORDERS = ["-".join(order) for order in itertools.permutations(ORDER.split("-"))]
PIPELINES_LAST = [order for order in ORDERS if order.endswith("pp")]


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int]:
    """Any sizes, with any division of the same ranks for the experts."""
    size = st.integers(1, 4)
    sizes = {name: draw(size) for name in ("tp", "cp", "dp", "pp")}
    share = sizes["tp"] * sizes["cp"] * sizes["dp"]
    etp = draw(st.sampled_from([n for n in range(1, share + 1) if share % n == 0]))
    ep = draw(st.sampled_from([n for n in range(1, share // etp + 1) if share // etp % n == 0]))
    return axis_sizes(prod(sizes.values()), **sizes, ep=ep, etp=etp)


# ---- The arithmetic


@settings(deadline=None)
@given(layouts(), st.sampled_from(ORDERS))
def test_groups_are_what_they_are_defined_to_be(sizes: dict[str, int], order: str) -> None:
    world = prod(sizes[name] for name in ("tp", "cp", "dp", "pp"))
    for kind, groups in all_groups(sizes, order).items():
        assert groups == by_definition(sizes, kind, order), kind
        assert kind == "embedding" or groups == axis_groups(sizes, kind, order), kind
        inside = sorted(itertools.chain(*groups))
        assert len(set(inside)) == len(inside), f"{kind}: a rank is in two groups"
        if kind == "embedding":
            assert len(inside) == world // sizes["pp"] * min(2, sizes["pp"])
        else:
            assert inside == list(range(world))
            assert {len(group) for group in groups} == {prod(sizes[name] for name in kind.split("-"))}


@settings(deadline=None)
@given(layouts(), st.sampled_from(ORDERS), st.booleans())
def test_indices_are_the_digits_of_a_rank(sizes: dict[str, int], order: str, expert: bool) -> None:
    seen, world = set(), prod(sizes[name] for name in ("tp", "cp", "dp", "pp"))
    for rank in range(world):
        coordinate, stride, total = coordinates(rank, sizes, order, expert=expert), 1, 0
        for name, index in coordinate.items():
            assert 0 <= index < sizes[name]
            total += index * stride
            stride *= sizes[name]
        assert total == rank
        seen.add(tuple(coordinate.values()))
    assert len(seen) == world


@settings(deadline=None)
@given(layouts(), st.sampled_from(ORDERS))
def test_both_worlds_have_the_same_pipelines_or_the_order_is_refused(sizes: dict[str, int], order: str) -> None:
    same = axis_groups(sizes, "pp", order) == axis_groups(sizes, "pp", order, expert=True)
    assert same or not order.endswith("pp")
    if same:
        check_pipelines(sizes, order)
    else:
        with pytest.raises(ValueError, match="pp must be the same in both worlds"):
            check_pipelines(sizes, order)


def test_the_figures_of_the_slide_and_of_megatron() -> None:
    for kind, expected in evidence.SLIDE_GROUPS.items():
        assert groups_of(kind, SLIDE, ORDER) == expected
    # The docstring of Megatron's initialize_model_parallel: 16 GPUs, tp 2, pp 4.
    groups = all_groups(axis_sizes(16, tp=2, dp=2, pp=4), ORDER)
    assert groups["tp"] == [[n, n + 1] for n in range(0, 16, 2)]
    assert groups["dp"] == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert groups["pp"] == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert groups["embedding"] == [[0, 12], [1, 13], [2, 14], [3, 15]]
    one_stage = all_groups(axis_sizes(4, tp=4), ORDER)["embedding"]
    assert one_stage == [[0], [1], [2], [3]], "one stage is first and last"


def test_a_kind_has_axes_of_one_world() -> None:
    with pytest.raises(AssertionError, match="cp-ep: the axes of one world are etp, ep, edp, pp"):
        axis_groups(axis_sizes(4, cp=2, dp=2, ep=2), "cp-ep")


def test_equal_to_megatron_core() -> None:
    """Over every division of 8, 12 and 16 ranks, with every order that ends in pp."""
    reason = "megatron-core is not installed"
    megatron = pytest.importorskip("megatron.core.parallel_state", reason=reason, exc_type=ImportError)
    compared = 0
    for world, order in itertools.product((8, 12, 16), PIPELINES_LAST):
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        for tp, cp, pp, ep, etp in itertools.product(divisors, divisors, divisors, (1, 2, 4), (1, 2)):
            if world % (tp * cp * pp) or world // pp % (ep * etp):
                continue
            sizes = axis_sizes(world, tp=tp, cp=cp, dp=world // (tp * cp * pp), pp=pp, ep=ep, etp=etp)
            dense = megatron.RankGenerator(tp=tp, ep=1, dp=sizes["dp"], pp=pp, cp=cp, order=order)
            expert = megatron.RankGenerator(tp=etp, ep=ep, dp=sizes["edp"], pp=pp, cp=1, order=order)
            for kind in set(KINDS) - {"embedding"}:
                theirs = (expert if is_expert(kind) else dense).get_ranks(
                    kind.replace("etp", "tp").replace("edp", "dp")
                )
                assert axis_groups(sizes, kind, order) == theirs, (sizes, kind, order)
                assert groups_of(kind, sizes, order) == theirs, (sizes, kind, order)
                compared += 1
            first_and_last = [megatron.default_embedding_ranks(pipeline) for pipeline in dense.get_ranks("pp")]
            assert ranks.embedding_groups(sizes, order) == first_and_last
    assert compared > 10_000


# ---- The lesson


def test_the_script(pool: Pool, tmp_path: Path) -> None:
    report, groups, plot = (tmp_path / name for name in ("report.json", "groups.json", "plot.svg"))
    outcome = pool.script(2, SCRIPT, "--report", str(report), "--json", str(groups), "--plot", str(plot))
    assert outcome.codes == [0, 0], outcome.out + outcome.err
    written, found = json.loads(report.read_text()), json.loads(groups.read_text())
    assert len(written["claims"]) == 6 + 3 * len(KINDS) - 1, "core/mesh.py has no group for the embedding"
    assert found["sizes"] == written["mesh"]
    assert set(found["groups"]) == set(KINDS)
    assert found["groups"]["tp"] == axis_groups(found["sizes"], "tp", found["order"])
    assert "[0-3] [4-7] [8-11] [12-15]" in outcome.out
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "flags", [(), ("--world=96", "--tp=4", "--cp=3", "--pp=4", "--ep=6", "--etp=2", "--order=cp-tp-ep-dp-pp")]
)
def test_alone_it_calculates(flags: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    run = Run(arguments(*flags), Job(0, 1, torch.device("cpu"), "gloo", 30.0), POLICIES["float64"])
    ranks.lesson(run)
    assert len(run.evidence.claims) == 6 + 2 * len(KINDS) - 1
    assert all(claim.holds for claim in run.evidence.claims)
    assert "[0-3] [4-7] [8-11] [12-15]" in capsys.readouterr().out


REFUSED = {
    "world": (("--world=0",), "--world 0: must be in [1, 65536]; use --world 16"),
    "sizes": (("--world=15", "--tp=4", "--ep=2"),
              "--tp x --cp x --pp = 4: must divide the 15 ranks, so that the rest is dp; use --tp 1 --ep 1"),
    "negative": (("--tp=-1",), "--tp -1: an axis has at least one rank; use --tp 1"),
    "experts": (("--ep=3",), "--ep 3 --etp 1: ep x etp must divide tp x cp x dp = 16; use --ep 1 --etp 1"),
    "order": (("--order=tp-pp",), "must name each of tp, cp, ep, dp and pp once; use --order tp-cp-ep-dp-pp"),
    "pipelines": (("--tp=2", "--pp=2", "--order=tp-pp-cp-ep-dp"),
                  "--order tp-pp-cp-ep-dp: pp must be the same in both worlds; use --order tp-cp-ep-dp-pp"),
    "file": (("--json=/no/such/place.json",), "--json /no/such/place.json: there is no folder /no/such"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str) -> None:
    flags, hint = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        ranks.check(arguments(*flags), 1)
    assert hint in str(refusal.value)


def test_another_world_than_the_running_one_is_refused() -> None:
    with pytest.raises(ValueError, match="--world 16: 8 ranks are running; leave --world out, or run without torchrun"):
        ranks.check(arguments("--world=16"), 8)


def arguments(*flags: str) -> Namespace:
    frame = Lesson(SCRIPT, "03", "", "", "")
    ranks.add_flags(frame)
    return frame.parser.parse_args(flags)


# ---- The bugs

Bug = Callable[[], AbstractContextManager]


def strides_are_not_products() -> AbstractContextManager:
    """Every axis steps by the size of the one before only."""

    def wrong(axes: list[str], sizes: dict[str, int]) -> dict[str, int]:
        before = [1, *(sizes[axis] for axis in axes)]
        return dict(zip(axes, before, strict=False))

    return patch.object(ranks, "strides", wrong)


def the_first_index_varies_slowest() -> AbstractContextManager:
    """The groups are right, but in another order than Megatron's, and so are the ranks of a group of two axes."""
    right = ranks.indices
    return patch.object(ranks, "indices", lambda axes, sizes: right(axes[::-1], sizes))


def neighbours_differ_in_dp() -> AbstractContextManager:
    """In the mesh that communicates: within a stage the array of ranks has its axes the wrong way round."""
    right = core.mesh.DeviceMesh

    def wrong(device: str, array: Tensor, mesh_dim_names: tuple[str, ...]) -> object:
        stages, *shape = array.shape
        pp, *names = mesh_dim_names
        return right(device, array.reshape(stages, *shape[::-1]), mesh_dim_names=(pp, *names[::-1]))

    return patch.object(core.mesh, "DeviceMesh", wrong)


def experts_are_divided_like_the_dense() -> AbstractContextManager:
    """ep is what dp is, as if every expert were sharded over the full tp as well."""
    right, dense = ranks.groups_of, {"ep": "dp", "edp": "cp", "etp": "tp"}
    return patch.object(ranks, "groups_of", lambda kind, *sizes: right(dense.get(kind, kind), *sizes))


def the_mask_is_inverted() -> AbstractContextManager:
    right = ranks.groups_of

    def wrong(kind: str, sizes: dict[str, int], order: str) -> list[list[int]]:
        return right("-".join(n for n in ranks.axes_of(kind, order) if n not in kind.split("-")), sizes, order)

    return patch.object(ranks, "groups_of", wrong)


def the_second_stage_gets_the_head() -> AbstractContextManager:
    right = ranks.groups_of
    return patch.object(ranks, "embedding_groups", lambda *sizes: [stages[:2] for stages in right("pp", *sizes)])


def the_library_swaps_tp_and_dp() -> AbstractContextManager:
    right, swapped = evidence.axis_groups, {"tp": "dp", "dp": "tp"}

    def wrong(sizes: dict[str, int], kind: str, *more: str, **which: bool) -> list[list[int]]:
        return right(sizes, swapped.get(kind, kind), *more, **which)

    return patch.object(evidence, "axis_groups", wrong)


def the_group_of_both_axes_is_that_of_the_last() -> AbstractContextManager:
    right = evidence.took_part
    return patch.object(evidence, "took_part", lambda run, mesh, kind: right(run, mesh, kind.split("-")[-1]))


def an_all_reduce_is_left_out() -> AbstractContextManager:
    right = comm.all_reduce
    return patch.object(comm, "all_reduce", lambda x, axis, *op: x if axis.name == "edp" else right(x, axis, *op))


DEFINED = {kind: f"{kind}: by definition" for kind in KINDS}
MET = {kind: f"{kind}: by communication" for kind in KINDS}
LIBRARY = {kind: f"{kind}: core/mesh.py" for kind in KINDS}
MUST_FAIL = {
    strides_are_not_products: {DEFINED["pp"], MET["pp"], DEFINED["edp"], "the slide's pp", LIBRARY["pp"]},
    the_first_index_varies_slowest: {DEFINED["dp"], LIBRARY["tp-pp"], "the slide's dp"},
    neighbours_differ_in_dp: {MET["tp"], MET["dp"], MET["ep"], MET["edp"]},
    experts_are_divided_like_the_dense: {DEFINED["ep"], MET["ep"], DEFINED["edp"], "the slide's ep", LIBRARY["ep"]},
    the_mask_is_inverted: {DEFINED["tp"], MET["tp"], DEFINED["tp-dp-cp"], MET["ep"], "the slide's dp"},
    the_second_stage_gets_the_head: {DEFINED["embedding"], MET["embedding"]},
    the_library_swaps_tp_and_dp: {LIBRARY["tp"], LIBRARY["dp"]},
    the_group_of_both_axes_is_that_of_the_last: {MET["tp-pp"], MET["tp-cp"], MET["etp-ep-pp"]},
    an_all_reduce_is_left_out: {MET["edp"]},
}
SOUND = [  # layouts in which every claim must hold
    ("--tp=2", "--cp=2", "--pp=2", "--ep=2", "--etp=2"),
    ("--pp=4", "--cp=2", "--order=cp-dp-ep-tp-pp"),
    ("--pp=4", "--cp=2", "--ep=1"),
]


def failing_claims(cases: list[tuple[Bug | None, tuple[str, ...]]]) -> list[list[str]]:
    """Run the lesson inside a worker, with each bug and its flags; the claims that failed, on rank 0."""
    job, failed = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), []
    for bug, flags in cases:
        run = Run(arguments(*flags), job, POLICIES["float64"])
        with bug() if bug else nullcontext():
            ranks.lesson(run)
        failed.append([claim.claim for claim in run.evidence.claims if not claim.holds])
    return failed


@pytest.fixture(scope="module")
def failed(pool: Pool) -> dict[Bug | tuple[str, ...], list[str]]:
    """By bug, or by flags where there is none: the claims that failed on 8 ranks."""
    four_stages = {the_second_stage_gets_the_head: ("--tp=2", "--pp=4", "--ep=2")}
    buggy = [(bug, four_stages.get(bug, ("--tp=2", "--pp=2", "--ep=2"))) for bug in MUST_FAIL]
    found = pool.run(8, failing_claims, [(None, flags) for flags in SOUND] + buggy)[0]
    return dict(zip([*SOUND, *MUST_FAIL], found, strict=True))


@pytest.mark.parametrize("flags", SOUND, ids=" ".join)
def test_without_a_bug_every_claim_holds(failed: dict, flags: tuple[str, ...]) -> None:
    assert failed[flags] == []


def test_any_number_of_ranks(pool: Pool) -> None:
    assert pool.run(6, failing_claims, [(None, ())])[0] == [[]]


@pytest.mark.parametrize("bug", MUST_FAIL, ids=lambda bug: bug.__name__)
def test_the_claims_catch(failed: dict, bug: Bug) -> None:
    missed = {claim for claim in MUST_FAIL[bug] if not any(f.startswith(claim) for f in failed[bug])}
    assert not missed, f"only these failed: {failed[bug]}"
