"""What a run claims: what the slide or paper says, what was measured, and whether it holds."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from core.proof.language import ENGLISH, Catalogue, laid_out
from core.proof.terminal import coloured, wrapped

SHOWN = 10  # claims that failed


@dataclass(frozen=True)
class Claim:
    """What the slide says and what this run measured."""

    claim: str
    formula: str
    expected: float
    measured: float
    tolerance: float
    where: str = ""  # of what is compared, the worst

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.expected) <= self.tolerance  # never true of NaN or infinity


@dataclass(frozen=True)
class Row:
    """A row of a table: the same claim of several ranks or sizes."""

    claim: str
    formula: str
    cases: list[Claim]
    correctness: bool  # whether it says that the result is right, and not what the slide says

    @property
    def holds(self) -> bool:
        return all(case.holds for case in self.cases)

    @property
    def measured(self) -> str:
        return " ".join(number(case.measured) for case in self.cases)


@dataclass
class Evidence:
    """The claims of a run, in two tables: what the slide says, and that it is right. Rank 0 fills and prints."""

    rows: list[Row] = field(default_factory=list)

    @property
    def claims(self) -> list[Claim]:
        return [case for row in self.rows for case in row.cases]

    def claim(
        self, claim: str, formula: str, expected: float, measured: float, tolerance: float = 0.0, *,
        correctness: bool = False,
    ) -> None:  # fmt: skip
        """One claim. `formula` is what the paper or slide says, with this run's numbers."""
        self.each(claim, formula, [(claim, expected, measured)], tolerance, correctness=correctness)

    def each(
        self, claim: str, formula: str, cases: Iterable[tuple], tolerance: float = 0.0, *, correctness: bool = False
    ) -> None:
        """The same claim of several ranks or sizes, in one row.

        Args:
            cases: (name of the case, expected, measured), and what is the worst of all that was compared, if it is
                known: it is said where the claim does not hold.
            correctness: whether it says that the result is right, and not what the slide says.
        """
        made = [
            Claim(name, formula, float(expected), float(measured), tolerance, *where)
            for name, expected, measured, *where in cases
        ]
        self.rows.append(Row(claim, formula, made, correctness))

    def on_ranks(
        self, claim: str, formula: str, expected: float, measured: Iterable[float], tolerance: float = 0.0, *,
        correctness: bool = False,
    ) -> None:  # fmt: skip
        """The same claim of every rank; `measured` in rank order."""
        cases = [(f"{claim}, rank {rank}", expected, value) for rank, value in enumerate(measured)]
        self.each(claim, formula, cases, tolerance, correctness=correctness)

    def failed(self, known: Catalogue = ENGLISH) -> str:
        """The claims that do not hold, a line each; empty where all do."""
        if not self.claims:
            return known.gettext("nothing was claimed")
        lines = [
            f"FAILED: {c.claim}: {number(c.measured)}, not {number(c.expected)} within {c.tolerance:g}"
            + (f"; the worst is {c.where}" if c.where else "")
            for c in self.claims
            if not c.holds
        ]
        lines = lines[:SHOWN] + [f"and {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)
        return "\n".join(map(known.gettext, lines))

    def tables(self, width: int = 141, known: Catalogue = ENGLISH) -> str:
        """What the slide says, then that it is right; no wider than `width`, if that can be; as `known` has it."""
        made, room = [], max(30, min(width, 141) - 11)  # of three columns
        widths = (room * 44 // 130, room * 46 // 130, room * 40 // 130)
        for title, correctness in (("the slide", False), ("correctness", True)):
            header = [*map(known.gettext, (title, "slide or paper", "measured", "holds"))]
            rows = [row for row in self.rows if row.correctness is correctness]
            cells = []
            for row in rows:
                texts = known.gettext(row.claim), known.gettext(row.formula), row.measured
                folded = ["\n".join(wrapped(text, room)) for text, room in zip(texts, widths, strict=True)]
                cells.append([*folded, verdict(row.holds, known)])
            made += ["\n".join(laid_out(header, cells))] * bool(rows)
        return "\n\n".join(made)


def verdict(holds: bool, known: Catalogue) -> str:
    """In a word, coloured where it is a terminal."""
    word = known.gettext("yes" if holds else "NO")
    return f"\033[{32 if holds else 31}m{word}\033[0m" if coloured() else word


def number(value: float) -> str:
    """As the tables write it."""
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
