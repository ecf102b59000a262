"""F&B of DualPipe on real ranks: what computes while rows of experts are in flight, and what that is worth. Lecture 08.

Seen where layers compute and where rows leave and arrive, not from what the pipeline says of itself. On virtual clocks
attention takes 1 in a forward, the MLP or the experts 1, a backward twice as long, and an all-to-all `EXCHANGE`.

P stages, N forwards on a rank; F and B a forward and a backward of one stage with their all-to-alls, W the part of the
weights
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cluster.run.worker import Worker
from core import comm
from core.model.seeded import generator
from core.proof.clock import VirtualClock
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from expert_parallel.engine.layers import ExpertParallelMoE
from pipeline.engine.actions import UNIT_COSTS, Action, Row, Schedule, size, with_communication
from pipeline.engine.step import Trace
from pipeline.engine.validator import validate
from pipeline.schedules import build

EXCHANGE = 0.5
FREE = dict.fromkeys(UNIT_COSTS, 0.0)  # an action itself: its layers take the time


class Flights:
    """Watches the layers of a worker, in pairs: F&B of which the backward begins before the forward ends.

    Attributes:
        pairs: how many there were.
        hidden: all-to-alls between whose begin and end the other direction has computed.
        could: those that the pairs could hide, where none is recomputed.
        recomputes: whether a backward does what a forward has done.
    """

    def __init__(self, worker: Worker):
        self.worker, self.pairs, self.hidden, self.could, self.recomputes = worker, 0, 0, 0, False
        self.clock: VirtualClock | None = None  # of a step that is measured
        self._now: VirtualClock | None = None  # the same, but where the load is counted ahead
        self._open: list[Action] = []
        self._computed, self._begun = {"F": 0, "B": 0}, {"F": 0, "B": 0}  # by direction; of the open actions
        self._before = 0  # forwards of layers when those began
        for block in worker.model.blocks.values():
            block.attention.register_forward_hook(self._computes)
            mixture = isinstance(block.mlp, ExpertParallelMoE)
            (block.mlp.experts if mixture else block.mlp).register_forward_hook(self._computes)
            if mixture:
                block.mlp.flight.begun = self._leaves
        worker.pipeline.observers = [self, *worker.pipeline.observers]

    # ---- What layers do

    def _computes(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        self.recomputes |= _direction() == "B"
        self._count()
        if output.requires_grad:
            output.register_hook(lambda _: self._count())

    def _count(self) -> None:
        direction = _direction()
        self._computed[direction] += 1
        if self._now:
            split = any(action.kind == "I" for action in self._open)
            self._now.now[0] += UNIT_COSTS["F" if direction == "F" else "I" if split else "B"]

    def _leaves(self, pending: comm.Pending) -> None:
        direction = _direction()
        self._begun[direction] += 1
        before, when = self._computed[_other(direction)], self._now.now[0] if self._now else 0.0
        pending.wait = partial(self._arrives, pending, direction, before, when)

    def _arrives(self, pending: comm.Pending, direction: str, before: int, when: float) -> Tensor:
        """In place of the wait, which it is."""
        del pending.wait  # who waits again does not wait for the rows
        self.hidden += self._computed[_other(direction)] > before
        if self._now:
            self._now.now[0] = max(self._now.now[0], when + EXCHANGE)
        return pending.wait()

    # ---- What the pipeline does

    def begins(self, action: Action, then: Sequence[Action], final: bool) -> None:
        self._now = self.clock if torch.is_grad_enabled() else None
        if not self._open:
            self._begun, self._before = {"F": 0, "B": 0}, self._computed["F"]
        self._open.append(action)
        if self._now and action.kind == "W":
            self._now.now[0] += UNIT_COSTS["W"] * 2 * len(self.worker.pipeline.stages[action.stage].blocks)

    def ends(self, action: Action) -> None:
        if len(self._open) == 2:
            self.pairs += 1
            self.could += hidden_by(self._begun["F"], self._begun["B"], self._computed["F"] > self._before)
        self._open.remove(action)

    def done(self) -> None:
        """Nothing to see."""

    # ---- Claims. All ranks call it, after the training.

    def claim(self, run: Run, steps: int) -> None:
        """The order of events in the training, and virtual time of one more step, of which nothing is kept."""
        layout, pipeline = self.worker.layout, self.worker.pipeline
        schedule = build(layout.schedule, layout.pp, layout.microbatches, layout.v)
        row = schedule[pipeline.axis.index]
        assert isinstance(row, Row)
        found = (steps * len(row.pairs), self.pairs, self.could, self.hidden)
        for rank, (expected, pairs, could, hidden) in enumerate(run.job.gather(found) or ()):
            run.evidence.claim(f"F&B by turns, rank {rank}", f"the schedule's = {expected}", expected, pairs)
            if not self.recomputes:
                run.evidence.claim(
                    f"all-to-alls of F&B in whose flight the other direction computes, rank {rank}",
                    f"all, where both have as many = {could}, by the order of events", could, hidden,
                )  # fmt: skip
        if layout.recompute != "none" or not (steps and run.args.verify):
            return
        exchanges = run.job.gather({stage: _mixtures(model) for stage, model in pipeline.stages.items()})
        layers = run.job.gather({stage: len(model.blocks) for stage, model in pipeline.stages.items()})
        by_turns = self._makespan(run)
        pipeline.pairs, pipeline.program = {}, with_communication(schedule)[pipeline.axis.index]
        one_by_one = self._makespan(run)
        if run.job.rank:
            return
        exchanges, layers = ({k: v for each in of_ranks for k, v in each.items()} for of_ranks in (exchanges, layers))
        for name, expected, formula, found in zip(
            ("by turns", "one after the other"), planned(schedule, layers, exchanges), FORMULAS, (by_turns, one_by_one),
            strict=True,
        ):  # fmt: skip
            what = f"{formula} = {expected:g}" if _equal(layers, exchanges) else f"on virtual devices = {expected:g}"
            run.evidence.claim(f"virtual time of a step, F&B {name}", what, expected, found, 1e-9)

    def _makespan(self, run: Run) -> float:
        spec = self.worker.spec
        shape, random = (2, spec.layout.batch, spec.config.sequence), generator(spec.seed, "flights")
        tokens = torch.randint(spec.config.vocabulary, shape, generator=random).to(spec.device)
        trace = Trace(VirtualClock(spec.device), SavedActivations([]), costs=FREE)
        self.worker.zero_grad()
        self.clock = trace.clock
        try:
            self.worker.forward_backward(0, *tokens, trace=trace)
        finally:
            self.clock = None
        return max(run.job.gather(float(trace.clock.now[0])) or [0.0])


FORMULAS = (
    "(P+1)(F+B) + (N-P-1) F&B + (P/2-1)(F&B+B-3W)",
    "N(F+B) + (P/2-1)(F+B-2W)",
)


def planned(schedule: Schedule, layers: dict[int, int], mixtures: dict[int, int]) -> tuple[float, float]:
    """The time of a step by turns, and one after the other: by formula where all stages are equal, on virtual devices.

    Args:
        layers, mixtures: of each stage: all of them, and those with experts.
    """
    stages, _ = size(schedule)
    travel = [2 * EXCHANGE * mixtures[stage] for stage in range(stages)]
    costs = {
        kind: [2 * cost * layers[stage] + (travel[stage] if kind != "W" else 0.0) for stage in range(stages)]
        for kind, cost in UNIT_COSTS.items()
    }
    hidden = {
        (f, b): EXCHANGE * hidden_by(2 * mixtures[f], 2 * mixtures[b], layers[f] > 0)
        for f in range(stages)
        for b in range(stages)
    }
    if _equal(layers, mixtures):
        f, b, w = (costs[kind][0] for kind in "FBW")
        both, n = f + b - hidden[0, 0], sum(action.kind == "F" for action in schedule[0])
        by_turns = (stages + 1) * (f + b) + (n - stages - 1) * both + (stages / 2 - 1) * (both + b - 3 * w)
        return by_turns, n * (f + b) + (stages / 2 - 1) * (f + b - 2 * w)
    by_turns = validate(schedule, costs, together=True, hidden=hidden)
    return by_turns.makespan, validate(schedule, costs).makespan


def hidden_by(forward: int, backward: int, computes: bool = True) -> int:
    """Of so many all-to-alls of the forward and of the backward of an F&B, those that travel while the other computes.

    By turns: as many of each as the other has. Of the backward one more, behind a forward that has none.

    Args:
        computes: whether the forward has a layer: a stage may be the embedding or the head alone.
    """
    return 2 * min(forward, backward) + (forward == 0 < backward and computes)


def _equal(layers: dict[int, int], mixtures: dict[int, int]) -> bool:
    return len(set(layers.values())) == len(set(mixtures.values())) == 1


def _mixtures(model: nn.Module) -> int:
    return sum(isinstance(block.mlp, ExpertParallelMoE) for block in model.blocks.values())


def _direction() -> str:
    """Which of the two computes here: whether it is within a backward."""
    return "F" if torch._C._current_graph_task_id() == -1 else "B"


def _other(direction: str) -> str:
    return "B" if direction == "F" else "F"
