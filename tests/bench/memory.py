"""Peak memory of a rank over three steps: its high-water mark above what it had before the model, against torch's.

The same GPT, data and AdamW, both sides in the same processes, one after the other, each once before it is measured:
what is loaded at a first use is not counted. Large tensors are given back to the system when they are freed (mallopt),
so that the mark is what is alive and not what the allocator keeps.
"""

import ctypes
import gc
from collections.abc import Collection
from pathlib import Path

from core.proof.launch import Job
from tests.bench.harness import Row, Step, Topic
from tests.bench.long_context import AT_ONCE, M_MMAP_THRESHOLD, status
from tests.bench.zero import OURS, Bench

STEPS = 3
# Of each row: ours, the peer, the bar.
ROWS = {
    "ZeRO-3 peak of a rank / fully_shard": ("ZeRO-3", "fully_shard", 0.9),
    "ZeRO-2 peak of a rank / fully_shard": ("ZeRO-2", "fully_shard, weights kept", None),
}


def peak(job: Job, name: str) -> float:
    """MB by which this process grows at most, from before the model is made; the making itself is not counted."""
    made = Bench(job)
    gc.collect()
    base = status("VmRSS")
    step: Step = (made.ours(OURS[name]) if name in OURS else made.torchs(name))[1]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present: sharding the full model is over
    for _ in range(STEPS):
        step()
    return (status("VmHWM") - base) / 1e6


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, AT_ONCE)
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(side for row in wanted for side in ROWS[row][:2]):
        peak(job, name)  # what is loaded at the first use
        gc.collect()
        found[name] = [max(job.gather(peak(job, name)), default=0.0) for _ in range(min(rounds, 3))]
    if job.rank:
        return []
    rows = []
    for name in wanted:
        ours, peer, bar = ROWS[name]
        a, b = (sorted(found[side])[len(found[side]) // 2] for side in (ours, peer))
        rows.append(Row(name, peer, a, b, ratio=a / b, bar=bar, unit="MB"))
    return rows


TOPIC = Topic(4, tuple(ROWS), bench, rounds=3)
