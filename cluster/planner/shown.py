"""What `cluster.plan` shows: the table of layouts, and the lines on few devices. Lecture 03."""

from collections.abc import Iterable

from tabulate import tabulate

from cluster.planner.answers import Known, Offloaded, error_of, few
from cluster.planner.counting import step_flops
from cluster.planner.layout import Layout
from cluster.planner.machines import Machine
from cluster.planner.plans import Plan
from cluster.planner.software import Software
from core.model.config import ModelConfig


def rate(model: ModelConfig, plan: Plan) -> float:
    """FLOP/s of a rank that the model needs; recomputation does not count."""
    return step_flops(model, plan.layout.batch) / plan.step.seconds / plan.layout.ranks


COLUMNS = ("tp", "cp", "ulysses", "ep", "pp", "v", "dp", "zero", "mb", "m", "schedule", "recompute", "GB",
           "s a step", "MFU", "bubble", "bound by", "")  # fmt: skip
FORMATS = ("",) * 12 + (".3g", ".4g", ".3f", ".3f")


def recomputed(layout: Layout) -> str:
    every = layout.recompute_every
    return layout.recompute if every == 1 else f"{layout.recompute} 1/{every}"


def row(model: ModelConfig, machine: Machine, plan: Plan, note: str = "") -> tuple:
    x, seconds = plan.layout, plan.step.seconds
    schedule = x.schedule if x.pp > 1 else ""
    layout = (x.tp, x.cp, x.ulysses, x.ep, x.pp, x.v, x.dp, x.zero, x.microbatch, x.microbatches, schedule)
    mfu, bubble = rate(model, plan) / machine.peak, plan.step.parts["bubble"] / seconds
    return (*layout, recomputed(x), plan.memory.total / 1e9, seconds, mfu, bubble, plan.step.bound_by, note)


def table(model: ModelConfig, machine: Machine, chosen: Plan, best: Iterable[Plan], common: Iterable[Known]) -> str:
    """The chosen one, the fastest, and the common layouts, wherever they rank."""
    limit, fastest = error_of(model), min((p.step.seconds for p in best), default=chosen.step.seconds)
    rows, missing, shown = [], [], []
    for plan in (chosen, *(plan for plan in best if plan is not chosen)):
        tied = "chosen" if plan is chosen else "a tie" if plan.step.seconds <= (1 + limit) * fastest else ""
        rows.append(row(model, machine, plan, tied))
        shown.append(plan)
    for each in common:
        if each.plan is None:
            missing.append(f"{each.name}: no form of it keeps the rules and fits.")
        elif at := [i for i, plan in enumerate(shown) if plan.layout == each.plan.layout]:
            at = at[0]
            rows[at] = (*rows[at][:-1], ", ".join(filter(None, (rows[at][-1], each.name))))
        else:
            rows.append(row(model, machine, each.plan, each.name))
    return "\n".join([tabulate(rows, COLUMNS, floatfmt=FORMATS), *missing])


def gb(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number / 1e9:,.0f}" if number >= 1e12 else f"{number / 1e9:.3g}"


def on_host(model: ModelConfig, plan: Offloaded) -> str:
    """What it is, how fast, and whether device and host have the room."""
    (device, host), rate = plan.room, plan.layout.batch * model.sequence / plan.seconds
    held = f"{gb(plan.device)} of {gb(device)} GB of a device, {gb(plan.host)} of {gb(host)} GB of the host for each"
    what = "gradients and optimizer on the host (ZeRO-Offload; not in cluster/train.py)"
    if not plan.fits:
        return f"does not fit, nor with {what}: {held}"
    return f"{what}: {plan.seconds:.3g} s a step, {rate:,.0f} tokens/s, {held}"


def few_lines(model: ModelConfig, machine: Machine, batch: int, software: Software) -> list[str]:
    """For 1, 2, 4 and 8 devices, one line each."""
    lines = ["On few devices:"]
    for world, plan in few(model, machine, batch, software):
        if plan is None:
            lines.append(f"  {world}: no layout keeps the rules")
        elif isinstance(plan, Offloaded):
            lines.append(f"  {world}: {on_host(model, plan)}")
        else:
            held = f"{plan.memory.total / 1e9:.3g} GB"
            rate = plan.layout.batch * model.sequence / plan.step.seconds
            lines.append(f"  {world}: {plan.step.seconds:.3g} s a step, {rate:,.0f} tokens/s, {held} ({plan.layout})")
    return lines
