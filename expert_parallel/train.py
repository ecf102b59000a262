"""CODE 04: train a mixture of experts over the ranks (专家并行大规模训练), balanced and unbalanced side by side.

    torchrun --nproc_per_node=8 expert_parallel/train.py

Balance is not only a matter of learning. All ranks wait for the one whose experts have the most tokens, and a rank must
have the memory for what arrives there. So the two trainings are shown by rank: rows computed, rows that travel, bytes.

E experts, K for each token, N ranks
"""

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from tabulate import tabulate
from torch import Tensor, nn

from core.proof.lesson import Lesson, Run
from core.proof.memory import live_bytes
from core.proof.plot import bars
from expert_parallel.experts import Experts
from expert_parallel.gating import Routing
from expert_parallel.layers import expert_parameters
from expert_parallel.moe import MoEConfig
from expert_parallel.training import (
    ENOUGH,
    Trained,
    add_flags,
    add_parallel_flags,
    balance,
    check,
    claim_equal,
    ep_of,
    moe_of,
    train_with,
)

UNBALANCED, BALANCED = "unbalanced", "balanced"


@dataclass
class Work:
    """What a rank had to do, over all layers and steps, and what it holds."""

    rows: list[list[int]]  # computed by its experts, by step and layer
    sent: float  # elements of tokens, to and from the experts
    experts: int  # bytes of weights and Adam moments
    rest: int


def lesson(run: Run) -> None:
    moe = moe_of(run.args)
    ways = {
        UNBALANCED: replace(moe, routing=replace(moe.routing, aux=0.0, z=0.0, bias_rate=0.0)),
        BALANCED: moe,
    }
    trained: dict[str, Trained] = {}
    work: dict[str, list[Work]] = {}
    losses: dict[str, list[float]] = {}
    for name, each in ways.items():
        run.say(f"{name}: {told(each.routing)}")
        trained[name], mine = train_watched(run, each)
        losses[name], work[name] = list(run.losses), run.job.gather(mine)
    claim_equal(run, *trained.values())
    if run.job.rank == 0:
        show_balance(run, trained, losses)
        show_work(run, work)
        claim_work(run, trained, work)


def told(routing: Routing) -> str:
    ways = {"aux": "auxiliary loss", "z": "z-loss", "bias_rate": "bias, rate"}
    used = [f"{what} {getattr(routing, name):g}" for name, what in ways.items() if getattr(routing, name)]
    return f"top {routing.top_k} of {routing.experts}, {routing.score}, " + (
        ", ".join(used) or "nothing against imbalance"
    )


def train_watched(run: Run, moe: MoEConfig) -> tuple[Trained, Work]:
    """Train, and note how many rows the experts here compute."""
    rows: list[list[int]] = []

    def watch(model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, Experts)]

        def note(experts: Experts, arguments: tuple[Tensor, list[int]]) -> None:
            if experts is layers[0]:
                rows.append([])
            rows[-1].append(sum(arguments[1]))

        for layer in layers:
            layer.register_forward_pre_hook(note)

    trained = train_with(run, moe, ep_of(run.args, run.job.world_size), run.args.etp, run.args.dispatch, watch=watch)
    experts = set(expert_parameters(trained.model))

    def held(parameters: list[nn.Parameter]) -> int:
        state = trained.optimizer.state
        return live_bytes([*parameters, *(s for p in parameters for s in state.get(p, {}).values() if s.dim())])

    traffic = trained.mesh["ep"].ledger.traffic.items()
    ways = {"ep": ("all-to-all", "all-gather", "reduce-scatter"), "etp": ("all-to-all",)}
    return trained, Work(
        rows,
        sum(each.elements for (operation, axis), each in traffic if operation in ways.get(axis, ())),
        held([p for p in trained.model.parameters() if p in experts]),
        held([p for p in trained.model.parameters() if p not in experts]),
    )


def show_balance(run: Run, trained: dict[str, Trained], losses: dict[str, list[float]]) -> None:
    steps = run.args.steps
    rows = []
    for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
        row: list[float] = [step]
        for name, each in trained.items():
            row += [losses[name][step], *balance(each.loads[step])]
        rows.append(row)
    header = ["step", *(f"{name}\n{what}" for name in trained for what in ("loss", "entropy", "MaxVio"))]
    run.say(f"\nloss, and the load of the {run.args.experts} experts, mean over the layers")
    run.say(tabulate(rows, header, floatfmt=".3f"))


def show_work(run: Run, work: dict[str, list[Work]]) -> None:
    """Where the time and the memory go, by rank."""
    rows = [
        (rank, *(f(ranks[rank]) for ranks in work.values() for f in (
            lambda w: sum(map(sum, w.rows)), lambda w: max(map(max, w.rows)), lambda w: w.sent / run.args.steps
        ))) for rank in range(run.job.world_size)
    ]  # fmt: skip
    what = ("rows of its experts,\nall steps", "most in a layer\nat a time", "elements sent\na step")
    run.say(
        "\n"
        + tabulate(rows, ["rank", *(f"{name}:\n{each}" for name in work for each in what)], intfmt=",", floatfmt=",.0f")
    )
    for name, ranks in work.items():
        run.say(f"{name}: the experts take {slowest(ranks):.2f} times as long as with as many rows on each rank")
    one = work[BALANCED][0]
    sizes = f"{one.experts / 1e6:.2f} MB of experts and their Adam moments, {one.rest / 1e6:.2f} MB of the rest"
    run.say(f"a rank holds {sizes}\n")
    if run.args.plot:
        ranks = [f"rank {rank}" for rank in range(run.job.world_size)]
        bars(run.args.plot, "Rows that the experts of a rank computed", "rows", ranks,
             {name: [sum(map(sum, w.rows)) for w in each] for name, each in work.items()})  # fmt: skip


def slowest(ranks: list[Work]) -> float:
    """The rows that all wait for, the most of any rank in each layer and step, over the mean."""
    by_layer = torch.tensor([w.rows for w in ranks], dtype=torch.float64)  # (N, steps, L)
    return (by_layer.amax(0).sum() / by_layer.mean(0).sum()).item()


def claim_work(run: Run, trained: dict[str, Trained], work: dict[str, list[Work]]) -> None:
    args = run.args
    if args.dispatch == "all-to-all" and args.etp == 1 and not args.capacity:
        for name, each in trained.items():
            ep = each.mesh["ep"].size
            chosen = torch.stack(each.loads).sum((0, 1)).view(ep, -1).sum(1).tolist()
            computed = [sum(sum(map(sum, w.rows)) for w in work[name][i::ep]) for i in range(ep)]
            what = f"rows computed, {name}"
            cases = [(f"{what}, ep {i}", *pair) for i, pair in enumerate(zip(chosen, computed, strict=True))]
            formula = "the choices of the experts there: " + " ".join(f"{n:,}" for n in chosen)
            run.evidence.each(what, formula, cases)
    if args.steps >= ENOUGH and args.top_k < args.experts:
        half = args.steps // 2
        uneven, even = (
            balance(torch.stack(trained[name].loads[half:]).flatten(0, 1))[1] for name in (UNBALANCED, BALANCED)
        )
        what, excess = f"MaxVio in the second half, balanced: {even:.3f}", max(0.0, even - uneven)
        run.evidence.claim(what, f"at most {uneven:.3f}, unbalanced: excess 0", 0, excess)


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks)
    if not (args.aux or args.bias_rate):
        raise ValueError("--aux 0 --bias-rate 0: nothing would balance the load; use --aux 0.05")


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert-parallel training at scale",
        "专家并行大规模训练",
        "A GPT with mixtures of experts, balanced and unbalanced: loss, load, and what each rank has to do.",
    )
    add_flags(frame, layers=2, feed_forward=128)
    add_parallel_flags(frame)
    frame.parser.set_defaults(steps=40, aux=0.05)
    sys.exit(frame.main(refuse, lesson))
