"""Covering arrays: few rows that have every wanted combination of values, where some combinations are refused.

Greedy, a row at a time (AETG; Cohen, Dalal, Fredman, Patton 1997): a row begins with a combination that is still
missing, and each further parameter takes the value with which most missing ones come, if a legal row has it. Whether
one has is decided and not guessed: what refuses a row says which parameters it has read, so only these can mend it, and
where none of them does, nothing else will.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations, product
from random import Random
from typing import Any, NamedTuple

Row = dict[str, Any]  # parameter: value
Combination = tuple[tuple[str, Any], ...]  # of some parameters, in the order of the table


class Refusal(NamedTuple):
    """Why a row is refused."""

    rule: str
    reads: frozenset[str]  # parameters: with the same values of these the same rule refuses


class Unproved(Exception):
    """Too many rows were looked at."""


class Covering:
    """The rows, and what no row can have.

    Args:
        table: the values of each parameter, the plainest first.
        refusal: why a row is refused; None: it is legal.
        strengths: t: parameters, of any t of which every combination of values is wanted; None: all parameters.
        tries: rows are begun so many times, and the one that covers most is kept.
        given: rows that are there already.

    Attributes:
        rows: the array.
        refused: the combinations of which no legal row exists, and the rules that refuse all of them.
    """

    LIMIT = 200_000  # rows that are looked at to find or refute one

    def __init__(
        self,
        table: Mapping[str, Sequence[Any]],
        refusal: Callable[[Row], Refusal | None],
        strengths: Mapping[int, Sequence[str] | None],
        seed: int = 0,
        tries: int = 4,
        given: Sequence[Row] = (),
    ):
        self.table, self._refusal, self._random = table, refusal, Random(seed)
        self._plain = {name: values[0] for name, values in table.items()}
        self._missing: dict[Combination, None] = dict.fromkeys(self._wanted(strengths))  # in order
        self.refused: dict[Combination, frozenset[str]] = {}
        self.rows: list[Row] = []
        self._sets = dict.fromkeys(tuple(name for name, _ in combination) for combination in self._missing)
        self._of = {name: [each for each in self._sets if name in each] for name in table}
        for row in given:
            self._cover(row)
        while self._missing:
            begun = [row for row in (self._begun() for _ in range(tries)) if row is not None]
            if begun:
                self.rows.append(max(begun, key=lambda row: len(self._new(row))))
                self._cover(self.rows[-1])
        self.rows = self._ordered(self.rows)

    def _cover(self, row: Row) -> None:
        for combination in self._new(row):
            del self._missing[combination]

    def of(self, row: Row) -> set[Combination]:
        """What is wanted, and in the row."""
        return {tuple((name, row[name]) for name in names) for names in self._sets}

    def _ordered(self, rows: Sequence[Row]) -> list[Row]:
        """Each next row has the most of what those before have not: the first ones alone have nearly all."""
        left = [(row, self.of(row)) for row in rows]
        ordered, there = [], set()
        while left:
            best = max(range(len(left)), key=lambda i: len(left[i][1] - there))
            row, has = left.pop(best)
            if has - there:  # else later rows have made it needless
                ordered.append(row)
                there |= has
        return ordered

    def _wanted(self, strengths: Mapping[int, Sequence[str] | None]) -> Iterator[Combination]:
        for t, names in strengths.items():
            for some in combinations(names or self.table, t):
                yield from (tuple(zip(some, values, strict=True)) for values in product(*map(self.table.get, some)))

    def _new(self, row: Row, of: str | None = None) -> list[Combination]:
        """What is missing and in the row; `of`: with this parameter. Parameters that the row leaves open have none."""
        sets = self._of[of] if of else self._sets
        found = (tuple((n, row[n]) for n in names) for names in sets if all(n in row for n in names))
        return [combination for combination in found if combination in self._missing]

    def _start(self) -> Row | None:
        """What the next row begins with: of what is missing one of the widest; None where nothing is."""
        widest = max(map(len, self._missing), default=0)
        return dict(self._random.choice([c for c in self._missing if len(c) == widest])) if widest else None

    def _refuse(self, combination: Combination) -> None:
        rules: set[str] = set()
        try:
            assert self.complete(dict(combination), self._plain, rules) is None
        except Unproved:
            rules.add(f"none found among {self.LIMIT:,} rows")
        self.refused[combination] = frozenset(rules)
        del self._missing[combination]

    def _begun(self) -> Row | None:
        """A legal row with a combination that is missing; None where nothing is any more."""
        row = None
        while row is None:
            if (fixed := self._start()) is None:
                return None
            with suppress(Unproved):
                row = self.complete(fixed, self._plain, set())
            if row is None:
                self._refuse(tuple(fixed.items()))
        left = [name for name in self.table if name not in fixed]
        self._random.shuffle(left)
        for name in left:
            gains = [(len(self._new(fixed | {name: value}, name)), self._random.random(), value)
                     for value in self.table[name]]  # fmt: skip
            for gain, _, value in sorted(gains, reverse=True):
                if not gain:
                    break  # left open, for what the others need
                try:
                    found = self.complete(fixed | {name: value}, row, set(), 300)
                except Unproved:
                    continue
                if found is not None:
                    fixed[name], row = value, found
                    break
        return row

    def complete(self, fixed: Row, base: Row, rules: set[str], limit: int = LIMIT) -> Row | None:
        """A legal row with what is fixed, else near to `base`; None where none exists, and then the `rules` say why.

        Raises:
            Unproved: neither was clear after so many rows.
        """
        left = [limit]

        def search(fixed: Row) -> Row | None:
            left[0] -= 1
            if left[0] < 0:
                raise Unproved
            row = base | fixed
            refusal = self._refusal(row)
            if refusal is None:
                return row
            free = [name for name in self.table if name in refusal.reads and name not in fixed]
            if not free:
                rules.add(refusal.rule)
                return None
            values = [sorted(self.table[name], key=lambda v, name=name: v != row[name]) for name in free]
            for chosen in product(*values):
                if (found := search(fixed | dict(zip(free, chosen, strict=True)))) is not None:
                    return found
            return None

        return search(fixed)
