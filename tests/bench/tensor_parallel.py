"""Tensor and sequence parallelism against torch.distributed.tensor.parallel.

The same GPT, data and loss over a cut vocabulary, forward and backward without an optimizer. The floor is the same
products of a rank with messages that are not sent: the axis has its size, and what would arrive is what is there.
"""

from collections.abc import Collection

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
from core.proof.launch import Job
from tests.bench.harness import Row, Step, Topic, alternate, row, silent

DTYPE = torch.float32
CONFIG = GPTConfig(layers=8, hidden=256, heads=4, sequence=64, tied=False)
BATCH = 16
# Of each row: whether it is sequence parallelism too, and the bar.
ROWS = {"TP / parallelize_module": (False, 0.70), "TP + SP / parallelize_module": (True, 0.50)}


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
        gathered = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
        plan |= {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(**gathered),
            "mlp_norm": SequenceParallel(),
            "mlp": PrepareModuleInput(**gathered),
        }
        ends["norm"] = SequenceParallel()
    for block in model.blocks.values():
        parallelize_module(block, mesh, plan)
    return parallelize_module(model, mesh, ends)


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    config = CONFIG
    axis = Mesh(job.device.type, Ledger(), job.timeout, tp=job.world_size)["tp"]
    mesh = DeviceMesh(job.device.type, list(axis.ranks), mesh_dim_names=("tp",))
    inputs, targets = (t.to(job.device) for t in Text(None, config.sequence).batch(0, 0, BATCH))

    def ours(topic: object, loss: object) -> tuple[GPT, Step]:
        model = materialize(topic.parallelize(GPT(config), axis), 0, job.device, DTYPE)
        same_heads, _ = axis.split(config.kv_copies(axis.size))

        def step() -> None:
            loss.token_loss(model(inputs), targets, targets.numel(), axis, config.vocabulary).backward()
            if topic is sequence_parallel.engine.layers:
                topic.sum_replicated_gradients(model, axis, same_heads)

        return model, step

    def theirs(sequence: bool) -> tuple[GPT, Step]:
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

    steps: dict[str, tuple[GPT, Step]] = {}
    for sequence in {ROWS[name][0] for name in wanted}:
        topic = sequence_parallel.engine if sequence else megatron_tp.engine
        steps[f"ours {sequence}"] = ours(topic.layers, topic.loss)
        steps[f"parallelize_module {sequence}"] = theirs(sequence)
        floor = ours(topic.layers, topic.loss)
        steps[f"floor {sequence}"] = floor[0], silent(floor[1])

    def cleared(model: GPT, step: Step) -> Step:
        def run() -> None:
            model.zero_grad()
            step()

        return run

    times = alternate(job, {name: cleared(*each) for name, each in steps.items()}, rounds)
    kinds = [ROWS[name][0] for name in wanted]
    equal = job.gather([different(steps[f"ours {k}"][0], steps[f"parallelize_module {k}"][0]) for k in kinds])
    assert not any(map(any, equal)), f"the two sides do not compute the same gradients: {equal}"
    return [
        row(times, name, f"ours {k}", f"parallelize_module {k}", f"floor {k}", bar=ROWS[name][1])
        for name, k in zip(wanted, kinds, strict=True)
    ]


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


TOPIC = Topic(4, tuple(ROWS), bench)
