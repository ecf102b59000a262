"""One way to train, as the one loop (`training.py`) drives it: a plain version, a fast one, or the combined run."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from core.model.gpt import GPT
from core.model.precision import MasterOptimizer
from core.proof.lesson import Run
from core.proof.oracle import Oracle
from core.shards import LocalTensor, shard_of


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
