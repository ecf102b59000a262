"""Carry out any schedule on real processes. Lecture 09: Megatron-LM pipeline code (Megatron-LM 流水并行 PP 代码解析).

The schedule says what to compute in which order; `with_communication` has added when to send and to ask. What is left
is what you read here: post a receive, compute, send, and forget what is no longer needed.

M microbatches, B samples in a microbatch, S sequence, H hidden
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from core.ledger import SavedActivations, VirtualClock
from core.mesh import Axis
from core.p2p import Mail
from core.seeded import Draw
from pipeline.schedules import UNIT_COSTS, Action, Schedule, placement, with_communication
from pipeline.validator import validate


@dataclass
class Kept:
    """What a stage keeps of one microbatch between its forward and its backward.

    Not the output: once it is sent, only the place in the graph where its gradient enters is needed. (Megatron-LM
    gets the same by shrinking the output's storage, `deallocate_output_tensor`.)
    """

    input: Tensor
    exit: GradientEdge | None  # None where nothing on this stage or before it is trained


@dataclass
class Trace:
    """The measurements of traced steps."""

    clock: VirtualClock
    saved: SavedActivations


class Pipeline:
    """One rank of a pipeline that has one stage on each rank.

    Args:
        stage: called as stage(x, draw); maps (B, S) tokens or (B, S, H) activations to the next stage's input, or to
            logits on the last stage.
        loss: maps (logits, targets) of one microbatch to its share of the global loss, a scalar: the shares add up.
        schedule: what every rank computes, in order; validated here.
        axis: the ranks of the pipeline.
        shape: (B, S, H) of the activation that travels.

    Raises:
        ScheduleError: the schedule cannot run.
        ValueError: it does not put stage r on rank r for every rank of the axis.
    """

    def __init__(
        self,
        stage: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        axis: Axis,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        validate(schedule)
        if placement(schedule) != {r: r for r in range(axis.size)}:
            raise ValueError(f"the schedule must put stage r on rank r, for each of the {axis.size} ranks")
        self.stage, self.loss, self.axis = stage, loss, axis
        self.shape, self.dtype, self.device = shape, dtype, device
        self.is_first, self.is_last = axis.index == 0, axis.index == axis.size - 1
        self.program = with_communication(schedule)[axis.index]
        self.microbatches = 1 + max(action.microbatch for action in schedule[0])
        self.in_flight_peak = 0
        self._kept: dict[int, Kept] = {}  # in flight: forward done, backward not yet
        self._arriving: dict[Action, Callable[[], Tensor]] = {}
        forward = [(r, r + 1, "F") for r in range(axis.size - 1)]
        self._mail = Mail(axis, forward + [(after, before, "B") for before, after, _ in forward], device)
        self._trace: Trace | None = None

    def step(self, inputs: Tensor, targets: Tensor, draw: Draw | None = None, trace: Trace | None = None) -> Tensor:
        """Forward and backward of all microbatches; gradients are added to the parameters' `.grad`.

        Args:
            inputs, targets: (M, B, S); only the first stage reads inputs, only the last reads targets.
            draw: the first sample of the batch, for dropout.
            trace: measure this step. Each message is then followed by a small one that carries the sender's clock.

        Returns:
            this rank's share of the loss, a scalar: all of it on the last stage, 0 elsewhere.

        Raises:
            PeerError: a neighbour died or was silent for the whole timeout.
            ValueError: the batch does not have the schedule's number of microbatches.
        """
        if not len(inputs) == len(targets) == self.microbatches:
            raise ValueError(f"{len(inputs)} microbatches for a schedule of {self.microbatches}")
        self._trace = trace
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        leaving = None  # the result of the last action, until it is sent
        for action in self.program:
            m = action.microbatch
            match action.kind:
                case "RECV_F" | "RECV_B":
                    self._ask(action)
                case "F":
                    samples = draw and draw._replace(first_sample=draw.first_sample + m * inputs.shape[1])
                    leaving = self._forward(action, inputs[m], targets[m], samples)
                    if self.is_last:
                        total += leaving.detach()
                case "B":
                    leaving = self._backward(action)
                case "SEND_F" | "SEND_B":
                    self._send(action, leaving.detach())
                    leaving = None
        self._mail.flush()
        assert not self._kept, "a valid schedule leaves nothing behind"
        return total

    def _forward(self, action: Action, tokens: Tensor, targets: Tensor, draw: Draw | None) -> Tensor:
        x = tokens if self.is_first else self._arrived(action).requires_grad_()
        with self._measured(action), self._trace.saved if self._trace else nullcontext():
            y = self.stage(x, draw)
            if self.is_last:
                y = self.loss(y, targets)
        self._kept[action.microbatch] = Kept(x, get_gradient_edge(y) if y.requires_grad else None)
        self.in_flight_peak = max(self.in_flight_peak, len(self._kept))
        return y

    def _backward(self, action: Action) -> Tensor | None:
        gradient = None if self.is_last else self._arrived(action)
        kept = self._kept.pop(action.microbatch)
        if kept.exit is not None:
            with self._measured(action):
                torch.autograd.backward(kept.exit, gradient)
        return kept.input.grad

    # Messages. One is known on both sides by the action that receives it.

    def _ask(self, receive: Action) -> None:
        sender = self.axis.index + (-1 if receive.kind == "RECV_F" else 1)
        into = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._arriving[receive] = self._mail.receive(into, sender, receive.kind[-1], self._tag(receive))
        if self._trace:
            stamp = self._mail.receive(self._trace.clock.stamp(), sender, "clock", self._tag(receive) + 1)
            self._arriving[receive] = self._with_stamp(self._arriving[receive], stamp)

    def _arrived(self, action: Action) -> Tensor:
        return self._arriving.pop(action._replace(kind=f"RECV_{action.kind}"))()

    def _send(self, send: Action, x: Tensor) -> None:
        assert x.shape == self.shape, f"{send}: {tuple(x.shape)} is not the {self.shape} that the next stage expects"
        step = 1 if send.kind == "SEND_F" else -1
        receive = Action(send.stage + step, f"RECV_{send.kind[-1]}", send.microbatch)
        self._mail.send(x, self.axis.index + step, send.kind[-1], self._tag(receive))
        if self._trace:
            self._mail.send(self._trace.clock.stamp(), self.axis.index + step, "clock", self._tag(receive) + 1)

    def _tag(self, receive: Action) -> int:
        number = receive.stage * self.microbatches + receive.microbatch
        return 4 * number + 2 * (receive.kind == "RECV_B")  # even; the clock's message has the odd number after it

    # Measurement.

    def _measured(self, action: Action) -> AbstractContextManager:
        return self._trace.clock.action(str(action), UNIT_COSTS[action.kind]) if self._trace else nullcontext()

    def _with_stamp(self, message: Callable[[], Tensor], stamp: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def arrive() -> Tensor:
            value = message()
            self._trace.clock.hear(stamp())
            return value

        return arrive

    def close(self) -> None:
        """End the thread that sends."""
        self._mail.close()
