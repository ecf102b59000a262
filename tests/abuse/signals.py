"""One rank killed, or stopped, in a phase of a script: the others end within the timeout, by code 1, and name it.

Scripts, ranks, phases and signals are drawn; each trial takes until the others have noticed: 3 s of a killed rank, half
the timeout and more of a stopped one. Several trials at once, because ranks wait: about 3 s a trial.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import count
from random import Random
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch.distributed as dist

from tests.pool import Pool

RANKS, TIMEOUT, SLACK = 4, 10.0, 12.0  # seconds; the slack is for a busy machine
LONGEST, HIT = 90.0, "a signal is sent at"
PHASES = {  # where a rank is hit: at the call of this, or of the n-th message
    "arguments": ("core.proof.lesson", "Lesson._check_common"),
    "meeting": ("core.proof.launch", "meeting_place"),
    "first barrier": ("core.proof.launch", "Watch.__init__"),
    "groups": ("core.mesh", "Mesh.__init__"),
    "message": ("core.ledger", "Ledger.record"),
    "saving": ("core.proof.checkpoint", "fingerprint"),
    "gathering a report": ("core.proof.launch", "Job.gather"),
    "evidence": ("core.proof.evidence", "Evidence.claim"),
    "the end": ("core.proof.launch", "Watch.end"),
}
ALONE = ("cluster/accuracy.py", "cluster/ranks.py", "cluster/dry_run.py", "pipeline/auto.py", "cluster/topology.py")
FLAGS = {
    "cluster/train.py": ("--hidden", "16", "--sequence", "16", "--save", "RUN", "--save-every", "2", "--sample", "0")
}


class Trial(NamedTuple):
    script: str
    victim: int
    phase: str
    number: int  # of the call
    signal: signal.Signals
    agent: bool  # whether the job's store is torchrun's, or rank 0's


class Ended(NamedTuple):
    """What came of a trial."""

    trial: Trial
    seconds: float  # of the last other rank
    met: bool  # the phase
    failed: list[str]


def strike(trial: Trial, port: int, rank: int) -> None:
    """Arm the rank, before its script begins."""
    if trial.agent:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    if rank != trial.victim:
        return
    module, name = PHASES[trial.phase]
    *path, last = name.split(".")
    owner, calls = import_module(module), count(1)
    for each in path:
        owner = getattr(owner, each)
    right = getattr(owner, last)

    def hit(*arguments: Any, **named: Any) -> Any:
        if next(calls) == trial.number:
            print(f"{HIT} {time.monotonic()} ", flush=True)
            os.kill(os.getpid(), trial.signal)
        return right(*arguments, **named)

    setattr(owner, last, hit)


def draw(scripts: list[str], chance: Random) -> Trial:
    phase = chance.choice([*PHASES, "message", "message", "message"])
    number = {"message": int(2 ** chance.uniform(0, 8)), "saving": chance.choice((1, 2))}.get(phase, 1)
    script = "cluster/train.py" if phase == "saving" else chance.choice(scripts)
    how = chance.choice((signal.SIGKILL, signal.SIGSTOP))
    return Trial(script, chance.randrange(RANKS), phase, number, how, chance.random() < 0.7)


def named(said: str) -> set[int]:
    """The ranks that others say are lost, or that they could not meet."""
    apart = "\n".join(re.findall(r"could not meet the other ranks .*", said))
    lost = re.findall(r"lost rank (\d+)", said)
    return {int(rank) for rank in lost + re.findall(r"rank (\d+)(?: did not come| died| is stopped|, which)", apart)}


class Watched:
    """A trial under way."""

    def __init__(self, pool: Pool, trial: Trial):
        flags = [mkdtemp() if flag == "RUN" else flag for flag in FLAGS.get(trial.script, ())]
        flags += ["--steps", "6", "--timeout", str(TIMEOUT), "--device", "cpu"]
        self.trial, self.store = trial, dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        before = partial(strike, trial, self.store.port)
        self.running = pool.start(RANKS, trial.script, *flags, timeout=200, before=before)
        self.ended = self.began = time.monotonic()

    def others_run(self) -> bool:
        found = any(p.is_alive() for rank, p in enumerate(self.running.processes) if rank != self.trial.victim)
        if found:
            self.ended = time.monotonic()
        return found and self.ended < self.began + LONGEST

    def judge(self) -> Ended:
        """When the other ranks have ended, or had too long."""
        trial, running = self.trial, self.running
        hit, victim = re.search(rf"{HIT} ([\d.]+) ", running.said("out")), running.processes[trial.victim]
        if not hit:
            victim.join(20)
        for process in running.processes:
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode for rank, process in enumerate(running.processes) if rank != trial.victim]
        said, failed = running.said("err"), []
        if not hit:
            good = [*codes, victim.exitcode] == [0] * RANKS
            return Ended(trial, 0.0, False, [] if good else [f"not hit, and exit codes {codes}: {said[-900:]}"])
        seconds = self.ended - float(hit[1])
        if trial.phase == "the end" and codes == [0] * len(codes):  # all was done
            return Ended(trial, seconds, True, [])
        if codes != [1] * len(codes):
            failed.append(f"exit codes {codes}")
        if seconds > TIMEOUT + SLACK:
            failed.append(f"took {seconds:.0f} s")
        if named(said) != {trial.victim}:
            failed.append(f"rank {trial.victim} is not named, or another is")
        if "Traceback" in said:
            failed.append("a traceback")
        return Ended(trial, seconds, True, [f"{'; '.join(failed)}: {said[-1500:]}"] if failed else [])


def struck(scripts: list[str], trials: int, seed: int = 0, together: int = 4) -> Iterator[Ended]:
    pool, chance = Pool(), Random(seed)
    scripts = [name for name in scripts if name not in ALONE]
    for first in range(0, trials, together):
        under = [Watched(pool, draw(scripts, chance)) for _ in range(min(together, trials - first))]
        while sum(each.others_run() for each in under):  # each of them is looked at
            time.sleep(0.1)
        yield from (each.judge() for each in under)
    pool.close()
