"""Step time of our tensor and sequence parallelism against torch.distributed.tensor.parallel.

    torchrun --nproc_per_node=4 tests/bench/bench_tensor_parallel.py

The same GPT, data and loss over a cut vocabulary, forward and backward without an optimizer, float32, alternating in
one run; the medians of the ratios taken round by round. Not a test: the ratio depends on the machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import megatron_tp.engine.layers
import megatron_tp.engine.loss
import sequence_parallel.engine.layers
import sequence_parallel.engine.loss
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize
from core.model.text import Text
from core.proof.launch import Job, choose_device, launch, process_info

DTYPE = torch.float32


def torchs(model: GPT, mesh: DeviceMesh, sequence: bool) -> GPT:
    """torch's plan for the same cuts."""
    whole = Shard(1) if sequence else Replicate()
    plan = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=whole),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=whole),
    }
    ends = {
        "embed.token": RowwiseParallel(input_layouts=Replicate(), output_layouts=whole),
        "head": ColwiseParallel(input_layouts=whole, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        gathered = {"input_layouts": (Shard(1), None), "desired_input_layouts": (Replicate(), None)}
        plan |= {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(**gathered),
            "mlp_norm": SequenceParallel(),
            "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        }
        ends["norm"] = SequenceParallel()
    for block in model.blocks.values():
        parallelize_module(block, mesh, plan)
    return parallelize_module(model, mesh, ends)


def bench(job: Job, config: GPTConfig, batch: int, rounds: int) -> None:
    axis = Mesh(job.device.type, Ledger(), job.timeout, tp=job.world_size)["tp"]
    mesh = DeviceMesh(job.device.type, list(axis.ranks), mesh_dim_names=("tp",))
    inputs, targets = (t.to(job.device) for t in Text(None, config.sequence).batch(0, 0, batch))

    def ours(topic: object, loss: object) -> tuple[GPT, Callable[[], None]]:
        model = materialize(topic.parallelize(GPT(config), axis), 0, job.device, DTYPE)
        same_heads, _ = axis.split(config.kv_copies(axis.size))

        def step() -> None:
            loss.token_loss(model(inputs), targets, targets.numel(), axis, config.vocabulary).backward()
            if topic is sequence_parallel.engine.layers:
                topic.sum_replicated_gradients(model, axis, same_heads)

        return model, step

    def theirs(sequence: bool) -> tuple[GPT, Callable[[], None]]:
        model = materialize(GPT(config), 0, job.device, DTYPE)
        if sequence:  # torch has nothing for positions: ours
            model.embed.position = sequence_parallel.engine.layers.PositionShard(model.embed.position, axis)
        torchs(model, mesh, sequence)

        def step() -> None:
            with loss_parallel():
                F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
            if sequence:
                dist.all_reduce(model.embed.position.weight.grad)
                for p in model.parameters():  # LayerNorms, as an optimizer would find them
                    if isinstance(p.grad, DTensor) and p.grad.placements[0].is_partial():
                        p.grad = p.grad.redistribute(placements=[Replicate()])

        return model, step

    runs = {
        "ours, TP": ours(megatron_tp.engine.layers, megatron_tp.engine.loss),
        "torch, TP": theirs(False),
        "ours, TP + SP": ours(sequence_parallel.engine.layers, sequence_parallel.engine.loss),
        "torch, TP + SP": theirs(True),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):  # two rounds to warm up
        for name, (model, step) in runs.items():
            model.zero_grad()
            dist.barrier()
            began = time.perf_counter()
            step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    pairs = (("ours, TP", "torch, TP"), ("ours, TP + SP", "torch, TP + SP"))
    equal = job.gather([different(runs[a][0], runs[b][0]) for a, b in pairs])
    if job.rank:
        return
    assert not any(map(any, equal)), f"the two sides do not compute the same gradients: {equal}"
    print(tabulate([(n, statistics.median(t[2:]) * 1e3, min(t[2:]) * 1e3) for n, t in times.items()],
                   ("step", "median ms", "fastest ms"), floatfmt=".1f"))  # fmt: skip
    print(
        f"\nmedian of the ratios, {rounds} rounds, {job.world_size} ranks on {os.cpu_count()} cores, {job.device.type}"
    )
    for a, b in pairs:
        ratios = [x / y for x, y in zip(times[a][2:], times[b][2:], strict=True)]
        print(f"{a:<14} / {b:<15} {statistics.median(ratios):.3f}")


def different(ours: GPT, theirs: GPT) -> list[str]:
    """Names of the parameters whose gradients are not the same."""

    def local(p: nn.Parameter) -> Tensor:
        return p.grad.redistribute(placements=p.placements).to_local() if isinstance(p.grad, DTensor) else p.grad

    others = dict(theirs.named_parameters())
    return [
        name
        for name, p in ours.named_parameters()
        if not torch.allclose(p.grad, local(others[name]), rtol=1e-3, atol=1e-6)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = GPTConfig(layers=args.layers, hidden=args.hidden, heads=4, sequence=args.sequence, tied=False)
    with launch(choose_device(args.device, process_info())[0], 120) as the_job:
        bench(the_job, sizes, args.batch, args.rounds)
