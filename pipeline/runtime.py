"""Lecture 09: Megatron-LM pipeline code (Megatron-LM 流水并行 PP 代码解析): how a rank carries out a schedule.

A schedule is a list of actions for each rank; this is its interpreter. A forward (F) receives an activation, computes,
sends the next one; a backward (B) receives a gradient, computes, sends the next one. A receive blocks: the rank is idle
until the message is there, and that is the bubble. A send does not: if it waited to be taken, 1F1B would stand still as
soon as rank r sends an activation to r+1, and r+1 a gradient to r, at the same time. (Megatron-LM gets round it with
one call for both, `send_forward_recv_backward`.)

Any schedule runs in which the ranks take micro-batches in one order; `1f1b.py` and the others train with it beside the
fast one, which they have in common with `cluster/`: it posts receives ahead, so messages travel while it computes.

read: runtime.py:28-138; then engine/runtime.py, core/p2p.py

M micro-batches, B samples in a micro-batch, S sequence, H hidden
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from core.mesh import Axis
from core.model.seeded import SampleMasks
from core.p2p import PointToPoint
from pipeline.engine.actions import Schedule, placement, routes, size


class PlainPipeline:
    """One rank of a pipeline.

    Args:
        stages: those of this rank, by number. A stage maps (B, S) tokens or (B, S, H) activations to the next stage's
            input, or to logits on the last stage.
        loss: maps (logits, targets) of one micro-batch to its share of the global loss, a scalar: the shares add up.
        schedule: what every rank computes, in order; a valid one.
        axis: the ranks of the pipeline.
        shape: (B, S, H) of the activation that travels.
        masks: of the stages' dropouts; told which micro-batch is computed.
        wgrads: where the linear layers leave their weight gradients in a backward, if they do: see `zero_bubble.py`.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        axis: Axis,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        masks: SampleMasks | None = None,
        wgrads: list[Callable[[], None]] | None = None,
    ):
        self.stages, self.loss, self.masks = stages, loss, masks
        self.me, self.actions = axis.index, schedule[axis.index]
        self.rank_of = placement(schedule)  # by (stage, micro-batch)
        count, self.microbatches = size(schedule)
        self.last = count - 1
        self.shape, self.dtype, self.device = shape, dtype, device
        self.messages = PointToPoint(axis, routes(schedule), device)
        self.wgrads = wgrads if wgrads is not None else []
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # input and output of forwards without backward
        self.pending: dict[tuple[int, int], list[Callable[[], None]]] = {}  # wgrads of I without W
        self.handed_over: dict[tuple[str, int, int], Tensor] = {}  # from one stage to the next on this rank

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """All actions of one step; gradients are added to the parameters' `.grad`.

        Args:
            inputs, targets: (M, B, S); only the first stage reads inputs, only the last reads targets.

        Returns:
            the sum of the losses that this rank has computed, a scalar; 0 where it does not have the last stage.

        Raises:
            PeerError: a neighbour died or was silent for the whole timeout.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for stage, kind, m in self.actions:
            if kind == "F":
                output = self.forward(stage, m, inputs[m], targets[m])
                if stage == self.last:
                    total += output.detach()
            if kind in ("B", "I"):
                self.backward(stage, m)
            if kind in ("B", "W"):
                self.add_weight_gradients(stage, m)
        self.messages.flush()  # until everything sent has been taken
        return total

    def forward(self, stage: int, m: int, tokens: Tensor, targets: Tensor) -> Tensor:
        # 1. Receive
        x = tokens if stage == 0 else self.receive("F", stage - 1, stage, m).requires_grad_()
        # 2. Compute
        if self.masks:
            self.masks.at(m * len(tokens))
        y = self.stages[stage](x)
        if stage == self.last:
            y = self.loss(y, targets)
        self.kept[stage, m] = x, y  # in flight until the backward
        # 3. Send
        if stage < self.last:
            self.send(y.detach(), "F", stage + 1, m)
        return y

    def backward(self, stage: int, m: int) -> None:
        # 1. Receive
        dy = None if stage == self.last else self.receive("B", stage + 1, stage, m)
        # 2. Compute
        x, y = self.kept.pop((stage, m))
        torch.autograd.backward(y, dy)  # adds to the parameters' .grad, and makes x.grad
        self.pending[stage, m] = self.wgrads.copy()
        self.wgrads.clear()
        # 3. Send
        if stage > 0:
            self.send(x.grad, "B", stage - 1, m)

    def add_weight_gradients(self, stage: int, m: int) -> None:
        for wgrad in self.pending.pop((stage, m)):
            wgrad()

    def receive(self, kind: str, sender: int, stage: int, m: int) -> Tensor:
        """What stage `sender` has sent to `stage`: an activation ("F") or a gradient ("B"), (B, S, H). Blocks."""
        if self.rank_of[sender, m] == self.me:
            return self.handed_over.pop((kind, stage, m))
        into = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.messages.receive(into, self.rank_of[sender, m], kind, self.tag(kind, stage, m))()

    def send(self, x: Tensor, kind: str, to: int, m: int) -> None:
        """Send to stage `to`; does not wait until it is taken."""
        if self.rank_of[to, m] == self.me:
            self.handed_over[kind, to, m] = x
        else:
            self.messages.send(x, self.rank_of[to, m], kind, self.tag(kind, to, m))

    def tag(self, kind: str, stage: int, m: int) -> int:
        """Tells apart the messages from one rank to another, by what they are and for which stage."""
        return 2 * (stage * self.microbatches + m) + "FB".index(kind)

    def close(self) -> None:
        self.messages.close()
