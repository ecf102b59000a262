"""A long run does not grow: resident memory, threads and open files of each rank, and the files in its --save folder.

`cluster/train.py` with a tiny model on two ranks, saved and validated every few steps, for as many minutes as one says.
What a run holds settles in the first fifth; after that, the slope of a line through the memory of each rank, times an
hour, stays below what a list of its losses may take, and the counts do not change.
"""

import os
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.pool import Pool

FLAGS = (
    *("--hidden", "16", "--heads", "4", "--layers", "2", "--batch", "8", "--sequence", "16", "--zero", "1"),
    *("--save-every", "20", "--evaluate", "10", "--sample", "0", "--device", "cpu", "--steps", "10000000"),
)
WARM = 0.2  # of the time
GROWS = 16.0  # MB an hour


class Sample(NamedTuple):
    """Of one rank at a time."""

    seconds: float
    megabytes: float
    threads: int
    files: int  # that are open


def look(process: int, began: float) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{process}/fd"))
    return Sample(time.monotonic() - began, int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), files)


def hourly(samples: Sequence[Sample]) -> float:
    """MB an hour, by the line that fits the second half best."""
    half = samples[len(samples) // 2 :]
    return statistics.linear_regression([s.seconds / 3600 for s in half], [s.megabytes for s in half]).slope


def soak(minutes: float, *more: str, ranks: int = 2) -> tuple[list[str], list[str]]:
    """What was seen, and what grew."""
    pool, began, samples = Pool(), time.monotonic(), [[] for _ in range(ranks)]
    kept: list[int] = []
    with TemporaryDirectory() as folder:
        running = pool.start(
            ranks, "cluster/train.py", *FLAGS, "--save", f"{folder}/run", *more, timeout=minutes * 60 + 60
        )
        every = min(5.0, minutes * 60 / 40)
        while (now := time.monotonic() - began) < minutes * 60:
            time.sleep(every)
            if not all(process.is_alive() for process in running.processes):
                break
            if now > minutes * 60 * WARM:
                for rank, process in enumerate(running.processes):
                    samples[rank].append(look(process.pid, began))
                kept.append(sum(1 for _ in Path(folder).rglob("*")))
        alive = [process.is_alive() for process in running.processes]
        said = running.said("err")
        for process in running.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        running.end()
        pool.close()
    steps = max((int(line.split("|")[-1].split("/")[0]) for line in said.replace("\r", "\n").splitlines()
                 if "step/s" in line), default=0)  # fmt: skip
    failed = [] if all(alive) else [f"the run ended: {said[-800:]}"]
    seen = [
        f"{steps} steps in {minutes:g} minutes, {len(kept)} samples, files in the folder {min(kept)} to {max(kept)}"
    ]
    failed += [f"files in the folder: {kept[0]}, then {kept[-1]}"] * (max(kept[-5:]) > max(kept[:5]) + 6)
    for rank, each in enumerate(samples):
        slope = hourly(each)
        threads, files = [[getattr(s, what) for s in each] for what in ("threads", "files")]
        seen.append(
            f"rank {rank}: {each[0].megabytes:.1f} to {each[-1].megabytes:.1f} MB, {slope:+.1f} MB an hour in the "
            f"second half; threads {min(threads)} to {max(threads)}, open files {min(files)} to {max(files)}"
        )
        failed += [f"rank {rank} grows by {slope:.1f} MB an hour"] * (slope > GROWS)
        for what, values in (("threads", threads), ("open files", files)):
            grown = max(values[len(values) // 2 :]) > max(values[: len(values) // 2]) + 1
            failed += [f"rank {rank}: {what} {values[0]}, then {max(values)}"] * grown
    return seen, failed
