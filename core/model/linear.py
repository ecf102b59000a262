"""y = x W^T + b, whose weight's gradient can be computed later than its input's. Zero bubble (2401.10241), section 2.

A pipeline that waits for the gradient of a stage's input need not wait for those of its weights, which nobody else
reads. So that any layer can leave its weights' gradients for later, it looks up `deferring` in its backward.

I and O in and out features
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.proof.memory import SavedActivations


class Product(NamedTuple):
    """The gradient of a weight (O, I) that is left^T right, still to be multiplied."""

    left: Tensor  # (R, O)
    right: Tensor  # (R, I)

    def value(self) -> Tensor:
        return self.left.T @ self.right

    def added_to(self, weight: Tensor) -> bool:
        """Whether it could be added to `.grad` in the product itself, and now is: without a pass of its own over it.

        Not where the first gradient is to become `.grad`, nor where a hook is to be told or may change it.
        """
        total, hooks = weight.grad, weight._post_accumulate_grad_hooks or weight._backward_hooks
        if total is None or total.dtype != self.left.dtype or hooks:
            return False
        torch.addmm(total, self.left.T, self.right, out=total)
        return True


Gradients = Sequence[Tensor | None]  # of weight and bias, or of several; None where not trained


class Later(NamedTuple):
    """The gradients of the weights and biases of one layer, or of several of one input, still to be computed."""

    parameters: Sequence[Tensor | None]
    compute: Callable[[], Sequence[Tensor | Product | None]]
    account: list[Any]  # keeps what `compute` reads in the count of saved activations, where it is counted

    def add(self) -> None:
        """Compute, and add to `.grad` as autograd does, with its hooks."""
        trained = []
        with torch.no_grad():  # as in a backward
            for p, gradient in zip(self.parameters, self.compute(), strict=True):
                if isinstance(gradient, Product):
                    gradient = None if gradient.added_to(p) else gradient.value()
                if gradient is not None:
                    trained.append((p, gradient))
        torch.autograd.backward([p for p, _ in trained], [g for _, g in trained])


class Deferred:
    """Within `with deferred:` a backward leaves the gradients of these parameters' layers for later: `take` them.

    The other parameters, LayerNorms and embeddings, get theirs at once: they cost next to nothing.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.on = False
        self.expected = True  # whether the backward of what is computed now will be within `with deferred:`
        self.weights_leave = False  # whether ZeRO-3 frees the weights after the backward of a stage's input
        self.account: SavedActivations | None = None
        self._later: list[Later] = []
        for p in parameters:
            p.deferred = self

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *error: object) -> None:
        self.on = False

    def put(
        self,
        parameters: Sequence[Tensor | None],
        compute: Callable[[], Sequence[Tensor | Product | None]],
        reads: Sequence[Tensor],
    ) -> Gradients:
        """Leave `compute`, which reads these tensors, for later; nothing to return from backward now."""
        if any(p is not None and p.requires_grad for p in parameters):
            account = self.account.keep(reads) if self.account else []
            self._later.append(Later(parameters, compute, account))
        return (None,) * len(parameters)

    def take(self) -> list[Later]:
        """What has been left since the last call."""
        taken, self._later = self._later, []
        return taken


def deferring(weight: Tensor) -> Deferred | None:
    """Where a backward that runs now is to put the gradients of this weight's layer; None: compute them."""
    deferred = getattr(weight, "deferred", None)
    return deferred if deferred is not None and deferred.on else None


def of_parameters(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    """The gradients of weight (O, I) and bias (O) for the gradient (..., O) of y, where they are trained, or deferred.

    Args:
        x: (..., I).
    """

    def compute() -> tuple[Product | None, Tensor | None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = Product(rows, x.reshape(-1, x.shape[-1])) if weight.requires_grad else None
        return of_weight, rows.sum(0) if bias is not None and bias.requires_grad else None

    if deferred := deferring(weight):
        return deferred.put((weight, bias), compute, (gradient, x))
    of_weight, of_bias = compute()
    return of_weight and of_weight.value(), of_bias


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # as they are, with their marks
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        return of_x, *of_parameters(gradient, x, ctx.weight, ctx.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., I) to (..., O); torch's own, which is quicker, but where the weight's gradient may be deferred."""
    deferred = getattr(weight, "deferred", None)
    if deferred is not None and deferred.expected:
        return _Split.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def products(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Several layers of one input. Those that send messages for it share them, by their `together`."""
    together = getattr(layers[0], "together", None)
    return together(x, layers) if together else [layer(x) for layer in layers]


def of_input(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The gradient (..., I) of what several layers have read, for those (..., O) of their results."""
    found = gradients[0].flatten(0, -2) @ weights[0]
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        found.addmm_(gradient.flatten(0, -2), weight)
    return found.view(*gradients[0].shape[:-1], -1)


class Linear(nn.Linear):
    """torch's layer, computed by `linear`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # nothing to draw there, which takes torch as long as the rest of a model
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
