"""Pipelines: a step of each schedule, without an optimizer, against torch.distributed.pipelining.

The same stages, data and order of actions. The floor is what a rank computes: its stages' forwards and backwards, on
inputs that are there. Nobody reaches it: a rank waits for others. So each schedule is compared with its order alone
too, the same products in the schedule's order, in which a rank waits for others, but for a byte in place of a tensor.
"""

import os
import tempfile
from collections.abc import Collection
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.linear import Deferred, Later
from core.model.text import Text
from core.proof.launch import Job
from pipeline.engine.actions import (
    Action,
    Schedule,
    input_of,
    output_of,
    placement,
    routes,
    sender_of,
    size,
    stages_of_ranks,
)
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
BY_BYTES = "the order alone"
ALONE = "one process, all cores"
# Of each row: ours, the peer, the bar.
ROWS = {
    **{f"pipeline {name}": (name, peer, 0.90) for name, peer in PEERS.items()},
    **{f"pipeline {name} / its order alone": (name, f"{name}, {BY_BYTES}", 1.08) for name in PEERS},
    "pipeline 1f1b / one process": ("1f1b", ALONE, None),
}


class Bytes:
    """From rank to rank one byte for each message of a schedule, in pipes of the system. All ranks make all of them."""

    def __init__(self, job: Job, schedule: Schedule, rank: int):
        self._rank, self._rank_of = rank, placement(schedule)
        folder = job.share(tempfile.mkdtemp() if job.rank == 0 else None)
        every = {route: os.path.join(folder, "-".join(map(str, route))) for route in routes(schedule)}
        if job.rank == 0:
            for name in every.values():
                os.mkfifo(name)
        dist.barrier()
        self._files = {route: os.open(name, os.O_RDWR) for route, name in every.items()}
        dist.barrier()
        if job.rank == 0:
            for name in every.values():
                os.unlink(name)
            os.rmdir(folder)

    def wait(self, action: Action) -> None:
        """For what the action needs, where another rank makes it."""
        sender = self._rank_of.get(sender_of(input_of(action)), self._rank)
        if sender != self._rank:
            os.read(self._files[sender, self._rank, input_of(action).kind[-1]], 1)

    def tell(self, action: Action) -> None:
        """Whoever needs what the action has made, where that is another rank."""
        receive = output_of(action)
        receiver = self._rank_of.get((receive.stage, receive.microbatch), self._rank)
        if receiver != self._rank:
            os.write(self._files[self._rank, receiver, receive.kind[-1]], b".")


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

    def in_order(self, name: str) -> Step:
        plan = build(name, self.axis.size, MICROBATCHES)
        stages, last, row = self.stages(f"{name}, {BY_BYTES}", plan), size(plan)[0] - 1, plan[self.axis.index]
        others = Bytes(self.job, plan, self.axis.index)
        deferred = Deferred(p for stage in stages.values() for p in stage.parameters())
        split = {(a.stage, a.microbatch) for a in row if a.kind == "I"}
        activation, gradient = torch.randn(2, *self.shape, device=self.job.device)
        kept: dict[tuple[int, int], Tensor] = {}
        later: dict[tuple[int, int], list[Later]] = {}

        def forward(stage: int, m: int) -> Tensor:
            y = stages[stage](self.inputs[m] if stage == 0 else activation.detach().requires_grad_())
            return self.loss(y, self.targets[m]) if stage == last else y

        def step() -> None:
            for action in row:
                stage, kind, m = action
                if kind == "W":
                    while later[stage, m]:
                        later[stage, m].pop().add()
                    continue
                others.wait(action)
                if kind == "F":
                    deferred.expected = (stage, m) in split
                    kept[stage, m] = forward(stage, m)
                else:
                    with deferred if kind == "I" else nullcontext():
                        kept.pop((stage, m)).backward(None if stage == last else gradient)
                    later[stage, m] = deferred.take()
                others.tell(action)

        return self.zeroed(f"{name}, {BY_BYTES}", step)

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
    for name in dict.fromkeys(ROWS[each][0] for each in wanted):
        runs |= {name: made.ours(name), f"{name}, floor": made.floor(name)}
    for name, peer, _ in (ROWS[each] for each in wanted):
        if peer == ALONE:
            runs[ALONE] = made.one_process()
        else:
            runs[peer] = made.in_order(name) if BY_BYTES in peer else made.torchs(name)
    times = alternate(job, runs, rounds, {ALONE})
    same = [
        torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        for name, peer in PEERS.items() if peer in runs
        for ours, theirs in zip(made.models[name].parameters(), made.models[peer].parameters(), strict=True)
    ]  # fmt: skip
    equal = job.gather(all(same))
    if job.rank:
        return []
    assert all(equal), f"the two sides do not compute the same gradients on ranks {equal}"
    return [row(times, each, *ROWS[each][:2], f"{ROWS[each][0]}, floor", ROWS[each][2]) for each in wanted]


TOPIC = Topic(4, tuple(ROWS), bench)
