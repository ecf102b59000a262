"""Lecture 02: one rank of a thousand, on a laptop (Megatron-LM 代码概览).

    python cluster/dry_run.py
    python cluster/dry_run.py --tp 8 --sp --pp 16 --zero 1 --schedule interleaved --chunks 6 --batch 1536

read: dry_run.py:68-147; then run/worker.py

A rank knows of the others only what it sends them and what they send back. So one process can be rank k of any job: the
same code trains (`run/worker.py`), on tensors that have a shape, a type and a storage with a size, but no numbers
(torch's fake tensors), in a group of ranks that take what is sent and answer at once (torch's fake process group).
Nothing is allocated or computed, and still every message enters the ledger, and every tensor that autograd keeps is
counted. What comes out is compared with the planner's formulas (`planner/memory.py`, `planner/traffic.py`), which know
nothing of that code.

What depends on numbers has no dry run: clipping, whose messages are some numbers a parameter, and where tokens go.
Of a mixture of experts the tokens choose evenly, as in the planner's formulas; what does not hang on their choice is
that of any run. The router has no losses here, and drops nothing.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster import rules
from cluster.evidence.dry_run import BUILT, RULES, bucket_padding, draw, held, most_gradients, shown
from cluster.evidence.even import ROUTED, route_evenly, unevenness
from cluster.planner.counting import model_parameters
from cluster.planner.layout import Layout, given, layout_from
from cluster.planner.memory import rank_memory
from cluster.planner.options import add_case_flags, model_of
from cluster.planner.traffic import sent_bytes, summed_over_tp
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker, planned_muon, sent_by_axis
from core.ledger import Ledger
from core.mesh import ORDER, Mesh, axis_groups, axis_sizes
from core.model.config import ModelConfig
from core.model.precision import POLICIES, Precision
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations
from core.proof.rules import check as check_rules
from expert_parallel.engine.routing import MoEConfig
from zero.engine.muon import Muon
from zero.engine.optimizer import MakeOptimizer
from zero.newton_schulz import MuonSettings

CPU = torch.device("cpu")
# Fused, because the plain one reads its count of steps as a number. The state is the same.
ADAMW = partial(torch.optim.AdamW, lr=1e-3, fused=True)
WORLD = 1024
NEAR = 0.01
LONGEST = 600.0  # seconds


class Account(NamedTuple):
    """Of one rank in one step."""

    held: dict[str, int]  # bytes of weights, gradients, optimizer, and of activations when they are most
    sent: dict[str, float]  # elements, by axis
    bytes: dict[str, float]  # the same in bytes
    muon: float = 0.0  # what of it Muon sends, by its shards and who owns which matrix


def one_step(
    model: ModelConfig, layout: Layout, mesh: Mesh, precision: Precision, make_optimizer: MakeOptimizer = ADAMW,
    muon: MuonSettings | None = None,
) -> Account:  # fmt: skip
    """One step, but for clipping, of a rank of the process group that there is, real or not."""
    moe = MoEConfig.of(model) if model.experts else None
    spec = TrainSpec(model, moe, layout, 0, precision, CPU, make_optimizer, muon=muon)
    worker = Worker(spec, mesh)
    route_evenly(worker)
    saved = SavedActivations(worker.model.parameters())
    tokens = torch.zeros(layout.batch, model.sequence, dtype=torch.int64)
    worker.zero_grad()
    most = most_gradients(worker) if layout.reduce == "step" else {"gradients": 0}
    worker.forward_backward(0, tokens, tokens, saved)
    count = held(worker)
    count["gradients"] = max(count["gradients"], most["gradients"])
    if layout.zero == 3:
        count["gathered"] = sum(engine.sharding.weights.most for engine in worker.engines)
    worker.step()
    count["optimizer"] = held(worker)["optimizer"]  # Adam makes its moments in the first step
    worker.close()
    sent = sent_by_axis(mesh["tp"].ledger)
    return Account(
        count | {"activations": saved.peak},
        {axis: traffic.elements for axis, traffic in sent.items()},
        {axis: traffic.bytes for axis, traffic in sent.items()},
        planned_muon(worker),
    )


@contextmanager
def pretended(rank: int, world: int) -> Iterator[None]:
    """Be this rank of a job whose other ranks do not exist."""
    assert not dist.is_initialized(), "a process is in one job"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported")  # here nobody waits
            yield
    finally:
        dist.destroy_process_group()


def account(
    model: ModelConfig, layout: Layout, rank: int, precision: Precision, muon: MuonSettings | None = None
) -> Account:
    """`dry_run` in a process that is in no job."""
    with pretended(rank, layout.ranks):
        mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
        with FakeTensorMode():
            make = partial(Muon, lr=1e-3, fused=True) if muon else ADAMW
            return one_step(model, layout, mesh, precision, make, muon)


def dry_run(
    model: ModelConfig, layout: Layout, rank: int, precision: Precision, muon: MuonSettings | None = None
) -> Account:
    """What rank `rank` of this layout holds, and sends in a step, without the other ranks, memory or computing.

    In a process of its own: this one may be in a job.

    Raises:
        ValueError: there is no such rank.
    """
    refuse(layout, rank)
    case = json.dumps([asdict(model), asdict(layout), rank, precision.name, muon])
    command = [sys.executable, "-c", "import sys; from cluster import dry_run; dry_run.alone(sys.argv[1])", case]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    if outcome.returncode:
        raise RuntimeError(f"the dry run failed:\n{outcome.stderr}")
    return Account(*json.loads(outcome.stdout))


def alone(case: str) -> None:
    """The other end of `dry_run`."""
    model, layout, rank, precision, muon = json.loads(case)
    settings = MuonSettings(*muon) if muon else None
    print(json.dumps(account(ModelConfig(**model), Layout(**layout), rank, POLICIES[precision], settings)))


def refuse(layout: Layout, rank: int) -> None:
    """Raises ValueError where there is no such rank."""
    check_rules(SimpleNamespace(rank=rank, last=layout.ranks - 1), RULES)


def compared(
    found: Account, model: ModelConfig, layout: Layout, pp_rank: int, itemsize: int, muon: bool = False
) -> list[tuple[str, str, float, float]]:
    """(what, of which kind, by the planner, by this run), in bytes, of a rank with this index in the pipeline."""
    sent, kept = sent_bytes(model, layout, pp_rank, itemsize), rank_memory(model, layout, pp_rank, itemsize, muon)
    sent |= {"muon": max(4, itemsize) * found.muon} if muon else {}
    moved = [("sent in a step", axis, sent.get(axis, 0.0), found.bytes.get(axis, 0.0)) for axis in sent | found.bytes]
    return moved + [("held", kind, getattr(kept, kind), measured) for kind, measured in found.held.items()]


# ---- The lesson ------------------------------------------------------------------------------------------------------


def case(args: argparse.Namespace) -> tuple[ModelConfig, Layout]:
    """What the flags ask for."""
    model = model_of(args)
    if not given(args) and args.world == WORLD and args.batch is None:
        return model, shown(model)
    return model, layout_from(args, args.world, args.batch, model.experts > 0, microbatch=1)


def check_built(model: ModelConfig) -> None:
    """Raises ValueError unless the model is of the kind of `core.model.gpt`."""
    check_rules(SimpleNamespace(name=model.name, missing=model.unbuilt()), [BUILT])


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the flags do not fit each other."""
    model, layout = case(args)
    check_built(model)
    rules.check(layout, model, world=args.world, batch=args.batch)
    refuse(layout, args.rank)  # of a layout that is one


def index_on_axes(layout: Layout, rank: int) -> dict[str, int]:
    """The rank's index on each axis."""
    sizes = axis_sizes(layout.ranks, tp=layout.tp, cp=layout.cp, dp=layout.dp, pp=layout.pp)
    groups = {name: next(g for g in axis_groups(sizes, name, ORDER) if rank in g) for name in ("tp", "cp", "dp", "pp")}
    return {name: group.index(rank) for name, group in groups.items()}


def lesson(run: Run) -> None:
    model, layout = case(run.args)
    show(run, model, layout, run.args.rank)


def show(run: Run, model: ModelConfig, layout: Layout, rank: int, muon: MuonSettings | None = None) -> None:
    """The dry run of a rank beside the planner's figures, which are claimed."""
    index, itemsize = index_on_axes(layout, rank), run.dtype.itemsize
    run.mesh = {name: getattr(layout, name) for name in index}
    where = ", ".join(f"{name} {i} of {run.mesh[name]}" for name, i in index.items())
    run.say(f"{model.name}, {model_parameters(model):,} parameters, on {layout.ranks} ranks: {layout}")
    run.say(f"rank {rank}: {where}; stages {' '.join(map(str, layout.stages_of(index['pp'])))} of {layout.stages}\n")
    if run.job.rank:
        return
    found, rows = dry_run(model, layout, rank, run.precision, muon), []
    padding = bucket_padding(model, layout, index["pp"], itemsize, muon is not None)
    # Of the gradients that sp sums a shard of ZeRO may have any number.
    uneven = {"tp": max(4, itemsize) * summed_over_tp(model, layout, index["pp"])} if layout.zero else {}
    apart_of_rows = unevenness(model, layout)
    for what, kind, expected, measured in compared(found, model, layout, index["pp"], itemsize, muon is not None):
        elements = f"{found.sent.get(kind, 0.0):,.0f}" if what != "held" else ""
        apart = f"{measured / expected - 1:+.3%}" if expected else "not planned"
        rows.append((what, kind, elements, measured / 1e9, expected / 1e9, apart))
        formula = f"{expected:,.0f} by the planner, within {NEAR:.0%}"
        more = apart_of_rows if kind in ("ep", "etp", "activations") else 0.0
        near = (NEAR + more) * expected + (padding if what == "held" else uneven).get(kind, 0)
        run.evidence.claim(f"bytes {what}: {kind}", formula, expected, measured, near)
    if model.experts:
        run.say(f"{ROUTED}\n")
    draw(run, rows, rank)
    header = ("", "", "elements", "GB, this run", "GB, planner", "difference")
    run.say(tabulate(rows, header, floatfmt=",.4f"))


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "02",
        "Megatron-LM code overview: a dry run at scale",
        "Megatron-LM 代码概览",
        "One rank of a layout of a thousand, by the code that trains, without the others: what it sends and holds.",
    )
    add_case_flags(frame.parser)
    frame.parser.set_defaults(dtype="bfloat16", world=WORLD)
    frame.parser.add_argument("--rank", type=int, default=0, help="which of them (default %(default)s)")
    sys.exit(frame.main(check, lesson))
