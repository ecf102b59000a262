"""What `router.py` shows and claims: the load of the experts under each way of balancing it."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from core.mesh import Mesh
from core.model.gpt import GPT
from core.proof.arguments import configuration
from core.proof.figures import grid, lines
from core.proof.lesson import Run
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.routing import MoEConfig, Routing
from expert_parallel.evidence.training import (
    ENOUGH,
    Plain,
    Trained,
    Version,
    balance,
    claim_equal,
    engine,
    mesh_of,
    train_versions,
)

ALONE = "left alone"
FALLEN = 30  # steps after which the auxiliary loss must have had its effect in the mean over a quarter of them


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


def compare_ways(run: Run, route_plainly: Callable[[GPT, MoEConfig, Mesh], GPT]) -> None:
    """Train with each way, by the plain router and the engine's."""
    trained: dict[str, Trained] = {}
    mesh = mesh_of(run, ep=1)
    for name, routing in ways(run.args).items():
        run.say(f"{name}: {described(routing)}")
        moe = MoEConfig(routing)
        plain = route_plainly(to_moe(GPT(configuration(run.args)), moe), moe, mesh)
        trained[name] = train_versions(run, moe, {"plain": Plain(run, plain, mesh), "engine": engine(run, moe, mesh)})
    loads = {name: each.loads["engine"] for name, each in trained.items() if run.job.rank == 0}
    for name, load in loads.items():
        show(run, name, load)
    claim_equal(run, *trained.values())
    claim_router(run, trained)
    if run.job.rank:
        return
    claim_balance(run, loads)
    uneven = {name: [balance(step)[1] for step in load] for name, load in loads.items()}
    title = "Unevenness of the experts' load", "专家负载的不均衡"
    run.draw(lines(title, ("step", "步"), ("MaxVio, mean over the layers", "MaxVio，各层平均"), uneven), chart=True)
    for name, load in loads.items():
        draw_load(run, name, load[-1].sum(0))


def draw_load(run: Run, name: str, load: Tensor) -> None:
    """Choices of each expert, (E), in the last step."""
    most = load.max().item()
    cells = [(("choices", "次数"), [(f"{n:,.0f}", n / most) for n in load.tolist()])]
    title = (
        f"{name}: choices of each expert in the last step, all layers",
        f"{name}：最后一步各专家被选中的次数",
    )
    run.draw(grid(title, ("expert", "专家"), [str(e) for e in range(len(load))], cells))


def described(routing: Routing) -> str:
    words = [f"top {routing.top_k} of {routing.experts}", routing.score]
    words += [f"{n} {getattr(routing, n):g}" for n in ("aux", "z", "bias_rate", "capacity") if getattr(routing, n)]
    words += [f"drop by {routing.drop}"] if routing.capacity else []
    words += [f"in {routing.top_groups} of {routing.groups} groups"] if routing.groups > 1 else []
    return ", ".join(words)


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


class Seen(NamedTuple):
    """What the routers of one version did on this rank, in all layers and steps."""

    different: int  # experts of a token, summed over the tokens
    error: float  # of the sum of a token's weights, against 1
    groups: int  # that the experts of a token are in, at most
    taken: int  # tokens of a sample by one expert, at most
    dropped: int


def seen_by(version: Version, routing: Routing, sequence: int) -> Seen:
    choices = [choice for step in version.record.choices for choice in step]
    experts = torch.cat([choice.experts for choice in choices])  # (T L steps, k)
    kept = torch.cat([torch.ones_like(c.experts, dtype=torch.bool) if c.kept is None else c.kept for c in choices])
    weights = torch.cat([choice.weights for choice in choices])
    groups = experts // (routing.experts // routing.groups)
    samples = zip(experts.split(sequence), kept.split(sequence), strict=True)
    return Seen(
        sum(len(set(row)) for row in experts.tolist()),
        (weights.sum(1) - 1).abs().max().item(),
        max(len(set(row)) for row in groups.tolist()),
        max(int(torch.bincount(sample[here], minlength=routing.experts).max()) for sample, here in samples),
        int((~kept).sum()),
    )


def claim_router(run: Run, trained: dict[str, Trained]) -> None:
    """What a router must hold to in every layer and step, in every version."""
    args = run.args
    chosen = args.top_k * args.batch * args.sequence * args.layers * args.steps
    for name, routing in ways(args).items():
        mine = {what: seen_by(made, routing, args.sequence) for what, made in trained[name].versions.items()}
        if not (everyone := run.job.gather(mine)):
            continue
        seen = {
            what: Seen(*zip(*(rank[what] for rank in everyone), strict=True)) for what in mine
        }  # of tuples, by rank

        def claim(
            what: str, formula: str, expected: float, measured: Callable[[Seen], float], most: float = 0.0
        ) -> None:
            cases = [(f"{what} ({version})", expected, measured(each)) for version, each in seen.items()]  # noqa: B023
            run.evidence.each(what, formula, cases, most)

        claim(f"different experts for each token, {name}", f"kbsL in each step: {chosen:,}", chosen,
              lambda s: sum(s.different))  # fmt: skip
        if routing.sums_to_one:
            rounding = 4 * torch.finfo(run.dtype).eps
            claim(f"the weights of a token, {name}", "sum to 1: error 0", 0, lambda s: max(s.error), rounding)
        if routing.groups > 1:
            claim(f"groups of a token, of {routing.groups}", f"at most {routing.top_groups}: excess 0", 0,
                  lambda s, most=routing.top_groups: max(0, max(s.groups) - most))  # fmt: skip
        if routing.capacity:
            most = math.ceil(Fraction(str(routing.capacity)) * args.top_k * args.sequence / args.experts)
            claim("tokens that an expert took of a sample", f"at most ceil(cks/E) = {most}: excess 0", 0,
                  lambda s, most=most: max(0, max(s.taken) - most))  # fmt: skip
            share = sum(seen["engine"].dropped) / chosen
            run.say(f"\ncapacity {routing.capacity:g}: {share:.1%} of the choices were dropped")


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
    if run.args.steps < FALLEN:
        return
    # A bias goes by steps of one size, and with few of them may still be on its way: only the loss must have done it.
    *before, last = (quarter[:, 1].mean().item() for quarter in found["auxiliary loss"].tensor_split(4))
    what = f"MaxVio falls, auxiliary loss: {last:.3f} in the last quarter of the steps"
    claim(what, f"below {max(before):.3f} in the worst before: excess 0", 0, max(0.0, last - max(before)))
