"""Train a parallel GPT beside the same GPT in one process, and compare the two after every step.

What is parallel is the topic's: it gives the model, and the functions that compute its gradients and clip them.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core import comm
from core.gpt import GPT, GPTConfig
from core.launch import Stop
from core.lesson import Lesson, Run
from core.mesh import Axis
from core.oracle import TOLERANCE, Oracle, relative_difference, worst_difference
from core.seeded import Draw
from core.shards import Piece, join, shard_of
from core.text import VOCABULARY, Text


def add_model_flags(lesson: Lesson, **defaults: Any) -> None:
    """The flags of every lesson that trains the GPT. `defaults` replace the usual ones, by name."""
    flag = partial(_flag, lesson, defaults)
    flag("batch", 16, "samples in a step")
    flag("layers", 8, "layers of the whole model")
    flag("hidden", 64)
    flag("heads", 4)
    flag("feed-forward", 0, "0: four times hidden")
    flag("sequence", 64, "tokens in a sample")
    flag("attention", "sdpa", choices=("sdpa", "softmax"))
    flag("dropout", 0.0, "needs --attention softmax")
    lesson.parser.add_argument("--untied", action="store_true", help="give the head a weight of its own")
    flag("lr", 1e-3, "learning rate of AdamW")
    flag("clip", 1.0, "largest global gradient norm")


def _flag(
    lesson: Lesson, defaults: dict[str, object], name: str, usual: object, what: str = "", **more: object
) -> None:
    default = defaults.get(name.replace("-", "_"), usual)
    lesson.parser.add_argument(
        f"--{name}", type=type(usual), default=default, help=f"{what} (default %(default)s)".strip(), **more
    )


def configuration(args: argparse.Namespace) -> GPTConfig:
    return GPTConfig(
        vocabulary=VOCABULARY,
        sequence=args.sequence,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        feed_forward=args.feed_forward,
        dropout=args.dropout,
        attention=args.attention,
        tied=not args.untied,
    )


def check_model(args: argparse.Namespace) -> GPTConfig:
    """The model's sizes; raises ValueError when the arguments of `add_model_flags` cannot make a training run."""
    config = configuration(args)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1; use --batch 8")
    for name, usual in (("lr", 1e-3), ("clip", 1.0)):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive and finite; use --{name} {usual}")
    Text(args.data, args.sequence)
    return config


def clip_and_total(
    parameters: Iterable[nn.Parameter], counted: Iterable[Tensor], axes: Sequence[Axis], clip: float, loss: Tensor
) -> tuple[float, float]:
    """Clip by the norm of the *whole* model's gradient, as one process would; returns (norm, loss).

    Args:
        counted: the gradients that this rank adds to the norm: over the ranks of `axes`, each number once.
        clip: largest global norm.
        loss: this rank's share of the loss, a scalar; travels along, so that all ranks know the sum.
    """
    squares = [g.double().square().sum() for g in counted]
    totals = torch.stack([sum(squares, torch.zeros((), dtype=torch.float64, device=loss.device)), loss.double()])
    for axis in axes:
        comm.all_reduce(totals, axis.within("norm"))
    square_norm, total_loss = totals.tolist()
    norm = square_norm**0.5
    nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm, dtype=torch.float64))
    return norm, total_loss


class Optimizer(Protocol):
    """What `train` needs of an optimizer."""

    state: dict[Tensor, dict[str, Tensor]]

    def step(self) -> object: ...
    def zero_grad(self) -> None: ...


class Comparison:
    """The largest relative differences from one process so far."""

    loss = gradient = norm = parameter = 0.0

    def claim(self, run: Run, norm_note: str = "") -> None:
        tolerance, claim = TOLERANCE[run.dtype], run.evidence.claim
        same = "largest relative difference 0"
        claim("losses equal one process, all steps", same, 0, self.loss, tolerance.loss)
        claim("every gradient equals one process, all steps", same, 0, self.gradient, tolerance.gradient)
        claim(f"the global gradient norm{norm_note}", "relative difference 0", 0, self.norm, tolerance.loss)
        claim("every parameter after every step", same, 0, self.parameter, tolerance.parameter)


def train(
    run: Run,
    model: GPT,
    optimizer: Optimizer,
    oracle: Oracle | None,
    forward_backward: Callable[[int, Tensor, Tensor, Draw], Tensor],
    clip: Callable[[Tensor], tuple[float, float]],
) -> Comparison:
    """Train `model` and the oracle for `--steps` steps of `--batch` samples of `--data`, and compare them.

    Args:
        model: this rank's part of the GPT, its parameters named as in the whole and marked where cut.
        oracle: the same GPT in one process, on rank 0; None elsewhere.
        forward_backward: (step, inputs, targets, draw) to this rank's share of the loss; leaves in `.grad` what the
            whole model's gradient is for the parameters, or the parts of parameters, on this rank.
        clip: this rank's share of the loss to (global gradient norm, loss), as `clip_and_total`.
    """
    args, worst = run.args, Comparison()
    text = Text(args.data, args.sequence)
    exact = run.dtype == torch.float64  # then the oracle trains on its own from first to last; see Oracle.adopt
    bar = run.steps()
    for step in bar:
        inputs, targets = (t.to(run.job.device) for t in text.batch(args.seed, step, args.batch))
        samples = Draw(args.seed, step, 0)

        began = time.perf_counter()
        optimizer.zero_grad()
        share = forward_backward(step, inputs, targets, samples)
        # Gradients as they were before clipping: a wrong scale must show.
        gradients = _pieces(model, lambda p: p.grad.clone() if p.requires_grad else None)
        norm, loss = clip(share)
        stop_unless_finite(run, step, norm + loss, gradients)
        optimizer.step()
        run.training_seconds += time.perf_counter() - began
        run.tokens += targets.numel()
        run.losses.append(loss)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        # All from the CPU: rank 0 has no part in the GPUs of other ranks.
        whole_gradients = _gathered(run, gradients)
        weights = _gathered(run, _pieces(model, lambda p: p.detach()))
        states = {} if exact else _gathered(run, _states(model, optimizer))
        if oracle:
            run.reference_losses.append(oracle.step(inputs, targets, samples))
            worst.loss = max(worst.loss, relative_difference(loss, oracle.loss))
            worst.gradient = max(worst.gradient, worst_difference(whole_gradients, oracle.gradients))
            worst.norm = max(worst.norm, relative_difference(norm, oracle.norm))
            worst.parameter = max(worst.parameter, worst_difference(weights, oracle.parameters()))
            if not exact:
                oracle.adopt(weights, states)
    return worst


def _pieces(model: GPT, of: Callable[[nn.Parameter], Tensor | None]) -> list[Piece]:
    found = [(name, p, of(p)) for name, p in model.named_parameters()]
    return [Piece(model.whole_name(name), value, shard_of(p)) for name, p, value in found if value is not None]


def _states(model: GPT, optimizer: Optimizer) -> list[Piece]:
    """The optimizer's state, named (parameter, key)."""
    return [
        Piece((model.whole_name(name), key), value, shard_of(p) if value.shape == p.shape else None)
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    ]


def _gathered(run: Run, pieces: list[Piece]) -> list[tuple[object, Tensor]]:
    """The whole tensors from all ranks' pieces, on rank 0."""
    everyone = run.job.gather([piece._replace(value=piece.value.cpu()) for piece in pieces])
    return list(join(piece for rank in everyone for piece in rank))


def stop_unless_finite(run: Run, step: int, total: float, gradients: list[Piece]) -> None:
    """Stop all ranks together, saying where, when the loss or a gradient is NaN or infinite.

    Args:
        total: the loss plus the global norm, known to all ranks: not finite when anything is not.
    """
    if math.isfinite(total):
        return
    bad = [piece.name for piece in gradients if not piece.value.isfinite().all()]
    found = [f"{name} on rank {rank}" for rank, names in enumerate(run.job.gather(bad)) for name in names]
    shown = ", ".join(found[-3:]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    where = f"the gradient of {shown}" if found else "the loss or the gradients' global norm"
    raise Stop(f"NaN or Inf at step {step} in {where}; try a smaller --lr than {run.args.lr}")
