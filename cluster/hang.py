"""Lecture 03: why a job hangs, and which rank did not join (大模型并行与 GPU 集群配置). What users of clusters ask.

    torchrun --nproc_per_node=8 cluster/hang.py --fault skip

A collective ends when every rank of its axis has joined. A rank that takes another road says nothing; the others wait
for it, until the timeout ends them all with the same message, which names the collective, and neither rank nor reason.
So each rank keeps a flight record: every collective and message has a number on its axis, and the last ones, with
where in the step the rank is, travel with its heartbeat. When a wait passes the timeout the records are laid beside one
another. Here a rank of a data-parallel training takes another road, in eight ways, and is to be named:

    skip     it skips a collective             dead     it is killed
    order    two in another order              slow     it computes for longer than the others wait
    gather   a gather that only rank 0 calls   send     it sends what nobody receives
    shape    a tensor of another shape         data     its data loader runs out before the others'

The ranks that hang are processes beside those of torchrun, which start them, and live on to tell what they have said.

read: hang.py:45-117; core/proof/diagnosis.py:211-249; then core/proof/flight.py, core/proof/watch.py
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.evidence import hang as evidence
from core import comm, p2p
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.flight import FLIGHT, Group
from core.proof.launch import Job, collective, launch
from core.proof.lesson import Lesson, Run

# ---- A training in which one rank takes another road -----------------------------------------------------------------

STEPS, MICROBATCHES, LAYERS, HIDDEN, SAMPLES = 4, 2, 3, 8, 5
STEP = 2  # in which it does


def batches(rank: int, steps: int) -> Iterator[Tensor]:
    """(micro-batches, samples, hidden) of each step: this rank's share of the data."""
    numbers = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        yield torch.randn(MICROBATCHES, SAMPLES, HIDDEN, generator=numbers)


def forward(weights: list[Tensor], x: Tensor, pause: float) -> Tensor:
    for layer, weight in enumerate(weights):
        FLIGHT.in_layer(str(layer))
        time.sleep(pause)
        x = torch.relu(x @ weight)
    return x.square().mean()


def train(job: Job, fault: str, rank: int) -> None:
    """Data parallelism: gradients are summed, then every rank learns all losses. In one step `rank` makes a `fault`.

    Raises:
        PeerError: a wait for the other ranks took longer than the timeout: the others' road is not this rank's.
        MismatchError: this rank was about to join with a tensor that the others do not have.
    """
    axis = Mesh("cpu", Ledger(), job.timeout, dp=job.world_size)["dp"]
    limit = timedelta(seconds=job.timeout)
    reports = Group.of_all("reports", dist.new_group(timeout=limit))  # apart from training: it sends other things
    weights = [torch.eye(HIDDEN, requires_grad=True) for _ in range(LAYERS)]
    ends_early = fault == "data" and job.rank == rank

    for step, batch in enumerate(batches(job.rank, STEP if ends_early else STEPS)):
        wrong = fault if step == STEP and job.rank == rank else ""

        loss = torch.zeros(())
        for m, x in enumerate(batch):
            FLIGHT.at("forward", m, step=step)
            share = forward(weights, x, pause=job.timeout / 3 if wrong == "slow" else 0.0)
            FLIGHT.at("backward", m)
            share.backward()
            loss += share.detach()
        if wrong == "dead":
            time.sleep(job.timeout / 3)  # by then the others wait for it
            os.kill(os.getpid(), signal.SIGKILL)
        if wrong == "send":
            p2p.send(loss, axis, (axis.index + 1) % axis.size)

        FLIGHT.at("gradients")
        if wrong == "order":
            comm.all_gather(loss[None], axis)
        if wrong != "skip":
            sum_gradients(weights, axis, short=wrong == "shape")
        if wrong != "order":
            comm.all_gather(loss[None], axis)
        if fault == "gather" and step == STEP and job.rank == 0:
            with collective("gather", "gathering losses", *reports[::2][::-1]):
                everyone = [None] * job.world_size
                dist.gather_object(loss.item(), everyone, group=reports.group)

        FLIGHT.at("optimizer")
        with torch.no_grad():
            for weight in weights:
                weight -= 0.01 * weight.grad
                weight.grad = None


def sum_gradients(weights: list[Tensor], axis: Axis, short: bool) -> None:
    """One all-reduce of all of them, as one flat tensor; `short` is a bug, which forgets the last layer."""
    taking_part = weights[:-1] if short else weights
    flat = torch.cat([weight.grad.flatten() for weight in taking_part])  # (layers x hidden x hidden,)
    comm.all_reduce(flat, axis)
    for weight, summed in zip(taking_part, flat.split(HIDDEN * HIDDEN), strict=True):
        weight.grad = summed.view_as(weight)


def hang(fault: str, rank: int, wait: float) -> None:
    """Be one of the ranks that hang. With `shape`, ranks compare their tensors before they join: else gloo aborts."""
    with launch(torch.device("cpu"), wait, check_messages=fault == "shape", meeting=evidence.MEETING) as job:
        train(job, fault, rank)


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run, nursery: evidence.Nursery) -> None:
    args, ranks = run.args, run.job.world_size
    rank = ranks - 1 if args.rank is None else args.rank
    faults = evidence.FAULTS if args.fault == "all" else {args.fault: evidence.FAULTS[args.fault]}
    found = {}
    for fault in ("none", *faults):
        guilty = 0 if fault == "gather" else rank
        if run.job.rank == 0:
            found[fault] = nursery.run(ranks, fault, guilty, args.wait)
            evidence.show(run, fault, guilty, found[fault])
        run.job.share(None)  # the others wait for one fault at a time
    if run.job.rank == 0:
        evidence.claim(run, ranks, rank, found)
        run.draw(evidence.figure(ranks, found))


def add_flags(frame: Lesson) -> None:
    flag = frame.parser.add_argument
    flag("--fault", choices=("all", *evidence.FAULTS), default="all", help="what the rank does (default %(default)s)")
    flag("--rank", type=int, help="the rank that does it, but for gather (default: the last)")
    flag("--wait", type=float, default=1.5, help="the timeout of the ranks that hang, in seconds (default %(default)s)")


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError unless that rank exists, and the wait is short."""
    if args.rank is not None and not 0 <= args.rank < ranks:
        raise ValueError(f"--rank {args.rank}: must be one of the {ranks} ranks; use --rank {ranks - 1}")
    if not 1 <= args.wait <= args.timeout / 2:
        raise ValueError(
            f"--wait {args.wait}: must be in [1, half of --timeout, {args.timeout / 2:g}], for that is what the ranks "
            "that watch have; use --wait 1.5"
        )


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "03",
        "Parallelism and GPU cluster configuration: why a job hangs",
        "大模型并行与 GPU 集群配置",
        "A rank takes another road, in eight ways; from the ranks' flight records it is named, and what it did.",
        smallest=2,
    )
    add_flags(frame)
    sys.exit(frame.main(check, partial(lesson, nursery=evidence.Nursery(hang))))
