"""Carry out any schedule on real processes. Lecture 09: Megatron-LM pipeline code (Megatron-LM 流水并行 PP 代码解析).

The schedule says what to compute in which order; `with_communication` has added when to send and to ask. What is left
is what you read here: post a receive, compute, send, and forget what is no longer needed. A rank holds one stage or
several; from a stage to the next on the same rank nothing is sent.

M microbatches, B samples in a microbatch, S sequence, H hidden
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from core.mesh import Axis
from core.model.linear import Deferred, Later
from core.model.seeded import SampleMasks
from core.p2p import PointToPoint
from core.proof.clock import VirtualClock
from core.proof.memory import SavedActivations
from pipeline.schedules import (
    UNIT_COSTS,
    Action,
    Schedule,
    delivery,
    held,
    needed,
    part_of_rank,
    placement,
    size,
    with_communication,
)
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
    by_stage: dict[int, int] = field(default_factory=dict)  # bytes that autograd saved for one microbatch
    left_for_weights: int = 0  # layers whose weight gradients a W has computed


class Pipeline:
    """One rank of a pipeline.

    Args:
        stages: those that this rank holds, by number; called as stage(x). Each maps (B, S) tokens or (B, S, H)
            activations to the next stage's input, or to logits on the last stage.
        loss: maps (logits, targets) of one microbatch to its share of the global loss, a scalar: the shares add up.
        schedule: what every rank computes, in order; validated here.
        axis: the ranks of the pipeline.
        shape: (B, S, H) of the activation that travels.
        masks: of the stages' dropouts; told which micro-batch is computed.

    Raises:
        ScheduleError: the schedule cannot run.
        ValueError: it is for another number of ranks, or puts other stages on this one.
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
    ):
        validate(schedule)
        if len(schedule) != axis.size:
            raise ValueError(f"the schedule is for {len(schedule)} ranks, the pipeline has {axis.size}")
        if sorted(stages) != held(schedule)[axis.index]:
            raise ValueError(f"the schedule puts stages {held(schedule)[axis.index]} here, not {sorted(stages)}")
        self.stages, self.loss, self.axis = stages, loss, axis
        self.shape, self.dtype, self.device, self.masks = shape, dtype, device, masks
        self.last = size(schedule)[0] - 1
        self.microbatches = size(schedule)[1]
        self.part = part_of_rank(schedule)
        self.in_flight_peak = 0
        self._kept: dict[tuple[int, int], Kept] = {}  # by (stage, microbatch): forward done, backward not yet
        self._owed: dict[tuple[int, int], list[Later]] = {}  # input gradient done, weight gradients not yet
        self._split = {(a.stage, a.microbatch) for a in schedule[axis.index] if a.kind == "I"}
        self._deferred = Deferred(p for stage in stages.values() for p in stage.parameters()) if self._split else None
        # Messages.
        program = with_communication(schedule)
        self.program = program[axis.index]
        self._rank_of = placement(schedule)
        self._arriving: dict[Action, Callable[[], Tensor]] = {}
        routes = {
            (rank, self._rank_of[receive.stage, receive.microbatch], receive.kind[-1])
            for rank, row in enumerate(program)
            for receive in (delivery(action) for action in row if action.kind in "FBI")
            if self._rank_of.get((receive.stage, receive.microbatch), rank) != rank
        }
        self._messages = PointToPoint(axis, sorted(routes), device)
        self._trace: Trace | None = None
        self._saved: SavedActivations | None = None

    def step(
        self,
        inputs: Tensor,
        targets: Tensor,
        trace: Trace | None = None,
        saved: SavedActivations | None = None,
    ) -> Tensor:
        """Forward and backward of all microbatches; gradients are added to the parameters' `.grad`.

        Args:
            inputs, targets: (M, B, S); only the first stage reads inputs, only the last reads targets.
            trace: measure this step. Each message is then followed by a small one that carries the sender's clock.
            saved: count what is kept for backward, and nothing else; a trace has its own.

        Returns:
            this rank's share of the loss, a scalar: on the ranks of the last stage; 0 elsewhere.

        Raises:
            PeerError: a neighbour died or was silent for the whole timeout.
            ValueError: the batch does not have the schedule's number of microbatches.
        """
        self._trace, self._saved = trace, trace.saved if trace else saved
        if self._deferred:
            self._deferred.account = self._saved
        total = self._carry_out(self.program, inputs, targets)
        assert {**self._kept, **self._owed} == {}, "a valid schedule leaves nothing behind"
        return total

    @torch.no_grad()
    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss alone, as `step` gives it: the forwards of the schedule and their messages, without gradients."""
        self._trace = self._saved = None
        forwards = [action for action in self.program if action.kind in ("F", "RECV_F", "SEND_F")]
        return self._carry_out(forwards, inputs, targets)

    def _carry_out(self, program: Sequence[Action], inputs: Tensor, targets: Tensor) -> Tensor:
        if not len(inputs) == len(targets) == self.microbatches:
            raise ValueError(f"{len(inputs)} microbatches for a schedule of {self.microbatches}")
        total = torch.zeros((), dtype=torch.float64, device=self.device)  # not self.dtype: many small shares
        leaving = None  # the result of the last action, until it is sent
        for action in program:
            m = action.microbatch
            match action.kind:
                case "RECV_F" | "RECV_B":
                    self._ask(action)
                case "F":
                    if self.masks:
                        self.masks.at(m * inputs.shape[1])
                    leaving = self._forward(action, inputs[m], targets[m])
                    if action.stage == self.last:
                        total += leaving.detach()
                case "B" | "I":
                    leaving = self._backward(action)
                case "W":
                    self._add_weight_gradients(action)
                case "SEND_F" | "SEND_B":
                    self._send(action, leaving.detach())
                    leaving = None
            if action.kind in "FBI" and self._rank_of.get((delivery(action)[0], m)) == self.axis.index:
                self._arriving[delivery(action)] = partial(Tensor.detach, leaving.detach())
                leaving = None
        self._messages.flush()
        return total

    def _forward(self, action: Action, tokens: Tensor, targets: Tensor) -> Tensor:
        x = tokens if action.stage == 0 else self._arrived(action).requires_grad_()
        if self._deferred:
            self._deferred.expected = (action.stage, action.microbatch) in self._split
        before = self._trace.saved.live if self._trace else 0
        with self._measured(action), self._saved or nullcontext():
            y = self.stages[action.stage](x)
            if action.stage == self.last:
                y = self.loss(y, targets)
        if self._trace:
            self._trace.by_stage.setdefault(action.stage, self._trace.saved.live - before)
        if torch.is_grad_enabled():
            self._kept[action.stage, action.microbatch] = Kept(x, get_gradient_edge(y) if y.requires_grad else None)
            self.in_flight_peak = max(self.in_flight_peak, len(self._kept) + len(self._owed))
        return y

    def _backward(self, action: Action) -> Tensor | None:
        """Whole, or for an I only what does not lead to the gradients of the linear layers' weights."""
        gradient = None if action.stage == self.last else self._arrived(action)
        kept = self._kept.pop((action.stage, action.microbatch))
        if self._deferred:  # for what is computed again in a backward
            self._deferred.expected = action.kind == "I"
        if kept.exit is not None:
            with self._measured(action), self._deferred if action.kind == "I" else nullcontext():
                torch.autograd.backward(kept.exit, gradient)
        if action.kind == "I":
            self._owed[action.stage, action.microbatch] = self._deferred.take()
        return kept.input.grad

    def _add_weight_gradients(self, action: Action) -> None:
        owed = self._owed.pop((action.stage, action.microbatch))
        if self._trace:
            self._trace.left_for_weights += len(owed)
        with self._measured(action):
            while owed:
                owed.pop().add()  # and forget what it read

    # Messages. One is known on both sides by the action that receives it.

    def _ask(self, receive: Action) -> None:
        sender = self._rank_of[receive.stage + (-1 if receive.kind == "RECV_F" else 1), receive.microbatch]
        into = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._arriving[receive] = self._messages.receive(into, sender, receive.kind[-1], self._tag(receive))
        if self._trace:
            stamp = self._messages.receive(self._trace.clock.stamp(), sender, "clock", self._tag(receive) + 1)
            self._arriving[receive] = self._with_stamp(self._arriving[receive], stamp)

    def _arrived(self, action: Action) -> Tensor:
        return self._arriving.pop(needed(action))()

    def _send(self, send: Action, x: Tensor) -> None:
        assert x.shape == self.shape, f"{send}: {tuple(x.shape)} is not the {self.shape} that the next stage expects"
        receive = delivery(send._replace(kind=send.kind[-1]))
        to = self._rank_of[receive.stage, receive.microbatch]
        self._messages.send(x, to, send.kind[-1], self._tag(receive))
        if self._trace:
            self._messages.send(self._trace.clock.stamp(), to, "clock", self._tag(receive) + 1)

    def _tag(self, receive: Action) -> int:
        number = receive.stage * self.microbatches + receive.microbatch
        return 4 * number + 2 * (receive.kind == "RECV_B")  # even; the clock's message has the odd number after it

    # Measurement.

    def _measured(self, action: Action) -> AbstractContextManager:
        return (
            self._trace.clock.action(str(action), self.part * UNIT_COSTS[action.kind]) if self._trace else nullcontext()
        )

    def _with_stamp(self, message: Callable[[], Tensor], stamp: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def arrive() -> Tensor:
            value = message()
            self._trace.clock.receive(stamp())
            return value

        return arrive

    def close(self) -> None:
        """End the thread that sends."""
        self._messages.close()
