"""The oracle: the same training in one process, with the global batch at once. What every layout is compared with."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.model.documents import Documents, use_documents
from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.model.tokens import documents_of


class Tolerance(NamedTuple):
    """Largest relative difference from one process that rounding explains."""

    loss: float
    gradient: float
    norm: float  # of the gradients that the ranks have, which are added up in float64
    update: float  # of parameters, master weights and optimizer state, from the same gradients


# The one process computes in float64, from the weights that the ranks have. So float64 leaves room for nothing but the
# order of summation. With fewer bits each step is compared from one state, the gradients with float64's, and the update
# with the one that the same gradients make: a gradient near 0 may have the other sign, and Adam would make a full step
# of it in the other direction. What is rounded in bfloat16 is off by up to 2^-9 = 0.002 each time.
TOLERANCE = {
    "float64": Tolerance(1e-10, 1e-10, 1e-10, 1e-10),
    "float32": Tolerance(1e-6, 1e-5, 1e-9, 1e-6),
    "bfloat16": Tolerance(2e-4, 2e-2, 1e-9, 1e-6),
}


class Oracle:
    """The reference GPT trained in one process, in float64.

    Args:
        make_optimizer: builds the optimizer over the parameters it is given; the layouts call the same function.
        clip: largest global gradient norm, as `torch.nn.utils.clip_grad_norm_` applies it.
        make: builds the model on the meta device, where it is not the plain GPT.
        groups: of the model's parameters, as torch.optim takes them.
        eos: the token that ends a document, where documents are to be kept apart.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int,
        device: torch.device,
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        clip: float,
        make: Callable[[GPTConfig], GPT] = GPT,
        groups: Callable[[GPT], Iterable[Any]] = GPT.parameters,
        eos: int | None = None,
    ):
        self.model = materialize(make(config), seed, device, torch.float64)
        self.masks = use_masks(self.model, SampleMasks(seed))
        self.documents, self.eos = use_documents(self.model, Documents(self.masks)), eos
        self.optimizer = make_optimizer(groups(self.model))
        self.clip = clip
        self.gradients: dict[str, Tensor] = {}
        self.norm = self.loss = 0.0

    def step(self, inputs: Tensor, targets: Tensor, step: int = 0) -> float:
        """One step on the global batch, (samples, sequence) each; the loss."""
        self.forward_backward(inputs, targets, step)
        self.update()
        return self.loss

    def forward_backward(self, inputs: Tensor, targets: Tensor, step: int) -> None:
        """Loss and gradients of the global batch. Keeps the gradients as they are before clipping."""
        self.masks.seek(step)
        self.documents.seek(None if self.eos is None else documents_of(inputs, self.eos))
        self.optimizer.zero_grad()
        loss = token_loss(self.model(inputs), targets, targets.numel())
        loss.backward()
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.loss = loss.item()

    def update(self, gradients: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Clip and update.

        Args:
            gradients: in place of the oracle's own, but for parameters of which it has none.
        """
        parameters = dict(self.model.named_parameters())
        for name, gradient in gradients:
            if parameters[name].grad is not None:
                parameters[name].grad.copy_(gradient)
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        self.optimizer.step()

    def adopt(
        self, weights: Iterable[tuple[str, Tensor]], states: Iterable[tuple[tuple[str, str], Tensor]] = ()
    ) -> None:
        """Go on from these weights, by full name, and these optimizer states, by (full name, key), if any."""
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for name, value in weights:
            parameters[name].data.copy_(value)
        for (name, key), value in states:
            mine = parameters[name]
            self.optimizer.state[mine][key] = value.to(mine) if value.shape == mine.shape else value.clone()

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


def worst(
    tensors: Iterable[tuple[Hashable, Tensor]],
    reference: Mapping[Hashable, Tensor],
    scales: Mapping[Hashable, Hashable] | None = None,
) -> tuple[float, Hashable]:
    """The largest |a - b| / |b| (Euclidean norms) over the tensors, each compared with its namesake, and its name.

    Infinite when a tensor of the reference has no counterpart, when one has no namesake, and when anything is NaN:
    a layout that lost a parameter must not pass for equal.

    Args:
        scales: by name, another of the reference, whose norm is the divisor where it is the larger.
    """
    worst, where, seen = 0.0, "", {}
    for name, value in tensors:
        if name not in reference or reference[name].shape != value.shape:
            return float("inf"), name
        if name in seen and torch.equal(value, seen[name]):
            continue  # a replica of one that has been compared
        expected = reference[name].double().cpu()
        scale = expected.norm().item()
        if name in (scales or ()):
            scale = max(scale, reference[scales[name]].double().norm().item())
        difference = (value.double().cpu() - expected).norm().item() / (scale or 1.0)
        if difference != difference:
            return float("inf"), name
        if difference > worst:
            worst, where = difference, name
        seen[name] = value
    for name in reference:
        if name not in seen:
            return float("inf"), name
    return worst, where


def worst_difference(tensors: Iterable[tuple[Hashable, Tensor]], reference: Mapping[Hashable, Tensor]) -> float:
    """The difference that `worst` finds."""
    return worst(tensors, reference)[0]
