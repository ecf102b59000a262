"""Trainings by several ranks compared with one process: what is compared, what is claimed, and where the worst is."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from core.model.gpt import GPT
from core.proof.full import full_tensors
from core.proof.lesson import Run
from core.proof.oracle import TOLERANCE, Oracle, relative_difference, worst
from core.proof.trainable import Trainable
from core.shards import LocalTensor, shard_of


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
            oracle.adopt(master_before, states_before)
            oracle.update(full_gradients)
            if run.dtype != torch.float32:
                types = {name: value.dtype for name, value in weights}
                self._compare("rounding", weights, {name: value.to(types[name]) for name, value in master})
        self._compare("gradient", full_gradients, oracle.gradients, {} if exact else keys_by_queries(oracle.gradients))
        self.loss = max(self.loss, relative_difference(loss, oracle.loss))
        self.norm = max(self.norm, relative_difference(norm, oracle.norm))
        self._compare("parameter", master, oracle.parameters())
        if trainable.compares_states:
            self._compare("state", states, oracle.states())

    def _compare(
        self, what: str, tensors: FullTensors, expected: dict, scales: Mapping[Hashable, Hashable] | None = None
    ) -> None:
        apart, name = worst(tensors, expected, scales)
        if apart > (getattr(self, what) or 0.0):
            shown = " ".join(name) if isinstance(name, tuple) else name
            there = any(name == n and name in expected and value.shape == expected[n].shape for n, value in tensors)
            rank = f" on rank {tensors.rank_of_worst(name, expected[name].cpu())}" if there else ", which is missing"
            self.where[what] = shown + rank
        setattr(self, what, max(getattr(self, what) or 0.0, apart))

    def claim(self, run: Run, norm_note: str = "") -> None:
        claim_equal(run, {"": self}, norm_note)


def keys_by_queries(gradients: Mapping[Hashable, Tensor]) -> dict[Hashable, Hashable]:
    """By the name of a bias of keys that of the queries: what `worst` calls scales, for few bits.

    A vector added to all keys would not change what softmax makes of the scores, but for rotary positions: the gradient
    of that bias is a small difference of numbers as large as those in the queries'.
    """
    biases = (str(name) for name in gradients if str(name).endswith(".attention.k.bias"))
    return {name: name.replace(".k.bias", ".q.bias") for name in biases}


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


def claim_replicated_parameters(run: Run, models: Mapping[str, GPT]) -> None:
    """What several ranks hold, in full or the same shard of it, has stayed equal on all of them.

    Args:
        models: this rank's, by version.
    """
    mine = {name: _held_by_others(model) for name, model in models.items()}
    everyone = run.job.gather(mine)
    if everyone:
        claim, cases = "replicated parameters stay equal on all ranks", []
        for name, held in mine.items():
            first: dict[Hashable, Tensor] = {}
            pairs = ((first.setdefault(key, p), p) for rank in everyone for key, p in rank[name].items())
            cases.append((f"{claim} ({name})", 0, sum((a != b).sum().item() for a, b in pairs)))
            elements = sum(p.numel() for p in held.values())
        run.evidence.each(claim, f"differ in 0 of {elements:,} elements a rank", cases, correctness=True)


def _held_by_others(model: GPT) -> dict[Hashable, Tensor]:
    """What other ranks hold too, by name and, of a shard, its index."""
    found = {}
    for name, p in model.named_parameters():
        mark = shard_of(p)
        if mark is None or mark.copy is not None:
            found[name, mark and mark.index] = p.detach().cpu()
    return found
