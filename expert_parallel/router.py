"""CODE 04: the router (专家并行大规模训练): who goes where, and what keeps the load even.

    torchrun --nproc_per_node=8 expert_parallel/router.py

A router that is left alone soon sends all tokens to the same few experts: those learn fastest. Here the same model is
trained from the same start with each way against that. `gating.py` has them; this lesson shows the load.

The load is the whole batch's: each rank here has a part of the tokens, and the auxiliary loss needs what all of them
chose, so the ranks add up their counts, E numbers a layer.

b samples in a step, s tokens of a sample, L layers, E experts, K for each token
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from tabulate import tabulate
from torch import Tensor

from core.proof.lesson import Lesson, Run
from core.proof.plot import picture
from expert_parallel.gating import DROPS, Routing
from expert_parallel.moe import MoEConfig
from expert_parallel.training import ENOUGH, Trained, add_flags, balance, check, claim_equal, train_with

ALONE = "left alone"


def ways(args: argparse.Namespace) -> dict[str, Routing]:
    """The same top-k, balanced in each way."""
    alone = Routing(args.experts, args.top_k, "topk-softmax" if args.top_k > 1 else "softmax-topk")
    found = {
        ALONE: alone,
        "auxiliary loss": replace(alone, aux=args.aux, z=args.z),
        "bias, no loss": replace(alone, score="sigmoid", bias_rate=args.bias_rate),
        "capacity": replace(alone, score="softmax-topk", capacity=args.capacity, drop=args.drop),
    }
    half = args.experts // 2  # groups of two
    if args.experts % 2 == 0 and args.top_k <= 2 * (half - 1):  # and one of them closed at least
        groups = max(-(-args.top_k // 2), half // 2)
        found["groups"] = replace(alone, score="sigmoid", groups=half, top_groups=groups, aux=args.aux)
    return found


def lesson(run: Run) -> None:
    trained: dict[str, Trained] = {}
    for name, routing in ways(run.args).items():
        run.say(f"{name}: {described(routing)}")
        trained[name] = train_with(run, MoEConfig(routing), ep=1)
    loads = {name: torch.stack(each.loads) for name, each in trained.items()}  # (steps, L, E)
    for name, load in loads.items():
        show(run, name, load)
    claim_equal(run, *trained.values())
    claim_router(run, trained)
    if run.job.rank:
        return
    claim_balance(run, loads)
    if run.args.plot:
        with picture(run.args.plot, 8, 4) as axes:
            for name, load in loads.items():
                axes.plot([balance(step)[1] for step in load], label=name)
            axes.set(title="Unevenness of the experts' load", xlabel="step", ylabel="MaxVio, mean over the layers")
            axes.legend()


def described(routing: Routing) -> str:
    told = [f"top {routing.top_k} of {routing.experts}", routing.score]
    told += [f"{n} {getattr(routing, n):g}" for n in ("aux", "z", "bias_rate", "capacity") if getattr(routing, n)]
    told += [f"drop by {routing.drop}"] if routing.capacity else []
    told += [f"in {routing.top_groups} of {routing.groups} groups"] if routing.groups > 1 else []
    return ", ".join(told)


def show(run: Run, name: str, load: Tensor) -> None:
    """The first layer's load over the steps: an expert's tokens as a bar, the mean one of four blocks."""
    rows = []
    for step in sorted({*range(0, len(load), max(1, len(load) // 5)), len(load) - 1}):
        entropy, violation = balance(load[step, 0])
        rows.append((step, *bars(load[step, 0]), f"{entropy:.3f}", f"{violation:.2f}"))
    experts = [f"expert {i}" for i in range(load.shape[2])]
    most = f"entropy at most ln {len(experts)} = {math.log(len(experts)):.3f}"
    run.say(f"\n{name}, first layer: tokens of each expert, four blocks the mean ({most})")
    run.say(tabulate(rows, ("step", *experts, "entropy", "MaxVio"), disable_numparse=True))


def bars(load: Tensor) -> Sequence[str]:
    return ["█" * round(4 * n / load.double().mean().item()) + f" {n}" for n in load.tolist()]


def claim_router(run: Run, trained: dict[str, Trained]) -> None:
    """What a router must hold to in every layer and step."""
    args, made = run.args, ways(run.args)
    claim = run.evidence.claim
    for name, each in trained.items():
        routing = made[name]
        different = sum(len(set(row)) for step in each.choices for c in step for row in c.experts.tolist())
        weights = torch.cat([c.weights for step in each.choices for c in step])
        most, dropped = fullest(each, routing.experts, args.sequence)
        everyone = run.job.gather((different, (weights.sum(1) - 1).abs().max().item(), most, dropped))
        if not everyone:
            continue
        different, error, most, dropped = zip(*everyone, strict=True)
        chosen = args.top_k * args.batch * args.sequence * args.layers * args.steps
        claim(f"different experts for each token, {name}", f"KbsL in each step: {chosen:,}", chosen, sum(different))
        if routing.sums_to_one:
            claim(f"the weights of a token, {name}", "sum to 1: error 0", 0, max(error), 4 * torch.finfo(run.dtype).eps)
        if routing.groups > 1:
            size, most_groups = routing.experts // routing.groups, 0
            for row in (row for step in each.choices for c in step for row in c.experts.tolist()):
                most_groups = max(most_groups, len({expert // size for expert in row}))
            excess = max(0, most_groups - routing.top_groups)
            claim(f"groups of a token, of {routing.groups}", f"at most {routing.top_groups}: excess 0", 0, excess)
        if routing.capacity:
            places = math.ceil(Fraction(str(routing.capacity)) * args.top_k * args.sequence / args.experts)
            excess = max(0, max(most) - places)
            claim("tokens that an expert took of a sample", f"at most ceil(cKs/E) = {places}: excess 0", 0, excess)
            share = f"{sum(dropped) / chosen:.1%} of the choices were dropped"
            run.say(f"\ncapacity {routing.capacity:g}: {share}")


def fullest(trained: Trained, experts: int, sequence: int) -> tuple[int, int]:
    """(the most tokens of a sample that an expert took, choices that were dropped), in all layers and steps."""
    most = dropped = 0
    for choice in (c for step in trained.choices for c in step):
        kept = torch.ones_like(choice.experts, dtype=torch.bool) if choice.kept is None else choice.kept
        for sample, here in zip(choice.experts.split(sequence), kept.split(sequence), strict=True):
            most = max(most, int(torch.bincount(sample[here], minlength=experts).max()))
        dropped += int((~kept).sum())
    return most, dropped


def claim_balance(run: Run, loads: dict[str, Tensor]) -> None:
    """What balances does, against the router left alone: means over the layers and the last half of the steps."""
    if run.args.steps < ENOUGH:
        run.say(f"\nwhat balancing has done is claimed from --steps {ENOUGH} on: it needs some steps to do it")
        return
    found = {name: torch.tensor([balance(step) for step in load]) for name, load in loads.items()}  # (steps, 2)
    half, claim = run.args.steps // 2, run.evidence.claim
    entropy, violation = found.pop(ALONE)[half:].mean(0).tolist()
    for name in ("auxiliary loss", "bias, no loss"):
        mine = found[name][half:].mean(0).tolist()
        excess = max(0.0, mine[1] - violation)
        claim(f"MaxVio, {name}: {mine[1]:.3f}", f"below {violation:.3f}, left alone: excess 0", 0, excess)
        lack = max(0.0, entropy - mine[0])
        claim(f"entropy of the load, {name}: {mine[0]:.3f}", f"above {entropy:.3f}, left alone: lack 0", 0, lack)
    # A bias goes by steps of one size, and with few of them may still be on its way: only the loss must have done it.
    *before, last = (quarter[:, 1].mean().item() for quarter in found["auxiliary loss"].tensor_split(4))
    what = f"MaxVio falls, auxiliary loss: {last:.3f} in the last quarter of the steps"
    claim(what, f"below {max(before):.3f} in the worst before: excess 0", 0, max(0.0, last - max(before)))


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks)
    ways(args)
    for flag, usual in (("aux", 0.05), ("bias_rate", 0.01)):
        if not getattr(args, flag):
            name = f"--{flag.replace('_', '-')}"
            raise ValueError(f"{name} 0: one of the ways would not balance the load; use {name} {usual}")


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: the router",
        "专家并行大规模训练",
        "Top-k gating left alone, and balanced by a loss, by a bias and by a capacity: the load of the experts.",
    )
    add_flags(frame, routing=False, layers=2, feed_forward=64)
    flag = frame.parser.add_argument
    flag("--aux", type=float, help="of the load-balancing loss (default %(default)s)")
    flag("--z", type=float, default=0.001, help="of the router z-loss (default %(default)s)")
    flag("--bias-rate", type=float, help="of balancing by a bias (default %(default)s)")
    flag("--capacity", type=float, help="capacity factor (default %(default)s)")
    flag("--drop", choices=DROPS, default="probability", help="what is dropped (default %(default)s)")
    frame.parser.set_defaults(steps=40, aux=0.05, bias_rate=0.01, capacity=1.25)
    sys.exit(frame.main(refuse, lesson))
