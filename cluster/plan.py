"""Lecture 03: which layout is fastest, and why (大模型并行与 GPU 集群配置).

    python -m cluster.plan --model gpt3-175b --machine dgx-a100 --world 1024 --batch 1536

Every layout that keeps the rules (`planner/rulebook.py`), fits the memory (`planner/memory.py`, `planner/residency.py`)
and could be best gets the time of its step (`planner/steptime.py`), with the constants of a named program, which
`accuracy.py` fits to published runs (`--software`). The model of time has an error of its own: layouts within it are a
tie, and the simplest is chosen. Shown are the fastest, and the usual ones beside them; what bounds the choice,
what other choices would cost, what more hardware would win, and the command that starts it. A flag of the layout fixes
that choice. What the times were held against, and what is not in them, is at the end of --help.

read: planner/plans.py:84-181; planner/search.py:24-68; then planner/answers.py, planner/memory.py, planner/steptime.py
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace

from cluster.planner.answers import (
    DOMAIN,
    error_of,
    gains,
    known,
    offloaded,
    simplest,
    ties,
)
from cluster.planner.command import OWN_TEXT, commands, folder_of, lacking, trainjob, write_config
from cluster.planner.counting import model_parameters
from cluster.planner.hardware import Machine
from cluster.planner.layout import given
from cluster.planner.options import machine_of, model_of, parser
from cluster.planner.page import page
from cluster.planner.plans import OWN_MEMORY, Plan, fits, plans, something_that_fits, usable
from cluster.planner.shown import few_lines, on_host, rate, table
from cluster.planner.software import NAMED, Software, constants_of, with_features
from cluster.planner.stages import layers_by_rank
from cluster.planner.traffic import sent
from core.model.config import ModelConfig
from core.proof.files import check_writable, write_file
from core.proof.language import catalogue, language_of
from core.proof.rules import at_least, check
from core.proof.terminal import fit
from pipeline.split import layers_by_stage, notation

BATCH = 512  # without the flag
IMBALANCE = 1.04  # 2408.15664, table 2: a MaxVio of 0.04 over a data set, by biases and without a loss for balance
AT_LEAST_ONE = ("world", "batch", "tp", "cp", "ep", "etp", "pp", "dp", "ulysses", "microbatch", "microbatches")
WHY = {  # what takes longest, and what makes it shorter
    "matrix products": "matrix products: shorter with fewer FLOP computed again, larger microbatches, 8-bit products "
    "(--bits 8) or faster devices",
    "memory": "the memory's bandwidth, in all that lies between the matrix products: shorter with fused kernels",
    "tp": "the all-reduces of tensor parallelism: shorter with fewer tp ranks",
    "cp": "keys and values sent between the ranks of one sequence: shorter with fewer cp ranks",
    "ep": "the all-to-alls of the experts: shorter with ep inside a node, or behind the other half of a batch",
    "bubble": "the pipeline's bubble: shorter with more microbatches, more stages a rank or another schedule",
    "pp": "messages between stages",
    "dp": "gradients and weights sent between the data parallel ranks: shorter with a larger batch, or less sharding",
    "optimizer": "the optimizer's update: shorter with ZeRO",
    "launch": "the host, which starts kernels more slowly than the device runs them: shorter with CUDA graphs or "
    "larger microbatches",
}


CHOICES = ("tp", "cp", "ulysses", "ep", "pp", "schedule", "v", "zero", "recompute", "recompute_every", "microbatch")


def why(model: ModelConfig, machine: Machine, found: list[Plan], best: Plan | None = None) -> list[str]:
    """What bounds the best layout, and for each of its choices the best one without it."""
    best = best or found[0]
    shares = {cause: seconds / best.step.seconds for cause, seconds in best.step.parts.items()}
    largest = sorted(shares, key=shares.__getitem__, reverse=True)
    spent = ", ".join(f"{cause} {shares[cause]:.1%}" for cause in largest if shares[cause] > 5e-4)
    memory = best.memory
    used = memory.total / machine.memory
    states = memory.weights + memory.gradients + memory.optimizer
    lines = [
        f"The step is spent on {spent}.",
        f"It is bound by {WHY[best.step.bound_by]}.",
        *([f"Then by {WHY[largest[1]]}."] if shares[largest[1]] > 0.1 else []),
        f"Memory: {memory.total / 1e9:.3g} of {machine.memory / 1e9:.3g} GB ({used:.0%}), of which states "
        f"{states / 1e9:.3g} and saved activations {memory.activations / 1e9:.3g}.",
    ]
    layers = layers_by_rank(model, best.layout)
    if len(set(layers)) > 1:
        split = notation(layers_by_stage(model.layers, best.layout.stages, best.layout.split))
        lines.append(f"Its ranks have {min(layers)} to {max(layers)} layers: --stages '{split}'")
    for field in CHOICES:
        other = next((p for p in found if getattr(p.layout, field) != getattr(best.layout, field)), None)
        if other:
            lines.append(f"{field} {getattr(best.layout, field)}: with {dearer(best, other, field)}")
    return lines


def dearer(best: Plan, other: Plan, field: str) -> str:
    """How much longer a step is with another choice, and what takes longer."""
    longer = other.step.seconds / best.step.seconds - 1
    grown = {cause: seconds - best.step.parts.get(cause, 0.0) for cause, seconds in other.step.parts.items()}
    most = f", most of it {max(grown, key=grown.__getitem__)}" if longer > 5e-4 else ""
    how = f"{longer:.1%} longer" if longer >= 0 else f"{-longer:.1%} shorter, which is a tie"
    return f"{getattr(other.layout, field)} at best {how}{most} ({other.layout})."


def software_of(args: argparse.Namespace) -> Software:
    """The program whose time and memory are meant."""
    # The dispatchers of today's recipes for experts send a token to each node once.
    features = ("deepep",) if NAMED[args.software].at_once or args.software == "megatron-core" else ()
    return replace(with_features(NAMED[args.software], features, args.bits), imbalance=args.imbalance)


class NothingFits(ValueError):
    """No layout does, or keeps the rules; with lines on few devices, where the number of devices was not said."""

    def __init__(self, message: str, few: list[str]):
        super().__init__(message)
        self.few = few


def search(args: argparse.Namespace) -> tuple[ModelConfig, Machine, list[Plan], int]:
    """The model, the machine, all layouts that fit, the fastest first, and how many were considered.

    Raises:
        ValueError: the flags make no sense, or no layout fits; then it says with which flags one does.
    """
    said = [name for name in AT_LEAST_ONE if getattr(args, name, None) is not None]
    check(args, [at_least("top", 1, 10), *(at_least(name, 1, 1) for name in said)])
    if not 1 <= args.imbalance <= 1000:
        raise ValueError(
            f"--imbalance {args.imbalance}: is a ratio to the mean, of 1 to 1000; use --imbalance {IMBALANCE}"
        )
    model, machine = model_of(args), machine_of(args)
    world, batch = args.world or machine.node, args.batch or BATCH
    fixed = {name: [value] for name, value in given(args).items()}
    software = software_of(args)
    found, considered = plans(model, machine, world, batch, software, fixed)
    if found:
        return model, machine, found, considered
    what = f"no layout of {model.name} that these flags allow keeps the rules"
    if considered:
        what = f"none of {considered:,} layouts of {model.name} fits {machine.memory / 1e9:.0f} GB"
        if host := offloaded(model, machine, world, batch, software):
            what += f"; {on_host(model, host)}"
    world_is_free = args.world is None and not fixed
    lines = few_lines(model, machine, batch, software) if considered and world_is_free else []
    use = something_that_fits(model, machine, world, batch, fixed, software) or "a smaller model"
    raise NothingFits(f"--world {world} --batch {batch}: {what}; use {use}", lines)


def main() -> int:
    made = parser("plan", "The fastest layout of a model on a machine, and why.")
    made.epilog, made.formatter_class = DOMAIN, argparse.RawDescriptionHelpFormatter
    made.add_argument("--software", choices=tuple(NAMED), default="megatron-core",
                      help="whose time and memory; here: this project's (default %(default)s)")  # fmt: skip
    made.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="of the layers' products (default 16)")
    made.add_argument("--imbalance", type=float, default=IMBALANCE, metavar="X",
                      help="tokens of the busiest expert over the mean (default %(default)s)")  # fmt: skip
    made.add_argument("--kubernetes", action="store_true", help="also print a TrainJob of Kubeflow")
    made.add_argument("--top", type=int, default=10, help="layouts to show (default %(default)s)")
    made.add_argument("--write-config", metavar="FOLDER", help="write config.json there, for a command that trains it")
    made.add_argument("--page", metavar="FILE.html", help="the plans as a page: time against memory, and why")
    made.add_argument("--json", action="store_true", help="the same for a program")
    began, words = time.perf_counter(), catalogue(language_of(sys.argv[1:]))
    try:
        args = made.parse_args()
        if args.page:
            check_writable("--page", args.page)
        model, machine, found, considered = search(args)
        folder = write_config(args.write_config, model) if args.write_config else folder_of(args)
    except ValueError as error:
        print(f"cluster/plan.py: {words.gettext(str(error))}", file=sys.stderr)
        if isinstance(error, NothingFits) and error.few:
            print(fit(words.printed("\n".join(error.few))), file=sys.stderr)
        return 2

    def say(text: str) -> None:
        print(fit(words.printed(text)))

    seconds = time.perf_counter() - began
    software, chosen = software_of(args), simplest(model, found)
    layout, world = chosen.layout, chosen.layout.ranks
    shown = [chosen, *(plan for plan in found if plan is not chosen)][: args.top]
    line, sbatch = commands(layout, machine, model, folder)
    job = trainjob(layout, machine, model, folder)
    reasons = why(model, machine, found, chosen)
    if args.page:
        ranked = [chosen, *(plan for plan in found if plan is not chosen)]
        write_file(args.page, page(model, machine, ranked, args.top, reasons, line, usable(machine, software)))
    if args.json:
        written = report(model, machine, shown) | {"considered": considered, "torchrun": line, "sbatch": sbatch}
        written |= {"software": software.name, "tied": len(ties(model, found)), "trainjob": job}
        print(json.dumps(written, indent=1))
        return 0
    size = model_parameters(model)
    size = f"{size / 1e9:.2f} x 10^9" if size > 1e8 else f"{size:,}"
    say(f"{model.name}, {size} parameters, on {world} of {machine.name}, batch {layout.batch}, as {software.name}")
    if model.notes:
        say(f"Of the file: {model.notes}.")
    say(f"{considered:,} layouts tried, {len(found):,} fit; {seconds:.1f} s\n")
    fixed = {name: [value] for name, value in given(args).items()}
    common = [] if fixed else known(model, machine, world, layout.batch, software, found)
    say(table(model, machine, chosen, found[: args.top], common) + "\n")
    tied = len(ties(model, found))
    if tied > 1:
        say(f"{tied} layouts are within {error_of(model):.0%} of the fastest, the median error on H100: a tie. "
            f"Chosen is the one with fewest parts.")  # fmt: skip
    say("\n".join(reasons))
    won = ", ".join(f"{what} {gain:+.1%}" for what, gain in gains(model, machine, world, layout.batch, software, chosen,
                                                                  fixed))  # fmt: skip
    say(f"Tokens a second would be won: {won}.")
    if args.world is None and not fixed:
        say("\n".join(few_lines(model, machine, layout.batch, software)))
    say(f"Constants of {software.name}: {constants_of(software.name)}.")
    if software.name not in OWN_MEMORY and fits(model, layout, machine) is None:
        say("This project's own program holds more than that: for a layout that it trains add --software here.")
    say("Median error on H100 in bfloat16: "
          f"{error_of(model):.0%}; what it was held against, and what is not in it: --help.")  # fmt: skip
    if lacks := lacking(model, folder):
        whole = "" if lacking(model, "FOLDER") else "; with --write-config FOLDER it trains this model"
        say(f"The plan is for the model; the command trains one without {lacks}{whole}.")
    if model.sequence >= OWN_TEXT:
        say(f"Samples of {model.sequence:,} tokens are longer than the text here is to validate on: text.txt in the "
            f"command is one of yours, of {10 * model.sequence + 10:,} bytes or more.")  # fmt: skip
    print(f"\n{line}\n\n{sbatch}", end="")
    if args.kubernetes:
        print(f"\n{job}", end="")
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
