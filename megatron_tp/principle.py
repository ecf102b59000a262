"""Lecture 04: tensor parallelism, the principle (Megatron-LM TP 原理). Shoeybi et al. 2019 (1909.08053), section 3.

    torchrun --nproc_per_node=8 megatron_tp/principle.py

A product Y = XA can be cut over the ranks by the columns of A or by its rows. By columns, then by rows, makes an MLP,
or an attention, that needs one all-reduce forward and one backward. A is (in, out), as on the slide.

b samples, s tokens in a sample, h hidden, d head size, V vocabulary, t ranks, i this rank
"""

import argparse
import math
import sys
import time
from functools import partial
from textwrap import fill

import torch
import torch.nn.functional as F
from einops import rearrange
from tabulate import tabulate
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.text import Text
from core.proof.arguments import check_cuts
from core.proof.lesson import Lesson, Run
from core.proof.oracle import TOLERANCE, relative_difference, worst_difference
from core.proof.plot import bars
from core.proof.training import stop_unless_finite
from core.shards import LocalTensor
from megatron_tp.dense import COLUMNS, ROWS, WHOLE, Cuts, Dense, Weights, joined, part, whole

MLP: Cuts = {"A": COLUMNS, "A bias": COLUMNS, "B": ROWS, "B bias": WHOLE}
ATTENTION: Cuts = {"Q": COLUMNS, "K": COLUMNS, "V": COLUMNS, "O": ROWS, "O bias": WHOLE}
MODEL: Cuts = MLP | ATTENTION | {"token": WHOLE, "position": WHOLE, "logits": WHOLE}
EXPERIMENTS: dict[str, tuple[str, Cuts]] = {  # what rank i computes; how input, weights and result are cut
    "column": ("Y_i = f(X) A_i", {"X": WHOLE, "A": COLUMNS, "Y": COLUMNS}),
    "row": ("Y = g(X_i A_i)", {"X": COLUMNS, "A": ROWS, "Y": WHOLE}),
    "mlp": ("Z = g(GeLU(f(X) A_i + bias_i) B_i) + bias", {"X": WHOLE} | MLP | {"Z": WHOLE}),
    "attention": ("Z = g(heads_i(Q, K, V of f(X)) O_i) + bias", {"X": WHOLE} | ATTENTION | {"Z": WHOLE}),
}


class Split:
    """The four experiments on rank i, where the weights `w`, and the X of the row split, are this rank's parts."""

    def __init__(self, axis: Axis, head_size: int):
        self.f = partial(comm.copy_to, axis=axis)  # identity forward, all-reduce backward
        self.g = partial(comm.reduce_from, axis=axis)  # all-reduce forward, identity backward
        self.d = head_size

    def column(self, x: Tensor, w: Weights) -> Tensor:
        # Through its own columns each rank finds one term of X's gradient: f adds the terms up.
        return self.f(x) @ w["A"]

    def row(self, x: Tensor, w: Weights) -> Tensor:
        # XA = X_1 A_1 + ... + X_t A_t: each rank has one term, g adds them up.
        return self.g(x @ w["A"])

    def mlp(self, x: Tensor, w: Weights) -> Tensor:
        y = F.gelu(self.f(x) @ w["A"] + w["A bias"])  # (b, s, 4h/t): the part of Y that the rows of B_i need
        return self.g(y @ w["B"]) + w["B bias"]  # the bias after the sum, or it would come t times

    def attention(self, x: Tensor, w: Weights) -> Tensor:
        x = self.f(x)
        # The columns of Q_i, K_i and V_i, d at a time, are whole heads, which do not need each other.
        q, k, v = (rearrange(x @ w[name], "b s (heads d) -> b heads s d", d=self.d) for name in "QKV")
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.d)).masked_fill(future, float("-inf"))
        heads = rearrange(scores.softmax(-1) @ v, "b heads s d -> b s (heads d)")  # (b, s, h/t)
        return self.g(heads @ w["O"]) + w["O bias"]


# ---- The four experiments --------------------------------------------------------------------------------------------


def experiment(run: Run, name: str, axis: Axis, d: int) -> tuple[str, ...]:
    """Forward, then backward from a given gradient of the result, cut and dense. Rank 0 gets its row of the table."""
    (formula, cuts), axis = EXPERIMENTS[name], axis.labelled(name)
    *given, result = cuts
    w = {n: part(run, n, cuts[n], axis).requires_grad_() for n in given}
    forward = Ledger()
    with axis.ledger.recording_to(forward):
        y = getattr(Split(axis, d), name)(w["X"], w)
    gradients = torch.autograd.grad(y, [*w.values()], part(run, f"d {result}", cuts[result], axis))
    ahead, both = (ledger.traffic["all-reduce", axis.name] for ledger in (forward, axis.ledger))

    shapes = "\n".join(" x ".join(map(str, tensor.shape)) for tensor in (*w.values(), y))
    everyone = run.job.gather((shapes, ahead.messages, both.messages - ahead.messages, both.elements))
    results = joined(run, {result: y}, cuts, axis)
    gradients = joined(run, dict(zip(given, gradients, strict=True)), cuts, axis)
    if not everyone:
        return ()

    w = {n: whole(run, n).requires_grad_() for n in given}
    y = getattr(Dense(d), name)(w["X"], w)
    expected = torch.autograd.grad(y, [*w.values()], whole(run, f"d {result}"))
    expected = dict(zip(given, expected, strict=True))
    claim, tolerance = run.evidence.claim, TOLERANCE[run.dtype]
    claim(f"{name}: result equals dense", SAME, 0, worst_difference(results, {result: y.detach()}), tolerance.loss)
    claim(f"{name}: all gradients equal dense", SAME, 0, worst_difference(gradients, expected), tolerance.gradient)
    shapes, *counts, elements = zip(*everyone, strict=True)
    for what, letter, measured in zip(("forward", "backward"), "gf", counts, strict=True):
        n = formula.count(f"{letter}(") * (axis.size > 1)
        slide = f"{n} {letter} in {formula}" if axis.size > 1 else "0: one rank sends nothing"
        run.evidence.on_ranks(f"{name}: all-reduces {what}", slide, n, measured)
    if result == "Z":
        n = 4 * y.numel() * (axis.size - 1) // axis.size
        run.evidence.on_ranks(f"{name}: elements a rank sends", f"4bsh(t-1)/t = {n:,}", n, elements, 1e-9 * n)
    of = "\n".join(" x ".join(map(str, whole(run, n).shape)) for n in cuts)
    how = "\n".join({COLUMNS: "columns", ROWS: "rows", WHOLE: "not cut"}[cut] for cut in cuts.values())
    measured = (" or ".join(map(str, dict.fromkeys(ranks))) for ranks in (shapes, *counts))  # one, if ranks agree
    return f"{name}\n{fill(formula, 30)}", "\n".join(cuts), of, how, *measured


def show_columns_first(run: Run, axis: Axis) -> None:
    """Were the first cut of the MLP by rows, GeLU would have to wait for g: it is not linear."""
    term = part(run, "X", COLUMNS, axis) @ part(run, "A", ROWS, axis)
    early, late = comm.reduce_from(F.gelu(term), axis), F.gelu(comm.reduce_from(term, axis))
    if axis.size > 1:
        apart = ((early - late).norm() / late.norm()).item()
        run.say("Were the first product cut by rows, GeLU would have to wait for g, because it is not linear: relative")
        run.say(f"difference of GeLU(X_1 A_1) + ... from GeLU(X_1 A_1 + ...): {apart:.3f}\n")


def diagram(h: int, t: int) -> str:
    """The bands of A and B that the ranks hold."""
    bands = "|".join(f" A_{i} " for i in range(t))
    titles = f"A {h} x {4 * h}: {4 * h // t} columns a rank", f"B {4 * h} x {h}: {4 * h // t} rows a rank"
    return tabulate([(f"|{bands}|", f"| B_{i} |") for i in range(t)], titles, "plain")


# ---- The training ----------------------------------------------------------------------------------------------------


def sgd_step(net: Split | Dense, w: Weights, lr: float, tokens: Tensor, targets: Tensor) -> tuple[float, Weights]:
    """Train one layer, without norms, by plain SGD, which hides no wrong scale. The mean loss, and its gradients."""
    x = w["token"][tokens] + w["position"]
    x = x + net.attention(x, w)
    x = x + net.mlp(x, w)
    loss = F.cross_entropy((x @ w["logits"]).flatten(0, 1), targets.flatten())
    gradients = dict(zip(w, torch.autograd.grad(loss, [*w.values()]), strict=True))
    with torch.no_grad():
        for name, gradient in gradients.items():
            w[name] -= lr * gradient
    return loss.item(), gradients


def train(run: Run, axis: Axis, d: int) -> None:
    """Train on all ranks, and on rank 0 also in one process, and compare the two after every step."""
    args, job, text = run.args, run.job, Text(run.args.data, run.args.sequence)
    w = {n: part(run, n, cut, axis).requires_grad_() for n, cut in MODEL.items()}
    reference = {n: whole(run, n).requires_grad_() for n in MODEL}
    worst = [0.0, 0.0, 0.0]
    bar = run.steps()
    for step in bar:
        tokens, targets = (t.to(job.device) for t in text.batch(args.seed, step, args.batch))
        began = time.perf_counter()
        loss, gradients = sgd_step(Split(axis, d), w, args.lr, tokens, targets)
        # NaN or Inf on one rank makes this sum NaN or Inf on all, so that all stop together.
        total = comm.all_reduce(sum(g.double().abs().sum() for g in gradients.values()), axis.labelled("check"))
        stop_unless_finite(run, step, loss + total.item(), [LocalTensor(n, g, None) for n, g in gradients.items()])
        run.training_seconds += time.perf_counter() - began
        run.tokens += targets.numel()
        run.losses.append(loss)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        losses, gradients, weights = job.gather(loss), *(joined(run, x, MODEL, axis) for x in (gradients, w))
        if job.rank == 0:
            loss, expected = sgd_step(Dense(d), reference, args.lr, tokens, targets)
            run.reference_losses.append(loss)
            apart = max(relative_difference(mine, loss) for mine in losses)
            apart = apart, worst_difference(gradients, expected), worst_difference(weights, reference)
            worst = [*map(max, worst, apart)]
            if run.dtype != torch.float64:  # two right runs of few bits drift apart: compare each step from one state
                for name, value in weights:
                    reference[name].data.copy_(value)
    if job.rank == 0:
        for what, value, limit in zip(("loss", "gradient", "parameter"), worst, TOLERANCE[run.dtype], strict=True):
            run.evidence.claim(f"training: every {what} equals dense, all steps", SAME, 0, value, limit)


def lesson(run: Run) -> None:
    h, t = run.args.hidden, run.job.world_size
    run.mesh = {"tp": t}
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=t)["tp"]
    run.say(f"The MLP: rank i holds A_i and B_i.\n\n{diagram(h, t)}\n")
    run.say(f"Attention: Q, K and V like A, {run.args.heads // t} of {run.args.heads} heads a rank; O like B.")
    run.say("f: identity forward, all-reduce backward. g: all-reduce forward, identity backward.\n")
    rows = [experiment(run, name, axis, h // run.args.heads) for name in EXPERIMENTS]
    header = ("experiment", "tensor", "whole", "cut by", f"on each of {t} ranks", "all-reduces\nforward", "\nbackward")
    run.say(tabulate(rows, header, "simple_grid", disable_numparse=True) + "\n")
    if run.args.plot and run.job.rank == 0:
        counts = {way: [float(row[i]) for row in rows] for way, i in (("forward, g", -2), ("backward, f", -1))}
        bars(run.args.plot, f"All-reduces on {t} ranks", "all-reduces", [*EXPERIMENTS], counts)
    show_columns_first(run, axis.labelled("rows first"))
    train(run, axis.labelled("training"), h // run.args.heads)
    sent = run.job.gather(axis.ledger.traffic["all-reduce", "tp training"].elements / run.args.steps)
    others = run.job.gather(sum(n.messages for (kind, _), n in axis.ledger.traffic.items() if kind != "all-reduce"))
    if run.job.rank == 0:
        n = 8 * run.args.batch * run.args.sequence * h * (t - 1) // t
        run.evidence.on_ranks("training: elements a layer sends in a step", f"8bsh(t-1)/t = {n:,}", n, sent, 1e-9 * n)
        run.evidence.on_ranks("messages other than all-reduces", "0", 0, others)


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError unless each rank can have as many whole heads, and the text is long enough."""
    for name, default in DEFAULTS.items():
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive and finite; use --{name} {default}")
    check_cuts(args, ranks)
    Text(args.data, args.sequence)


DEFAULTS = {"batch": 8, "sequence": 32, "hidden": 64, "heads": 8, "lr": 0.1}
SAME = "largest relative difference 0"

if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "04",
        "Megatron-LM tensor parallelism: principle",
        "Megatron-LM TP 原理",
        "A product cut by columns or by rows; an MLP and an attention with one all-reduce forward and one backward.",
    )
    for name, default in DEFAULTS.items():
        frame.parser.add_argument(f"--{name}", type=type(default), default=default, help="default %(default)s")
    frame.parser.set_defaults(feed_forward=0)  # four times hidden
    sys.exit(frame.main(check, lesson))
