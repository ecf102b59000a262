"""Pipelines: a step of each schedule, without an optimizer, against torch.distributed.pipelining.

The same stages, data and order of actions. The floor is what a rank computes: its stages' forwards and backwards, on
inputs that are there.
"""

from collections.abc import Collection
from functools import partial

import torch
from einops import rearrange
from torch.distributed.pipelining import PipelineStage, schedules

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.launch import Job
from pipeline.engine.actions import Schedule, size, stages_of_ranks
from pipeline.engine.runtime import Pipeline
from pipeline.schedules import build
from pipeline.stages import each_stage, partition
from tests.bench.harness import Row, Step, Topic, alternate, row

CONFIG = GPTConfig(layers=8, hidden=256, heads=4, sequence=64)
BATCH, MICROBATCHES = 32, 8
PEERS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
ROWS = {**{f"pipeline {name}": name for name in PEERS}, "pipeline 1f1b / one process": "1f1b"}


class Bench:
    """The steps, each with a model of its own."""

    def __init__(self, job: Job):
        self.job = job
        self.axis = Mesh(job.device.type, Ledger(), job.timeout, pp=job.world_size)["pp"]
        self.whole = [t.to(job.device) for t in Text(None, CONFIG.sequence).batch(0, 0, BATCH)]
        self.inputs, self.targets = (rearrange(t, "(m b) s -> m b s", m=MICROBATCHES) for t in self.whole)
        self.shape = (BATCH // MICROBATCHES, CONFIG.sequence, CONFIG.hidden)
        self.loss = partial(token_loss, tokens=self.whole[1].numel())
        self.models: dict[str, GPT] = {}

    def stages(self, name: str, schedule: Schedule) -> dict[int, GPT]:
        count, mine = size(schedule)[0], stages_of_ranks(schedule)[self.axis.index]
        model = materialize(partition(GPT(CONFIG), mine, count), 0, self.job.device, torch.float32)
        self.models[name] = model
        return each_stage(model, mine, count)

    def ours(self, name: str) -> Step:
        schedule = build(name, self.axis.size, MICROBATCHES)
        stages = self.stages(name, schedule)
        pipeline = Pipeline(stages, self.loss, schedule, self.axis, self.shape, torch.float32, self.job.device)
        return self.zeroed(name, lambda: pipeline.step(self.inputs, self.targets))

    def torchs(self, name: str) -> Step:
        plan, of_torch = build(name, self.axis.size, MICROBATCHES), getattr(schedules, PEERS[name])
        count, stages = size(plan)[0], self.stages(PEERS[name], plan)
        pipes = [PipelineStage(m, s, count, self.job.device, group=self.axis.group) for s, m in stages.items()]
        one = issubclass(of_torch, schedules.PipelineScheduleSingle)
        schedule = of_torch(pipes[0] if one else pipes, MICROBATCHES, loss_fn=self.loss, scale_grads=False)
        data = [self.whole[0]] if 0 in stages else []
        target = {"target": self.whole[1]} if count - 1 in stages else {}
        return self.zeroed(PEERS[name], lambda: schedule.step(*data, **target))

    def floor(self, name: str) -> Step:
        plan = build(name, self.axis.size, MICROBATCHES)
        stages, last = self.stages(f"{name}, floor", plan), size(plan)[0] - 1
        activation, gradient = torch.randn(2, *self.shape, device=self.job.device)

        def step() -> None:
            for m in range(MICROBATCHES):
                for number, stage in stages.items():
                    y = stage(self.inputs[m] if number == 0 else activation.detach().requires_grad_())
                    if number == last:
                        self.loss(y, self.targets[m]).backward()
                    else:
                        y.backward(gradient)

        return self.zeroed(f"{name}, floor", step)

    def one_process(self) -> Step:
        self.models["one process"] = model = materialize(GPT(CONFIG), 0, self.job.device, torch.float32)
        return self.zeroed("one process", lambda: self.loss(model(self.whole[0]), self.whole[1]).backward())

    def zeroed(self, name: str, compute: Step) -> Step:
        def step() -> None:
            self.models[name].zero_grad()
            compute()

        return step


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    made, runs = Bench(job), {}
    for name in dict.fromkeys(ROWS[each] for each in wanted):
        runs |= {name: made.ours(name), PEERS[name]: made.torchs(name), f"{name}, floor": made.floor(name)}
    alone = "one process, all cores"
    if "pipeline 1f1b / one process" in wanted:
        runs[alone] = made.one_process()
    times = alternate(job, runs, rounds, {alone})
    same = [
        torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        for name, peer in PEERS.items() if name in runs
        for ours, theirs in zip(made.models[name].parameters(), made.models[peer].parameters(), strict=True)
    ]  # fmt: skip
    equal = job.gather(all(same))
    if job.rank:
        return []
    assert all(equal), f"the two sides do not compute the same gradients on ranks {equal}"
    found = []
    for each in wanted:
        name = ROWS[each]
        peer, bar = (alone, None) if each.endswith("one process") else (PEERS[name], 0.90)
        found.append(row(times, each, name, peer, f"{name}, floor", bar))
    return found


TOPIC = Topic(4, tuple(ROWS), bench)
