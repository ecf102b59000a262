"""Lessons of lecture 06 with known bugs in them, inside the workers of the pool; and which claims fail."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist

import core.proof.arguments
from core.model.precision import POLICIES
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from sequence_parallel import activations, all_gather, hybrid, long_context, megatron_sp, ring_attention, ulysses
from tests.pool import Pool

Bug = Callable[[], AbstractContextManager]
LESSONS = {
    "megatron_sp": megatron_sp,
    "activations": activations,
    "ulysses": ulysses,
    "ring_attention": ring_attention,
    "all_gather": all_gather,
    "hybrid": hybrid,
    "long_context": long_context,
}


def run_lesson(lesson: str, flags: Sequence[str], bug: Bug | None = None) -> Run:
    """Run a lesson inside a worker, with a bug."""
    frame = Lesson(f"sequence_parallel/{lesson}.py", "06", "", "", "")
    core.proof.arguments.add_model_flags(frame)
    frame.parser.add_argument("--placement", default="zigzag")
    frame.parser.add_argument("--ulysses", type=int, default=0)
    frame.parser.add_argument("--recompute", default="full")
    args = frame.parser.parse_args(flags)
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    run = Run(args, job, POLICIES[args.dtype])
    with bug() if bug else nullcontext(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        LESSONS[lesson].lesson(run)
    return run


def failing_claims(lesson: str, flags: Sequence[str], bugs: Sequence[Bug | None]) -> list[list[str]]:
    """The claims that failed with each of the bugs, on rank 0."""
    found = []
    for bug in bugs:
        try:
            run = run_lesson(lesson, flags, bug)
        except Stop as stop:
            found.append([f"stopped: {stop}"])
            continue
        found.append([claim.claim for claim in run.evidence.claims if not claim.holds])
    return found


def claims_catch(pool: Pool, ranks: int, lesson: str, flags: Sequence[str], bugs: Mapping[Bug, set[str]]) -> None:
    """Without a bug every claim holds; with one those fail that should."""
    none, *found = pool.run(ranks, failing_claims, lesson, flags, [None, *bugs], timeout=110)[0]
    assert none == []
    for (bug, must_fail), failed in zip(bugs.items(), found, strict=True):
        missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
        assert not missed, f"{bug.__name__}: {missed} held, only these failed: {failed}"


def equal(version: str) -> tuple[str, str, str, str, str]:
    """What is claimed of a version that trains: losses, gradients, their norm, parameters, and replicas."""
    return (
        f"losses equal one process, all steps ({version})",
        f"every gradient equals one process, all steps ({version})",
        f"the global gradient norm ({version})",
        f"every parameter after every step ({version})",
        f"replicated parameters stay equal on all ranks ({version})",
    )
