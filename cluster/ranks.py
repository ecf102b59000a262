"""Lecture 03: which ranks work together (大模型并行与 GPU 集群配置). Megatron-LM's order string, and all that follows.

    python cluster/ranks.py --world 16 --tp 4 --pp 2 --ep 4
    torchrun --nproc_per_node=8 cluster/ranks.py --tp 2 --cp 2 --pp 2 --ep 4

read: ranks.py:27-80; then core/mesh.py, evidence/ranks.py

A rank is a number, and its indices on the axes are the digits of that number. The order string says which digit varies
fastest, so which axis has neighbouring ranks and with them the fastest links. Alone the script calculates, for any
number of ranks; `axis_groups` in core/mesh.py, which the other topics use, is held equal to it. With torchrun every
group is also found by communication: the result of an all-reduce shows which ranks took part in it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

from cluster.evidence import ranks as evidence
from core.mesh import ORDER, axis_sizes, check_pipelines
from core.proof.files import check_writable, write_file
from core.proof.lesson import Lesson, Run
from core.proof.rules import check as check_rules

# ---- From the order string to the groups of every kind ---------------------------------------------------------------
#
# Dense layers and expert layers divide the same ranks in two ways:
#   tp x cp x dp x pp = world = etp x ep x edp x pp, so dp = world / (tp x cp x pp) and edp = world / (etp x ep x pp)
# One order string numbers both: tp-cp-ep-dp-pp is tp, cp, dp, pp for dense layers, and etp, ep, edp, pp for experts.

Groups = list[list[int]]
EXPERT = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}  # name in the order string: axis of the expert layers


def axes_of(kind: str, order: str) -> list[str]:
    """The axes that number the ranks for this kind of group, the fastest varying first."""
    if {"etp", "ep", "edp"} & set(kind.split("-")):
        return [EXPERT[name] for name in order.split("-") if name != "cp"]
    return [name for name in order.split("-") if name != "ep"]


def strides(axes: list[str], sizes: dict[str, int]) -> dict[str, int]:
    """How far apart ranks are whose index on an axis differs by 1: the product of the sizes before it."""
    stride, step = {}, 1
    for axis in axes:
        stride[axis] = step
        step *= sizes[axis]
    return stride


def indices(axes: list[str], sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Every combination of indices on these axes, the first axis varying fastest."""
    for slowest_first in product(*(range(sizes[axis]) for axis in reversed(axes))):
        yield dict(zip(axes, reversed(slowest_first), strict=True))


def groups_of(kind: str, sizes: dict[str, int], order: str) -> Groups:
    """All groups of one kind, such as "dp" or "dp-cp": ranks whose indices differ on the axes of the kind only.

    The kind is a mask over the axes. Under the mask the index runs inside a group, elsewhere it says which group.
    """
    axes = axes_of(kind, order)
    stride = strides(axes, sizes)
    masked = [axis for axis in axes if axis in kind.split("-")]
    others = [axis for axis in axes if axis not in masked]
    groups = []
    for fixed in indices(others, sizes):
        group = []
        for running in indices(masked, sizes):
            index = fixed | running
            group.append(sum(index[axis] * stride[axis] for axis in axes))
        groups.append(group)
    return groups


def embedding_groups(sizes: dict[str, int], order: str) -> Groups:
    """First and last stage of every pipeline: both have the tied embedding and sum its gradients."""
    return [sorted({pipeline[0], pipeline[-1]}) for pipeline in groups_of("pp", sizes, order)]


# ---- The lesson ------------------------------------------------------------------------------------------------------

KINDS = {  # what the ranks of a group do together
    "tp": "one layer, a shard of it each",
    "cp": "one sequence, a shard of it each",
    "dp": "other samples: gradients are summed",
    "pp": "one model, some of its layers each",
    "dp-cp": "other tokens: all that sum a dense gradient",
    "tp-cp": "the same samples in one stage",
    "tp-dp": "one shard of other sequences in one stage",
    "tp-pp": "one replica of the model, but for cp",
    "tp-dp-cp": "all tokens of the batch in one stage",
    "embedding": "both ends of a pipeline: the tied embedding",
    "ep": "one layer of experts, some of them each",
    "etp": "one expert, a shard of it each",
    "edp": "replicas of one expert: its gradients summed",
    "etp-ep": "one full layer of experts",
    "etp-ep-pp": "one replica of all experts",
}
SLIDE = axis_sizes(16, tp=4, dp=2, pp=2, ep=4)


def all_groups(sizes: dict[str, int], order: str) -> dict[str, Groups]:
    """The groups of all KINDS."""
    return {
        kind: embedding_groups(sizes, order) if kind == "embedding" else groups_of(kind, sizes, order) for kind in KINDS
    }


def show(run: Run, title: str, sizes: dict[str, int], order: str, groups: dict[str, Groups]) -> None:
    run.say(title)
    numbered = {"dense": strides(axes_of("dp", order), sizes), "experts": strides(axes_of("edp", order), sizes)}
    evidence.show(run, sizes, order, numbered, groups, KINDS)


def lesson(run: Run) -> None:
    sizes, order = layout(run.args, run.job.world_size), run.args.order
    groups, of_slide = all_groups(sizes, order), all_groups(SLIDE, ORDER)
    run.mesh = sizes
    if sizes != SLIDE:
        show(run, "The slide:", SLIDE, ORDER, of_slide)
    show(run, "These ranks:", sizes, order, groups)
    if run.job.rank == 0:
        evidence.claim_slide(run, of_slide)
        evidence.claim_groups(run, sizes, order, groups)
        if run.args.json:
            write_file(run.args.json, json.dumps({"order": order, "sizes": sizes, "groups": groups}))
        run.draw(evidence.lit(order, groups, KINDS))
        if run.args.plot:
            evidence.draw(run.args.plot, groups)
    if run.job.world_size > 1:
        evidence.claim_communication(run, sizes, order, groups)


def layout(args: argparse.Namespace, ranks: int) -> dict[str, int]:
    """The sizes of all axes. Without flags those of the slide for 16 ranks, and similar ones for others.

    Raises:
        ValueError: the sizes do not fit the number of ranks or each other.
    """
    world = args.world if args.world is not None else ranks if ranks > 1 else 16
    given = {name: size for name in evidence.AXES if (size := getattr(args, name)) is not None}
    if not given:
        pp = 2 if world % 2 == 0 else 1
        tp = next(n for n in (4, 2, 1) if world // pp % (2 * n) == 0 or n == 1)
        given = {"tp": tp, "pp": pp, "ep": tp}
    sizes = dict.fromkeys(evidence.AXES, 1) | given
    model = sizes["tp"] * sizes["cp"] * sizes["pp"]
    check_rules(SimpleNamespace(world=world, ranks=ranks, model=model, given=given, **sizes), evidence.RULES)
    return axis_sizes(world, dp=world // model, **given)


def add_flags(frame: Lesson) -> None:
    flag = frame.parser.add_argument
    flag("--world", type=int, help="ranks (default: those running; alone 16, as on the slide)")
    for axis in evidence.AXES:
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
