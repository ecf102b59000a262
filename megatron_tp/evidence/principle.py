"""Lecture 04: the four experiments against dense, and the training of one layer beside one process."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from core import comm
from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Axis
from core.model.precision import MasterOptimizer, wide
from core.proof.comparison import claim_equal
from core.proof.figures import bars, shards
from core.proof.lesson import Run
from core.proof.oracle import TOLERANCE, worst_difference
from core.proof.trainable import Replica
from core.proof.training import train
from core.shards import counted_once
from megatron_tp.evidence.dense import (
    COLUMNS,
    REPLICATED,
    ROWS,
    Shards,
    Weights,
    full_tensor,
    gathered,
    local_tensor,
    shard_mark,
)

MOST_BANDS = 8
SAME = "largest relative difference 0"
WAYS = {COLUMNS: "columns", ROWS: "rows", REPLICATED: "replicated"}


@dataclass(frozen=True)
class Experiment:
    """One product on the ranks, and in one process."""

    name: str
    formula: str  # what rank i computes
    on_ranks: Callable[[Tensor, Weights, Axis], Tensor]
    dense: Callable[[Tensor, Weights], Tensor]
    shards: Shards  # of X and the weights
    result: tuple[str, int | None]  # its name, and how it is sharded
    forward: int  # all-reduces: the g in the formula
    backward: int  # the f in the formula


def show_mlp(h: int, t: int) -> str:
    """What each rank has: of A its own band of columns, of B its own band of rows."""
    titles = "rank", f"A {h} x {4 * h}:\n{4 * h // t} columns a rank", f"B {4 * h} x {h}:\n{4 * h // t} rows a rank"
    rows = [(i, _bands(i, t), f"| B_{i} |") for i in range(t)]
    return tabulate(rows, titles, "plain", disable_numparse=True)


def _bands(i: int, t: int) -> str:
    """The t bands of A's columns, of which rank i has one and other ranks the others, dots here."""
    name = f" A_{i} "
    if t <= MOST_BANDS:
        return "|" + "|".join(name if j == i else ".".center(len(name)) for j in range(t)) + "|"
    return f"|{f' {i} x . |' * (i > 0)}{name}|{f' {t - 1 - i} x . |' * (i < t - 1)}"  # no wider than a terminal


def show_table(run: Run, experiments: Sequence[Experiment], axis: Axis) -> None:
    """Make the experiments, and show which shards they had and how often they all-reduced."""
    rows = [_row(run, experiment, axis.labelled(experiment.name)) for experiment in experiments]
    ranks = f"each of {axis.size} ranks"
    header = ("experiment", "tensor", "full", "sharded by", ranks, "all-reduces\nforward", "\nbackward")
    run.say(tabulate(rows, header, "simple_grid", disable_numparse=True) + "\n")
    if run.job.rank == 0:
        for experiment in experiments:
            draw_shards(run, experiment, axis.size)
        counts = {way: [float(row[i]) for row in rows] for way, i in (("forward, g", -2), ("backward, f", -1))}
        title = f"All-reduces on {axis.size} ranks", f"{axis.size} 个 rank 上的 all-reduce 次数"
        run.draw(bars(title, "all-reduces", [e.name for e in experiments], counts), chart=True)


def draw_shards(run: Run, experiment: Experiment, t: int) -> None:
    """Which shard of X, of the weights and of the result is on which rank."""
    dims = experiment.shards | dict([experiment.result])
    zh = {COLUMNS: "按列", ROWS: "按行", REPLICATED: "每个 rank 一份"}
    tensors = [
        (name, full_tensor(run, name).shape[-2:], None if dim is None else dim % 2, (WAYS[dim], zh[dim]))
        for name, dim in dims.items()
        if full_tensor(run, name).dim() > 1
    ]
    run.draw(shards((f"{experiment.name}: {experiment.formula}",) * 2, tensors, t))


def _row(run: Run, experiment: Experiment, axis: Axis) -> tuple[str, ...]:
    """Forward, then backward from a given gradient of the result, sharded and dense. Rank 0 gets a row of the table."""
    name, formula = experiment.name, experiment.formula
    result, result_dim = experiment.result
    w = {n: local_tensor(run, n, dim, axis).requires_grad_() for n, dim in experiment.shards.items()}
    forward = Ledger()
    with axis.ledger.recording_to(forward):
        y = experiment.on_ranks(w["X"], w, axis)
    gradients = torch.autograd.grad(y, [*w.values()], local_tensor(run, f"d {result}", result_dim, axis))
    ahead, both = (ledger.traffic["all-reduce", axis.name] for ledger in (forward, axis.ledger))

    shapes = "\n".join(" x ".join(map(str, tensor.shape)) for tensor in (*w.values(), y))
    everyone = run.job.gather((shapes, ahead.messages, both.messages - ahead.messages, both.elements))
    results = gathered(run, {result: y}, {result: result_dim}, axis)
    gradients = gathered(run, dict(zip(w, gradients, strict=True)), experiment.shards, axis)
    if not everyone:
        return ()

    full = {n: full_tensor(run, n).double().requires_grad_() for n in w}
    y = experiment.dense(full["X"], full)
    expected = torch.autograd.grad(y, [*full.values()], full_tensor(run, f"d {result}").double())
    expected = dict(zip(full, expected, strict=True))
    tolerance = TOLERANCE[run.precision.name].gradient
    for what, difference in (
        ("result equals", worst_difference(results, {result: y.detach()})),
        ("all gradients equal", worst_difference(gradients, expected)),
    ):
        run.evidence.claim(f"{name}: {what} dense", SAME, 0, difference, tolerance, correctness=True)
    shapes, *counts, elements = zip(*everyone, strict=True)
    directions = ("forward", "g", experiment.forward), ("backward", "f", experiment.backward)
    for (direction, letter, n), measured in zip(directions, counts, strict=True):
        slide = f"{n} {letter} in {formula}" if axis.size > 1 else "0: one rank sends nothing"
        run.evidence.on_ranks(f"{name}: all-reduces {direction}", slide, n if axis.size > 1 else 0, measured)
    if result == "Z":
        n = 4 * y.numel() * (axis.size - 1) // axis.size
        run.evidence.on_ranks(f"{name}: elements a rank sends", f"4bsh(t-1)/t = {n:,}; counted", n, elements, 1e-9 * n)
    dims = experiment.shards | {result: result_dim}
    of = "\n".join(" x ".join(map(str, full_tensor(run, n).shape)) for n in dims)
    how = "\n".join(WAYS[dim] for dim in dims.values())
    measured = (" or ".join(map(str, dict.fromkeys(ranks))) for ranks in (shapes, *counts))  # one, if ranks agree
    return f"{name}\n{fill(formula, 26)}", "\n".join(dims), of, how, *measured


def show_columns_first(run: Run, axis: Axis) -> None:
    """Were the first product of the MLP sharded by rows, GeLU would have to wait for g: it is not linear."""
    term = local_tensor(run, "X", COLUMNS, axis) @ local_tensor(run, "A", ROWS, axis)
    early, late = comm.reduce_from(F.gelu(term), axis), F.gelu(comm.reduce_from(term, axis))
    if axis.size > 1:
        apart = ((early - late).norm() / late.norm()).item()
        run.say("Were the first product sharded by rows, GeLU would have to wait for g, because it is not linear:")
        run.say(f"relative difference of GeLU(X_1 A_1) + ... from GeLU(X_1 A_1 + ...): {apart:.3f}\n")


# ---- The training ----------------------------------------------------------------------------------------------------

Logits = Callable[[Weights, Tensor], Tensor]


class Parameters(nn.ParameterDict):
    """The weights of the layer, by the slide's letters, as `core.proof.training` reads a model."""

    def full_name(self, name: str) -> str:
        return name


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(logits.flatten(0, 1)), targets.flatten())


class DenseTraining:
    """The one layer in one process: what `core.proof.training.train` needs of an oracle. Plain SGD hides no scale."""

    def __init__(self, run: Run, names: Iterable[str], model: Logits):
        self.weights = {name: full_tensor(run, name).double().requires_grad_() for name in names}
        self.model, self.lr = model, run.args.lr
        self.loss = self.norm = 0.0
        self.gradients: dict[str, Tensor] = {}

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> None:
        self.forward_backward(inputs, targets, step)
        self.update(self.gradients.items())

    def forward_backward(self, inputs: Tensor, targets: Tensor, step: int) -> None:
        loss = mean_loss(self.model(self.weights, inputs), targets)
        gradients = torch.autograd.grad(loss, [*self.weights.values()])
        self.gradients = dict(zip(self.weights, gradients, strict=True))
        self.loss = loss.item()

    @torch.no_grad()
    def update(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        gradients = dict(gradients)
        self.norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
        for name, gradient in gradients.items():
            self.weights[name] -= self.lr * gradient.to(self.weights[name])

    def adopt(self, weights: Iterable[tuple[str, Tensor]], states: object = ()) -> None:
        """Go on from these weights; SGD has no state."""
        for name, value in weights:
            self.weights[name].data.copy_(value)

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.weights.items()}


def train_one_layer(run: Run, axis: Axis, shards: Shards, model: Logits, dense: Logits) -> None:
    """Train on all ranks and in one process, compare, and claim what a layer sends in a step."""
    args, t = run.args, axis.size
    w = Parameters()
    for name, dim in shards.items():
        w[name] = nn.Parameter(local_tensor(run, name, dim, axis))
        w[name].grad_dtype = run.precision.gradients
        w[name].shard = shard_mark(w[name], dim, axis)

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = mean_loss(model(w, inputs), targets)
        loss.backward()
        return loss.detach() if axis.index == 0 else torch.zeros_like(loss)  # the same on all ranks: one counts it

    def norm_and_loss(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(w.parameters(), counted_once(w.parameters(), axis), [axis], largest, share)

    sgd = MasterOptimizer(w.parameters(), partial(torch.optim.SGD, lr=args.lr), run.precision.master)
    oracle = DenseTraining(run, shards, dense) if run.job.rank == 0 else None
    compared = train(run, {"": Replica(w, sgd, forward_backward, norm_and_loss)}, oracle)
    traffic = axis.ledger.traffic
    sent = run.job.gather(traffic["all-reduce", "tp training"].elements / args.steps)
    others = run.job.gather(sum(n.messages for (operation, _), n in traffic.items() if operation != "all-reduce"))
    if oracle:
        claim_equal(run, compared)
        n = 8 * args.batch * args.sequence * args.hidden * (t - 1) // t
        formula = f"8bsh(t-1)/t = {n:,}; counted"
        run.evidence.on_ranks("training: elements a layer sends in a step", formula, n, sent, 1e-9 * n)
        run.evidence.on_ranks("messages other than all-reduces", "0", 0, others)
