"""Time and memory of attention over a cut sequence against dense attention in one process with as many cores.

    torchrun --nproc_per_node=4 tests/bench/bench_long_context.py

Attention alone, forward and backward. The dense one is torch's own `scaled_dot_product_attention` on rank 0 with one
thread a core while the other ranks sleep; ours has a thread a rank. Alternating in one run; the medians of the ratios
taken round by round, of the time that passed, and of the time that all cores together were busy, which other programs
on the machine do not lengthen. Memory is the growth of the resident set at its peak, inputs included. Not a test: the
ratios depend on the machine.
"""

import argparse
import ctypes
import gc
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.seeded import generator
from core.proof.launch import Job, choose_device, launch, process_info
from core.proof.lesson import DTYPES
from core.proof.oracle import worst_difference
from sequence_parallel.context import SequenceAttention
from sequence_parallel.engine.ulysses import FullSequence, context_parallel

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


def bench(job: Job, shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> None:
    axis = Mesh("cpu", Ledger(), job.timeout, cp=job.world_size)["cp"]
    c, cores = axis.size, len(os.sched_getaffinity(0))
    ways: dict[str, SequenceAttention] = {
        "dense": FullSequence(),
        "ring, zigzag": context_parallel(axis, job.device),
        "ring, contiguous": context_parallel(axis, job.device, zigzag=False),
        "Ulysses": context_parallel(axis, job.device, c),
    }
    if c % 2 == 0 and c > 2:
        ways["hybrid"] = context_parallel(axis, job.device, c // 2)

    def here(name: str) -> bool:
        torch.set_num_threads(cores if name == "dense" else 1)
        dist.barrier()
        return name != "dense" or job.rank == 0

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, AT_ONCE)
    memory = {name: peak(shape, dtype, attention) if here(name) else 0.0 for name, attention in ways.items()}
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, USUAL)
    inputs = {name: numbers(shape, dtype, attention) for name, attention in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}  # of this rank's threads
    for _ in range(rounds + 1):  # one round to warm up
        for name, attention in ways.items():
            works = here(name)
            began, busy_before = time.perf_counter(), time.process_time()
            if works:
                step(attention, *inputs[name])
            busy[name].append(time.process_time() - busy_before)
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    worst = {}
    step(ways["dense"], *inputs["dense"])
    for name, attention in ways.items():
        mine, whole = ([(str(i), x.grad) for i, x in enumerate(inputs[n][:3])] for n in (name, "dense"))
        places = attention.positions(shape[2])
        worst[name] = worst_difference(mine, {i: x[:, :, places] for i, x in whole})
    everyone = job.gather((memory, worst, busy))
    if job.rank:
        return
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert all(x < tolerance for _, each, _ in everyone for x in each.values()), f"not the same gradients: {everyone}"
    work = {name: [sum(each) for each in zip(*(busy[name] for *_, busy in everyone), strict=True)] for name in ways}
    rows = []
    for name in ways:
        most = [memory[name] for memory, *_ in everyone]
        seconds = [(median(times[name]), ratio(times, name)), (median(work[name]), ratio(work, name))]
        rows.append((name, *(x for each in seconds for x in each), max(most), sum(most)))
    print(f"{shape} (samples, heads, tokens, head size), {dtype}, {c} ranks on {cores} cores, {rounds} rounds")
    head = ("", "ms", "/ dense", "ms of all cores", "/ dense", "peak MB, one rank", "all ranks")
    print(tabulate(rows, head, floatfmt=("", ".1f", ".3f", ".1f", ".3f", ".1f", ".1f")))


def median(seconds: list[float]) -> float:
    """In ms, without the first round."""
    return 1e3 * statistics.median(seconds[1:])


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(x / y for x, y in zip(seconds[name][1:], seconds["dense"][1:], strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    args = parser.parse_args()
    with launch(choose_device("cpu", process_info())[0], 120) as the_job:
        bench(the_job, (args.batch, args.heads, args.sequence, args.head_size), DTYPES[args.dtype], args.rounds)
