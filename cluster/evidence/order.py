"""What travels over the data ranks while a pipeline computes, seen as each action begins. Lectures 01 and 07."""

from collections.abc import Sequence

import torch

from cluster.evidence.flights import Flights
from cluster.run.worker import Worker
from core.proof.lesson import Run
from pipeline.engine.actions import Action
from pipeline.engine.observer import what_follows
from zero.engine.gathered import GatheredWeights


class Order:
    """An observer of a worker's pipeline, that looks before the engines do anything; of training steps only.

    Attributes:
        ahead: actions but the first of a step that find the first weights they need gathered, or on their way.
        reducing: actions that begin while gradients are on their way to the data ranks.
    """

    def __init__(self, worker: Worker):
        self.worker, self.sharding = worker, worker.dense_engine.sharding
        self.ahead = self.reducing = 0
        self._first = True
        self.flights = Flights(worker) if worker.layout.by_turns else None
        worker.pipeline.observers = [self, *worker.pipeline.observers]

    def begins(self, action: Action, then: Sequence[Action], final: bool) -> None:
        if not torch.is_grad_enabled():
            return
        self.reducing += bool(self.sharding.gradients.in_flight)
        weights = self.sharding.weights
        if isinstance(weights, GatheredWeights) and action.kind != "W":
            here = weights.walks[action.stage].first(action.kind == "F")
            self.ahead += not self._first and all(unit.full[0].untyped_storage().nbytes() for unit in here if unit.full)
            self._first = False

    def ends(self, action: Action) -> None:
        """Nothing to see."""

    def done(self) -> None:
        self._first = True

    def claim(self, run: Run, steps: int) -> None:
        """By the schedule. All ranks call it, after the training."""
        layout, row = self.worker.layout, [a for a in self.worker.pipeline.program if "_" not in a.kind]
        finals = [i for i, (_, final) in enumerate(what_follows(row)[a] for a in row) if final]
        after = steps * (len(row) - 1 - finals[0]) if len(finals) > 1 else 0
        read = steps * (sum(action.kind != "W" for action in row) - 1)
        everyone = run.job.gather((read, self.ahead, after, self.reducing))
        for rank, (read, ahead, after, reducing) in enumerate(everyone or ()):
            if layout.zero == 3:
                run.evidence.claim(
                    f"actions whose weights are there or on their way before, rank {rank}",
                    f"all but the first of a step = {read}, by the order of events", read, ahead,
                )  # fmt: skip
            if after and (layout.zero < 2 or layout.reduce == "step"):
                run.evidence.claim(
                    f"actions that begin while another stage's gradients are reduced, rank {rank}",
                    f"all after the last of that stage = {after}, by the order of events", after, reducing,
                )  # fmt: skip
        if self.flights:  # whose further steps are not counted here
            self.flights.claim(run, steps)
