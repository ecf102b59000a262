"""Random configurations through arguments and rules, no process started: about 5 ms each, 10,000 in a minute.

One that is refused names a flag, a rule and a value that works, and that value is tried: followed from refusal to
refusal, a configuration comes to one that is accepted, and meets no rule twice. An accepted one of the combined run
makes its dry run, as a rank that is drawn: about a second each (`dry`), so some of them, by chance.
"""

import contextlib
import io
import multiprocessing
import re
import shlex
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from typing import NamedTuple
from unittest.mock import patch

import torch

from cluster import dry_run
from cluster.run.arguments import configured, layout_of, model_of, moe_of
from cluster.run.recipe import optimizer_of
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Run
from tests.abuse.drawn import TRAIN, Drawn, Refused, Script, draw, parsed, scripts

HOPS = 12  # refusals on the way to what is accepted; a configuration may have many faults
HELP = "--help shows what works"


class Met(NamedTuple):
    """What came of some configurations."""

    tried: int
    accepted: int
    followed: int  # refused ones, whose advice led to an accepted one
    dry: int  # that made a dry run
    claims: int  # of those
    failures: list[str]


def advice_of(message: str) -> str:
    """What a refusal says to use, or nothing."""
    return message.rpartition("; use ")[2] if "; use " in message else ""


def applied(message: str, drawn: Drawn) -> Drawn | None:
    """The configuration with the flags of a refusal's advice, of several ways the first. None: it has no flags."""
    advice, flags, ranks = advice_of(message), [*drawn.flags], drawn.ranks
    advice = re.split(r", or | or (?=--|no )|, and | with it| alone|, without |; ", advice)[0].strip(",.")
    if found := re.search(r"nproc_per_node=?\s?(\d+)", advice):
        return Drawn(flags, int(found[1]))
    if found := re.fullmatch(r"no (--[\w-]+)", advice):
        return Drawn([flag for flag in flags if flag.partition("=")[0] != found[1]], ranks)
    words, found = shlex.split(advice), False
    while words:
        name = words.pop(0)
        if not name.startswith("--"):
            continue
        found = True
        base = name.removeprefix("--no-").removeprefix("--")
        flags = [flag for flag in flags if flag.partition("=")[0] not in (f"--{base}", f"--no-{base}")]
        if words and not words[0].startswith("--"):
            values = [words.pop(0).replace("ID", "10")]
            while words and re.fullmatch(r"-?[\d.]+", words[0]):
                values.append(words.pop(0))
            flags += [name, *values] if len(values) > 1 else [f"{name}={values[0]}"]
        else:
            flags.append(name)
    return Drawn(flags, ranks) if found else None


def refused(script: Script, drawn: Drawn, message: str) -> str | None:
    """What is wrong with a refusal, or with one met on the way that it shows."""
    met: list[str] = []
    while True:
        if "; use " not in message and HELP not in message and "; leave" not in message:
            return f"no value that works: {message}"
        if not re.search(r"--[a-z]", message.partition(": ")[0]) and "lesson needs" not in message:
            return f"no flag is named: {message}"
        if HELP in message:  # its own list of choices, or how many values there are
            return None
        if message in met:
            return f"what it says to use does not work: {' -> '.join([*met, message])}"
        if len(met) == HOPS:
            return f"no end of refusals: {' -> '.join(met)}"
        met.append(message)
        then = applied(message, drawn)
        if then is None:
            return None  # a file, or words
        drawn = then
        try:
            parsed(script, drawn)
            return None
        except Refused as error:
            message = str(error)


def rehearse(args: Namespace, ranks: int, rank: int) -> list[str]:
    """The claims of a dry run that do not hold; their number is the first."""
    layout, model = layout_of(args, ranks), model_of(configured(args), moe_of(args))
    said = io.StringIO()
    run = Run(args, Job(0, 1, torch.device("cpu"), "gloo", 60.0), POLICIES[args.dtype])
    with patch.object(dry_run, "dry_run", dry_run.account), contextlib.redirect_stdout(said):
        dry_run.show(run, model, layout, rank, optimizer_of(args)[1])
    claims = run.evidence.claims
    failed = [f"{c.claim}: {c.measured:.6g}, by the planner {c.expected:.6g}" for c in claims if not c.holds]
    return [str(len(claims)), *failed]


def some(name: str, numbers: Sequence[int], seed: int, dry: float) -> Met:
    """Those configurations, in this process. Each follows from its number."""
    torch.set_num_threads(1)
    script, accepted, followed, rehearsed, claims = scripts()[name], 0, 0, 0, 0
    failures: list[str] = []
    for number in numbers:
        chance = Random(f"{name} {seed} {number}")
        drawn = draw(script, chance)
        line = f"{name} {number}: {drawn.ranks} ranks, {shlex.join(drawn.flags)}"
        try:
            args = parsed(script, drawn)
        except Refused as refusal:
            try:
                if wrong := refused(script, drawn, str(refusal)):
                    failures.append(f"{line}\n    {wrong}")
                followed += not wrong
            except Exception:
                failures.append(f"{line}\n    after {refusal}\n{traceback.format_exc(limit=-4)}")
            continue
        except SystemExit:
            continue
        except Exception:
            failures.append(f"{line}\n{traceback.format_exc(limit=-4)}")
            continue
        accepted += 1
        if name == TRAIN and chance.random() < dry:
            rank = chance.randrange(drawn.ranks)
            try:
                held, *wrong = rehearse(args, drawn.ranks, rank)
                claims += int(held)
            except Exception:
                wrong = [traceback.format_exc(limit=-4)]
            rehearsed += 1
            failures += [f"{line} --dry-run --rank {rank}\n    {each}" for each in wrong]
    return Met(len(numbers), accepted, followed, rehearsed, claims, failures)


def meet(names: Sequence[str], count: int, seed: int = 0, dry: float = 0.0, first: int = 0,
         processes: int = 2) -> Iterator[tuple[str, Met, float]]:  # fmt: skip
    """Of each script `count` configurations, on a few processes that are forked once."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for name in names:
            began = time.monotonic()
            parts = [range(first + i, first + min(i + 50, count)) for i in range(0, count, 50)]
            met = pool.map(partial(some, name, seed=seed, dry=dry), parts, chunksize=1)
            sums = [sum(each[i] for each in met) for i in range(5)]
            yield name, Met(*sums, [failure for each in met for failure in each.failures]), time.monotonic() - began
