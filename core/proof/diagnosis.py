"""Who waits for whom, and why: read from the flight records of all ranks, a pure function of them.

A wait is explained by following it: from a rank that waits to those that have not started what it waits for, and from
them on, until a rank is found that does not wait, or one that has been met before. Before that, ranks that have
started different things under one number are looked for: nothing that they wait for afterwards means anything.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, NamedTuple

from core.proof.language import ENGLISH, Catalogue, laid_out
from core.proof.terminal import measure, wrapped

LATE = 0.5  # of the longest wait: who has joined, or moved on, within the last half of it is slow, not stuck
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Call:
    """One rank's side of a collective, or of a message: as its record shows it. Times are seconds ago."""

    operation: str
    axis: str
    ranks: tuple[int, ...]  # that take part; (sender, receiver) of a message
    number: int
    lane: str = ""  # what counts the numbers: the ranks that share it count alike
    shape: tuple[int, ...] = ()
    dtype: str = ""
    peer: int | None = None
    direction: str = ""  # of a message: send or receive
    uneven: bool = False  # whether the first dimension may differ between ranks
    where: str = ""
    age: float = 0.0
    waited: float = 0.0

    def __str__(self) -> str:
        if not self.direction:
            return f"{self.operation} {self.number} over {self.axis}"
        kind = f" ({self.operation})" if self.operation else ""
        return f"{self.direction}{kind} {self.number} {'to' if self.direction == 'send' else 'from'} rank {self.peer}"

    @property
    def tensor(self) -> str:
        return f"{self.shape} {self.dtype}" if self.dtype else ""

    def fits(self, other: "Call") -> bool:
        """Whether the tensors of two ranks do."""
        first = 1 if self.uneven else 0
        return self.shape[first:] == other.shape[first:] and self.dtype == other.dtype


@dataclass
class Record:
    """What one rank's heart has last sent."""

    state: str = "running"  # or "ended", or "failed: ..."
    where: str = ""
    moved: float = 0.0  # seconds since it has come there
    waits: list[Call] = field(default_factory=list)  # the oldest first
    finished: Call | None = None
    lanes: dict[str, list[Call]] = field(default_factory=dict)  # the last calls of each, the newest last

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> "Record":
        """From what `FlightRecord.snapshot` gives."""
        names = {each.name for each in fields(Call)}

        def call(of: Mapping[str, Any]) -> Call:
            values = {name: value for name, value in of.items() if name in names}
            return Call(**values | {"ranks": (*of["ranks"],), "shape": (*of["shape"],)})

        lanes = [[call(each) for each in lane] for lane in found["lanes"] if lane]
        finished = call(found["finished"]) if found["finished"] else None
        waits = [call(each) for each in found["waits"]]
        return cls(
            found["state"], found["where"], found["moved"], waits, finished, {lane[0].lane: lane for lane in lanes}
        )

    @property
    def last(self) -> Call | None:
        """What it has started last."""
        return min((lane[-1] for lane in self.lanes.values()), key=lambda call: call.age, default=None)

    def started(self, call: Call) -> Call | None:
        """This rank's side of another rank's call; None where it has not come to it, or it is long past."""
        return next((each for each in self.lanes.get(call.lane, ()) if each.number == call.number), None)

    def has_passed(self, call: Call) -> bool:
        lane = self.lanes.get(call.lane)
        return bool(lane) and lane[-1].number >= call.number

    def doing(self) -> str:
        if self.state == "ended":
            return "has ended"
        if self.waits:
            return f"waits in {self.waits[0]}"
        return f"is {inside(self.where)}"


class Finding(NamedTuple):
    """What is wrong: of which kind, the ranks that have caused it as far as one can tell, and in one line."""

    kind: str  # dead, failed, mismatch, shape, ended, cycle, message, slow, not reached, unclear
    ranks: tuple[int, ...]
    text: str


def named(ranks: Iterable[int]) -> str:
    """rank 3; ranks 2 and 6; ranks 0-4, 6 and 7."""
    ranks = sorted(ranks)
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    some = [t for run in runs for t in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    text = ", ".join(some[:-1]) + (" and " if some[1:] else "") + some[-1]
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def diagnose(records: Mapping[int, Record], lost: Mapping[int, str]) -> Finding:
    """What is wrong.

    Args:
        records: by rank; of lost ranks the last that they have sent. Some may be missing.
        lost: why a rank is thought to be lost, in words such as "died"; the first one first.
    """
    failed = {rank: record.state for rank, record in records.items() if record.state.startswith("failed")}
    for rank, state in failed.items():
        return Finding("failed", (rank,), f"rank {rank} {state}" + _waiting_for(records, rank))
    if differing := _mismatch(records):  # gloo ends a rank that gets more bytes than it expects
        more = "".join(f"; rank {rank} {why}" for rank, why in lost.items())
        return differing._replace(text=differing.text + more)
    for rank, why in lost.items():
        record = records.get(rank)
        last = f"; it was last {_place(record)}" if record else ""
        return Finding("dead", (rank,), f"rank {rank} {why}{last}" + _waiting_for(records, rank))
    return _blocked(records) or _late(records) or _unclear(records)


def inside(where: str) -> str:
    return where if where.startswith("outside") else f"in {where}"


def _place(record: Record) -> str:
    return f"in {record.waits[0]}, {record.waits[0].where}" if record.waits else inside(record.where)


def _waiting_for(records: Mapping[int, Record], lost: int) -> str:
    """The ranks that wait for that one, as the rest of a line."""
    by_call: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, record in records.items():
        for call in record.waits[:1]:
            if rank != lost and lost in call.ranks:
                by_call[call.lane, str(call)].append(rank)
    if not by_call:
        return ""
    (_, call), ranks = max(by_call.items(), key=lambda item: len(item[1]))
    return f"; {named(ranks)} wait{'s' * (len(ranks) == 1)} for it in {call}"


def _mismatch(records: Mapping[int, Record]) -> Finding | None:
    """Of the calls that ranks have started under one number, the first that differ."""
    started: dict[tuple[str, int], dict[int, Call]] = defaultdict(dict)
    for rank, record in records.items():
        for lane, calls in record.lanes.items():
            for call in calls:
                started[lane, call.number][rank] = call
    differing = []
    for calls in started.values():
        first = next(iter(calls.values()))
        for kind, differ in (
            ("mismatch", any(call.operation != first.operation for call in calls.values())),
            ("shape", any(not call.fits(first) for call in calls.values())),
        ):
            if differ:
                differing.append((max(call.age for call in calls.values()), kind, calls))
                break
    if not differing:
        return None
    _, kind, calls = max(differing, key=lambda found: found[0])
    return _odd_ones_out(kind, calls, {rank for rank in calls if records[rank].state == "ended"})


def _odd_ones_out(kind: str, calls: Mapping[int, Call], ended: set[int]) -> Finding:
    alike: dict[Any, list[int]] = defaultdict(list)
    for rank, call in calls.items():
        alike[call.operation if kind == "mismatch" else (call.shape[call.uneven :], call.dtype)].append(rank)
    sides = sorted(alike.values(), key=lambda side: -len(side))
    if len(sides[0]) * 2 <= len(calls):  # no majority: who has ended is the odd one
        sides.sort(key=lambda side: not ended.isdisjoint(side))
    others, *rest = sides
    odd = sorted(rank for side in rest for rank in side)
    a, b = calls[odd[0]], calls[others[0]]

    def put(call: Call) -> str:
        return str(call) + (f" with {call.tensor}" if kind == "shape" else "")

    if len(odd) == 1 and len(others) > 1:
        peers = f"its {NUMBERS[len(others)] if len(others) < len(NUMBERS) else len(others)} peers are"
    else:
        peers = f"{named(others)} {'is' if len(others) == 1 else 'are'}"
    if {*odd} <= ended:
        have = "has" if len(odd) == 1 else "have"
        return Finding("ended", (*odd,), f"{named(odd)} {have} ended while {peers} in {put(b)} ({b.where})")
    told = (f"{named(side)} {'is' if len(side) == 1 else 'are'} in {put(calls[side[0]])}" for side in rest)
    text = f"{', '.join(told)} while {peers} in {put(b)}"
    ways = f" ({a.where})" if a.where == b.where or not a.where else f" ({a.where}; the peers: {b.where})"
    return Finding(kind, tuple(odd if len(others) > len(odd) else calls), text + ways)


def _blocked(records: Mapping[int, Record]) -> Finding | None:
    """Follow the waits."""
    waits = {rank: record.waits[0] for rank, record in records.items() if record.waits}
    blocking = {rank: _missing(records, call) for rank, call in waits.items()}
    for start in sorted((r for r in blocking if blocking[r]), key=lambda rank: -waits[rank].waited):
        seen: list[int] = []
        rank = start
        while rank not in seen and blocking.get(rank):
            seen.append(rank)
            # Rather one that does not wait itself: it explains more.
            rank = min(blocking[rank], key=lambda peer: (bool(blocking.get(peer)), peer))
        if rank in seen:
            return _cycle(waits, seen[seen.index(rank) :])
        return _not_reached(records, waits[seen[-1]], rank)
    return None


def _missing(records: Mapping[int, Record], call: Call) -> list[int]:
    """The ranks that have not started what another waits for; of one that was never heard of nothing is known."""
    return [r for r in call.ranks if r in records and not records[r].has_passed(call)]


def _cycle(waits: Mapping[int, Call], ranks: Sequence[int]) -> Finding:
    alone = [rank for rank in ranks if waits[rank].direction and waits[waits[rank].peer].peer is None]
    if len(alone) == 1:  # a message with one side only, and its other side elsewhere
        call = waits[alone[0]]
        lacks = "posted its receive" if call.direction == "send" else "sent it"
        there = f"it waits in {waits[call.peer]}, for rank {ranks[(ranks.index(call.peer) + 1) % len(ranks)]}"
        return Finding("message", (*alone,), f"rank {alone[0]} waits in {call}, which has not {lacks}: {there}")
    by_call: dict[tuple[str, str], list[int]] = {(waits[rank].lane, str(waits[rank])): [] for rank in ranks}
    for rank, call in waits.items():  # and those that wait in the same
        by_call.get((call.lane, str(call)), []).append(rank)
    sides = [(call, side) for (_, call), side in by_call.items()]
    sides.sort(key=lambda side: (len(side[1]), side[1]))
    everyone = sorted(rank for _, side in sides for rank in side)
    told = ", ".join(f"{named(side)} in {call}" for call, side in sides)
    causes = sides[0][1] if len(sides[0][1]) < len(sides[-1][1]) else everyone
    waiting = "wait for each other" if len(sides) == 2 else "wait for one another in a circle"
    return Finding("cycle", (*causes,), f"{named(everyone)} {waiting}: {told}")


def _not_reached(records: Mapping[int, Record], call: Call, rank: int) -> Finding:
    """A rank that waits for nothing that another has not started, and has not come to `call`."""
    record = records[rank]
    oldest = {r: each.waits[0] for r, each in records.items() if each.waits}
    others = [r for r, its in oldest.items() if (its.lane, its.number) == (call.lane, call.number)]
    wait = f"{named(others)} wait{'s' * (len(others) == 1)} for it"
    if record.state == "ended":
        return Finding("ended", (rank,), f"rank {rank} has ended and never reaches {call}: {wait}")
    place = f"it {record.doing()}" + ("" if record.waits else f" (for {record.moved:.1f} s)")
    if call.direction:
        waits, lacks = (0, "posted its receive") if call.direction == "send" else (1, "sent it")
        text = f"rank {call.ranks[waits]} waits in {call}, but rank {rank} has not {lacks}: {place}"
        return Finding("message", (rank,), text)
    slow = not record.waits and record.moved < LATE * call.waited
    if slow:
        return Finding("slow", (rank,), f"rank {rank} is slow: it has not reached {call}, but moves on: {place}")
    return Finding("not reached", (rank,), f"rank {rank} has not reached {call}: {place}")


def _late(records: Mapping[int, Record]) -> Finding | None:
    """All have started what the oldest wait is for: who came last?"""
    oldest = max((call for record in records.values() for call in record.waits), key=lambda c: c.waited, default=None)
    if oldest is None or oldest.direction:
        return None
    ages = {rank: call.age for rank in oldest.ranks if rank in records and (call := records[rank].started(oldest))}
    if not ages:
        return None
    last = min(ages, key=lambda rank: ages[rank])
    if ages[last] > LATE * oldest.waited:
        return None
    behind = max(ages.values()) - ages[last]
    where = records[last].started(oldest).where
    return Finding(
        "slow", (last,), f"rank {last} is slow: it came to {oldest} {behind:.1f} s after the first, {inside(where)}"
    )


def _unclear(records: Mapping[int, Record]) -> Finding:
    waits = Counter(str(record.waits[0]) for record in records.values() if record.waits)
    if not waits:
        return Finding("unclear", (), "no rank waits for another")
    call, count = waits.most_common(1)[0]
    if count > 1:
        return Finding("unclear", (), f"all who take part have started {call}: the network, or too short a --timeout")
    return Finding("unclear", (), f"{call} has not come to its end, and all who take part have started it")


def table(
    records: Mapping[int, Record], lost: Mapping[int, str], world_size: int, width: int, known: Catalogue = ENGLISH
) -> str:
    """What every rank was in, as far as one knows; the last column but one is wrapped to fit `width`."""
    rows = []
    for rank in range(world_size):
        record = records.get(rank)
        if record is None:
            rows.append((rank, lost.get(rank, "unknown"), "", "", "", ""))
            continue
        call, state = record.waits[0] if record.waits else record.last, record.state.partition(":")[0]
        if state == "running":
            state = "waits in" if record.waits else "computes"
        what = f"{call}" if call and record.waits else f"after {call}" if call else ""
        since, where = (call.waited, call.where) if record.waits else (record.moved, record.where)
        rows.append((rank, lost.get(rank, state), what, call.tensor if call else "", where, f"{since:.1f} s"))
    header = ("rank", "", "operation", "tensor", "where", "since")
    cells = [[known.gettext(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(map(measure, column)) for column in zip(*cells, strict=True)]
    room = max(16, width - sum(widths) + widths[4] - 2 * (len(widths) - 1))
    return "\n".join(laid_out(cells[0], [[*row[:4], "\n".join(wrapped(row[4], room)), row[5]] for row in cells[1:]]))
