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
from dataclasses import asdict, replace

from tabulate import tabulate

from cluster.planner.hardware import Machine, Software
from cluster.planner.layout import Layout, given
from cluster.planner.memory import layers_by_rank
from cluster.planner.models import Model
from cluster.planner.options import machine_of, model_of, parser
from cluster.planner.plans import Plan, plans, something_that_fits
from cluster.planner.traffic import sent
from core.model.text import VOCABULARY

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


def rate(model: Model, plan: Plan) -> float:
    """FLOP/s of a rank that the model needs; recomputation does not count."""
    return model.flops(plan.layout.batch) / plan.step.seconds / plan.layout.ranks


def table(model: Model, machine: Machine, best: Iterable[Plan]) -> str:
    rows = []
    for plan in best:
        x, seconds = plan.layout, plan.step.seconds
        kind = x.schedule if x.pp > 1 else ""
        sizes = (x.tp, x.cp, x.ulysses, x.ep, x.pp, x.v, x.dp, x.zero, x.microbatch, x.microbatches, kind, x.recompute)
        bubble, mfu = plan.step.parts["bubble"] / seconds, rate(model, plan) / machine.peak
        rows.append((*sizes, plan.held.total / 1e9, seconds, mfu, bubble, plan.step.bound_by))
    header = ("tp", "cp", "ulysses", "ep", "pp", "v", "dp", "zero", "mb", "m", "schedule", "recompute", "GB",
              "s a step", "MFU", "bubble", "bound by")  # fmt: skip
    return tabulate(rows, header, floatfmt=("",) * 12 + (".3g", ".4g", ".3f", ".3f"))


def why(model: Model, machine: Machine, found: list[Plan]) -> list[str]:
    """What bounds the best layout, and for each of its choices the best one without it."""
    best, lines = found[0], []
    shares = {cause: seconds / best.step.seconds for cause, seconds in best.step.parts.items()}
    largest = sorted(shares, key=shares.__getitem__, reverse=True)
    spent = ", ".join(f"{cause} {shares[cause]:.1%}" for cause in largest if shares[cause] > 5e-4)
    lines.append(f"The step is spent on {spent}.")
    lines.append(f"It is bound by {WHY[best.step.bound_by]}.")
    used = best.held.total / machine.memory
    states = best.held.weights + best.held.gradients + best.held.optimizer
    lines.append(f"Memory: {best.held.total / 1e9:.3g} of {machine.memory / 1e9:.3g} GB ({used:.0%}), of which states "
                 f"{states / 1e9:.3g} and saved activations {best.held.activations / 1e9:.3g}.")  # fmt: skip
    layers = layers_by_rank(model, best.layout)
    if len(set(layers)) > 1:
        lines.append(f"Its ranks have {min(layers)} to {max(layers)} layers: {' '.join(map(str, layers))}.")
    for field in ("tp", "cp", "ulysses", "ep", "pp", "schedule", "v", "zero", "recompute", "microbatch"):
        here = getattr(best.layout, field)
        other = next((plan for plan in found if getattr(plan.layout, field) != here), None)
        if other:
            longer = other.step.seconds / best.step.seconds - 1
            grown = {c: s - best.step.parts[c] for c, s in other.step.parts.items()}
            cause = max(grown, key=grown.__getitem__)
            there = getattr(other.layout, field)
            most = f", most of it {cause}" if longer > 5e-4 else ""
            lines.append(f"{field} {here}: with {there} at best {longer:.1%} longer{most} ({other.layout}).")
    return lines


def commands(layout: Layout, machine: Machine, model: Model) -> tuple[str, str]:
    """The torchrun line, the same on every node, and a batch script for Slurm."""
    nodes = next(n for n in range(-(-layout.ranks // machine.node), layout.ranks + 1) if layout.ranks % n == 0)
    each = layout.ranks // nodes
    if model.experts:  # all layers of core.model.gpt have them then
        model = replace(model, feed_forward=model.expert_feed_forward)
    sizes = [f"--{name.replace('_', '-')} {getattr(model, name)}" for name in TRAINED]
    if model.experts:
        sizes += [f"--experts {model.experts} --top-k {model.top_k}"]
        sizes += [f"--shared {model.shared_feed_forward}"] if model.shared_feed_forward else []
    how = "--dtype bfloat16 --no-verify --sample 0"
    script = " ".join(["cluster/train.py", str(layout), f"--batch {layout.batch}", *sizes, how])
    meet = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=$FIRST_NODE:29400 " if nodes > 1 else ""
    line = f"torchrun {meet}--nproc_per_node={each} {script}"
    sbatch = f"""#!/bin/bash
#SBATCH --job-name={model.name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={each}
#SBATCH --exclusive
export FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {line}
"""
    return line, sbatch


def lacking(model: Model) -> str:
    """What of a model `cluster/train.py`, whose model is `core.model.gpt`, does not have."""
    found = {
        "grouped key and value heads": model.kv_heads != model.heads,
        "a gated MLP": model.gated,
        "norms and linear layers without biases": not model.biases,
        "rotary positions": not model.learned_positions,
        "latent attention": model.latent is not None,
        "layers without experts": model.dense_layers,
        "heads of another size than hidden / heads": model.head_size * model.heads != model.hidden,
        f"a vocabulary of {model.vocabulary:,}": model.vocabulary != VOCABULARY,
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
        fixed = {name: [value] for name, value in given(args).items()}
        found, considered = plans(model, machine, world, batch, Software(), fixed)
        seconds = time.perf_counter() - began
        if not found:
            use = something_that_fits(model, machine, world, batch, fixed)
            what = f"none of {considered:,} layouts of {model.name} fits {machine.memory / 1e9:.0f} GB"
            what = what if considered else f"no layout of {model.name} that these flags allow keeps the rules"
            raise ValueError(
                f"--world {world} --batch {batch}: {what}; " + (f"use {use}" if use else "use a smaller model")
            )
    except ValueError as error:
        print(f"cluster/plan.py: {error}", file=sys.stderr)
        return 2
    line, sbatch = commands(found[0].layout, machine, model)
    if args.json:
        best = report(model, machine, found[: args.top])
        print(json.dumps(best | {"considered": considered, "torchrun": line, "sbatch": sbatch}, indent=1))
        return 0
    size = model.parameters()
    size = f"{size / 1e9:.2f} x 10^9" if size > 1e8 else f"{size:,}"
    print(f"{model.name}, {size} parameters, on {world} of {machine.name}, batch {batch}")
    print(f"{considered:,} layouts keep the rules, {len(found):,} of those tried fit; {seconds:.1f} s\n")
    print(table(model, machine, found[: args.top]) + "\n")
    print("\n".join(why(model, machine, found)))
    if lacks := lacking(model):
        print(f"The plan is for the model; cluster/train.py builds the GPT of core/model/gpt.py, without {lacks}.")
    print(f"\n{line}\n\n{sbatch}", end="")
    return 0


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
