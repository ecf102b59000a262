"""The plans as a page: time against memory, what bounds the best ones, and the command that starts the first."""

from collections.abc import Sequence

from cluster.planner.hardware import Machine
from cluster.planner.plans import Plan
from core.model.config import ModelConfig
from core.proof.figures import bars, grid, scatter
from core.proof.page.page import assemble

MOST = 400  # plans in the picture, the fastest


def page(
    model: ModelConfig,
    machine: Machine,
    found: Sequence[Plan],
    top: int,
    why: Sequence[str],
    command: str,
    usable: float,
) -> str:
    """Self-contained.

    Args:
        found: the chosen one, then the fastest first.
        top: how many of them are named.
        why: what bounds the best one, and what another choice would cost.
        usable: bytes of a device that a plan may fill.
    """
    points = [
        (f"{i + 1}" if i < top else "", plan.step.seconds, plan.memory.total / 1e9, plan.layout.schedule)
        for i, plan in enumerate(found[:MOST])
    ]
    title = (
        f"The {len(points)} fastest plans that fit: the best {top} are numbered",
        f"放得下的最快的 {len(points)} 个方案，前 {top} 名标有序号",
    )
    axes = ("a step, seconds", "一步，秒"), ("memory of the rank that has most, GB", "最多的 rank 的显存，GB")
    best = found[:top]
    parts = {part: [plan.step.parts[part] for plan in best] for part in best[0].step.parts}
    parts = {part: seconds for part, seconds in parts.items() if any(seconds)}
    names = [f"{i + 1}" for i in range(len(best))]
    rows = [
        (name, [(str(plan.layout), None), (f"{plan.step.seconds:.4g}", plan.step.seconds / best[-1].step.seconds),
                (f"{plan.memory.total / 1e9:.3g}", plan.memory.total / machine.memory), (plan.step.bound_by, None)])
        for name, plan in zip(names, best, strict=True)
    ]  # fmt: skip
    columns = [("layout", "布局"), ("s a step", "秒/步"), "GB", ("bound by", "瓶颈")]
    limit = f"{usable / 1e9:.3g}"
    figures = [
        scatter(title, *axes, points, note=(f"{limit} GB may be used.", f"可用 {limit} GB。")),
        bars(("Where the time of a step goes", "一步的时间用在哪里"), ("seconds", "秒"), names, parts, stacked=True),
        grid(("The best plans", "最好的方案"), "", columns, rows),
    ]
    heading = f"{model.name} on {found[0].layout.ranks} ranks of {machine.name}, batch {found[0].layout.batch}"
    return assemble(
        "figures.html",
        {"figures": figures},
        (),
        heading=heading,
        title=("Plans", "并行方案"),
        lines=why,
        command=command,
    )
