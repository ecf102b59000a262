"""Step time of our pipelines against torch.distributed.pipelining, and against one process with all cores.

    torchrun --nproc_per_node=4 tests/bench/bench_pipeline.py

The same stages, data, schedule and optimizer-free step, float32, alternating in one run; the medians of the ratios
taken step by step. Not a test: the ratio depends on the machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from einops import rearrange
from tabulate import tabulate
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.launch import Job, choose_device, launch, process_info
from pipeline.engine.actions import Schedule, size, stages_of_ranks
from pipeline.engine.runtime import Pipeline
from pipeline.schedules import build
from pipeline.stages import each_stage, partition

CONFIG = GPTConfig(layers=8, hidden=256, heads=4, sequence=64)
BATCH, MICROBATCHES = 32, 8
PAIRS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


def timed(step: Callable[[], None]) -> float:
    dist.barrier()
    began = time.perf_counter()
    step()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    dist.barrier()
    return time.perf_counter() - began


def bench(job: Job, rounds: int) -> None:
    axis = Mesh(job.device.type, Ledger(), job.timeout, pp=job.world_size)["pp"]
    dtype, tokens = torch.float32, BATCH * CONFIG.sequence
    whole = [t.to(job.device) for t in Text(None, CONFIG.sequence).batch(0, 0, BATCH)]
    inputs, targets = (rearrange(t, "(m b) s -> m b s", m=MICROBATCHES) for t in whole)
    shape = (BATCH // MICROBATCHES, CONFIG.sequence, CONFIG.hidden)
    loss = partial(token_loss, tokens=tokens)

    def part(schedule: Schedule) -> tuple[GPT, dict[int, GPT]]:
        stages, mine = size(schedule)[0], stages_of_ranks(schedule)[axis.index]
        model = materialize(partition(GPT(CONFIG), mine, stages), 0, job.device, dtype)
        return model, each_stage(model, mine, stages)

    def ours(name: str) -> tuple[GPT, Callable[[], None]]:
        schedule = build(name, axis.size, MICROBATCHES)
        model, stages = part(schedule)
        pipeline = Pipeline(stages, loss, schedule, axis, shape, dtype, job.device)
        return model, lambda: pipeline.step(inputs, targets)

    def torchs(name: str, schedule_class: type) -> tuple[GPT, Callable[[], None]]:
        plan = build(name, axis.size, MICROBATCHES)
        count, (model, stages) = size(plan)[0], part(plan)
        pipes = [PipelineStage(m, s, count, job.device, group=axis.group) for s, m in stages.items()]
        one = issubclass(schedule_class, schedules.PipelineScheduleSingle)
        schedule = schedule_class(pipes[0] if one else pipes, MICROBATCHES, loss_fn=loss, scale_grads=False)
        data = [whole[0]] if 0 in stages else []
        target = {"target": whole[1]} if count - 1 in stages else {}
        return model, lambda: schedule.step(*data, **target)

    runs = {}
    for name, theirs in PAIRS.items():
        runs[name] = ours(name)
        runs[theirs] = torchs(name, getattr(schedules, theirs))
    single = materialize(GPT(CONFIG), 0, job.device, dtype)

    def one_process(parts: list[tuple[Tensor, Tensor]]) -> None:
        if job.rank == 0:
            torch.set_num_threads(os.cpu_count())
            for x, y in parts:
                loss(single(x), y).backward()
            torch.set_num_threads(1)

    runs["one process, whole batch"] = single, lambda: one_process([(whole[0], whole[1])])
    runs["one process, microbatches"] = single, lambda: one_process(list(zip(inputs, targets, strict=True)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):  # two rounds to warm up
        for name, (model, step) in runs.items():
            model.zero_grad()
            times[name].append(timed(step))
    same = [
        all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6) for a, b in
            zip(runs[name][0].parameters(), runs[theirs][0].parameters(), strict=True))
        for name, theirs in PAIRS.items()
    ]  # fmt: skip
    equal = job.gather(same)
    if job.rank:
        return
    assert all(map(all, equal)), f"the two sides do not compute the same gradients: {equal}"
    median = {name: statistics.median(values[2:]) for name, values in times.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a][2:], times[b][2:], strict=True))

    print(tabulate([(n, t * 1e3, min(times[n][2:]) * 1e3) for n, t in median.items()],
                   ("step", "median ms", "fastest ms"), floatfmt=".1f"))  # fmt: skip
    print(
        f"\nmedian of the ratios, {rounds} rounds, {job.world_size} ranks on {os.cpu_count()} cores, {job.device.type}"
    )
    for name, theirs in PAIRS.items():
        print(f"{f'{name} / {theirs}':<40} {ratio(name, theirs):.3f}")
    print("parallel efficiency, one process on all cores / 1f1b:")
    print(f"  one process with the whole batch     {ratio('one process, whole batch', '1f1b'):.3f}")
    print(f"  one process with the same m          {ratio('one process, microbatches', '1f1b'):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with launch(choose_device(arguments.device, process_info())[0], 120) as the_job:
        bench(the_job, arguments.rounds)
