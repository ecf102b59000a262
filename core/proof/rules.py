"""What may be combined: a rule is a Python predicate with a message. Lessons, planner and training apply the same ones.

A topic lists the rules that are about it; a lesson checks those it needs, and `cluster` all of them together.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One rule over a case: any object whose attributes are the sizes and choices that are combined.

    Args:
        name: what the rule is called in tables and tests.
        flags: which flags it concerns, as a message names them: "--tp {tp} --heads {heads}".
        holds: whether the case keeps the rule.
        reason: what must be, and why; may name attributes of the case in braces.
        use: the flags with which the rule holds, in words: "--heads 8"; None where only a search can say.
        source: the paper or code that says so.
        advice: without it a layout runs, but slowly; never refuses.
        peer: where flags that are right by themselves are refused together: who refuses them too, and where; or
            "cannot be:" and why.
    """

    name: str
    flags: str
    holds: Callable[[Any], bool]
    reason: str
    use: Callable[[Any], str] | None = None
    source: str = ""
    advice: bool = False
    peer: str = ""

    def message(self, case: Any) -> str:
        """`flags: reason`, with this case's numbers."""
        return f"{self.flags}: {self.reason}".format_map(vars(case))


def broken(case: Any, rules: Iterable[Rule]) -> Iterator[Rule]:
    """The rules that the case does not keep, in their order."""
    return (rule for rule in rules if not rule.holds(case))


def check(case: Any, rules: Iterable[Rule]) -> None:
    """Refuse a case that breaks a rule.

    Raises:
        ValueError: names the flags, the rule, its reason and a value that works.
    """
    for rule in broken(case, rules):
        if not rule.advice:
            raise ValueError(rule.message(case) + (f"; use {rule.use(case)}" if rule.use else ""))


def at_least(flag: str, least: int, works: int) -> Rule:
    """`--flag` is `least` or more."""
    name = flag.replace("-", "_")
    return Rule(
        flag,
        f"--{flag} {{{name}}}",
        lambda case: getattr(case, name) >= least,
        f"must be at least {least}" if least else "must not be negative",
        lambda case: f"--{flag} {works}",
    )


def at_most(flag: str, most: int) -> Rule:
    """`--flag` is `most` or less."""
    name = flag.replace("-", "_")
    return Rule(
        flag,
        f"--{flag} {{{name}}}",
        lambda case: getattr(case, name) <= most,
        f"is more than {most}",
        lambda case: f"--{flag} {most}",
    )


def positive(flag: str, works: float) -> Rule:
    """`--flag` is a positive number, not infinity or NaN."""
    name = flag.replace("-", "_")
    return Rule(
        flag,
        f"--{flag} {{{name}}}",
        lambda case: 0 < getattr(case, name) < inf,
        "must be positive and finite",
        lambda case: f"--{flag} {works}",
    )


def nearest_multiple(value: int, of: int) -> int:
    """The multiple of `of`, one or more of it, that is closest to `value`: what a message suggests."""
    return max(1, round(value / of)) * of
