"""Mixed precision as a named policy: which numbers of a training have how many bits. Lecture 01; 1710.03740, section 3.

    policy          parameters, compute   gradients   master, moments   bytes a parameter
    float64         8                     8           (8), 8 + 8        no policy of a real training: it proves most
    float32         4                     4           (4), 4 + 4        4 + 4 + 8
    bfloat16        2                     4           4, 4 + 4          2 + 4 + 12: what Megatron-LM has
    bfloat16-grads  2                     2           4, 4 + 4          2 + 2 + 12: what the ZeRO paper and slide count

Gradients are of one type when they are added up over micro-batches, over stages that share a weight and over ranks: as
in Megatron-LM, where one switch (`accumulate_allreduce_grads_in_fp32`) is for all of it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Precision(NamedTuple):
    """A policy. Parameters and what is computed with them are of one type, as are master weights and moments."""

    name: str
    parameters: torch.dtype
    gradients: torch.dtype  # in which they are added up and reduced
    master: torch.dtype  # of the update; where it is not the parameters', the optimizer has a copy of them

    @property
    def optimizer_bytes(self) -> int:
        """Of Adam, for each parameter: two moments, and the master weight where there is one: the paper's K."""
        return (2 + (self.master != self.parameters)) * self.master.itemsize

    @property
    def bytes(self) -> int:
        """Of all model states, for each parameter."""
        return self.parameters.itemsize + self.gradients.itemsize + self.optimizer_bytes


POLICIES = {
    policy.name: policy
    for policy in (
        Precision("float64", torch.float64, torch.float64, torch.float64),
        Precision("float32", torch.float32, torch.float32, torch.float32),
        Precision("bfloat16", torch.bfloat16, torch.float32, torch.float32),
        Precision("bfloat16-grads", torch.bfloat16, torch.bfloat16, torch.float32),
    )
}


def policy_of(precision: Precision | torch.dtype) -> Precision:
    """A policy as it is; of a data type, the usual one."""
    if isinstance(precision, Precision):
        return precision
    return next(policy for policy in POLICIES.values() if policy.parameters == precision)


def wide(x: Tensor) -> Tensor:
    """x in at least float32: for sums over many numbers, and for what must not be decided by rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MasterOptimizer:
    """An ordinary optimizer over parameters in the precision of the update: master weights, where the model's differ.

    Args:
        parameters: those without gradients in a step are left as they are.
        make_optimizer: makes it of the parameters that it is given.
        master: of the update.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        master: torch.dtype,
    ):
        self.master = {
            p: p if p.dtype == master or not p.requires_grad else nn.Parameter(p.detach().to(master))
            for p in parameters
        }
        self.optimizer = make_optimizer(self.master.values())

    def zero_grad(self) -> None:
        for p in self.master:
            p.grad = None

    def step(self) -> None:
        """Update the master weights, and round them to the model's precision."""
        copies = [(p, m) for p, m in self.master.items() if m is not p]
        for p, m in copies:
            m.grad = None if p.grad is None else p.grad.to(m.dtype)
        self.optimizer.step()
        for p, m in copies:
            m.grad = None
            p.data.copy_(m.detach())

    def tensors(self) -> list[Tensor]:
        """What it holds besides the model's weights: its copies of them, and its state but for the counts of steps."""
        state = [value for values in self.optimizer.state.values() for value in values.values() if value.dim()]
        return [m for p, m in self.master.items() if m is not p] + state

    def state_of(self, p: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of one of the parameters: moments, and the steps counted."""
        return self.optimizer.state[self.master[p]]
