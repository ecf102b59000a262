"""The training loop: ranks that train one model in one or several ways, beside the same model in one process.

A way to train is a `Trainable`: the plain version of a technique, its fast version, or the combined run. All of them
see the same batches, and after every step losses, gradients, norm, parameters and optimizer state are compared with
the one process.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.model.gpt import GPT
from core.model.text import Text
from core.proof.launch import Stop
from core.proof.lesson import Run
from core.proof.oracle import TOLERANCE, Oracle, relative_difference, worst_difference
from core.shards import LocalTensor, full_tensors, shard_of

FullTensors = list[tuple[Hashable, Tensor]]  # by full name


class Trainable(Protocol):
    """One way in which this rank trains the model; what `train` calls in each step, in this order."""

    compares_states: bool  # whether the optimizer's state is compared with one process's, too

    def zero_grad(self) -> None: ...

    def forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """Of the global batch, (samples, S) each, this rank's share of the loss, a scalar; the shares add up."""

    def gradients(self) -> list[LocalTensor]:
        """Copies of the gradients that this rank has, as they are before clipping: a wrong scale must show."""

    def clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        """Clip by the norm of the full model's gradient; (that norm, the loss: the sum of the ranks' shares)."""

    def step(self) -> None:
        """Update the parameters."""

    def weights(self) -> list[LocalTensor]: ...

    def states(self) -> list[LocalTensor]:
        """The optimizer's state, named (parameter, key)."""


class Replica:
    """What a `Trainable` has whose optimizer is an ordinary one over this rank's parameters.

    Args:
        model: this rank's shards of the GPT, its parameters named as in the full model and marked where sharded.
    """

    compares_states = False

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        forward_backward: Callable[[int, Tensor, Tensor], Tensor],
        clip: Callable[[float, Tensor], tuple[float, float]],
    ):
        self.model, self.optimizer = model, optimizer
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step
        self.forward_backward, self.clip = forward_backward, clip

    def gradients(self) -> list[LocalTensor]:
        return self._local(lambda p: None if p.grad is None else p.grad.clone())

    def weights(self) -> list[LocalTensor]:
        return self._local(lambda p: p.detach())

    def states(self) -> list[LocalTensor]:
        return [
            LocalTensor((self.model.full_name(name), key), value, shard_of(p) if value.shape == p.shape else None)
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state[p].items()
        ]

    def _local(self, of: Callable[[nn.Parameter], Tensor | None]) -> list[LocalTensor]:
        found = [(name, p, of(p)) for name, p in self.model.named_parameters()]
        return [LocalTensor(self.model.full_name(n), value, shard_of(p)) for n, p, value in found if value is not None]


class Comparison:
    """The largest relative differences of one trainable from the one process so far."""

    loss = gradient = norm = parameter = 0.0
    state: float | None = None  # where it is compared

    def __init__(self) -> None:
        self._before: list[FullTensors] | None = None  # weights and states before this step

    def begin(self, run: Run, trainable: Trainable) -> None:
        """Before the first step, on all ranks: with few bits a step is compared from the state before it."""
        if run.dtype != torch.float64:
            self._before = gathered(run, trainable.weights(), trainable.states())

    def after_step(
        self, run: Run, trainable: Trainable, oracle: Oracle | None, loss: float, norm: float,
        gradients: list[LocalTensor], redo: Callable[[], float],
    ) -> None:  # fmt: skip
        """Compare a step that the ranks have made with the one process's. On all ranks; it is on rank 0.

        Args:
            redo: lets the one process make the step again, from the state that the ranks had before it. In float64
                it trains on its own from first to last; with fewer bits see `Oracle.adopt`.
        """
        exact = run.dtype == torch.float64
        # In bfloat16 the oracle's own moments are too, and no measure for moments in float32.
        compares_states = trainable.compares_states and run.dtype != torch.bfloat16
        states = trainable.states() if compares_states or not exact else []
        full_gradients, weights, states = gathered(run, gradients, trainable.weights(), states)
        if oracle is None:
            return
        if not exact:
            oracle.adopt(*self._before)
            redo()
            self._before = [[(name, value.clone()) for name, value in found] for found in (weights, states)]
        self.loss = max(self.loss, relative_difference(loss, oracle.loss))
        self.gradient = max(self.gradient, worst_difference(full_gradients, oracle.gradients))
        self.norm = max(self.norm, relative_difference(norm, oracle.norm))
        self.parameter = max(self.parameter, worst_difference(weights, oracle.parameters()))
        if compares_states:
            self.state = max(self.state or 0.0, worst_difference(states, oracle.states()))

    def claim(self, run: Run, norm_note: str = "") -> None:
        claim_equal(run, {"": self}, norm_note)


def claim_equal(run: Run, compared: Mapping[str, Comparison], norm_note: str = "") -> None:
    """That every trainable equals one process; one row for all of them, in which each is a case. On rank 0."""
    tolerance = TOLERANCE[run.dtype]

    def row(claim: str, formula: str, of: Callable[[Comparison], float | None], most: float) -> None:
        cases = [(f"{claim} ({name})" if name else claim, 0.0, of(each)) for name, each in compared.items()]
        if cases := [case for case in cases if case[2] is not None]:
            run.evidence.each(claim, formula, cases, most, correctness=True)

    same = "largest relative difference 0"
    if len(compared) > 1:
        same += f" ({', '.join(compared)})"
    row("losses equal one process, all steps", same, lambda c: c.loss, tolerance.loss)
    row("every gradient equals one process, all steps", same, lambda c: c.gradient, tolerance.gradient)
    row(f"the global gradient norm{norm_note}", "relative difference 0", lambda c: c.norm, tolerance.loss)
    row("every parameter after every step", same, lambda c: c.parameter, tolerance.parameter)
    row("the optimizer's state after every step", same, lambda c: c.state, tolerance.parameter)


def train(
    run: Run,
    trainables: Mapping[str, Trainable],
    oracle: Oracle | None,
    *,
    text: Text | None = None,
    first: int = 0,
    compare: bool = True,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
) -> dict[str, Comparison]:
    """Train each of the `trainables` from step `first` to `--steps`, and compare each with the oracle after each step.

    The report's losses are those of the first trainable, its seconds and tokens those of the last, which is the
    fast one. All ranks call it alike.

    Args:
        oracle: the same model in one process, on rank 0; None elsewhere, and where `compare` is False.
        text: where the batches come from; `--data` when it is None.
        before_step, after_step: called with the step, and afterwards with its loss and seconds too.

    Raises:
        Stop: the loss or a gradient was NaN or infinite.
    """
    args, compared = run.args, {name: Comparison() for name in trainables}
    text = text or Text(args.data, args.sequence)
    if compare:
        for name, trainable in trainables.items():
            compared[name].begin(run, trainable)
    bar = run.steps()
    bar.update(min(first, args.steps))
    for step in range(first, args.steps):
        before_step(step)
        batch = tuple(t.to(run.job.device) for t in text.batch(args.seed, step, args.batch))
        one_process = partial(oracle.step, *batch, step) if oracle else None
        if oracle and run.dtype == torch.float64:
            one_process()
        for name, trainable in trainables.items():
            began = time.perf_counter()
            trainable.zero_grad()
            share = trainable.forward_backward(step, *batch)
            gradients = trainable.gradients() if compare else []
            norm, loss = trainable.clip(args.clip, share)
            stop_unless_finite(run, step, norm + loss, gradients)
            trainable.step()
            seconds = time.perf_counter() - began
            if compare:
                compared[name].after_step(run, trainable, oracle, loss, norm, gradients, one_process)
            if name == next(iter(trainables)):
                run.losses.append(loss)
                run.reference_losses += [oracle.loss] if oracle else []
        run.training_seconds += seconds
        run.tokens += batch[1].numel()
        after_step(step, loss, seconds)
        bar.set_postfix(loss=f"{loss:.4f}", tokens_s=f"{batch[1].numel() / seconds:,.0f}", refresh=False)
        bar.update()
    bar.close()
    return compared


def gathered(run: Run, *lists: list[LocalTensor]) -> list[FullTensors]:
    """For each list the full tensors of all ranks' shards, on rank 0, on the CPU: it has no part in other ranks' GPUs.

    An empty list for each elsewhere.
    """
    # As NumPy arrays, which pickle ten times faster than tensors, and never with all of a storage they are views of.
    mine = [[(name, _to_numpy(value), value.dtype, shard) for name, value, shard in tensors] for tensors in lists]
    found: list[FullTensors] = []
    for everyone in zip(*run.job.gather(mine), strict=True):
        tensors = (LocalTensor(name, torch.from_numpy(value).view(dtype), shard)
                   for rank in everyone for name, value, dtype, shard in rank)  # fmt: skip
        found.append(list(full_tensors(tensors)))
    return found or [[] for _ in lists]


def _to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def claim_replicated_parameters(run: Run, model: GPT) -> None:
    """What every rank holds in full has stayed equal on all of them."""
    replicated = {n: p.detach().cpu() for n, p in model.named_parameters() if shard_of(p) is None}
    copies = run.job.gather(replicated)
    if copies:
        differing = sum((copies[0][n] != other[n]).sum().item() for other in copies for n in replicated)
        what = f"{sum(p.numel() for p in replicated.values()):,} elements a rank"
        cases = [("replicated parameters stay equal on all ranks", 0, differing)]
        run.evidence.each(cases[0][0], f"differ in 0 of {what}", cases, correctness=True)


def stop_unless_finite(run: Run, step: int, total: float, gradients: list[LocalTensor]) -> None:
    """Stop all ranks together, saying where, when the loss or a gradient is NaN or infinite.

    Args:
        total: the loss plus the global norm, known to all ranks: not finite when anything is not.
    """
    if math.isfinite(total):
        return
    bad = [each.name for each in gradients if not each.value.isfinite().all()]
    found = [f"{name} on rank {rank}" for rank, names in enumerate(run.job.gather(bad)) for name in names]
    shown = ", ".join(found[-3:]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    where = f"the gradient of {shown}" if found else "the loss or the gradients' global norm"
    raise Stop(f"NaN or Inf at step {step} in {where}; try a smaller --lr than {run.args.lr}")
