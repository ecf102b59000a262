"""Train a parallel GPT beside the same GPT in one process, and compare the two after every step.

What is parallel is the topic's: it gives the model, and the functions that compute its gradients and clip them.
"""

import argparse
import math
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.gpt import GPT, GPTConfig
from core.launch import Stop
from core.lesson import Lesson, Run
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


def check_cuts(args: argparse.Namespace, ranks: int, sequence: bool = False) -> None:
    """Raises ValueError unless heads, feed-forward and (with `sequence`) a sample can be cut into `ranks` equal parts.

    Says what would do for all of them together. Sizes below 1 are left to `GPTConfig`.
    """
    heads, hidden, feed_forward = args.heads, args.hidden, args.feed_forward
    if min(heads, hidden) < 1 or feed_forward < 0:
        return
    fitting = [a for a in range(ranks, hidden + 1, ranks) if hidden % a == 0]
    use: dict[str, int] = {}
    if heads % ranks or hidden % heads:
        use["heads"] = min(fitting, key=lambda a: abs(a - heads), default=max(1, round(heads / ranks)) * ranks)
        if hidden % use["heads"]:
            use["hidden"] = max(1, round(hidden / use["heads"])) * use["heads"]
    if feed_forward % ranks:  # 0, four times hidden, always fits
        use["feed-forward"] = max(1, round(feed_forward / ranks)) * ranks
    if sequence and args.sequence % ranks:
        use["sequence"] = max(1, round(args.sequence / ranks)) * ranks
    if not use:
        return
    sizes = [heads, feed_forward or heads, args.sequence if sequence else heads]
    usable = [] if hidden % heads else [t for t in range(2, heads + 1) if not any(size % t for size in sizes)][-8:]
    now = " ".join(f"--{name} {getattr(args, name.replace('-', '_'))}" for name in use)
    raise ValueError(
        f"{now}: heads must divide --hidden, and what is cut must be a multiple of the {ranks} ranks, so that each "
        f"gets as much; use {' '.join(f'--{name} {value}' for name, value in use.items())}"
        + (f", or --nproc_per_node one of {', '.join(map(str, usable))}" if usable else "")
    )


class Layout:
    """What `train` needs to know of a rank's part of the model; this one is that of an ordinary optimizer.

    Args:
        model: this rank's part of the GPT, its parameters named as in the whole and marked where cut.
    """

    compares_states = False  # whether the optimizer's state is compared with one process's, too

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step

    def gradients(self) -> list[Piece]:
        """Copies of the gradients, as they are before clipping."""
        return self._pieces(lambda p: None if p.grad is None else p.grad.clone())

    def weights(self) -> list[Piece]:
        return self._pieces(lambda p: p.detach())

    def states(self) -> list[Piece]:
        """The optimizer's state, named (parameter, key)."""
        return [
            Piece((self.model.whole_name(name), key), value, shard_of(p) if value.shape == p.shape else None)
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state[p].items()
        ]

    def _pieces(self, of: Callable[[nn.Parameter], Tensor | None]) -> list[Piece]:
        found = [(name, p, of(p)) for name, p in self.model.named_parameters()]
        return [Piece(self.model.whole_name(name), value, shard_of(p)) for name, p, value in found if value is not None]


class Comparison:
    """The largest relative differences from one process so far."""

    loss = gradient = norm = parameter = 0.0
    state: float | None = None  # where it is compared

    def after_step(
        self,
        run: Run,
        layout: "Layout",
        oracle: Oracle | None,
        batch: tuple[Tensor, Tensor, Draw],
        loss: float,
        norm: float,
        gradients: list[Piece],
    ) -> None:
        """Let the one process, on rank 0, make the step that the ranks have made, and compare. On all ranks."""
        exact = run.dtype == torch.float64  # then the oracle trains on its own from first to last; see Oracle.adopt
        whole_gradients, weights = gathered(run, gradients), gathered(run, layout.weights())
        # In bfloat16 the oracle's own moments are too, and no measure for moments in float32.
        compares_states = layout.compares_states and run.dtype != torch.bfloat16
        states = gathered(run, layout.states()) if compares_states or not exact else []
        if oracle is None:
            return
        run.reference_losses.append(oracle.step(*batch))
        self.loss = max(self.loss, relative_difference(loss, oracle.loss))
        self.gradient = max(self.gradient, worst_difference(whole_gradients, oracle.gradients))
        self.norm = max(self.norm, relative_difference(norm, oracle.norm))
        self.parameter = max(self.parameter, worst_difference(weights, oracle.parameters()))
        if compares_states:
            self.state = max(self.state or 0.0, worst_difference(states, oracle.states()))
        if not exact:
            oracle.adopt(weights, states)

    def claim(self, run: Run, norm_note: str = "") -> None:
        tolerance, claim = TOLERANCE[run.dtype], run.evidence.claim
        same = "largest relative difference 0"
        claim("losses equal one process, all steps", same, 0, self.loss, tolerance.loss)
        claim("every gradient equals one process, all steps", same, 0, self.gradient, tolerance.gradient)
        claim(f"the global gradient norm{norm_note}", "relative difference 0", 0, self.norm, tolerance.loss)
        claim("every parameter after every step", same, 0, self.parameter, tolerance.parameter)
        if self.state is not None:
            claim("the optimizer's state after every step", same, 0, self.state, tolerance.parameter)


def train(
    run: Run,
    layout: Layout,
    oracle: Oracle | None,
    forward_backward: Callable[[int, Tensor, Tensor, Draw], Tensor],
    clip: Callable[[Tensor], tuple[float, float]],
) -> Comparison:
    """Train for `--steps` steps of `--batch` samples of `--data`, and compare with the oracle after each.

    Args:
        oracle: the same GPT in one process, on rank 0; None elsewhere.
        forward_backward: (step, inputs, targets, draw) to this rank's share of the loss, a scalar.
        clip: this rank's share of the loss to (global gradient norm, loss), as `clip_and_total`.
    """
    args, worst = run.args, Comparison()
    text = Text(args.data, args.sequence)
    bar = run.steps()
    for step in bar:
        inputs, targets = (t.to(run.job.device) for t in text.batch(args.seed, step, args.batch))
        samples = Draw(args.seed, step, 0)

        began = time.perf_counter()
        layout.zero_grad()
        share = forward_backward(step, inputs, targets, samples)
        gradients = layout.gradients()  # as they are before clipping: a wrong scale must show
        norm, loss = clip(share)
        stop_unless_finite(run, step, norm + loss, gradients)
        layout.step()
        run.training_seconds += time.perf_counter() - began
        run.tokens += targets.numel()
        run.losses.append(loss)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        worst.after_step(run, layout, oracle, (inputs, targets, samples), loss, norm, gradients)
    return worst


def gathered(run: Run, pieces: list[Piece]) -> list[tuple[Hashable, Tensor]]:
    """The whole tensors from all ranks' pieces, on rank 0, on the CPU: it has no part in the GPUs of other ranks."""
    # A copy: of a view all of its storage would travel.
    everyone = run.job.gather([piece._replace(value=piece.value.cpu().clone()) for piece in pieces])
    return list(join(piece for rank in everyone for piece in rank))


def claim_whole_parameters(run: Run, model: GPT) -> None:
    """What every rank holds whole has stayed equal on all of them."""
    whole = {n: p.detach().cpu() for n, p in model.named_parameters() if shard_of(p) is None}
    copies = run.job.gather(whole)
    if copies:
        differing = sum((copies[0][n] != other[n]).sum().item() for other in copies for n in whole)
        what = f"{sum(p.numel() for p in whole.values()):,} elements a rank"
        run.evidence.claim("parameters that every rank holds whole", f"differ in 0 of {what}", 0, differing)


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
