"""Lecture 03, ranks: what is shown and claimed of the groups, by calculation and by communication, and refused."""

from collections import defaultdict
from collections.abc import Mapping
from math import nan
from textwrap import fill

import torch
from tabulate import tabulate

from core import comm, p2p
from core.ledger import Ledger
from core.mesh import ORDER, Mesh, axis_groups, axis_names, is_expert
from core.proof.figures import Figure, together
from core.proof.lesson import Run
from core.proof.plot import picture
from core.proof.rulebook import axis
from core.proof.rules import Rule

Groups = list[list[int]]
AXES = ("tp", "cp", "pp", "ep", "etp")  # with a flag each; dp and edp follow
# The slide: 16 ranks, tp 4 x dp 2 x pp 2, and over the same ranks etp 1 x ep 4 x edp 2 x pp 2.
IN_FOURS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
FOUR_APART = [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
EIGHT_APART = [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]]
SLIDE_GROUPS = {"tp": IN_FOURS, "dp": FOUR_APART, "pp": EIGHT_APART, "ep": IN_FOURS, "edp": FOUR_APART}
SHOWN = 8  # groups of a kind in the table
LARGEST = 2**16  # ranks


# ---- What is shown ---------------------------------------------------------------------------------------------------


def text(group: list[int]) -> str:
    """A group in brackets: [0-3], [0,4], or [0,8,..,120] where there are many."""
    if len(group) > 2 and group == list(range(group[0], group[-1] + 1)):
        return f"[{group[0]}-{group[-1]}]"
    return f"[{','.join(map(str, group if len(group) <= 8 else [*group[:4], '..', group[-1]]))}]"


def show(
    run: Run, sizes: dict[str, int], order: str, strides: Mapping[str, dict[str, int]], groups: dict[str, Groups],
    together: dict[str, str],
) -> None:  # fmt: skip
    """The axes with their strides, the ranks with their indices, and the groups of every kind with their masks.

    Args:
        strides: of "dense" and of "experts" layers, by axis, the fastest varying first.
        together: what the ranks of each kind of group do.
    """
    world = sum(map(len, groups["tp"]))
    run.say(f"{world} ranks in the order {order}, the leftmost axis varies fastest\n")
    for layers, stride in strides.items():
        rows = [("size", *(sizes[n] for n in stride)), ("stride: the product of the sizes before", *stride.values())]
        run.say(tabulate(rows, (layers, *stride)) + "\n")
    if world <= 32:
        both = [coordinates(r, sizes, order, expert=False) | coordinates(r, sizes, order, expert=True)
                for r in range(world)]  # fmt: skip
        run.say(tabulate([(n, *(index[n] for index in both)) for n in both[0]], ("rank", *range(world))) + "\n")
    rows = []
    for kind, found in groups.items():
        axes = strides["experts" if is_expert(kind) else "dense"]
        mask = "" if kind == "embedding" else "".join("x" if n in kind.split("-") else "." for n in axes)
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        rows.append((kind, mask, len(found), fill(" ".join(map(text, found[:SHOWN])) + more, 56), together[kind]))
    run.say(tabulate(rows, ("kind", "mask", "groups", "ranks of each", "do together"), disable_numparse=True) + "\n")


MOST_RANKS = 256  # that a page shows
ZH = {
    "tp": "同一层，各有一片", "cp": "同一序列，各有一段", "dp": "不同样本：梯度求和", "pp": "同一模型，各有若干层",
    "dp-cp": "不同 token：稠密梯度求和的全部 rank", "tp-cp": "同一阶段中的相同样本",
    "tp-dp": "同一阶段中其他序列的一片",
    "tp-pp": "模型的一个副本（cp 除外）", "tp-dp-cp": "同一阶段中整批的全部 token",
    "embedding": "流水线两端：共享的词嵌入", "ep": "同一专家层，各有若干专家", "etp": "同一专家，各有一片",
    "edp": "同一专家的副本：梯度求和", "etp-ep": "一个完整的专家层", "etp-ep-pp": "全部专家的一个副本",
}  # fmt: skip


def lit(order: str, groups: dict[str, Groups], kinds: Mapping[str, str]) -> Figure:
    """The groups of every kind, of which those of a chosen rank are lit up; of the first ranks, where there are many.

    Args:
        kinds: what the ranks of a group do together.
    """
    world = min(MOST_RANKS, sum(map(len, groups["tp"])))
    shown = {
        kind: ((kinds[kind], ZH[kind]), [g for group in found if (g := [r for r in group if r < world])])
        for kind, found in groups.items()
    }
    title = f"Who works together with a rank, in the order {order}", f"某个 rank 与谁一起工作，顺序 {order}"
    return together(title, world, shown)


def draw(path: str, groups: dict[str, Groups]) -> None:
    """A row for each kind, a column for each rank; one colour is one group."""
    world, colours = sum(map(len, groups["tp"])), []
    for found in groups.values():
        number = {rank: i / len(found) for i, group in enumerate(found) for rank in group}
        colours.append([number.get(rank, nan) for rank in range(world)])
    with picture(path, 2 + 0.25 * min(world, 128), 4) as axes:
        axes.imshow(colours, aspect="auto", cmap="tab20")
        axes.set(title="Groups: the ranks of one colour in a row", xlabel="rank")
        axes.set_yticks(range(len(groups)), groups)


# ---- What is claimed -------------------------------------------------------------------------------------------------


def coordinates(rank: int, sizes: dict[str, int], order: str, *, expert: bool) -> dict[str, int]:
    """The rank's index on each axis, the fastest varying first: its digits, each with a base of its own."""
    index = {}
    for name in axis_names(order, expert=expert):
        rank, index[name] = divmod(rank, sizes[name])
    return index


def by_definition(sizes: dict[str, int], kind: str, order: str = ORDER) -> Groups:
    """The same groups without strides: together are ranks whose indices differ on the axes of the kind only."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    masked = ["pp"] if kind == "embedding" else kind.split("-")
    for rank in range(sizes["tp"] * sizes["cp"] * sizes["dp"] * sizes["pp"]):
        index = coordinates(rank, sizes, order, expert=is_expert("-".join(masked)))
        if kind != "embedding" or index["pp"] in (0, sizes["pp"] - 1):
            found[tuple(i for name, i in index.items() if name not in masked)].append(rank)
    return list(found.values())


def alike(found: Groups, expected: Groups) -> int:
    """How many groups are as expected, less those too many or missing."""
    return sum(a == b for a, b in zip(found, expected, strict=False)) - abs(len(found) - len(expected))


def claim_slide(run: Run, groups: dict[str, Groups]) -> None:
    for kind, expected in SLIDE_GROUPS.items():
        right = alike(groups[kind], expected)
        run.evidence.claim(
            f"the slide's {kind} groups of 16 ranks", " ".join(map(text, expected)), len(expected), right
        )


def claim_groups(run: Run, sizes: dict[str, int], order: str, groups: dict[str, Groups]) -> None:
    defined = {kind: by_definition(sizes, kind, order) for kind in groups}
    run.evidence.each(
        "groups equal to their definition, by kind",
        "together are ranks that differ on the masked axes only: " + " ".join(str(len(d)) for d in defined.values()),
        [(f"{kind}: by definition", len(d), alike(groups[kind], d)) for kind, d in defined.items()],
    )
    n, same = len(defined["pp"]), alike(axis_groups(sizes, "pp", order, expert=True), defined["pp"])
    run.evidence.claim("pipelines of the expert world", f"the {n} of the dense world", n, same)
    kinds = [kind for kind in groups if kind != "embedding"]
    run.evidence.each(
        "groups of core/mesh.py equal to those of this script, by kind",
        "all of " + " ".join(str(len(groups[kind])) for kind in kinds),
        [(f"{kind}: core/mesh.py", len(groups[kind]), alike(axis_groups(sizes, kind, order), groups[kind]))
         for kind in kinds],
        correctness=True,
    )  # fmt: skip


def took_part(run: Run, mesh: Mesh, kind: str) -> list[int]:
    """The ranks whose contribution reached this one through the axes of `kind`."""
    mine = torch.zeros(run.job.world_size, dtype=torch.float64, device=run.job.device)
    mine[run.job.rank] = 1.0
    if kind == "embedding":
        pp = mesh["pp"]
        if pp.size > 1 and pp.index in (0, pp.size - 1):
            mine += p2p.exchange(mine, pp, pp.size - 1 - pp.index)
    else:
        for name in kind.split("-"):  # sums over one axis after the other are the sum over the group of both
            mine = comm.all_reduce(mine, mesh[name])
    return [rank for rank, times in enumerate(mine.tolist()) for _ in range(int(times))]


def claim_communication(run: Run, sizes: dict[str, int], order: str, groups: dict[str, Groups]) -> None:
    """Every rank sends its own number into every group that it is in, and sees whose numbers come out."""
    n, cases = run.job.world_size, []
    given = {name: sizes[name] for name in ("tp", "cp", "dp", "pp", "ep", "etp")}
    mesh = Mesh(run.job.device.type, Ledger(), run.job.timeout, order, **given)
    everyone = run.job.gather({kind: took_part(run, mesh, kind) for kind in groups})
    for kind, found in groups.items() if everyone else ():
        group_of = {rank: group for group in found for rank in group}
        right = sum(of_rank[kind] == group_of.get(rank, [rank]) for rank, of_rank in enumerate(everyone))
        cases.append((f"{kind}: by communication", n, right))
    run.evidence.each("ranks that an all-reduce brought together with just their group, by kind", f"all {n}", cases)


# ---- What is refused -------------------------------------------------------------------------------------------------


RULES = (  # of a case: world; ranks, those running; the sizes of AXES; model: tp x cp x pp; given: sizes by flags
    Rule("world", "--world {world}", lambda case: 1 <= case.world <= LARGEST, f"must be in [1, {LARGEST}]",
         lambda case: "--world 16"),
    Rule("running", "--world {world}", lambda case: case.ranks in (1, case.world),
         "{ranks} ranks are running; leave --world out, or run without torchrun"),
    *map(axis, AXES),
    Rule("dp", "--tp x --cp x --pp = {model}", lambda case: case.world % case.model == 0,
         "must divide the {world} ranks, so that the rest is dp",
         lambda case: " ".join(f"--{name} 1" for name in case.given)),
)  # fmt: skip
