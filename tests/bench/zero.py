"""Data parallelism and ZeRO: a whole step with its update, against torch's own and DeepSpeed's.

The same GPT, data and AdamW, and a whole step. DeepSpeed's engine has no update without a sum over micro-batches, no
clipping here, and torch's AdamW as ours. The floor has the same products and the update of 1/N, and no messages.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
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
from core.proof.launch import Job
from tests.bench.harness import Row, Step, Topic, alternate, row
from zero.engine.engine import Engine, data_parallel, zero1, zero2, zero3

CONFIG = GPTConfig(layers=8, hidden=256, heads=4, sequence=64)
BATCH = 16
DTYPE = torch.float32
LR = 1e-4
optimizer_of = partial(torch.optim.AdamW, lr=LR)

OURS = {"DDP": data_parallel, "ZeRO-1": zero1, "ZeRO-2": zero2, "ZeRO-3": zero3}
# Of each row: ours, the peer, the bar, and the bar of floor / ours.
ROWS: dict[str, tuple[str, str, float | None, float | None]] = {
    "DDP / torch": ("DDP", "torch DDP", 1.0, None),
    "ZeRO-1 / torch": ("ZeRO-1", "DDP + ZeroRedundancyOptimizer", 0.9, None),
    "ZeRO-2 / torch": ("ZeRO-2", "fully_shard, weights kept", 0.9, None),
    "ZeRO-3 / torch": ("ZeRO-3", "fully_shard", 0.9, None),
    "ZeRO-1 / DeepSpeed": ("ZeRO-1", "DeepSpeed 1", 0.70, 0.90),
    "ZeRO-2 / DeepSpeed": ("ZeRO-2", "DeepSpeed 2", 0.68, 0.86),
    "ZeRO-3 / DeepSpeed": ("ZeRO-3", "DeepSpeed 3", 0.50, 0.75),
}
Trained = dict[str, Tensor]
Weights = Callable[[], Trained]


class Bench:
    """The steps, each with a model of its own, and what they have made of the weights."""

    def __init__(self, job: Job):
        self.job = job
        self.axis = Mesh(job.device.type, Ledger(), job.timeout, dp=job.world_size)["dp"]
        whole = [t.to(job.device) for t in Text(None, CONFIG.sequence).batch(0, 0, BATCH)]
        self.inputs, self.targets = (t.chunk(self.axis.size)[self.axis.index] for t in whole)
        self.tokens = whole[1].numel()

    def model(self) -> GPT:
        return materialize(GPT(CONFIG), 0, self.job.device, DTYPE)

    def loss(self, model: nn.Module) -> Tensor:
        return token_loss(model(self.inputs), self.targets, self.tokens)

    def ours(self, kind: Callable[..., Engine]) -> tuple[Weights, Step]:
        model = self.model()
        stage = kind(model, self.axis, optimizer_of, None, DTYPE)

        def step() -> None:
            stage.zero_grad()
            stage.backward(self.loss(model))
            stage.step()

        def weights() -> Trained:
            pieces = [piece._replace(value=piece.value.cpu().clone()) for piece in stage.weights()]
            return dict(full_tensors(piece for rank in self.job.gather(pieces) for piece in rank))

        return weights, step

    def torchs(self, kind: str) -> tuple[Weights, Step]:
        model: nn.Module = self.model()
        if "DDP" in kind:
            run = DistributedDataParallel(model, process_group=self.axis.group, gradient_as_bucket_view=True)
        else:
            mesh = DeviceMesh(self.job.device.type, list(self.axis.ranks), mesh_dim_names=("dp",))
            again = kind == "fully_shard"
            for block in model.blocks.values():
                fully_shard(block, mesh=mesh, reshard_after_forward=again)
            run = fully_shard(model, mesh=mesh, reshard_after_forward=again)
        if "Redundancy" in kind:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, self.axis.group, lr=LR)
        else:
            optimizer = optimizer_of(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            (self.loss(run) * self.axis.size).backward()  # torch averages over the ranks where we sum
            optimizer.step()

        def weights() -> Trained:
            named = model.named_parameters()
            return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in named}

        return weights, step

    def deepspeeds(self, stage: int) -> tuple[Weights, Step]:
        os.environ.setdefault("LOCAL_RANK", str(self.job.rank))
        deepspeed = importlib.import_module("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        model = self.model()
        whole = BATCH // self.axis.size
        settings = {
            "train_micro_batch_size_per_gpu": whole,
            "train_batch_size": BATCH,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,  # usually 1
            "zero_allow_untested_optimizer": True,
        }
        optimizer = optimizer_of(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)

        def step() -> None:
            engine.backward(self.loss(engine) * self.axis.size)  # it averages too
            engine.step()

        def weights() -> Trained:
            with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                return {n: p.detach().clone() for n, p in model.named_parameters()}

        return weights, step

    def floor(self) -> Step:
        """The products of a rank, and the update of 1/N of the parameters: flat, by torch's fused AdamW."""
        model = self.model()
        count = sum(p.numel() for p in model.parameters())
        shard = nn.Parameter(torch.zeros(-(-count // self.axis.size), device=self.job.device))
        shard.grad = torch.zeros_like(shard)
        optimizer = torch.optim.AdamW([shard], lr=LR, fused=True)

        def step() -> None:
            model.zero_grad()
            self.loss(model).backward()
            optimizer.step()

        return step


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    made = Bench(job)
    runs: dict[str, Step] = {}
    trained: dict[str, Weights] = {}
    for name in wanted:
        ours, peer, *_ = ROWS[name]
        if ours not in runs:
            trained[ours], runs[ours] = made.ours(OURS[ours])
        if not peer.startswith("DeepSpeed"):
            trained[peer], runs[peer] = made.torchs(peer)
        elif importlib.util.find_spec("deepspeed"):
            trained[peer], runs[peer] = made.deepspeeds(int(peer[-1]))
    runs["floor"] = made.floor()
    times = alternate(job, runs, rounds)
    weights = {name: each() for name, each in trained.items()}
    if job.rank:
        return []
    for ours, peer, *_ in (ROWS[name] for name in wanted):
        for parameter, value in weights[ours].items() if peer in weights else ():
            apart = (value - weights[peer][parameter].cpu()).norm() / value.norm()
            assert apart < 1e-3, f"{ours} and {peer} have trained {parameter} differently: {apart}"
    return [row(times, name, *ROWS[name][:2], "floor", *ROWS[name][2:]) for name in wanted]


TOPIC = Topic(4, tuple(ROWS), bench, rounds=11)
