"""Find a schedule for given costs and a given memory, instead of writing one down. Lecture 08, further.

Three steps. The named schedules that fit the memory are candidates. So are those of a greedy rule, which lets a rank
that is free do the most urgent thing it can: an input gradient, else a forward if memory allows, else what weight
gradients are left over; with several placements of the stages and several settings of the rule. The best of all are
improved by moving single actions, as long as that shortens the step. (2401.10241, section 3, does the same.)

p ranks, m micro-batches, S stages
"""

import heapq
import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from math import inf

from pipeline.engine.actions import (
    Action,
    Schedule,
    ScheduleError,
    most_in_flight,
    size,
    stage_share,
    stages_of_ranks,
)
from pipeline.engine.numbered import Clocks, Numbered
from pipeline.schedules import SCHEDULES, build

Costs = dict[str, list[float]]  # the time of F, I and W on each of 2p equal stages of the model, in order


@dataclass(frozen=True)
class Problem:
    """What a schedule is wanted for.

    Args:
        costs: see `Costs`.
        message: time a message between two ranks travels.
        memory: activations that a rank can hold, in microbatches of 1/p of the model: 1F1B needs p.
        copies: how often the ranks together can hold the model's parameters: DualPipe needs 2.
    """

    ranks: int
    microbatches: int
    costs: Costs
    message: float
    memory: float
    copies: int = 1

    def of(self, stages: int) -> Costs:
        """The costs of each of S = p or 2p stages, of the full backward (B) too."""
        each = 2 * self.ranks // stages
        merged = {kind: [sum(c[s * each : (s + 1) * each]) for s in range(stages)] for kind, c in self.costs.items()}
        return merged | {"B": [i + w for i, w in zip(merged["I"], merged["W"], strict=True)]}

    def fits(self, schedule: Schedule) -> bool:
        """Whether memory and copies are enough."""
        copies = sum(map(len, stages_of_ranks(schedule))) / size(schedule)[0]
        return copies <= self.copies and max(map(most_in_flight, schedule)) * stage_share(schedule) <= self.memory


@dataclass(frozen=True)
class Found:
    """A schedule, how it was found, and how long a step takes."""

    name: str
    schedule: Schedule
    makespan: float


def named(problem: Problem) -> Iterator[Found]:
    """The schedules of the lessons that exist for these sizes and fit."""
    for name in SCHEDULES:
        try:
            schedule = build(name, problem.ranks, problem.microbatches)
        except ScheduleError:
            continue
        if problem.fits(schedule):
            yield Found(name, schedule, makespan(schedule, problem))


def search(problem: Problem, tries: int | None = None, seed: int = 0) -> Found:
    """The best schedule found; never worse than a named one that fits.

    Args:
        tries: changes tried on each of the few best candidates; None: as many as take some seconds, at most 3000.

    Raises:
        ScheduleError: nothing fits the memory.
    """
    candidates = list(named(problem))
    p = problem.ranks
    if tries is None:
        tries = max(50, min(3000, 1_500_000 // (6 * p * problem.microbatches)))
    placements = {"one stage a rank": [*range(p)], "V": [*range(p), *reversed(range(p))], "round": [*range(p)] * 2}
    settings = product((True, False), (True, False), (0.0, 0.5, 1.0))
    limits = {problem.memory, (problem.memory + p) / 2, float(p)}
    for (place, where), setting, memory in product(placements.items(), settings, limits):
        if memory <= problem.memory and (schedule := greedy(problem, where, memory, *setting)):
            candidates.append(Found(f"greedy, {place}", schedule, makespan(schedule, problem)))
    draw = random.Random(seed)
    for _ in range(20 * tries // (p * problem.microbatches)):  # and with a choice left to chance now and then
        place, where = draw.choice([*placements.items()])
        setting = draw.random() < 0.8, draw.random() < 0.5, draw.random()
        if schedule := greedy(problem, where, problem.memory, *setting, draw):
            candidates.append(Found(f"greedy, {place}", schedule, makespan(schedule, problem)))
    if not candidates:
        raise ScheduleError(f"no schedule holds at most {problem.memory:g} microbatches on a rank")
    best = sorted(candidates, key=lambda found: found.makespan)
    of_placement = {str(stages_of_ranks(found.schedule)): found for found in reversed(best)}  # the best of each
    improved = [improve(found, problem, tries, seed) for found in of_placement.values()]
    return min([best[0], *improved], key=lambda found: found.makespan)


def greedy(
    problem: Problem,
    where: list[int],
    memory: float,
    backward_first: bool,
    late_stage_first: bool,
    patience: float,
    draw: random.Random | None = None,
) -> Schedule | None:
    """What free ranks do if each takes the most urgent thing; None where that ends in a dead end.

    Args:
        where: the rank of each stage.
        patience: a W is not begun if something more urgent arrives before this share of it is done.
        draw: now and then any action that is possible, or none, is taken instead.
    """
    p, m, stages = problem.ranks, problem.microbatches, len(where)
    cost, slots = problem.of(stages), int(memory * stages / p)
    mine = [[s for s in range(stages) if where[s] == r] for r in range(p)]
    arrives = {"F": [[inf] * (m + 1) for _ in where], "I": [[inf] * (m + 1) for _ in where]}
    arrives["F"][0][:m] = [0.0] * m
    following = {"F": [0] * stages, "I": [0] * stages}  # the next microbatch
    due = {"F": [0.0] + [inf] * (stages - 1), "I": [inf] * stages}  # when that arrives
    pending: list[list[Action]] = [[] for _ in range(p)]  # W whose I is done
    free, used = [0.0] * p, [0] * p
    rows: Schedule = [[] for _ in range(p)]
    events = [(0.0, r) for r in range(p)]

    def has_room(rank: int, stage: int) -> bool:
        first, last = mine[rank][0], mine[rank][-1]
        between = following["F"][first] - following["F"][last]  # microbatches that still need the last stage
        return used[rank] < slots and (stage == last or between < slots - 1)  # one slot is for that

    def choose(rank: int, now: float) -> Action | float:
        """What to do, or when to look again."""
        here, due_f, due_i = mine[rank], due["F"], due["I"]
        options = {
            "I": [s for s in here if due_i[s] <= now],
            "F": [s for s in here if due_f[s] <= now and has_room(rank, s)],
        }
        by_chance = draw is not None and draw.random() < 0.2
        for kind in () if by_chance else "IF" if backward_first else "FI":
            if options[kind]:
                stage = max(options[kind]) if late_stage_first or kind == "I" else min(options[kind])
                return Action(stage, kind, following[kind][stage])
        soon = min([time for s in here for time in (due_f[s], due_i[s]) if time > now], default=inf)
        if by_chance:
            possible = [Action(s, kind, following[kind][s]) for kind in "IF" for s in options[kind]]
            chosen = draw.choice([*possible, *pending[rank][:1], soon])
            if chosen != inf:
                return pending[rank].pop(0) if chosen in pending[rank] else chosen
        if pending[rank] and now + patience * cost["W"][pending[rank][0].stage] <= soon:
            return pending[rank].pop(0)
        return soon

    while events:
        now, rank = heapq.heappop(events)
        if now < free[rank]:
            continue
        action = choose(rank, now)
        if not isinstance(action, Action):
            if action < inf:
                heapq.heappush(events, (action, rank))
            continue
        stage, kind, microbatch = action
        rows[rank].append(action)
        end = free[rank] = now + cost[kind][stage]
        heapq.heappush(events, (end, rank))
        used[rank] += {"F": 1, "I": 0, "W": -1}[kind]
        if kind == "W":
            continue
        following[kind][stage] += 1
        due[kind][stage] = arrives[kind][stage][following[kind][stage]]
        if kind == "I":
            pending[rank].append(Action(stage, "W", microbatch))
        turned = kind == "F" and stage == stages - 1
        to, what = (stage, "I") if turned else (stage + (1 if kind == "F" else -1), kind)
        if to >= 0:
            arrives[what][to][microbatch] = time = end + (problem.message if where[to] != rank else 0.0)
            if microbatch == following[what][to]:
                due[what][to] = time
            heapq.heappush(events, (time, where[to]))
    return rows if sum(map(len, rows)) == 3 * stages * m else None


def improve(found: Found, problem: Problem, tries: int, seed: int) -> Found:
    """Move one action at a time, into an idle gap or anywhere near; less and less often keep what is worse."""
    draw, best, kept, length = random.Random(seed), found.makespan, None, found.makespan
    action = sum(map(sum, problem.costs.values())) / (6 * problem.ranks)  # mean time of one
    moves = Moves(found.schedule, problem)
    for i in range(tries):
        heat = 0.15 * action * (1 - i / tries) ** 2
        rank = draw.randrange(problem.ranks)
        last, idle = len(moves.rows[rank]) - 1, moves.idle(rank)
        if idle and draw.random() < 0.8:
            new = draw.choice(idle)
            old = min(last, new + 1 + int(draw.expovariate(0.3)))
        else:
            old = draw.randrange(last + 1)
            new = max(0, min(last, old + draw.randint(-4, 4)))
        if (new_length := moves.move(rank, old, new, within=length + draw.random() * heat)) < inf:
            length = new_length
            if length < best - 1e-12:
                best, kept = length, [list(row) for row in moves.rows]
    if kept is None:
        return found
    actions = [action for row in found.schedule for action in row]
    return Found(f"{found.name}, improved", [[actions[number] for number in row] for row in kept], best)


class Moves:
    """A schedule, as numbers, in which actions are moved. Only what starts after the move is timed again."""

    def __init__(self, schedule: Schedule, problem: Problem):
        numbered = Numbered(schedule)
        cost = problem.of(numbered.stages)
        self.rows = [list(row) for row in numbered.rows]
        self._slots = problem.memory * numbered.stages / problem.ranks
        self._change = numbered.change().tolist()
        self._key, self._kind = numbered.key.tolist(), numbered.kind.tolist()
        self._clocks = Clocks(numbered.durations(cost), *numbered.needs(problem.message))
        self._clocks.run(self.rows)
        self._left = [self._work_left(row) for row in self.rows]
        self._idle: dict[int, list[int]] = {}

    def idle(self, rank: int) -> list[int]:
        """The positions before which the rank waits."""
        if rank not in self._idle:
            row, starts, ends = self.rows[rank], self._clocks.starts, self._clocks.ends
            self._idle[rank] = [i for i in range(1, len(row)) if starts[row[i]] > ends[row[i - 1]] + 1e-9]
        return self._idle[rank]

    def move(self, rank: int, old: int, new: int, within: float) -> float:
        """Move an action of the rank, and return how long a step now takes.

        Infinite where nothing was moved: the step takes longer than `within`, or it does not fit, or cannot run.
        """
        before = self.rows[rank]
        row = before.copy()
        row.insert(new, row.pop(old))
        if self._overtakes(before, old, new) or max(accumulate(map(self._change.__getitem__, row))) > self._slots:
            return inf
        clocks, first = self._clocks, min(old, new)
        starts, ends = clocks.starts.copy(), clocks.ends.copy()
        changes = starts[before[first]]
        # What has started before depends on nothing that starts later.
        at = [bisect_left(each, changes, key=starts.__getitem__) for each in self.rows]
        at[rank] = min(at[rank], first)
        rows, left = self.rows.copy(), self._left.copy()
        rows[rank], left[rank] = row, self._work_left(row)
        tried = Clocks(clocks.durations, clocks.needs, clocks.travel)
        tried.starts, tried.ends = starts, ends
        for each, position in zip(rows, at, strict=True):
            for number in each[position:]:
                ends[number] = inf
        if not tried.run(rows, at, left, within + 1e-9):
            return inf
        length = max(ends[each[-1]] for each in rows)
        if length > within:
            return inf
        self.rows, self._left, self._clocks, self._idle = rows, left, tried, {}
        return length

    def _overtakes(self, row: list[int], old: int, new: int) -> bool:
        """Whether the action would come before one of its stage and micro-batch that must be done before it."""
        key, kind = self._key[row[old]], self._kind[row[old]]
        passed = row[new:old] if new < old else row[old + 1 : new + 1]
        return any(self._key[number] == key and self._kind[number] != kind for number in passed)

    def _work_left(self, row: list[int]) -> list[float]:
        work = [*accumulate(map(self._clocks.durations.__getitem__, reversed(row)), initial=0.0)]
        return work[::-1]


def makespan(schedule: Schedule, problem: Problem) -> float:
    """How long a step takes; infinite if the ranks wait for each other for ever."""
    numbered = Numbered(schedule)
    clocks = Clocks(numbered.durations(problem.of(numbered.stages)), *numbered.needs(problem.message))
    if not clocks.run(numbered.rows):
        return inf
    return max(clocks.ends[end - 1] for end in numbered.ends.tolist())
