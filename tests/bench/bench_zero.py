"""Step time of our data parallelism and ZeRO against torch's.

    torchrun --nproc_per_node=4 tests/bench/bench_zero.py

The same GPT, data and AdamW, float32, a whole step with its update, alternating in one run; the medians of the ratios
taken round by round. Not a test: the ratio depends on the machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.full import full_tensors
from core.proof.launch import Job, choose_device, launch, process_info
from zero.engine.engine import Engine, data_parallel, zero1, zero2, zero3

DTYPE = torch.float32
optimizer_of = partial(torch.optim.AdamW, lr=1e-4)


def bench(job: Job, config: GPTConfig, batch: int, rounds: int) -> None:
    axis = Mesh(job.device.type, Ledger(), job.timeout, dp=job.world_size)["dp"]
    mesh = DeviceMesh(job.device.type, list(axis.ranks), mesh_dim_names=("dp",))
    whole = [t.to(job.device) for t in Text(None, config.sequence).batch(0, 0, batch)]
    inputs, targets = (t.chunk(axis.size)[axis.index] for t in whole)
    tokens = whole[1].numel()

    def ours(kind: Callable[..., Engine]) -> tuple[Callable[[], dict], Callable[[], None]]:
        model = materialize(GPT(config), 0, job.device, DTYPE)
        stage = kind(model, axis, optimizer_of, None, DTYPE)

        def step() -> None:
            stage.zero_grad()
            stage.backward(token_loss(model(inputs), targets, tokens))
            stage.step()

        return lambda: dict(full_tensors(piece for rank in gathered(job, stage.weights()) for piece in rank)), step

    def torchs(kind: str) -> tuple[Callable[[], dict], Callable[[], None]]:
        model: nn.Module = materialize(GPT(config), 0, job.device, DTYPE)
        if kind.startswith("DDP"):
            run = DistributedDataParallel(model, process_group=axis.group, gradient_as_bucket_view=True)
        else:
            again = kind == "fully_shard"
            for block in model.blocks.values():
                fully_shard(block, mesh=mesh, reshard_after_forward=again)
            run = fully_shard(model, mesh=mesh, reshard_after_forward=again)
        if kind == "DDP + ZeroRedundancyOptimizer":
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, axis.group, lr=1e-4)
        else:
            optimizer = optimizer_of(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            # torch averages over the ranks where we sum.
            (token_loss(run(inputs), targets, tokens) * axis.size).backward()
            optimizer.step()

        def weights() -> dict:
            named = model.named_parameters()
            return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in named}

        return weights, step

    pairs = {
        "ours, DDP": ("torch, DDP", 1.0),
        "ours, ZeRO-1": ("DDP + ZeroRedundancyOptimizer", 0.9),
        "ours, ZeRO-2": ("fully_shard(reshard_after_forward=False)", 0.9),
        "ours, ZeRO-3": ("fully_shard", 0.9),
    }
    kinds = (data_parallel, zero1, zero2, zero3)
    runs = {}
    for (name, (theirs, _)), kind in zip(pairs.items(), kinds, strict=True):
        runs[name] = ours(kind)
        runs[theirs] = torchs(theirs.removeprefix("torch, "))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):  # two rounds to warm up
        for name, (_, step) in runs.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    trained = {name: weights() for name, (weights, _) in runs.items()}
    if job.rank:
        return
    for name, (theirs, _) in pairs.items():
        for parameter, value in trained[name].items():
            apart = (value - trained[theirs][parameter].cpu()).norm() / value.norm()
            assert apart < 1e-3, f"{name} and {theirs} have trained {parameter} differently: {apart}"
    rows = [(name, statistics.median(t[2:]) * 1e3, min(t[2:]) * 1e3) for name, t in times.items()]
    print(tabulate(rows, ("step", "median ms", "fastest ms"), floatfmt=".1f"))
    where = f"{job.world_size} ranks on {os.cpu_count()} cores, {job.device.type}"
    print(f"\nmedian of the ratios, {rounds} rounds, {where}")
    for name, (theirs, bar) in pairs.items():
        ratios = [x / y for x, y in zip(times[name][2:], times[theirs][2:], strict=True)]
        print(f"{name:<13} / {theirs:<41} {statistics.median(ratios):.3f}   bar {bar}")


def gathered(job: Job, pieces: list) -> list:
    return job.gather([piece._replace(value=piece.value.cpu().clone()) for piece in pieces])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = GPTConfig(layers=8, hidden=256, heads=4, sequence=64)
    with launch(choose_device(args.device, process_info())[0], 120) as the_job:
        bench(the_job, sizes, args.batch, args.rounds)
