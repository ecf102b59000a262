"""Random configurations really trained, at 2 to 8 ranks for two steps, beside one process: about a second each.

Those that `configurations` draws and refuses are followed to where their advice leads, so that what is trained has many
flags. All claims of each hold, and none hangs: a rank that gives no answer in a minute is a failure.
"""

import contextlib
import io
import shlex
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from random import Random
from typing import NamedTuple

import torch
import torch.distributed as dist

from cluster import train
from core.model.precision import POLICIES
from core.proof.launch import Job, Stop
from core.proof.lesson import Run
from tests.abuse.configurations import HOPS, applied
from tests.abuse.drawn import TRAIN, Drawn, Refused, draw, parsed, scripts
from tests.pool import Pool, WorkerError

TOGETHER = 4  # configurations in a call: a group of ranks takes as long to be made as one of them
PATIENCE = 60.0  # seconds for each
SAME = ("--steps=2", "--device=cpu", "--sample=3")


class Trained(NamedTuple):
    """What came of one, on rank 0."""

    line: str
    seconds: float
    claims: int
    failed: list[str]


def legal(seed: int, number: int) -> Drawn:
    """A configuration that is accepted at 2 ranks or more; it follows from the two numbers."""
    script, chance = scripts()[TRAIN], Random(f"training {seed} {number}")
    while True:
        drawn = draw(script, chance, rich=True)
        if drawn.ranks == 1:
            continue
        drawn = Drawn([*drawn.flags, *SAME], drawn.ranks)
        for _ in range(HOPS):
            try:
                parsed(script, drawn)
                return drawn
            except Refused as refusal:
                then = applied(str(refusal), drawn)
                if then is None or then.ranks != drawn.ranks:
                    break
                drawn = then


def train_one(flags: Sequence[str], job: Job) -> Trained | None:
    """All ranks call it."""
    began, said = time.perf_counter(), io.StringIO()
    args = parsed(scripts()[TRAIN], Drawn([*flags], job.world_size))
    run = Run(args, job, POLICIES[args.dtype])
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        train.lesson(run)
    if job.rank:
        return None
    claims = run.evidence.claims
    failed = [f"{c.claim}: {c.measured:.4g}, not {c.expected:.4g}; {c.where}" for c in claims if not c.holds]
    return Trained(line_of(flags, job.world_size), time.perf_counter() - began, len(claims), failed)


def line_of(flags: Sequence[str], ranks: int) -> str:
    return f"torchrun --nproc_per_node={ranks} {TRAIN} {shlex.join(flags)}"


def train_some(lines: Sequence[Sequence[str]]) -> list[Trained | None]:
    """Of one rank."""
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", PATIENCE)
    found = []
    for flags in lines:
        try:
            found.append(train_one(flags, job))
        except (Stop, ValueError) as stop:  # which all ranks have
            line = line_of(flags, job.world_size)
            found.append(Trained(line, 0.0, 0, [f"{type(stop).__name__}: {stop}"]))
        except Exception as error:
            raise RuntimeError(shlex.join(flags)) from error
    return found


def train_all(pool: Pool, ranks: int, lines: Sequence[Sequence[str]]) -> Iterator[Trained]:
    """A few in each call; where a call dies or hangs, one after another."""
    step = TOGETHER if len(lines) > 1 else 1
    for i in range(0, len(lines), step):
        some = lines[i : i + step]
        try:
            yield from pool.run(ranks, train_some, some, timeout=PATIENCE * (1 + len(some)))[0]
        except WorkerError as error:
            if len(some) == 1:
                yield Trained(line_of(some[0], ranks), 0.0, 0, [str(error)])
            else:
                for each in some:
                    yield from train_all(pool, ranks, [each])


def trained(count: int, seed: int = 0, first: int = 0, seconds: float = 1e9) -> Iterator[Trained]:
    """`count` of them from number `first`, until the time is up."""
    pool, until = Pool(), time.monotonic() + seconds
    try:
        for begin in range(first, first + count, 32):
            drawn = sorted(
                (legal(seed, i) for i in range(begin, min(begin + 32, first + count))), key=lambda d: d.ranks
            )
            for ranks, some in groupby(drawn, lambda d: d.ranks):
                yield from train_all(pool, ranks, [each.flags for each in some])
                if time.monotonic() > until:
                    return
    finally:
        pool.close()
