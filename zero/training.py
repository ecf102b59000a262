"""What the lessons of lecture 01 share: train a data-parallel GPT beside one process, and measure what a rank sends.

Ψ parameters, N ranks, m microbatches a step
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.oracle import Oracle
from core.proof.plot import bars
from core.proof.training import train
from zero.stage import Stage


def add_flags(lesson: Lesson) -> None:
    add_model_flags(lesson, layers=4)
    lesson.parser.set_defaults(steps=10)
    flag = lesson.parser.add_argument
    flag("--microbatches", type=int, default=2, help="microbatches of a rank in a step (default %(default)s)")
    flag("--bucket", type=int, default=2**16, help="elements in a bucket, about (default %(default)s)")


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the batch cannot be dealt out equally, or another flag does not fit."""
    check_model(args)
    for name, usual in (("microbatches", 2), ("bucket", 2**16)):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1; use --{name} {usual}")
    parts = ranks * args.microbatches
    if args.batch % parts:
        raise ValueError(
            f"--batch {args.batch}: must be a multiple of {ranks} ranks x --microbatches {args.microbatches}, so that "
            f"all parts are equal; use --batch {max(1, round(args.batch / parts)) * parts}"
        )


ForwardBackward = Callable[[int, Tensor, Tensor], Tensor]


def build(run: Run, stage_of: Callable[..., Stage]) -> tuple[Stage, Oracle | None, ForwardBackward]:
    """A model under a stage of ZeRO on all ranks, one process to compare with, and how to compute its gradients."""
    args, job = run.args, run.job
    config, m = configuration(args), args.microbatches
    axis = Mesh(job.device.type, Ledger(), job.timeout, dp=job.world_size)["dp"]
    run.mesh = {"dp": axis.size}
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    model = materialize(GPT(config), args.seed, job.device, run.dtype)
    masks = use_masks(model, SampleMasks(args.seed))
    master = torch.float32 if run.dtype == torch.bfloat16 else run.dtype
    stage = stage_of(model, axis, optimizer_of, master=master, elements=args.bucket)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None
    tokens = args.batch * args.sequence
    samples = args.batch // (axis.size * m)  # of a microbatch

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        share = torch.zeros((), dtype=run.dtype, device=job.device)
        for microbatch in range(m):
            first = (axis.index * m + microbatch) * samples
            part = slice(first, first + samples)
            masks.seek(step, first)
            loss = token_loss(model(inputs[part]), targets[part], tokens)
            stage.backward(loss, last=microbatch == m - 1)
            share += loss.detach()
        return share

    stage.forward_backward, stage.clip = forward_backward, stage.clip_and_total
    return stage, oracle, forward_backward


def teach(run: Run, stage_of: Callable[..., Stage], elements: Callable[[int, int], float] | None) -> Stage:
    """Train with a stage of ZeRO, and claim that it equals one process, and what it sends.

    Args:
        elements: what the paper says that a rank sends in a step, in units of Ψ(N-1)/N, for (m, N); None: no claim.
    """
    stage, oracle, _ = build(run, stage_of)
    worst = train(run, {"": stage}, oracle)[""]
    if elements:
        claim_messages(run, stage, elements(run.args.microbatches, stage.axis.size))
    if oracle:
        worst.claim(run)
    return stage


def claim_messages(run: Run, stage: Stage, expected: float) -> None:
    """What a rank sends in a step, but for the norm."""
    axis, steps = stage.axis, run.args.steps
    padded = sum(bucket.padded for bucket in stage.buckets)
    size = sum(bucket.size for bucket in stage.buckets)
    traffic = axis.ledger.traffic.items()
    sent = {operation: each.elements / steps for (operation, name), each in traffic if name == axis.name}
    everyone = run.job.gather(sum(sent.values()))
    if not everyone:
        return
    n = axis.size
    unit = padded * (n - 1) / n
    if run.args.plot:
        bars(run.args.plot, f"Sent by each of {n} ranks in a step", "elements", [*sent], {"measured": [*sent.values()]})
    cases = [(f"elements sent a step, rank {r}", expected * unit, each) for r, each in enumerate(everyone)]
    run.evidence.each(
        "elements a rank sends in a step",
        f"{expected:g}Ψ(N-1)/N = {expected * unit:,.0f}, Ψ = {size:,} + {padded - size} of padding",
        cases,
        1e-9 * unit,
    )
