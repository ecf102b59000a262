"""Attention over a cut sequence against dense attention in one process with as many cores.

Attention alone, forward and backward. The dense one is torch's own `scaled_dot_product_attention` on rank 0 with one
thread a core while the other ranks sleep; ours has a thread a rank. The floor is ours without messages: the kernel on
blocks of the sequence. Memory is the growth of the resident set at its peak, inputs included.
"""

import ctypes
import gc
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.seeded import generator
from core.proof.launch import Job
from core.proof.oracle import worst_difference
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.ulysses import FullSequence, context_parallel
from tests.bench.harness import Row, Topic, alternate, row, silent

SHAPE = (1, 8, 4096, 64)  # samples, heads, tokens, head size
DTYPE = torch.float32
# Of each row: the way, and the bar.
ROWS = {
    "zigzag ring s 4096 / dense": ("zigzag ring", 1.03),
    "contiguous ring s 4096 / dense": ("contiguous ring", None),
    "Ulysses s 4096 / dense": ("Ulysses", 1.03),
    "hybrid s 4096 / dense": ("hybrid", 1.03),
}
MEMORY = {f"{way} s 4096 peak of a rank / dense": way for way, _ in ROWS.values()}
M_MMAP_THRESHOLD = -3  # of mallopt
AT_ONCE, USUAL = 2**16, 2**25  # larger tensors are given back to the system when they are freed


def numbers(shape: tuple[int, ...], dtype: torch.dtype, attention: SequenceAttention) -> list[Tensor]:
    """This rank's part of Q, K, V, and of the output's gradient."""
    here = attention.positions(shape[2])
    whole = (torch.randn(shape, generator=generator("bench", i))[:, :, here].to(dtype) for i in range(4))
    return [x.requires_grad_(i < 3) for i, x in enumerate(whole)]


def step(attention: SequenceAttention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> None:
    for x in (q, k, v):
        x.grad = None
    attention(q, k, v).backward(gradient)


def status(name: str) -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(shape: tuple[int, ...], dtype: torch.dtype, attention: SequenceAttention) -> float:
    """MB by which the resident set grows at most for inputs, forward and backward."""
    step(attention, *numbers((1, shape[1], 16 * attention.multiple, shape[3]), dtype, attention))  # what is loaded once
    gc.collect()
    base = status("VmRSS")
    mine = numbers(shape, dtype, attention)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    step(attention, *mine)
    return (status("VmHWM") - base) / 1e6


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    axis = Mesh("cpu", Ledger(), job.timeout, cp=job.world_size)["cp"]
    c = axis.size
    every: dict[str, SequenceAttention] = {
        "dense": FullSequence(),
        "zigzag ring": context_parallel(axis, job.device),
        "contiguous ring": context_parallel(axis, job.device, zigzag=False),
        "Ulysses": context_parallel(axis, job.device, c),
        "hybrid": context_parallel(axis, job.device, c // 2),
    }
    asked = {"dense", *(ROWS[name][0] for name in wanted if name in ROWS), *(MEMORY.get(name) for name in wanted)}
    ways = {name: attention for name, attention in every.items() if name in asked}
    memory: dict[str, float] = {}
    if asked.intersection(MEMORY[name] for name in wanted if name in MEMORY):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, AT_ONCE)
        memory = {n: peak(SHAPE, DTYPE, a) if n != "dense" or job.rank == 0 else 0.0 for n, a in ways.items()}
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, USUAL)
    inputs = {name: numbers(SHAPE, DTYPE, attention) for name, attention in ways.items()}
    steps = {name: lambda name=name: step(ways[name], *inputs[name]) for name in ways}
    steps |= {f"{name}, no messages": silent(steps[name]) for name in ways if name != "dense"}
    times = alternate(job, steps, rounds, alone={"dense"})
    worst = {}
    for name, attention in ways.items():  # once more, with messages
        step(attention, *inputs[name])
    for name, attention in ways.items():
        mine, whole = ([(str(i), x.grad) for i, x in enumerate(inputs[n][:3])] for n in (name, "dense"))
        places = attention.positions(SHAPE[2])
        worst[name] = worst_difference(mine, {i: x[:, :, places] for i, x in whole})
    everyone = job.gather((memory, worst))
    if job.rank:
        return []
    assert all(x < 1e-4 for _, each in everyone for x in each.values()), f"not the same gradients: {everyone}"
    rows = []
    for name in (name for name in wanted if name in ROWS):
        way, bar = ROWS[name]
        rows.append(row(times, name, way, "dense", f"{way}, no messages", bar))
    for name in (name for name in wanted if name in MEMORY):
        most, dense = (max(each[way] for each, _ in everyone) for way in (MEMORY[name], "dense"))
        rows.append(Row(name, "dense", most, dense, ratio=most / dense, unit="MB"))
    return rows


TOPIC = Topic(4, (*ROWS, *MEMORY), bench, rounds=9)
