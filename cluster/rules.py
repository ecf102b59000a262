"""Lecture 03: which layouts can be run, and why the others cannot (大模型并行与 GPU 集群配置).

    python -m cluster.rules --model gpt3-175b --machine dgx-a100 --world 64 --batch 512 --tp 3 --pp 2

`planner/rulebook.py` has the rules. `check` is what a training calls before any process group exists; `explain` says
which rules hold, and what would do instead of a layout that breaks one.

read: planner/rulebook.py:76-209; then planner/search.py
"""

import shlex
import sys

from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout
from cluster.planner.options import case_of, parser
from cluster.planner.rulebook import POSITIVE, RULES, Case, broken
from cluster.planner.search import nearest
from core.model.config import ModelConfig
from core.proof.language import ENGLISH, Catalogue, catalogue, laid_out, language_of
from core.proof.rules import Rule
from core.proof.terminal import fit, wrapped


def check(
    layout: Layout,
    model: ModelConfig,
    machine: Machine | None = None,
    world: int | None = None,
    batch: int | None = None,
) -> None:
    """Raises ValueError, with the flags, the reason and a layout that works, unless every rule but advice holds."""
    case = Case(layout, model, machine, world, batch)
    if failing := broken(case):
        raise ValueError(f"{failing[0].message(case.sizes)}; {instead(case)}")


def instead(case: Case) -> str:
    """What to use in place of a layout that breaks a rule, in words."""
    found = nearest(case)
    if found is None:
        return f"no layout of {case.model.name} has {case.world or case.layout.ranks} ranks; use another --world"
    flags = found.flags(after=case.layout)
    if case.model.experts and found.tp > 1 and not found.sp and "--no-sp" not in flags:
        flags.append("--no-sp")  # left out, it would be there
    return f"use {shlex.join(flags)}" + (f" --batch {found.batch}" if case.batch not in (None, found.batch) else "")


def explain(case: Case, known: Catalogue = ENGLISH) -> str:
    """A table of all rules, what is wrong, and what to use instead; as `known` has it."""
    failing = broken(case, advice=True)
    unchecked = any(rule in POSITIVE for rule in failing)  # then the other rules mean nothing

    def verdict(rule: Rule) -> str:
        if rule in failing:
            return "advice" if rule.advice else "NO"
        return "?" if unchecked and rule not in POSITIVE else "yes"

    sizes = vars(case.sizes)
    rows = [
        (rule.name, verdict(rule), rule.flags.format_map(sizes), rule.reason.format_map(sizes), rule.source)
        for rule in RULES
    ]
    header, widths = ("rule", "holds", "flags", "reason", "source"), (40, 10, 30, 50, 26)
    cells = [["\n".join(wrapped(known.gettext(text), room)) for text, room in zip(row, widths, strict=True)]
             for row in rows]  # fmt: skip
    table = laid_out([*map(known.gettext, header)], cells)
    lines = [f"{'slow' if rule.advice else 'refused'}: {rule.message(case.sizes)}" for rule in failing]
    lines += [f"refused elsewhere too: {rule.peer}" for rule in failing if rule.peer and "cannot be" not in rule.peer]
    lines.append(instead(case) if failing else "every rule holds")
    return "\n".join([str(case.layout), *table, *map(known.gettext, lines)])


def main() -> int:
    known = catalogue(language_of(sys.argv[1:]))
    try:
        case = case_of(parser("rules", "Which rules a layout keeps, which it breaks, and what would do.").parse_args())
        print(fit(explain(case, known)))
    except ValueError as error:
        print(f"cluster/rules.py: {known.gettext(str(error))}", file=sys.stderr)
        return 2
    return 2 if broken(case) else 0


if __name__ == "__main__":
    sys.exit(main())
