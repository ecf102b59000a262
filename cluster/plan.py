"""Lecture 03: which layout is fastest, and why (大模型并行与 GPU 集群配置).

    python -m cluster.plan --model gpt3-175b --machine dgx-a100 --world 1024 --batch 1536

Every layout that keeps the rules (`planner/rulebook.py`) and fits the memory (`planner/memory.py`) gets the time of its
step (`planner/steptime.py`); the fastest are shown, what bounds the best, and what it would cost to choose otherwise.
Then the command that starts it. A flag of the layout fixes that choice. The constants of time are those that ten
published runs give, see `accuracy.py`; ours are not Megatron's programs, so trust the order more than the seconds.

read: planner/plans.py:21-104; planner/search.py:20-56; then planner/memory.py, planner/steptime.py
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict

from tabulate import tabulate

from cluster.planner.command import commands, folder_of, lacking, write_config
from cluster.planner.counting import model_parameters, step_flops
from cluster.planner.hardware import Machine
from cluster.planner.layout import given
from cluster.planner.options import machine_of, model_of, parser
from cluster.planner.plans import Plan, plans, something_that_fits
from cluster.planner.software import Software
from cluster.planner.stages import layers_by_rank
from cluster.planner.traffic import sent
from core.model.config import ModelConfig
from core.proof.rules import at_least, check

BATCH = 512  # without the flag
WHY = {
    "matrix products": "the matrix products: nothing else is left to win much",
    "memory": "the memory's bandwidth, in all that lies between the matrix products",
    "tp": "the all-reduces of tensor parallelism",
    "cp": "keys and values sent between the ranks of one sequence",
    "ep": "the all-to-alls of the experts",
    "bubble": "the pipeline's bubble",
    "pp": "messages between stages",
    "dp": "gradients and weights sent between the data parallel ranks",
    "optimizer": "the optimizer's update",
}


def rate(model: ModelConfig, plan: Plan) -> float:
    """FLOP/s of a rank that the model needs; recomputation does not count."""
    return step_flops(model, plan.layout.batch) / plan.step.seconds / plan.layout.ranks


COLUMNS = ("tp", "cp", "ulysses", "ep", "pp", "v", "dp", "zero", "mb", "m", "schedule", "recompute", "GB",
           "s a step", "MFU", "bubble", "bound by")  # fmt: skip
FORMATS = ("",) * 12 + (".3g", ".4g", ".3f", ".3f")


def table(model: ModelConfig, machine: Machine, best: Iterable[Plan]) -> str:
    rows = []
    for plan in best:
        x, seconds = plan.layout, plan.step.seconds
        schedule = x.schedule if x.pp > 1 else ""
        layout = (x.tp, x.cp, x.ulysses, x.ep, x.pp, x.v, x.dp, x.zero, x.microbatch, x.microbatches, schedule)
        mfu, bubble = rate(model, plan) / machine.peak, plan.step.parts["bubble"] / seconds
        rows.append((*layout, x.recompute, plan.memory.total / 1e9, seconds, mfu, bubble, plan.step.bound_by))
    return tabulate(rows, COLUMNS, floatfmt=FORMATS)


CHOICES = ("tp", "cp", "ulysses", "ep", "pp", "schedule", "v", "zero", "recompute", "microbatch")


def why(model: ModelConfig, machine: Machine, found: list[Plan]) -> list[str]:
    """What bounds the best layout, and for each of its choices the best one without it."""
    best = found[0]
    shares = {cause: seconds / best.step.seconds for cause, seconds in best.step.parts.items()}
    largest = sorted(shares, key=shares.__getitem__, reverse=True)
    spent = ", ".join(f"{cause} {shares[cause]:.1%}" for cause in largest if shares[cause] > 5e-4)
    memory = best.memory
    used = memory.total / machine.memory
    states = memory.weights + memory.gradients + memory.optimizer
    lines = [
        f"The step is spent on {spent}.",
        f"It is bound by {WHY[best.step.bound_by]}.",
        f"Memory: {memory.total / 1e9:.3g} of {machine.memory / 1e9:.3g} GB ({used:.0%}), of which states "
        f"{states / 1e9:.3g} and saved activations {memory.activations / 1e9:.3g}.",
    ]
    layers = layers_by_rank(model, best.layout)
    if len(set(layers)) > 1:
        lines.append(f"Its ranks have {min(layers)} to {max(layers)} layers: {' '.join(map(str, layers))}.")
    for field in CHOICES:
        other = next((p for p in found if getattr(p.layout, field) != getattr(best.layout, field)), None)
        if other:
            lines.append(f"{field} {getattr(best.layout, field)}: with {dearer(best, other, field)}")
    return lines


def dearer(best: Plan, other: Plan, field: str) -> str:
    """How much longer a step is with another choice, and what takes longer."""
    longer = other.step.seconds / best.step.seconds - 1
    grown = {cause: seconds - best.step.parts[cause] for cause, seconds in other.step.parts.items()}
    most = f", most of it {max(grown, key=grown.__getitem__)}" if longer > 5e-4 else ""
    return f"{getattr(other.layout, field)} at best {longer:.1%} longer{most} ({other.layout})."


def search(args: argparse.Namespace) -> tuple[ModelConfig, Machine, list[Plan], int]:
    """The model, the machine, all layouts that fit, the fastest first, and how many were considered.

    Raises:
        ValueError: the flags make no sense, or no layout fits; then it says with which flags one does.
    """
    check(args, [at_least("top", 1, 10)])
    model, machine = model_of(args), machine_of(args)
    world, batch = args.world or machine.node, args.batch or BATCH
    fixed = {name: [value] for name, value in given(args).items()}
    found, considered = plans(model, machine, world, batch, Software(), fixed)
    if found:
        return model, machine, found, considered
    what = f"no layout of {model.name} that these flags allow keeps the rules"
    if considered:
        what = f"none of {considered:,} layouts of {model.name} fits {machine.memory / 1e9:.0f} GB"
    use = something_that_fits(model, machine, world, batch, fixed) or "a smaller model"
    raise ValueError(f"--world {world} --batch {batch}: {what}; use {use}")


def main() -> int:
    made = parser("plan", "The fastest layout of a model on a machine, and why.")
    made.add_argument("--top", type=int, default=10, help="layouts to show (default %(default)s)")
    made.add_argument("--write-config", metavar="FOLDER", help="write config.json there, for a command that trains it")
    made.add_argument("--json", action="store_true", help="the same for a program")
    began = time.perf_counter()
    try:
        args = made.parse_args()
        model, machine, found, considered = search(args)
        folder = write_config(args.write_config, model) if args.write_config else folder_of(args)
    except ValueError as error:
        print(f"cluster/plan.py: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    layout, best = found[0].layout, found[: args.top]
    line, sbatch = commands(layout, machine, model, folder)
    if args.json:
        written = report(model, machine, best) | {"considered": considered, "torchrun": line, "sbatch": sbatch}
        print(json.dumps(written, indent=1))
        return 0
    size = model_parameters(model)
    size = f"{size / 1e9:.2f} x 10^9" if size > 1e8 else f"{size:,}"
    print(f"{model.name}, {size} parameters, on {layout.ranks} of {machine.name}, batch {layout.batch}")
    print(f"{considered:,} layouts keep the rules, {len(found):,} of those tried fit; {seconds:.1f} s\n")
    print(table(model, machine, best) + "\n")
    print("\n".join(why(model, machine, found)))
    if lacks := lacking(model, folder):
        whole = "" if lacking(model, "FOLDER") else "; with --write-config FOLDER it trains this model"
        print(f"The plan is for the model; the command trains one without {lacks}{whole}.")
    print(f"\n{line}\n\n{sbatch}", end="")
    return 0


def report(model: ModelConfig, machine: Machine, best: list[Plan]) -> dict[str, object]:
    """For a program: bytes of the rank that has most, elements that the first rank sends in a step."""
    layouts = [
        {
            "layout": asdict(plan.layout),
            "seconds": plan.step.seconds,
            "parts": plan.step.parts,
            "mfu": rate(model, plan) / machine.peak,
            "bytes": asdict(plan.memory) | {"total": plan.memory.total},
            "sent": sent(model, plan.layout),
            "bound_by": plan.step.bound_by,
        }
        for plan in best
    ]
    sizes = asdict(model) | {"parameters": model_parameters(model)}
    return {"model": sizes, "machine": asdict(machine), "plans": layouts}


if __name__ == "__main__":
    sys.exit(main())
