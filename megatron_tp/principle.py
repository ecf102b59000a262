"""Lecture 04: tensor parallelism, the principle (Megatron-LM TP 原理). Shoeybi et al. 2019 (1909.08053), section 3.

    torchrun --nproc_per_node=8 megatron_tp/principle.py

A product Y = XA can be sharded over the ranks by the columns of A or by its rows. By columns, then by rows, makes an
MLP, or an attention, that needs one all-reduce forward and one backward. A is (in, out), as on the slide.

read: principle.py:34-84; then evidence/dense.py

b samples, s tokens in a sample, h hidden, d head size, V vocabulary, t ranks, i this rank
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.lesson import Lesson, Run
from megatron_tp.evidence import dense
from megatron_tp.evidence.dense import COLUMNS, REPLICATED, ROWS, Weights
from megatron_tp.evidence.principle import Experiment, show_columns_first, show_mlp, show_table, train_one_layer
from megatron_tp.evidence.rules import check_principle

# ---- Four products, on rank i, whose weights w are its shards --------------------------------------------------------


def f(x: Tensor, axis: Axis) -> Tensor:
    """Identity forward, all-reduce backward."""
    return comm.copy_to(x, axis)


def g(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce forward, identity backward."""
    return comm.reduce_from(x, axis)


def column(x: Tensor, w: Weights, axis: Axis) -> Tensor:
    """X (b, s, h) replicated, A_i (h, 4h/t): Y_i (b, s, 4h/t), the columns of Y."""
    # Through its own columns each rank finds one term of X's gradient: f adds the terms up.
    return f(x, axis) @ w["A"]


def row(x: Tensor, w: Weights, axis: Axis) -> Tensor:
    """X_i (b, s, h/t), A_i (h/t, 4h): Y (b, s, 4h), replicated."""
    # XA = X_1 A_1 + ... + X_t A_t: each rank has one term, g adds them up.
    return g(x @ w["A"], axis)


def mlp(x: Tensor, w: Weights, axis: Axis) -> Tensor:
    """X (b, s, h) replicated, A_i (h, 4h/t), B_i (4h/t, h): Z (b, s, h), replicated."""
    y = F.gelu(f(x, axis) @ w["A"] + w["A bias"])  # (b, s, 4h/t): just the columns of Y that the rows of B_i need
    return g(y @ w["B"], axis) + w["B bias"]  # the bias after the sum, or it would be added t times


def attention(x: Tensor, w: Weights, axis: Axis, d: int) -> Tensor:
    """X (b, s, h) replicated, Q_i, K_i and V_i (h, h/t), O_i (h/t, h): Z (b, s, h), replicated."""
    x = f(x, axis)
    # The columns of Q_i, K_i and V_i, d at a time, are full heads, which do not need each other.
    q, k, v = (rearrange(x @ w[name], "b s (heads d) -> b heads s d", d=d) for name in "QKV")
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(future, float("-inf"))
    heads = rearrange(scores.softmax(-1) @ v, "b heads s d -> b s (heads d)")  # (b, s, h/t)
    return g(heads @ w["O"], axis) + w["O bias"]


# How each tensor is sharded: the dimension that the ranks divide among them, or none.
MLP = {"A": COLUMNS, "A bias": COLUMNS, "B": ROWS, "B bias": REPLICATED}
ATTENTION = {"Q": COLUMNS, "K": COLUMNS, "V": COLUMNS, "O": ROWS, "O bias": REPLICATED}
ENDS = {"token": REPLICATED, "position": REPLICATED, "logits": REPLICATED}


def one_layer(w: Weights, tokens: Tensor, axis: Axis, d: int) -> Tensor:
    """A GPT of one layer, without norms: tokens (b, s) to logits (b, s, V)."""
    x = w["token"][tokens] + w["position"]
    x = x + attention(x, w, axis, d)
    x = x + mlp(x, w, axis)
    return x @ w["logits"]


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    h, heads, t = run.args.hidden, run.args.heads, run.job.world_size
    d = h // heads
    run.mesh = {"tp": t}
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=t)["tp"]
    run.say(f"The MLP: rank i has A_i and B_i and nothing else of A and B.\n\n{show_mlp(h, t)}\n")
    run.say(f"Attention: Q, K and V like A, {heads // t} of {heads} heads a rank; O like B.")
    run.say("f: identity forward, all-reduce backward. g: all-reduce forward, identity backward (1909.08053).")
    run.say("(In lecture 06, as in 2205.05198, g is an all-gather forward, and this g is called f̄.)\n")
    experiments = [
        Experiment(
            "column", "Y_i = f(X) A_i", column, dense.product,
            {"X": REPLICATED, "A": COLUMNS}, ("Y", COLUMNS), forward=0, backward=1,
        ),
        Experiment(
            "row", "Y = g(X_i A_i)", row, dense.product,
            {"X": COLUMNS, "A": ROWS}, ("Y", REPLICATED), forward=1, backward=0,
        ),
        Experiment(
            "mlp", "Z = g(GeLU(f(X) A_i + bias_i) B_i) + bias", mlp, dense.mlp,
            {"X": REPLICATED} | MLP, ("Z", REPLICATED), forward=1, backward=1,
        ),
        Experiment(
            "attention", "Z = g(heads_i(Q, K, V of f(X)) O_i) + bias", partial(attention, d=d),
            partial(dense.attention, d=d),
            {"X": REPLICATED} | ATTENTION, ("Z", REPLICATED), forward=1, backward=1,
        ),
    ]  # fmt: skip
    show_table(run, experiments, axis)
    show_columns_first(run, axis.labelled("rows first"))
    model = partial(one_layer, axis=axis.labelled("training"), d=d)
    train_one_layer(run, axis, MLP | ATTENTION | ENDS, model, partial(dense.one_layer, d=d))


def add_flags(frame: Lesson) -> None:
    for name, default in {"batch": 3, "sequence": 48, "hidden": 80, "heads": 16, "lr": 0.1}.items():
        frame.parser.add_argument(f"--{name}", type=type(default), default=default, help="default %(default)s")
    frame.parser.set_defaults(feed_forward=0, clip=math.inf)  # four times hidden; gradients as they are


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "04",
        "Megatron-LM tensor parallelism: principle",
        "Megatron-LM TP 原理",
        "A product sharded by columns or by rows; an MLP and an attention with one all-reduce forward, one backward.",
    )
    add_flags(frame)
    sys.exit(frame.main(check_principle, lesson))
