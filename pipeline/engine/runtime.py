"""The fast runtime: any schedule on real processes, and what `cluster/` trains with. Lecture 09.

To `pipeline/runtime.py` it adds:

    receives posted ahead    one action before the one that needs the message, which so travels while that computes
    only what is needed      of an output, once it is sent, the place in the graph where its gradient enters
    deferred wgrads          the parameters are marked, and any kind of layer can leave its weights for later
    frozen parameters        stages in which nothing is trained
    forward alone            for an evaluation
    measurement              a virtual clock that messages carry along, and bytes of saved activations
    observers                who shards weights and gradients is told what is computed, and what comes next
    F&B                      where layers wait for messages of their own, the two compute by turns (`turns.py`)

M micro-batches, B samples in a micro-batch, S sequence, H hidden
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from core.mesh import Axis
from core.model.linear import Deferred, Later
from core.model.loss import InHead, loss_of
from core.model.seeded import SampleMasks
from core.p2p import PointToPoint
from core.proof.flight import FLIGHT, Where
from core.proof.memory import SavedActivations
from pipeline.engine.actions import (
    Action,
    Row,
    Schedule,
    input_of,
    output_of,
    placement,
    routes,
    sender_of,
    side_by_side,
    size,
    stage_share,
    stages_of_ranks,
    with_communication,
)
from pipeline.engine.observer import Observer, what_follows
from pipeline.engine.step import Kept, Step, Trace
from pipeline.engine.turns import Turns
from pipeline.engine.validator import validate


class Pipeline:
    """One rank of a pipeline.

    Args:
        stages: those of this rank, by number; called as stage(x). Each maps (B, S) tokens or (B, S, H) activations to
            the next stage's input, or to logits on the last stage.
        loss: maps (logits, targets) of one micro-batch to its share of the global loss, a scalar: the shares add up.
            Or one that the last stage computes, without its logits.
        schedule: what every rank computes, in order; validated here.
        axis: the ranks of the pipeline.
        shape: (B, S, H) of the activation that travels.
        masks: of the stages' dropouts; told which micro-batch is computed.
        observers: told of each action.
        turns: taken by the forward and the backward of an F&B, to which the layers give them where they would wait.

    Raises:
        ScheduleError: the schedule cannot run.
        ValueError: it is for another number of ranks, or puts other stages on this one.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor] | InHead,
        schedule: Schedule,
        axis: Axis,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        masks: SampleMasks | None = None,
        observers: Sequence[Observer] = (),
        turns: Turns | None = None,
    ):
        validate(schedule, together=turns is not None)
        if len(schedule) != axis.size:
            raise ValueError(f"the schedule is for {len(schedule)} ranks, the pipeline has {axis.size}")
        here = stages_of_ranks(schedule)[axis.index]
        if sorted(stages) != here:
            raise ValueError(f"the schedule puts stages {here} here, not {sorted(stages)}")
        self.stages, self.loss, self.axis = stages, loss, axis
        self.shape, self.dtype, self.device, self.masks = shape, dtype, device, masks
        self.observers, self.turns = observers, turns
        count, self.microbatches = size(schedule)
        self.last = count - 1
        row = schedule[axis.index]
        self.pairs = dict(row.pairs) if turns and isinstance(row, Row) else {}  # the F and B of an F&B
        self.program = side_by_side(with_communication(schedule)[axis.index], self.pairs)
        self.in_flight_peak = 0
        sends = {a: a._replace(kind=a.kind[-1]) for a in self.program if a.kind.startswith("SEND")}
        self._receive_of = {a: input_of(a) for a in row}  # what an action needs
        self._receive_for = {a: output_of(sends.get(a, a)) for a in (*row, *sends)}  # what becomes of its result
        self._share = stage_share(schedule)
        self._rank_of = placement(schedule)
        self._messages = PointToPoint(axis, routes(schedule), device)
        self._kept: dict[tuple[int, int], Kept] = {}  # by (stage, micro-batch): forward done, backward not yet
        self._pending: dict[tuple[int, int], list[Later]] = {}  # input gradient done, weight gradients not yet
        self._arriving: dict[Action, Callable[[], Tensor]] = {}  # by its receive: wait for a message, and get it
        self._leaving: dict[Action, Tensor] = {}  # results, by the receive on the other side, until they are sent
        self._split = {(a.stage, a.microbatch) for a in schedule[axis.index] if a.kind == "I"}
        self.deferred = Deferred(p for stage in stages.values() for p in stage.parameters()) if self._split else None
        if turns:
            turns.save, turns.restore = self._place, self._return_to
        self._carry_out = {
            "RECV_F": self._post_receive,
            "RECV_B": self._post_receive,
            "F": self._forward,
            "B": self._backward,
            "I": self._backward_input,
            "W": self._backward_weights,
            "SEND_F": self._send,
            "SEND_B": self._send,
        }

    def step(
        self,
        inputs: Tensor,
        targets: Tensor,
        trace: Trace | None = None,
        saved: SavedActivations | None = None,
    ) -> Tensor:
        """Forward and backward of all micro-batches; gradients are added to the parameters' `.grad`.

        Args:
            inputs, targets: (M, B, S); only the first stage reads inputs, only the last reads targets.
            trace: measure this step. Each message is then followed by a small one that carries the sender's clock.
            saved: count what is kept for backward, and nothing else; a trace has its own.

        Returns:
            this rank's share of the loss, a scalar: on the ranks of the last stage; 0 elsewhere.

        Raises:
            PeerError: a neighbour died or was silent for the whole timeout.
            ValueError: the batch does not have the schedule's number of micro-batches.
        """
        saved = trace.saved if trace else saved
        if self.deferred:
            self.deferred.account = saved
        total = self._run(self.program, inputs, targets, trace, saved)
        assert {**self._kept, **self._pending} == {}, "a valid schedule leaves nothing behind"
        return total

    @torch.no_grad()
    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss alone, as `step` gives it: the forwards of the schedule and their messages, without gradients."""
        forwards = [action for action in self.program if action.kind in ("RECV_F", "F", "SEND_F")]
        return self._run(forwards, inputs, targets, None, None)

    def close(self) -> None:
        """End the threads."""
        self._messages.close()
        if self.turns:
            self.turns.close()

    def _run(
        self, program: Sequence[Action], inputs: Tensor, targets: Tensor, trace: Trace | None,
        saved: SavedActivations | None,
    ) -> Tensor:  # fmt: skip
        if not len(inputs) == len(targets) == self.microbatches:
            raise ValueError(f"{len(inputs)} microbatches for a schedule of {self.microbatches}")
        loss = torch.zeros((), dtype=torch.float64, device=self.device)  # not self.dtype: many small shares
        for left in (self._kept, self._pending, self._arriving, self._leaving):  # by a step that failed
            left.clear()
        if self.deferred:
            self.deferred.take()
        self._now = Step(inputs, targets, loss, trace, saved)
        pairs = self.pairs if torch.is_grad_enabled() else {}
        follows = what_follows(program, pairs)
        actions = iter(program)
        for action in actions:
            block = [action, next(actions)] if action in pairs else [action]
            watched = self.observers if action in follows else ()
            for each in block:
                for observer in watched:
                    observer.begins(each, *follows[each])
            self._compute(block)
            for each in block:
                for observer in watched:
                    observer.ends(each)
        for observer in self.observers:
            observer.done()
        self._messages.flush()
        return loss

    # ---- Compute

    def _compute(self, block: list[Action]) -> None:
        """One action; or an F&B, by turns."""
        if len(block) == 2:
            forward, backward = block
            self.turns.together(lambda: self._backward(backward), lambda: self._forward(forward))
            return
        for action in block:
            self._carry_out[action.kind](action)

    def _place(self) -> tuple[int, bool, Where]:
        """What an action sets for its layers, and where it is."""
        return self.masks.offset if self.masks else 0, bool(self.deferred and self.deferred.expected), FLIGHT.here()

    def _return_to(self, place: tuple[int, bool, Where]) -> None:
        offset, expected, where = place
        FLIGHT.go_to(where)
        if self.masks:
            self.masks.at(offset)
        if self.deferred:
            self.deferred.expected = expected

    def _forward(self, action: Action) -> None:
        FLIGHT.at("forward", action.microbatch, action.stage)
        stage, _, m = action
        now, trace = self._now, self._now.trace
        x = now.inputs[m] if stage == 0 else self._wait_for_input(action).requires_grad_()
        if self.masks:
            self.masks.at(m * now.inputs.shape[1])
        if self.deferred:
            self.deferred.expected = (stage, m) in self._split
        before = trace.saved.live if trace else 0
        with self._measured(action), now.saved or nullcontext():
            if stage == self.last:
                y = loss_of(self.stages[stage], x, now.targets[m], self.loss)
            else:
                y = self.stages[stage](x)
        if trace:
            trace.by_stage.setdefault(stage, trace.saved.live - before)
        if stage == self.last:
            now.loss += y.detach()
        if torch.is_grad_enabled():
            self._kept[stage, m] = Kept(x, get_gradient_edge(y) if y.requires_grad else None)
            self.in_flight_peak = max(self.in_flight_peak, len(self._kept) + len(self._pending))
        self._pass_on(action, y)

    def _backward(self, action: Action) -> None:
        FLIGHT.at("backward", action.microbatch, action.stage)
        if self.deferred:  # for what is computed again in a backward
            self.deferred.expected = False
        self._pass_on(action, self._gradient_of_input(action, nullcontext()))

    def _backward_input(self, action: Action) -> None:
        """All but what leads to the gradients of the linear layers' weights."""
        FLIGHT.at("backward", action.microbatch, action.stage)
        self.deferred.expected = True
        gradient = self._gradient_of_input(action, self.deferred)
        self._pending[action.stage, action.microbatch] = self.deferred.take()
        self._pass_on(action, gradient)

    def _gradient_of_input(self, action: Action, deferring: AbstractContextManager) -> Tensor | None:
        gradient = None if action.stage == self.last else self._wait_for_input(action)
        kept = self._kept.pop((action.stage, action.microbatch))
        if kept.exit is not None:
            with self._measured(action), deferring:
                torch.autograd.backward(kept.exit, gradient)
        return kept.input.grad

    def _backward_weights(self, action: Action) -> None:
        FLIGHT.at("wgrad", action.microbatch, action.stage)
        pending = self._pending.pop((action.stage, action.microbatch))
        if self._now.trace:
            self._now.trace.deferred_layers += len(pending)
        with self._measured(action):
            while pending:
                pending.pop().add()  # and forget what it read

    def _measured(self, action: Action) -> AbstractContextManager:
        trace = self._now.trace
        return trace.clock.action(action, self._share * trace.costs[action.kind]) if trace else nullcontext()

    # ---- Messages. One is known on both sides by the action that receives it.

    def _post_receive(self, receive: Action) -> None:
        sender, trace = self._rank_of[sender_of(receive)], self._now.trace
        into = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        message = self._messages.receive(into, sender, receive.kind[-1], self._tag(receive))
        if trace is None:
            self._arriving[receive] = message
            return
        stamp = self._messages.receive(trace.clock.stamp(), sender, "clock", self._tag(receive, clock=True))

        def arrive() -> Tensor:
            value = message()
            trace.clock.receive(stamp())
            return value

        self._arriving[receive] = arrive

    def _wait_for_input(self, action: Action) -> Tensor:
        return self._arriving.pop(self._receive_of[action])()

    def _pass_on(self, action: Action, result: Tensor | None) -> None:
        """Hand the result to the next stage, or leave it for the SEND that follows."""
        receive = self._receive_for[action]
        receiver = self._rank_of.get((receive.stage, receive.microbatch))  # none at the ends of the pipeline
        if receiver == self.axis.index:
            value = result.detach()
            self._arriving[receive] = lambda: value
        elif receiver is not None:
            self._leaving[receive] = result.detach()

    def _send(self, send: Action) -> None:
        receive = self._receive_for[send]
        x = self._leaving.pop(receive)
        assert x.shape == self.shape, f"{send}: {tuple(x.shape)} is not the {self.shape} that the next stage expects"
        receiver = self._rank_of[receive.stage, receive.microbatch]
        self._messages.send(x, receiver, send.kind[-1], self._tag(receive))
        if trace := self._now.trace:
            self._messages.send(trace.clock.stamp(), receiver, "clock", self._tag(receive, clock=True))

    def _tag(self, receive: Action, clock: bool = False) -> int:
        """Tells apart the messages from one rank to another."""
        kind = ("RECV_F", "RECV_B").index(receive.kind) + 2 * clock
        return 4 * (receive.stage * self.microbatches + receive.microbatch) + kind
