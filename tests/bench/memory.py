"""Peak memory of a rank over three steps: its high-water mark above what it had before the model, against torch's.

The same GPT, data and AdamW, both sides in the same processes, one after the other, each once before it is measured:
what is loaded at a first use is not counted. Large tensors are given back to the system when they are freed (mallopt),
so that the mark is what is alive and not what the allocator keeps.
"""

import ctypes
import gc
import statistics
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from core.proof.launch import Job
from tests.bench.harness import Row, Step, Topic
from tests.bench.long_context import AT_ONCE, M_MMAP_THRESHOLD, USUAL, status
from tests.bench.zero import OURS, Bench

STEPS = 3
# Of each row: ours, the peer, the bar.
ROWS = {
    "ZeRO-3 peak of a rank / fully_shard": ("ZeRO-3", "fully_shard", 0.9),
    "ZeRO-2 peak of a rank / fully_shard": ("ZeRO-2", "fully_shard, weights kept", None),
}


def growth(make: Callable[[], Step]) -> float:
    """MB by which this process grows at most, from before the model is made; the making itself is not counted."""
    gc.collect()
    base = status("VmRSS")
    step = make()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present: sharding the full model is over
    for _ in range(STEPS):
        step()
    return (status("VmHWM") - base) / 1e6


def compared(job: Job, sides: Mapping[str, Callable[[], Step]], rounds: int) -> dict[str, float]:
    """Of each side the growth of the rank that grows most, the median of a few rounds; on rank 0."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, AT_ONCE)
    found: dict[str, list[float]] = {}
    for name, make in sides.items():
        growth(make)  # what is loaded at the first use
        found[name] = [max(job.gather(growth(make)), default=0.0) for _ in range(min(rounds, 3))]
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, USUAL)
    return {name: statistics.median(each) for name, each in found.items()}


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    made = Bench(job)
    names = dict.fromkeys(side for row in wanted for side in ROWS[row][:2])
    sides = {n: lambda n=n: (made.ours(OURS[n]) if n in OURS else made.torchs(n))[1] for n in names}
    found = compared(job, sides, rounds)
    return [] if job.rank else [memory_row(name, found, *ROWS[name]) for name in wanted]


def memory_row(name: str, found: Mapping[str, float], ours: str, peer: str, bar: float | None) -> Row:
    return Row(name, peer, found[ours], found[peer], ratio=found[ours] / found[peer], bar=bar, unit="MB")


TOPIC = Topic(4, tuple(ROWS), bench, rounds=3)
