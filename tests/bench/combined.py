"""The combined run: tp 2, pp 2, dp 2 on 8 ranks, a whole step with its update.

Against one process with a thread a core, in tokens a second; and against torch's composition of the same: DTensor's
tensor parallelism, 1F1B of torch.distributed.pipelining, and fully_shard over the data ranks. The floor is a rank's own
step with messages that are not sent. Peak memory as in `memory.py`.
"""

from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from cluster.planner.layout import Layout
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.precision import POLICIES
from core.model.text import Text
from core.proof.launch import Job
from pipeline.stages import each_stage, partition
from tests.bench.harness import Row, Step, Topic, alternate, row, silent
from tests.bench.memory import compared, memory_row
from tests.bench.tensor_parallel import torchs

CONFIG = GPTConfig(layers=8, hidden=256, heads=8, sequence=128, tied=False)
LAYOUT = Layout(tp=2, pp=2, dp=2, microbatch=4, microbatches=4, zero=1)
DTYPE = torch.float32
adamw = partial(torch.optim.AdamW, lr=1e-4)

ROWS = {
    "combined / one process": ("one process, all cores", None, True, 0.85),
    "combined / torch's composition": ("DTensor, 1F1B, fully_shard", None, False, 0.75),
}
MEMORY = {"combined peak of a rank / torch's composition": ("combined", "torch's", 0.9)}


class Bench:
    def __init__(self, job: Job, config: GPTConfig = CONFIG):
        self.job, self.config, self.losses = job, config, {}
        self.batch = [t.to(job.device) for t in Text(None, config.sequence).batch(0, 0, LAYOUT.batch)]

    def ours(self) -> Step:
        mesh = make_mesh(LAYOUT, self.job.device.type, Ledger(), self.job.timeout)
        worker = Worker(TrainSpec(self.config, None, LAYOUT, 0, POLICIES["float32"], self.job.device, adamw), mesh)

        def step() -> None:
            worker.zero_grad()
            share = worker.forward_backward(0, *self.batch)
            self.losses.setdefault("combined", []).append(float(share))
            worker.step()

        return step

    def torchs(self) -> Step:
        """The order of the ranks is the same: tp varies fastest, then dp, then pp."""
        sizes = (LAYOUT.pp, LAYOUT.dp, LAYOUT.tp)
        mesh = init_device_mesh(self.job.device.type, sizes, mesh_dim_names=("pp", "dp", "tp"))
        stage, dp = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
        model = materialize(partition(GPT(self.config), [stage], LAYOUT.pp), 0, self.job.device, DTYPE)
        part = each_stage(model, [stage], LAYOUT.pp)[stage]
        torchs(model, mesh["tp"], sequence=False)
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
        optimizer = adamw(part.parameters())

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / LAYOUT.microbatches

        pipe = PipelineStage(part, stage, LAYOUT.pp, self.job.device, group=mesh.get_group("pp"))
        schedule = Schedule1F1B(pipe, LAYOUT.microbatches, loss_fn=loss, scale_grads=False)
        inputs, targets = (t.chunk(LAYOUT.dp)[dp] for t in self.batch)

        def step() -> None:
            optimizer.zero_grad()
            losses: list[Tensor] = []
            with loss_parallel():
                if stage == 0:
                    schedule.step(inputs)
                else:
                    schedule.step(target=targets, losses=losses)
            whole = [each.detach().full_tensor() if isinstance(each, DTensor) else each.detach() for each in losses]
            own = float(sum(whole)) / LAYOUT.dp if mesh.get_local_rank("tp") == 0 else 0.0
            self.losses.setdefault("torch", []).append(own)
            optimizer.step()

        return step

    def one_process(self) -> Step:
        model = materialize(GPT(self.config), 0, self.job.device, DTYPE)
        optimizer = adamw(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            token_loss(model(self.batch[0]), self.batch[1], self.batch[1].numel()).backward()
            optimizer.step()

        return step


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    timed, kept = ([name for name in wanted if name in rows] for rows in (ROWS, MEMORY))
    rows = []
    if kept:  # first: what steps before have left to the allocator would be used again
        made = Bench(job)
        found = compared(job, {"combined": made.ours, "torch's": made.torchs}, rounds)
        rows = [] if job.rank else [memory_row(name, found, *MEMORY[name]) for name in kept]
    return rows + (bench_time(job, rounds, timed) if timed else [])


def bench_time(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    made = Bench(job)
    runs, alone = {"combined": made.ours(), "floor": silent(Bench(job).ours())}, "one process, all cores"
    for name in wanted:
        peer = ROWS[name][0]
        runs[peer] = made.one_process() if peer == alone else made.torchs()
    times = alternate(job, runs, rounds, {alone})
    shares = job.gather(made.losses)
    if job.rank:
        return []
    losses = {name: [sum(each) for each in zip(*(s[name] for s in shares), strict=True)] for name in made.losses}
    for name, found in losses.items():
        apart = max(abs(a / b - 1) for a, b in zip(found, losses["combined"], strict=True))
        assert apart < 1e-3, f"{name} and ours have other losses: {found} for {losses['combined']}"
    tokens = LAYOUT.batch * CONFIG.sequence
    return [
        row(times, name, "combined", ROWS[name][0], "floor", ROWS[name][3], tokens=tokens if ROWS[name][2] else None)
        for name in wanted
    ]


TOPIC = Topic(8, (*ROWS, *MEMORY), bench, rounds=9)
