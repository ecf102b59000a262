"""The training loop: ranks that train one model in one or several ways, beside the same model in one process.

A way to train is a `Trainable`: the plain version of a technique, its fast version, or the combined run. All of them
see the same batches, and after every step losses, gradients, norm, parameters and optimizer state are compared with
the one process.
"""

import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.model.gpt import GPT
from core.model.precision import MasterOptimizer
from core.model.text import Text
from core.proof.launch import Stop
from core.proof.lesson import Run
from core.proof.oracle import TOLERANCE, Oracle, relative_difference, worst
from core.shards import LocalTensor, full_tensors, shard_of


class FullTensors(list[tuple[Hashable, Tensor]]):
    """The full tensors of all ranks, by full name, and what they were made of."""

    def __init__(self, by_rank: Sequence[list[LocalTensor]] = ()):
        super().__init__(full_tensors(itertools.chain(*by_rank)))
        self.by_rank = by_rank

    def rank_of_worst(self, name: Hashable, expected: Tensor) -> int:
        """The rank whose shard, or copy, of a tensor is the farthest from the expected one's."""

        def apart(rank: int) -> float:
            found = [each for each in self.by_rank[rank] if each.name == name]
            pairs = [(each.value, each.shard.local(expected) if each.shard else expected) for each in found]
            return max(((a.double() - b.double()).norm().nan_to_num(torch.inf).item() for a, b in pairs), default=-1.0)

        return max(range(len(self.by_rank)), key=apart)


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

    def weights(self) -> list[LocalTensor]:
        """What the model computes with."""

    def master_weights(self) -> list[LocalTensor]:
        """What the optimizer updates, in its precision."""

    def states(self) -> list[LocalTensor]:
        """The optimizer's state, named (parameter, key)."""

    def guide(self, run: Run, oracle: Oracle | None) -> None:
        """Let the one process, which goes through this step afterwards, make the same discrete choices.

        With few bits a rounding decides now and then to which expert a token goes. On all ranks; it is on rank 0.
        """


class Replica:
    """What a `Trainable` has whose optimizer is an ordinary one over this rank's parameters.

    Args:
        model: this rank's shards of the GPT, its parameters named as in the full model and marked where sharded.
    """

    compares_states = False

    def __init__(
        self,
        model: GPT,
        optimizer: MasterOptimizer,
        forward_backward: Callable[[int, Tensor, Tensor], Tensor],
        clip: Callable[[float, Tensor], tuple[float, float]],
    ):
        self.model, self.optimizer = model, optimizer
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step
        self.forward_backward, self.clip = forward_backward, clip

    def guide(self, run: Run, oracle: Oracle | None) -> None:
        """There is nothing discrete."""

    def gradients(self) -> list[LocalTensor]:
        return self._local(lambda p: None if p.grad is None else p.grad.clone())

    def weights(self) -> list[LocalTensor]:
        return self._local(lambda p: p.detach())

    def master_weights(self) -> list[LocalTensor]:
        return self._local(lambda p: self.optimizer.master[p].detach())

    def states(self) -> list[LocalTensor]:
        return [
            LocalTensor((self.model.full_name(name), key), value, shard_of(p) if value.shape == p.shape else None)
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state_of(p).items()
        ]

    def _local(self, of: Callable[[nn.Parameter], Tensor | None]) -> list[LocalTensor]:
        found = [(name, p, of(p)) for name, p in self.model.named_parameters()]
        return [LocalTensor(self.model.full_name(n), value, shard_of(p)) for n, p, value in found if value is not None]


class Comparison:
    """The largest relative differences of one trainable from the one process so far."""

    loss = gradient = norm = parameter = 0.0
    state: float | None = None  # where it is compared
    rounding: float | None = None  # of the weights from the master weights, rounded; where there are any

    def __init__(self) -> None:
        self.where: dict[str, str] = {}  # of what is compared by tensors, the worst tensor and rank
        self._before: list[FullTensors] = []  # weights, master weights and states before this step

    def begin(self, run: Run, trainable: Trainable) -> None:
        """Before the first step, on all ranks: with few bits a step is compared from the state before it."""
        if run.dtype != torch.float64:
            self._before = _state(run, trainable)

    def after_step(
        self, run: Run, trainable: Trainable, oracle: Oracle | None, loss: float, norm: float,
        gradients: list[LocalTensor], again: Callable[[Oracle], None],
    ) -> None:  # fmt: skip
        """Compare a step that the ranks have made with the one process's. On all ranks; it is on rank 0.

        In float64 it has made the step too, and trains on its own from first to last. With fewer bits it begins where
        the ranks did: from their weights, in float64, it computes loss and gradients; and from their master weights
        and states it makes the update that *their* gradients call for.

        Args:
            again: the one process's forward and backward of the step.
        """
        exact = run.dtype == torch.float64
        if exact:
            states = trainable.states() if trainable.compares_states else []
            full_gradients, weights, states = gathered(run, gradients, trainable.weights(), states)
            master = weights
        else:
            trainable.guide(run, oracle)
            (full_gradients,), (weights, master, states) = gathered(run, gradients), _state(run, trainable)
        if oracle is None:
            return
        if not exact:
            (weights_before, master_before, states_before), self._before = self._before, [weights, master, states]
            oracle.adopt(weights_before)
            again(oracle)
            self._compare("gradient", full_gradients, oracle.gradients)
            oracle.adopt(master_before, states_before)
            oracle.update(full_gradients)
            if run.dtype != torch.float32:
                types = {name: value.dtype for name, value in weights}
                self._compare("rounding", weights, {name: value.to(types[name]) for name, value in master})
        else:
            self._compare("gradient", full_gradients, oracle.gradients)
        self.loss = max(self.loss, relative_difference(loss, oracle.loss))
        self.norm = max(self.norm, relative_difference(norm, oracle.norm))
        self._compare("parameter", master, oracle.parameters())
        if trainable.compares_states:
            self._compare("state", states, oracle.states())

    def _compare(self, what: str, tensors: FullTensors, expected: dict) -> None:
        apart, name = worst(tensors, expected)
        if apart > (getattr(self, what) or 0.0):
            shown = " ".join(name) if isinstance(name, tuple) else name
            there = any(name == n and name in expected and value.shape == expected[n].shape for n, value in tensors)
            rank = f" on rank {tensors.rank_of_worst(name, expected[name].cpu())}" if there else ", which is missing"
            self.where[what] = shown + rank
        setattr(self, what, max(getattr(self, what) or 0.0, apart))

    def claim(self, run: Run, norm_note: str = "") -> None:
        claim_equal(run, {"": self}, norm_note)


def claim_equal(run: Run, compared: Mapping[str, Comparison], norm_note: str = "") -> None:
    """That every trainable equals one process; one row for all of them, in which each is a case. On rank 0."""
    tolerance, exact = TOLERANCE[run.precision.name], run.dtype == torch.float64
    among = f" ({', '.join(compared)})" if len(compared) > 1 else ""

    def row(claim: str, formula: str, what: str, most: float) -> None:
        cases = [
            (f"{claim} ({name})" if name else claim, 0.0, getattr(each, what), each.where.get(what, ""))
            for name, each in compared.items()
            if getattr(each, what) is not None
        ]
        if cases:
            run.evidence.each(claim, formula + among, cases, most, correctness=True)

    same = "relative difference 0, at most {:g}".format
    row("losses equal one process, all steps", same(tolerance.loss), "loss", tolerance.loss)
    row("every gradient equals one process, all steps", same(tolerance.gradient), "gradient", tolerance.gradient)
    row(f"the global gradient norm{norm_note}", same(tolerance.norm), "norm", tolerance.norm)
    made = "" if exact else "what these gradients make of the master weights: "
    row("every parameter after every step", made + same(tolerance.update), "parameter", tolerance.update)
    row("the optimizer's state after every step", same(tolerance.update), "state", tolerance.update)
    row("weights are the master weights, rounded", "difference 0", "rounding", 0.0)


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
        if oracle and run.dtype == torch.float64:
            oracle.step(*batch, step)

        def again(oracle: Oracle, batch: tuple = batch, step: int = step) -> None:
            oracle.forward_backward(*batch, step)

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
    return compared


def _state(run: Run, trainable: Trainable) -> list[FullTensors]:
    """Weights, master weights and optimizer states; on rank 0."""
    return gathered(run, trainable.weights(), trainable.master_weights(), trainable.states())


def gathered(run: Run, *lists: list[LocalTensor]) -> list[FullTensors]:
    """For each list the full tensors of all ranks' shards, on rank 0, on the CPU: it has no part in other ranks' GPUs.

    An empty list for each elsewhere.
    """
    # As NumPy arrays, which pickle ten times faster than tensors, and never with all of a storage they are views of.
    mine = [[(name, _to_numpy(value), value.dtype, shard) for name, value, shard in tensors] for tensors in lists]
    everyone = zip(*run.job.gather(mine), strict=True)
    return [FullTensors([_from_numpy(rank) for rank in ranks]) for ranks in everyone] or [FullTensors() for _ in lists]


def _from_numpy(tensors: list[tuple]) -> list[LocalTensor]:
    return [LocalTensor(name, torch.from_numpy(value).view(dtype), shard) for name, value, dtype, shard in tensors]


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
