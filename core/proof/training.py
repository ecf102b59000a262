"""The training loop: ranks that train one model in one or several ways, beside the same model in one process.

A way to train is a `Trainable`: the plain version of a technique, its fast version, or the combined run. All of them
see the same batches, and after every step losses, gradients, norm, parameters and optimizer state are compared with
the one process.
"""

import math
import time
from collections.abc import Callable, Mapping

import torch

from core.model.text import Text
from core.model.tokens import Tokens
from core.proof.comparison import Comparison
from core.proof.flight import FLIGHT, Where
from core.proof.launch import Stop
from core.proof.lesson import Run
from core.proof.memory import live_bytes
from core.proof.oracle import Oracle
from core.proof.trainable import Trainable
from core.shards import LocalTensor


def train(
    run: Run,
    trainables: Mapping[str, Trainable],
    oracle: Oracle | None,
    *,
    text: Text | Tokens | None = None,
    first: int = 0,
    compare: bool = True,
    rows: range | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
) -> dict[str, Comparison]:
    """Train each of the `trainables` from step `first` to `--steps`, and compare each with the oracle after each step.

    The report's losses are those of the first trainable, its seconds and tokens those of the last, which is the
    fast one. All ranks call it alike.

    Args:
        oracle: the same model in one process, on rank 0; None elsewhere, and where `compare` is False.
        text: where the batches come from; `--data` when it is None.
        rows: the samples of the batch that this rank needs; None: all.
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
        batch = tuple(t.to(run.job.device) for t in text.batch(args.seed, step, args.batch, rows))
        if oracle and run.dtype == torch.float64:
            FLIGHT.at("one process", step=step)
            oracle.step(*batch, step)

        def again(oracle: Oracle, batch: tuple = batch, step: int = step) -> None:
            oracle.forward_backward(*batch, step)

        for name, trainable in trainables.items():
            began = time.perf_counter()
            FLIGHT.at("forward", step=step)
            FLIGHT.spent()  # what was before is no training
            trainable.zero_grad()
            share = trainable.forward_backward(step, *batch)
            FLIGHT.at("gradients")
            gradients = trainable.gradients() if compare else []
            norm, loss = trainable.clip(args.clip, share)
            stop_unless_finite(run, step, norm + loss, gradients)
            FLIGHT.at("optimizer")
            trainable.step()
            seconds = time.perf_counter() - began
            run.spent(name, FLIGHT.spent())
            FLIGHT.at("comparison")
            if compare:
                compared[name].after_step(run, trainable, oracle, loss, norm, gradients, again)
            if name == next(iter(trainables)):
                run.losses.append(loss)
                run.reference_losses += [oracle.loss] if oracle else []
        run.training_seconds += seconds
        run.tokens += batch[1].numel()
        after_step(step, loss, seconds)
        bar.set_postfix(loss=f"{loss:.4f}", tokens_s=f"{batch[1].numel() / seconds:,.0f}", refresh=False)
        bar.update()
    bar.close()
    FLIGHT.go_to(Where())
    if run.page:
        run.held |= {name: run.job.gather(held_bytes(each)) for name, each in trainables.items()}
    return compared


def held_bytes(trainable: Trainable) -> dict[str, int]:
    """Bytes that this rank holds between two steps, its shards of weights, gradients and the optimizer's numbers."""
    if measured := getattr(trainable, "memory_bytes", None):
        return measured()
    weights, master = ([each.value for each in of()] for of in (trainable.weights, trainable.master_weights))
    held = {"weights": live_bytes(weights), "gradients": live_bytes(each.value for each in trainable.gradients())}
    states = [each.value for each in trainable.states() if each.value.dim()]
    return held | {"optimizer": live_bytes([*weights, *master, *states]) - held["weights"]}


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
