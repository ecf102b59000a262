"""What the tests of checkpoints have in common: a worker of any layout, some steps, and all that it holds."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cluster.planner.layout import Layout
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPTConfig
from core.model.precision import POLICIES, Precision
from core.model.text import Text
from core.proof.launch import Job
from core.shards import LocalTensor
from expert_parallel.engine.routing import MoEConfig
from tests.cluster.test_worker import CLIP, CONFIG, CPU, SEED, optimizer_of

ELSEWHERE = SEED + 1  # the seed of a worker that is to load: what it does not load must show
FLOAT64 = POLICIES["float64"]


def job_here() -> Job:
    return Job(dist.get_rank(), dist.get_world_size(), CPU, "gloo", 30.0)


def worker_of(
    layout: Layout,
    moe: MoEConfig | None,
    seed: int = SEED,
    precision: Precision = FLOAT64,
    config: GPTConfig = CONFIG,
    bucket: int = 3000,
    mesh: Mesh | None = None,
) -> Worker:
    mesh = mesh or make_mesh(layout, "cpu", Ledger(), 30.0)
    return Worker(TrainSpec(config, moe, layout, seed, precision, CPU, optimizer_of, bucket), mesh)


def train(worker: Worker, steps: Sequence[int]) -> list[float]:
    losses = []
    for step in steps:
        worker.zero_grad()
        share = worker.forward_backward(step, *Text(None, 16).batch(SEED, step, 16))
        _, loss = worker.clip(CLIP, share)
        worker.step()
        losses.append(loss)
    return losses


def held(worker: Worker) -> list[LocalTensor]:
    """Copies of all that a checkpoint must bring back, in the order of the names."""
    pieces = worker.master_weights() + worker.states() + worker.weights()
    return sorted((each._replace(value=each.value.clone()) for each in pieces), key=lambda each: str(each.name))


def differing(before: list[LocalTensor], after: list[LocalTensor]) -> list[str]:
    """The names of what is not equal to the last bit."""
    pairs = zip(before, after, strict=True)
    return [
        str(a.name) for a, b in pairs if (a.name, a.shard) != (b.name, b.shard) or not torch.equal(a.value, b.value)
    ]
