"""Lecture 03: which layout is fastest, and why (大模型并行与 GPU 集群配置).

    python -m cluster.plan --model gpt3-175b --machine dgx-a100 --world 1024 --batch 1536

Every layout that keeps the rules (`rulebook.py`) and fits the memory (`memory.py`) gets the time of its step
(`steptime.py`); the fastest are shown, what bounds the best, and what it would cost to choose otherwise. Then the
command that starts it. A flag of the layout fixes that choice. The constants of time are those that ten published runs
give, see `accuracy.py`; ours are not Megatron's programs, so trust the order more than the seconds.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil

from tabulate import tabulate

from cluster.hardware import Machine, Software
from cluster.layout import Layout, given
from cluster.memory import Held, held
from cluster.models import Model
from cluster.options import machine_of, model_of, parser
from cluster.search import Choices, divisors, legal
from cluster.steptime import Step, step
from cluster.traffic import sent

USABLE = 0.92  # of a device's memory: the rest is the runtime's, and lost between allocations
SHORTEST = 2048  # tokens of a sequence that a rank of cp has at least: with fewer its messages are not hidden
TRAINED = ("layers", "hidden", "heads", "feed_forward", "sequence")  # sizes that cluster/train.py takes
WHY = {
    "matrix products": "the matrix products: nothing else is left to win much",
    "memory": "the memory's bandwidth, in all that lies between the matrix products",
    "tp": "the all-reduces of tensor parallelism",
    "cp": "keys and values that travel between the ranks of one sequence",
    "ep": "the all-to-alls of the experts",
    "bubble": "the pipeline's bubble",
    "pp": "messages between stages",
    "dp": "gradients and weights that travel between the data parallel ranks",
    "optimizer": "the optimizer's update",
}


@dataclass(frozen=True)
class Plan:
    """A layout, and what it is expected to need."""

    layout: Layout
    held: Held  # on the rank of the pipeline that holds most
    step: Step


def choices(model: Model, machine: Machine, world: int, batch: int, fixed: Choices) -> Choices:
    """The values that a search tries: those that can be best."""
    largest = max(1, model.sequence // SHORTEST)
    usual = {
        "tp": [t for t in divisors(machine.node) if world % t == 0],
        "cp": [c for c in divisors(world) if c <= largest],
        "sp": [False, True],
        "zero": [0, 1, 2, 3],
        "schedule": ["1f1b", "interleaved", "zb-h1", "zb-v"],
        "recompute": ["none", "selective", "full"],
        "microbatch": [b for b in (1, 2, 4, 8, 16) if b <= batch],
        "v": [2, 3, 4, 5, 6, 8],
    }
    return usual | fixed


def plans(
    model: Model, machine: Machine, world: int, batch: int, software: Software, fixed: Choices
) -> tuple[list[Plan], int]:
    """All layouts that fit, the fastest first, and how many were considered."""
    found, considered = [], 0
    for layout in legal(model, machine, world, batch, choices(model, machine, world, batch, fixed)):
        considered += 1
        if never_better(layout, fixed):
            continue
        if (need := fits(model, layout, machine)) is not None:
            found.append(Plan(layout, need, step(model, layout, machine, software)))
    return sorted(found, key=lambda plan: plan.step.seconds), considered


def never_better(layout: Layout, fixed: Choices) -> bool:
    """Whether another layout does the same for less, unless somebody asked for this one."""
    return (
        (layout.tp > 1 and not layout.sp and "sp" not in fixed)
        or (layout.pp == 1 and layout.schedule != "1f1b" and "schedule" not in fixed)
        or (layout.cp > 1 and layout.microbatch > 1 and not {"cp", "microbatch"} & fixed.keys())  # fewer whole samples
    )


def fits(model: Model, layout: Layout, machine: Machine) -> Held | None:
    """What the rank holds that holds most; None where that is more than there is."""
    most = None
    for rank in sorted({0, layout.pp // 2, layout.pp - 1}):
        need = held(model, layout, rank, quick=True)
        if need.total > USABLE * machine.memory:
            return None
        most = need if most is None or need.total > most.total else most
    return most


# ---- What is shown ---------------------------------------------------------------------------------------------------


def rate(model: Model, plan: Plan) -> float:
    """FLOP/s of a rank that the model needs; recomputation does not count."""
    return model.flops(plan.layout.batch) / plan.step.seconds / plan.layout.ranks


def table(model: Model, machine: Machine, best: Iterable[Plan]) -> str:
    rows = []
    for plan in best:
        x, seconds = plan.layout, plan.step.seconds
        kind = x.schedule if x.pp > 1 else ""
        rows.append((x.tp, x.cp, x.ep, x.pp, x.v, x.dp, x.zero, x.microbatch, x.microbatches, kind, x.recompute,
                     plan.held.total / 1e9, seconds, rate(model, plan) / machine.peak, plan.step.parts["bubble"] / seconds,
                     plan.step.bound_by))  # fmt: skip
    header = ("tp", "cp", "ep", "pp", "v", "dp", "zero", "mb", "m", "schedule", "recompute", "GB", "s a step", "MFU",
              "bubble", "bound by")  # fmt: skip
    return tabulate(rows, header, floatfmt=("",) * 11 + (".1f", ".3f", ".3f", ".3f"))


def why(model: Model, machine: Machine, found: list[Plan]) -> list[str]:
    """What bounds the best layout, and for each of its choices the best one without it."""
    best, lines = found[0], []
    shares = {cause: seconds / best.step.seconds for cause, seconds in best.step.parts.items()}
    spent = ", ".join(
        f"{cause} {share:.1%}" for cause, share in sorted(shares.items(), key=lambda s: -s[1]) if share > 5e-4
    )
    lines.append(f"The step is spent on {', '.join(f'{cause} {share:.1%}' for share, cause in spent)}.")
    lines.append(f"It is bound by {WHY[best.step.bound_by]}.")
    used = best.held.total / machine.memory
    lines.append(f"Memory: {best.held.total / 1e9:.1f} of {machine.memory / 1e9:.0f} GB ({used:.0%}), of which states "
                 f"{(best.held.weights + best.held.gradients + best.held.optimizer) / 1e9:.1f} and saved activations "
                 f"{best.held.activations / 1e9:.1f}.")  # fmt: skip
    for field in ("tp", "cp", "ep", "pp", "schedule", "v", "zero", "recompute", "microbatch"):
        here = getattr(best.layout, field)
        other = next((plan for plan in found if getattr(plan.layout, field) != here), None)
        if other:
            longer = other.step.seconds / best.step.seconds - 1
            grown = {c: s - best.step.parts[c] for c, s in other.step.parts.items()}
            cause = max(grown, key=grown.__getitem__)
            there = getattr(other.layout, field)
            lines.append(
                f"{field} {here}: with {there} at best {longer:.1%} longer, most of it {cause} ({other.layout})."
            )
    return lines


def commands(layout: Layout, machine: Machine, model: Model) -> tuple[str, str]:
    """The torchrun line, the same on every node, and a batch script for Slurm."""
    nodes = next(n for n in range(-(-layout.ranks // machine.node), layout.ranks + 1) if layout.ranks % n == 0)
    each = layout.ranks // nodes
    sizes = [f"--{name.replace('_', '-')} {getattr(model, name)}" for name in TRAINED]
    script = " ".join(["cluster/train.py", str(layout), f"--batch {layout.batch}", *sizes])
    meet = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=$FIRST_NODE:29400 " if nodes > 1 else ""
    line = f"torchrun {meet}--nproc_per_node={each} {script}"
    sbatch = f"""#!/bin/bash
#SBATCH --job-name={model.name.strip("*")}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={each}
#SBATCH --exclusive
export FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {line}
"""
    return line, sbatch


def lacking(model: Model) -> str:
    """What of a model `cluster/train.py`, whose model is `core.gpt`, does not have."""
    found = {
        "grouped key and value heads": model.kv_heads != model.heads,
        "a gated MLP": model.gated,
        "norms and linear layers without biases": not model.biases,
        "rotary positions": not model.learned_positions,
        "latent attention": model.latent is not None,
        "shared experts, and layers without experts": model.shared_experts or model.dense_layers,
    }
    return ", ".join(name for name, lacks in found.items() if lacks)


def main() -> int:
    made = parser("plan", "The fastest layout of a model on a machine, and why.")
    made.add_argument("--top", type=int, default=10, help="layouts to show (default %(default)s)")
    made.add_argument("--json", action="store_true", help="the same for a program")
    try:
        args = made.parse_args()
        model, machine = model_of(args), machine_of(args)
        world, batch = args.world or machine.node, args.batch or 512
        if args.top < 1:
            raise ValueError(f"--top {args.top}: must be at least 1; use --top 10")
        began = time.perf_counter()
        found, considered = plans(model, machine, world, batch, Software(), {n: [v] for n, v in given(args).items()})
        seconds = time.perf_counter() - began
        if not found:
            raise ValueError(nothing(model, machine, world, batch, considered))
    except ValueError as error:
        print(f"cluster/plan.py: {error}", file=sys.stderr)
        return 2
    line, sbatch = commands(found[0].layout, machine, model)
    if args.json:
        best = report(model, machine, found[: args.top])
        print(json.dumps(best | {"considered": considered, "torchrun": line, "sbatch": sbatch}, indent=1))
        return 0
    print(
        f"{model.name}, {model.parameters() / 1e9:.2f} x 10^9 parameters, on {world} of {machine.name}, batch {batch}"
    )
    print(f"{considered:,} layouts keep the rules, {len(found):,} of those tried fit; {seconds:.1f} s\n")
    print(table(model, machine, found[: args.top]) + "\n")
    print("\n".join(why(model, machine, found)))
    if lacks := lacking(model):
        print(f"The plan is for the model; cluster/train.py builds the GPT of core/gpt.py, without {lacks}.")
    print(f"\n{line}\n\n{sbatch}", end="")
    return 0


def nothing(model: Model, machine: Machine, world: int, batch: int, considered: int) -> str:
    """Why there is no plan, and what would do."""
    if not considered:
        use = f"use --batch {max(1, round(batch / world)) * world}, or decide less of the layout"
        return f"--world {world} --batch {batch}: no layout of {model.name} keeps the rules; {use}"
    states = 16 * model.parameters() / (USABLE * machine.memory)
    ranks = 2 * machine.node * ceil(max(world, states) / machine.node)
    return (
        f"--world {world}: {considered:,} layouts keep the rules and none fits {machine.memory / 1e9:.0f} GB; weights, "
        f"gradients and optimizer alone fill {states:.1f} ranks; use --world {ranks} --batch {ceil(batch / ranks) * ranks}"
    )


def report(model: Model, machine: Machine, best: list[Plan]) -> dict[str, object]:
    """For a program: bytes of the rank that holds most, elements that the first rank sends in a step."""
    layouts = [
        {
            "layout": asdict(plan.layout),
            "seconds": plan.step.seconds,
            "parts": plan.step.parts,
            "mfu": rate(model, plan) / machine.peak,
            "bytes": asdict(plan.held) | {"total": plan.held.total},
            "sent": sent(model, plan.layout),
            "bound_by": plan.step.bound_by,
        }
        for plan in best
    ]
    sizes = asdict(model) | {"parameters": model.parameters()}
    return {"model": sizes, "machine": asdict(machine), "plans": layouts}


if __name__ == "__main__":
    sys.exit(main())
