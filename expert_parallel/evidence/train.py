"""What `train.py` shows and claims: what each rank has to do where the load is balanced, and where it is not."""

from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

from core.model.gpt import GPT
from core.proof.figures import bars, lines
from core.proof.lesson import Run
from core.proof.memory import live_bytes
from expert_parallel.engine.experts import Experts
from expert_parallel.engine.routing import Routing
from expert_parallel.evidence.training import ENOUGH, Trained, Version, balance


@dataclass
class Work:
    """What a rank had to do, over all layers and steps, and what is on it."""

    rows: list[list[int]]  # computed by its experts, by step and layer
    sent: float  # elements of tokens, to and from the experts
    experts: int  # bytes of weights and Adam moments
    rest: int

    @property
    def total(self) -> int:
        return sum(map(sum, self.rows))


def described(routing: Routing) -> str:
    ways = {"aux": "auxiliary loss", "z": "z-loss", "bias_rate": "bias, rate"}
    used = [f"{what} {getattr(routing, name):g}" for name, what in ways.items() if getattr(routing, name)]
    against = ", ".join(used) or "nothing against imbalance"
    return f"top {routing.top_k} of {routing.experts}, {routing.score}, {against}"


def count_rows(model: GPT) -> list[list[int]]:
    """The rows that the experts here compute in the steps to come, by step and layer."""
    rows: list[list[int]] = []
    layers = [module for module in model.modules() if isinstance(module, Experts)]

    def note(experts: Experts, arguments: tuple[Tensor, list[int]]) -> None:
        if experts is layers[0]:
            rows.append([])
        rows[-1].append(sum(arguments[1]))

    for layer in layers:
        layer.register_forward_pre_hook(note)
    return rows


def work_of(version: Version, rows: list[list[int]]) -> Work:
    optimizer = version.optimizer

    def size(parameters: list) -> int:
        states = [s for p in parameters for s in optimizer.state_of(p).values() if s.dim()]
        return live_bytes([*parameters, *(optimizer.master[p] for p in parameters), *states])

    traffic = version.mesh["ep"].ledger.traffic.items()
    ways = {"ep": ("all-to-all", "all-gather", "reduce-scatter"), "etp": ("all-to-all",)}
    sent = sum(each.elements for (operation, axis), each in traffic if operation in ways.get(axis, ()))
    return Work(rows, sent, size(version.experts), size(version.rest))


def show_balance(run: Run, trained: dict[str, Trained]) -> None:
    steps = run.args.steps
    rows = []
    for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
        row: list[float] = [step]
        for each in trained.values():
            row += [each.losses[step], *balance(each.loads["engine"][step])]
        rows.append(row)
    header = ["step", *(f"{name}\n{what}" for name in trained for what in ("loss", "entropy", "MaxVio"))]
    run.say(f"\nloss, and the load of the {run.args.experts} experts, mean over the layers")
    run.say(tabulate(rows, header, floatfmt=".3f"))
    uneven = {name: [balance(load)[1] for load in each.loads["engine"]] for name, each in trained.items()}
    title = "Unevenness of the experts' load", "专家负载的不均衡"
    run.draw(lines(title, ("step", "步"), ("MaxVio, mean over the layers", "MaxVio，各层平均"), uneven))


def show_work(run: Run, work: dict[str, list[Work]]) -> None:
    """Where the time and the memory go, by rank."""
    rows = []
    for rank in range(run.job.world_size):
        row: list[float] = [rank]
        for ranks in work.values():
            row += [ranks[rank].total, max(map(max, ranks[rank].rows)), ranks[rank].sent / run.args.steps]
        rows.append(row)
    what = ("rows of its experts,\nall steps", "most in a layer\nat a time", "elements sent\na step")
    header = ["rank", *(f"{name}:\n{each}" for name in work for each in what)]
    run.say("\n" + tabulate(rows, header, intfmt=",", floatfmt=",.0f"))
    for name, ranks in work.items():
        run.say(f"{name}: the experts take {slowest(ranks):.2f} times as long as with as many rows on each rank")
    one = list(work.values())[-1][0]
    sizes = f"{one.experts / 1e6:.2f} MB of experts and their Adam moments, {one.rest / 1e6:.2f} MB of the rest"
    run.say(f"a rank holds {sizes}\n")
    columns = {name: [w.total for w in ranks] for name, ranks in work.items()}
    names = [f"rank {rank}" for rank in range(run.job.world_size)]
    title = "Rows that the experts of a rank computed", "各 rank 的专家计算的行数"
    run.draw(bars(title, ("rows", "行"), names, columns), chart=True)


def slowest(ranks: list[Work]) -> float:
    """The rows that all wait for, the most of any rank in each layer and step, over the mean."""
    by_layer = torch.tensor([w.rows for w in ranks], dtype=torch.float64)  # (N, steps, L)
    return (by_layer.amax(0).sum() / by_layer.mean(0).sum()).item()


def claim_work(run: Run, trained: dict[str, Trained], work: dict[str, list[Work]]) -> None:
    args = run.args
    if args.dispatch == "all-to-all" and args.etp == 1 and not args.capacity:
        for name, each in trained.items():
            ep = each.versions["engine"].mesh["ep"].size
            chosen = each.loads["engine"].sum((0, 1)).view(ep, -1).sum(1).tolist()
            computed = [sum(w.total for w in work[name][i::ep]) for i in range(ep)]
            what = f"rows computed, {name}"
            cases = [(f"{what}, ep {i}", *pair) for i, pair in enumerate(zip(chosen, computed, strict=True))]
            formula = "the choices of the experts there: " + " ".join(f"{n:,}" for n in chosen)
            run.evidence.each(what, formula, cases)
    if args.steps >= ENOUGH and args.top_k < args.experts:
        half = args.steps // 2
        uneven, even = (balance(each.loads["engine"][half:].flatten(0, 1))[1] for each in trained.values())
        what, excess = f"MaxVio in the second half, balanced: {even:.3f}", max(0.0, even - uneven)
        run.evidence.claim(what, f"at most {uneven:.3f}, unbalanced: excess 0", 0, excess)
