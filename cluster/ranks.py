"""Lecture 03: which ranks work together (大模型并行与 GPU 集群配置). Megatron-LM's order string, and all that follows.

    python cluster/ranks.py --world 16 --tp 4 --pp 2 --ep 4
    torchrun --nproc_per_node=8 cluster/ranks.py --tp 2 --cp 2 --pp 2 --ep 4

A rank is a number, and its places on the axes are the digits of that number. The order string says which digit varies
fastest, so which axis has neighbouring ranks and with them the fastest links. From it follow the strides (the products
of the sizes before), and from a mask over the axes every kind of group: `axis_groups` in core/mesh.py is that slide.
Expert layers divide the same ranks another way: dense world = tp x cp x dp x pp, expert world = etp x ep x edp x pp.

Alone it calculates, for any number of ranks. With torchrun every group is also found by communication: what a rank
gets from an all-reduce shows who took part in it.
"""

import argparse
import json
import sys
from collections import defaultdict
from math import nan, prod
from textwrap import fill

import torch
from tabulate import tabulate

from core import comm, p2p
from core.ledger import Ledger
from core.mesh import ORDER, Mesh, axis_groups, axis_names, axis_sizes, check_pipelines, is_expert
from core.proof.files import check_writable, write_file
from core.proof.lesson import Lesson, Run
from core.proof.plot import picture

Groups = list[list[int]]
KINDS = {  # what its ranks do together
    "tp": "one layer, each a part of it",
    "cp": "one sequence, each a part of it",
    "dp": "other samples, whose gradients are summed",
    "pp": "one model, each some of its layers",
    "dp-cp": "other tokens: all who sum a dense gradient",
    "tp-cp": "the same samples in one stage",
    "tp-dp": "the same places of other sequences in one stage",
    "tp-pp": "one copy of the model, for one part of the sequence",
    "tp-dp-cp": "all tokens of the batch in one stage",
    "embedding": "first and last stage, whose copies of the embedding are summed",
    "ep": "one layer of experts, each some of them",
    "etp": "one expert, each a part of it",
    "edp": "copies of one expert, whose gradients are summed",
    "etp-ep": "one layer of experts, all of it",
    "etp-ep-pp": "one copy of all experts",
}
# The slide: 16 ranks, tp 4 x dp 2 x pp 2, and over the same ranks etp 1 x ep 4 x edp 2 x pp 2.
SLIDE = {"tp": 4, "cp": 1, "pp": 2, "ep": 4, "etp": 1}
IN_FOURS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
FOUR_APART = [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
EIGHT_APART = [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]]
SLIDE_GROUPS = {"tp": IN_FOURS, "dp": FOUR_APART, "pp": EIGHT_APART, "ep": IN_FOURS, "edp": FOUR_APART}
SHOWN = 8  # groups of a kind in the table
LARGEST = 2**16  # ranks


def ranks_in(sizes: dict[str, int]) -> int:
    return sizes["tp"] * sizes["cp"] * sizes["dp"] * sizes["pp"]


def groups_of(sizes: dict[str, int], kind: str, order: str = ORDER) -> Groups:
    """All groups of one of KINDS, by the arithmetic of the slide."""
    if kind != "embedding":
        return axis_groups(sizes, kind, order)
    return [sorted({pipeline[0], pipeline[-1]}) for pipeline in axis_groups(sizes, "pp", order)]


def places(rank: int, sizes: dict[str, int], order: str, *, expert: bool) -> dict[str, int]:
    """The rank's place on each axis, the fastest varying first: its digits, each with a base of its own."""
    found = {}
    for name in axis_names(order, expert=expert):
        rank, found[name] = divmod(rank, sizes[name])
    return found


def by_definition(sizes: dict[str, int], kind: str, order: str = ORDER) -> Groups:
    """The same groups without strides: together are ranks whose places differ on the axes of the kind only."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    masked = {"embedding": "pp"}.get(kind, kind).split("-")
    for rank in range(ranks_in(sizes)):
        place = places(rank, sizes, order, expert=is_expert("-".join(masked)))
        if kind != "embedding" or place["pp"] in (0, sizes["pp"] - 1):
            found[tuple(index for name, index in place.items() if name not in masked)].append(rank)
    return list(found.values())


def alike(found: Groups, expected: Groups) -> int:
    """How many groups are as expected, less those too many or missing."""
    return sum(a == b for a, b in zip(found, expected, strict=False)) - abs(len(found) - len(expected))


# ---- What is shown ---------------------------------------------------------------------------------------------------


def text(group: list[int]) -> str:
    """A group in brackets: [0-3], [0,4], or [0,8,..,120] where there are many."""
    if len(group) > 2 and group == list(range(group[0], group[-1] + 1)):
        return f"[{group[0]}-{group[-1]}]"
    return f"[{','.join(map(str, group if len(group) <= 8 else [*group[:4], '..', group[-1]]))}]"


def show(run: Run, sizes: dict[str, int], order: str) -> None:
    """The axes with their strides, the ranks with their places, and the groups of every kind with their masks."""
    world = ranks_in(sizes)
    run.say(f"{world} ranks in the order {order}, the leftmost axis varies fastest\n")
    for expert in (False, True):
        names = axis_names(order, expert=expert)
        strides = [prod(sizes[n] for n in names[:i]) for i in range(len(names))]
        rows = [("size", *(sizes[n] for n in names)), ("stride: the product of the sizes before", *strides)]
        run.say(tabulate(rows, ("experts" if expert else "dense", *names)) + "\n")
    if world <= 32:
        both = [{**places(r, sizes, order, expert=False), **places(r, sizes, order, expert=True)} for r in range(world)]
        run.say(tabulate([(n, *(p[n] for p in both)) for n in both[0]], ("rank", *range(world))) + "\n")
    rows = []
    for kind, together in KINDS.items():
        groups = groups_of(sizes, kind, order)
        names = axis_names(order, expert=kind != "embedding" and is_expert(kind))
        mask = "" if kind == "embedding" else "".join("x" if n in kind.split("-") else "." for n in names)
        more = f" and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
        rows.append((kind, mask, len(groups), fill(" ".join(map(text, groups[:SHOWN])) + more, 56), together))
    run.say(tabulate(rows, ("kind", "mask", "groups", "ranks of each", "do together"), disable_numparse=True) + "\n")


def draw(path: str, sizes: dict[str, int], order: str) -> None:
    """A row for each kind, a column for each rank; one colour is one group."""
    world, colours = ranks_in(sizes), []
    for kind in KINDS:
        groups = groups_of(sizes, kind, order)
        number = {rank: i / len(groups) for i, group in enumerate(groups) for rank in group}
        colours.append([number.get(rank, nan) for rank in range(world)])
    with picture(path, 2 + 0.25 * min(world, 128), 4) as axes:
        axes.imshow(colours, aspect="auto", cmap="tab20")
        axes.set(title="Groups: the ranks of one colour in a row", xlabel="rank")
        axes.set_yticks(range(len(KINDS)), KINDS)


# ---- What is claimed -------------------------------------------------------------------------------------------------


def claim_groups(run: Run, sizes: dict[str, int], order: str) -> None:
    slide = axis_sizes(16, dp=2, **SLIDE)
    for kind, expected in SLIDE_GROUPS.items():
        found = alike(groups_of(slide, kind), expected)
        run.evidence.claim(
            f"the slide's {kind} groups of 16 ranks", " ".join(map(text, expected)), len(expected), found
        )
    defined = {kind: by_definition(sizes, kind, order) for kind in KINDS}
    counts = " ".join(str(len(groups)) for groups in defined.values())
    run.evidence.each(
        "groups equal to their definition, by kind",
        f"together are ranks that differ on the masked axes only: {counts}",
        [(f"{kind}: by definition", len(d), alike(groups_of(sizes, kind, order), d)) for kind, d in defined.items()],
    )
    n, same = len(defined["pp"]), alike(axis_groups(sizes, "pp", order, expert=True), defined["pp"])
    run.evidence.claim("pipelines of the expert world", f"the {n} of the dense world", n, same)


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


def claim_communication(run: Run, sizes: dict[str, int], order: str) -> None:
    """Every rank sends its own number into every group that it is in, and sees whose numbers come out."""
    n, cases = run.job.world_size, []
    given = {name: sizes[name] for name in ("tp", "cp", "dp", "pp", "ep", "etp")}
    mesh = Mesh(run.job.device.type, Ledger(), run.job.timeout, order, **given)
    for kind in KINDS:
        everyone = run.job.gather(took_part(run, mesh, kind))
        group_of = {rank: group for group in groups_of(sizes, kind, order) for rank in group}
        right = sum(found == group_of.get(rank, [rank]) for rank, found in enumerate(everyone))
        cases.append((f"{kind}: by communication", n, right))
    run.evidence.each("ranks that an all-reduce brought together with just their group, by kind", f"all {n}", cases)


def lesson(run: Run) -> None:
    sizes, order = layout(run.args, run.job.world_size), run.args.order
    run.mesh = sizes
    if (slide := axis_sizes(16, dp=2, **SLIDE)) != sizes:
        run.say("The slide:")
        show(run, slide, ORDER)
        run.say("This layout:")
    show(run, sizes, order)
    if run.job.rank == 0:
        claim_groups(run, sizes, order)
        if run.args.json:
            groups = {kind: groups_of(sizes, kind, order) for kind in KINDS}
            write_file(run.args.json, json.dumps({"order": order, "sizes": sizes, "groups": groups}))
        if run.args.plot:
            draw(run.args.plot, sizes, order)
    if run.job.world_size > 1:
        claim_communication(run, sizes, order)


# ---- The layout ------------------------------------------------------------------------------------------------------


def layout(args: argparse.Namespace, ranks: int) -> dict[str, int]:
    """All axis sizes. Without flags: of the slide for 16 ranks, and like it for others.

    Raises:
        ValueError: the sizes do not fit the number of ranks or each other.
    """
    world = args.world if args.world is not None else ranks if ranks > 1 else 16
    if not 1 <= world <= LARGEST:
        raise ValueError(f"--world {world}: must be in [1, {LARGEST}]; use --world 16")
    if ranks > 1 and world != ranks:
        raise ValueError(f"--world {world}: {ranks} ranks are running; leave --world out, or run without torchrun")
    given = {name: size for name in SLIDE if (size := getattr(args, name)) is not None}
    if not given:
        pp = 2 if world % 2 == 0 else 1
        tp = next(n for n in (4, 2, 1) if world // pp % (2 * n) == 0 or n == 1)
        given = {"tp": tp, "pp": pp, "ep": tp}
    for name, size in given.items():
        if size < 1:
            raise ValueError(f"--{name} {size}: an axis has at least one rank; use --{name} 1")
    product = given.get("tp", 1) * given.get("cp", 1) * given.get("pp", 1)
    if world % product:
        raise ValueError(
            f"--tp x --cp x --pp = {product}: must divide the {world} ranks, so that the rest is dp; "
            f"use {' '.join(f'--{name} 1' for name in given)}"
        )
    return axis_sizes(world, dp=world // product, **given)


def add_flags(frame: Lesson) -> None:
    flag = frame.parser.add_argument
    flag("--world", type=int, help="ranks (default: those running; alone 16, as on the slide)")
    for axis in SLIDE:
        flag(f"--{axis}", type=int, help="size of the axis (default 1; dp is the rest)")
    flag("--order", default=ORDER, help="leftmost varies fastest (default %(default)s)")
    flag("--json", metavar="FILE.json", help="write the groups of every kind")


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError unless the ranks can be divided so."""
    check_pipelines(layout(args, ranks), args.order)
    if args.json:
        check_writable("--json", args.json)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "03",
        "Parallelism and GPU cluster configuration: ranks",
        "大模型并行与 GPU 集群配置",
        "Which ranks work together on what: the order string, and every kind of group that follows from it.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
