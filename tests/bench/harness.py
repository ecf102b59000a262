"""What every benchmark of `tests/bench` shares: steps alternated in the same processes, and the rows of one table.

A topic is a module `tests/bench/NAME.py` with `TOPIC = Topic(...)`; `python -m tests.bench` finds it. Not tests: every
ratio depends on the machine.
"""

import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from core.engine import direct
from core.proof.launch import Job

WARM = 2  # rounds that are not counted
TIMEOUT = 900.0  # seconds for a topic
COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single", "isend", "irecv")
Step = Callable[[], object]


class Times(NamedTuple):
    """By step, one number a round, on every rank the same."""

    wall: dict[str, list[float]]  # seconds, from one barrier to the next
    busy: dict[str, list[float]]  # seconds of CPU, user and system, of all ranks together


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        ours, peer, floor: medians, in `unit`; None where there is none. The floor is the computation alone: the same
            products in the same processes, without messages.
        ratio: the median, over the rounds, of ours / peer; with its quartiles.
        busy: the same of CPU seconds, which other programs on the machine lengthen less.
        of_floor: the median of floor / ours.
        bar, floor_bar: what `ratio` shall be at most (at least where `more_is_better`) and `of_floor` at least.
    """

    name: str
    against: str
    ours: float
    peer: float | None = None
    floor: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    busy: float | None = None
    of_floor: float | None = None
    bar: float | None = None
    floor_bar: float | None = None
    unit: str = "ms"
    more_is_better: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the bars are reached; None where nothing was compared."""
        held = []
        if self.ratio is not None and self.bar is not None:
            held.append(self.ratio >= self.bar if self.more_is_better else self.ratio <= self.bar)
        if self.of_floor is not None and self.floor_bar is not None:
            held.append(self.of_floor >= self.floor_bar)
        return all(held) if held else None


@dataclass(frozen=True)
class Topic:
    """Benchmarks on so many ranks.

    Args:
        rows: the names of its rows, all of them.
        bench: called on every rank as bench(job, rounds, wanted) with the names that are wanted, of which it does no
            more than it must; returns the rows, on rank 0. It checks that both sides compute the same.
        rounds: as many, usually.
        lacking: why its peer cannot be measured here, or an empty string: then all rows are left out, and it is said.
    """

    ranks: int
    rows: tuple[str, ...]
    bench: Callable[[Job, int, Collection[str]], list[Row]]
    rounds: int = 15
    lacking: Callable[[], str] = str


def alternate(job: Job, runs: Mapping[str, Step], rounds: int, alone: Collection[str] = ()) -> Times:
    """Every step once a round, in turn forward and backward through them, so that none always follows the same one.

    Args:
        alone: steps of rank 0 with a thread a core, while the others sleep.
    """
    usual, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + WARM):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            torch.set_num_threads(cores if name in alone else usual)
            works = name not in alone or job.rank == 0
            _meet()
            began, busy_before = time.perf_counter(), time.process_time()
            if works:
                runs[name]()
                if job.device.type != "cpu":
                    torch.accelerator.synchronize()
            worked = time.process_time() - busy_before
            _meet()
            wall[name].append(time.perf_counter() - began)
            busy[name].append(worked)
    torch.set_num_threads(usual)
    everyone = [None] * job.world_size
    dist.all_gather_object(everyone, busy)
    total = {n: [sum(each) for each in zip(*(b[n] for b in everyone), strict=True)][WARM:] for n in runs}
    return Times({name: seconds[WARM:] for name, seconds in wall.items()}, total)


def _meet() -> None:
    dist.barrier()


def silent(step: Step) -> Step:
    """The same step without its messages: the floor. What would arrive is what happens to be in the buffer.

    Nothing is left for neighbours nor read (`core.engine.direct`); collectives of `torch.distributed` return at once.
    """

    class Done:
        """In place of a `dist.Work`."""

        def wait(self, *_: object) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    def nothing(*_: object, **__: object) -> Done:
        return Done()

    def numbers_only(received: Tensor, sent: Tensor, *_: object, **__: object) -> Done:
        if not sent.is_floating_point():  # how much comes: as much as goes
            received.copy_(sent)
        return Done()

    class NothingComes(direct.Exchange):
        """How much would come is as much as would go."""

        def __init__(self, near: object, axis: object, send: Tensor | Sequence[Tensor], expect: Sequence[Tensor],
                     *_: object, **__: object):  # fmt: skip
            self._numbers = [] if isinstance(send, Tensor) or send[0].is_floating_point() else send
            self._into = expect

        def wait(self, *_: object) -> bool:
            for received, sent in zip(self._into, self._numbers, strict=False):
                received.copy_(sent)
            return True

    class NoMessage(Done):
        def __init__(self, *_: object):
            pass

    def alone() -> None:
        with ExitStack() as stack:
            for name, other in (("Exchange", NothingComes), ("Sent", NoMessage), ("Coming", NoMessage)):
                stack.enter_context(mock.patch.object(direct, name, other))
            for name in COLLECTIVES:
                instead = numbers_only if name == "all_to_all_single" else nothing
                stack.enter_context(mock.patch.object(dist, name, instead))
            step()

    return alone


def row(
    times: Times,
    name: str,
    ours: str,
    peer: str | None = None,
    floor: str | None = None,
    bar: float | None = None,
    floor_bar: float | None = None,
    tokens: int | None = None,
) -> Row:
    """The row `name` of these steps.

    Args:
        ours, peer, floor: names of steps. A peer that was not measured, because it is not installed, leaves a blank.
        tokens: of a step: then the row has tokens a second, of which more is better.
    """
    against = peer or ""
    peer = peer if peer in times.wall else None
    measured = [statistics.median(times.wall[n]) if n in times.wall else None for n in (ours, peer, floor)]
    found = [m if m is None else tokens / m if tokens else 1e3 * m for m in measured]
    more: dict[str, object] = {}
    if peer:
        ratios = [ratio**-1 if tokens else ratio for ratio in _ratios(times.wall, ours, peer)]
        below, middle, above = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        busy = statistics.median(_ratios(times.busy, ours, peer))
        more |= {"ratio": middle, "quartiles": (below, above), "busy": busy}
    if floor in times.wall:
        more["of_floor"] = statistics.median(_ratios(times.wall, floor, ours))
    unit = "tokens/s" if tokens else "ms"
    return Row(name, against, *found, bar=bar, floor_bar=floor_bar, unit=unit, more_is_better=bool(tokens), **more)


def _ratios(seconds: dict[str, list[float]], a: str, b: str) -> list[float]:
    return [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]


def work(bench: Callable[[Job, int, Collection[str]], list[Row]], rounds: int, wanted: Collection[str]) -> list[Row]:
    """A topic on a forked rank."""
    torch.set_num_threads(1)
    return bench(Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", TIMEOUT), rounds, wanted)
