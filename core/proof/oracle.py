"""The oracle: the same training in one process, with the global batch at once. What every layout is compared with."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks


class Tolerance(NamedTuple):
    """Largest relative difference from one process that rounding explains."""

    loss: float  # also of the global gradient norm
    gradient: float
    parameter: float


# float64 leaves room for nothing but the order of summation, over any usual run; it is the proof. With fewer bits each
# step is compared from one state (`Oracle.adopt`). A bfloat16 gradient, added up over microbatches in 8 bits, is noisy
# all the same: those bounds catch a wrong scale, not a small error.
TOLERANCE = {
    torch.float64: Tolerance(1e-10, 1e-10, 1e-10),
    torch.float32: Tolerance(2e-5, 1e-4, 2e-4),
    torch.bfloat16: Tolerance(3e-2, 0.4, 0.2),
}


class Oracle:
    """The reference GPT trained in one process.

    Args:
        make_optimizer: builds the optimizer over the parameters it is given; the layouts call the same function.
        clip: largest global gradient norm, as `torch.nn.utils.clip_grad_norm_` applies it.
        make: builds the model on the meta device, where it is not the plain GPT.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        clip: float,
        make: Callable[[GPTConfig], GPT] = GPT,
    ):
        self.model = materialize(make(config), seed, device, dtype)
        self.masks = use_masks(self.model, SampleMasks(seed))
        self.optimizer = make_optimizer(self.model.parameters())
        self.clip = clip
        self.gradients: dict[str, Tensor] = {}
        self.norm = self.loss = 0.0

    def step(self, inputs: Tensor, targets: Tensor, step: int = 0) -> float:
        """One step on the global batch, (samples, sequence) each. Keeps the gradients as they were before clipping."""
        self.masks.seek(step)
        self.optimizer.zero_grad()
        loss = token_loss(self.model(inputs), targets, targets.numel())
        loss.backward()
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        self.optimizer.step()
        self.loss = loss.item()
        return self.loss

    def adopt(self, weights: Iterable[tuple[str, Tensor]], states: Iterable[tuple[tuple[str, str], Tensor]]) -> None:
        """Go on from these weights, by full name, and optimizer states, by (full name, key).

        With few bits two runs that are both right drift apart over the steps, the faster the larger the learning rate.
        Compared step by step from one state, they may differ by the rounding of one step only.
        """
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for name, value in weights:
            parameters[name].data.copy_(value)
        for (name, key), value in states:
            mine = parameters[name]
            self.optimizer.state[mine][key] = value.to(mine.dtype) if value.shape == mine.shape else value.clone()

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def states(self) -> dict[tuple[str, str], Tensor]:
        """The optimizer's state, by (full name of the parameter, key)."""
        named = self.model.named_parameters()
        return {(name, key): value for name, p in named for key, value in self.optimizer.state[p].items()}


def relative_difference(value: float, expected: float) -> float:
    """|value - expected| / |expected|; infinite when that is no number, so that NaN cannot pass for equal."""
    difference = abs(value - expected) / (abs(expected) or 1.0)
    return difference if difference == difference else float("inf")


def worst_difference(tensors: Iterable[tuple[str, Tensor]], reference: dict[str, Tensor]) -> float:
    """The largest |a - b| / |b| (Euclidean norms) over the tensors, comparing each of `tensors` with its namesake.

    Infinite when a tensor of the reference has no counterpart, when one has no namesake, and when anything is NaN:
    a layout that lost a parameter must not pass for equal.
    """
    worst, seen = 0.0, {}
    for name, value in tensors:
        if name not in reference or reference[name].shape != value.shape:
            return float("inf")
        if name in seen and torch.equal(value, seen[name]):
            continue  # a replica of one that has been compared
        expected = reference[name].double().cpu()
        difference = (value.double().cpu() - expected).norm().item() / (expected.norm().item() or 1.0)
        if difference != difference:
            return float("inf")
        worst = max(worst, difference)
        seen[name] = value
    return worst if seen.keys() == reference.keys() else float("inf")
