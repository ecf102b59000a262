"""Lessons of lecture 01 run inside the pool's workers, without a process start."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from core.model.precision import POLICIES
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from zero import ddp, memory, muon, offload, zero1, zero2, zero3, zeropp
from zero.evidence import muon as muon_evidence
from zero.evidence import training

LESSONS = {"ddp": ddp, "zero1": zero1, "zero2": zero2, "zero3": zero3, "memory": memory, "offload": offload,
           "zeropp": zeropp, "muon": muon}  # fmt: skip
Bug = Callable[[], AbstractContextManager]


@dataclass
class Outcome:
    """What rank 0 has to report of one run."""

    claims: list[str]
    failed: list[str]
    mesh: dict[str, int]
    losses: list[float]
    reference_losses: list[float]


def play(name: str, flags: Sequence[str], bug: Bug | None = None) -> Outcome:
    frame = Lesson(f"zero/{name}.py", "01", "", "", "")
    (muon_evidence if name == "muon" else training).add_flags(frame)
    frame.parser.set_defaults(stage="ZeRO-2", ranks_per_node=0)
    args = frame.parser.parse_args(flags)
    training.check(args, dist.get_world_size())
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    run = Run(args, job, POLICIES[args.dtype])
    with bug() if bug else nullcontext():
        try:
            LESSONS[name].lesson(run)
        except Stop as stop:
            return Outcome([], [f"stopped: {stop}"], run.mesh, [], [])
    claims = run.evidence.claims
    failed = [claim.claim for claim in claims if not claim.holds]
    return Outcome([claim.claim for claim in claims], failed, run.mesh, run.losses, run.reference_losses)


def play_all(runs: Sequence[tuple[str, Sequence[str], Bug | None]]) -> list[Outcome]:
    """One after another, in one process group."""
    return [play(*run) for run in runs]
