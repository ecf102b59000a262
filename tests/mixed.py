"""Bugs that every topic can have, and lessons run with them in bfloat16: a rounding must not hide one.

The names of modules are text: a bug travels to the workers of the pool.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from itertools import count
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT, materialize, token_loss
from core.model.precision import POLICIES, Precision
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from tests.pool import Pool

Bug = Callable[[], AbstractContextManager]
LOSS, GRADIENT, NORM = "losses equal one process", "every gradient equals one process", "the global gradient norm"
PARAMETER = "every parameter after every step"
VERSIONS = ("(plain)", "(engine)")


# ---- The bugs


def doubled(training: str, name: str) -> AbstractContextManager:
    """A factor of two in the gradient of one parameter, on all ranks that have it."""

    def wrong(model: GPT, *arguments: Any) -> GPT:
        model = materialize(model, *arguments)
        parameters = dict(model.named_parameters())
        if name in parameters:
            parameters[name].register_hook(lambda gradient: 2 * gradient)
        return model

    return patch(f"{training}.materialize", wrong)


def added_up_in_bfloat16(training: str) -> AbstractContextManager:
    def wrong(model: GPT, seed: int, device: torch.device, precision: Precision) -> GPT:
        return materialize(model, seed, device, precision._replace(gradients=torch.bfloat16))

    return patch(f"{training}.materialize", wrong)


@contextmanager
def a_microbatch_is_lost(microbatches: int, *modules: str) -> Iterator[None]:
    """Of each step's micro-batches one gives no gradients; its loss is as it should be."""
    with ExitStack() as stack:
        for module in modules:
            calls = count()

            def wrong(*arguments: Any, calls: Any = calls, **more: Any) -> Tensor:
                loss = token_loss(*arguments, **more)
                return loss if next(calls) % microbatches else 0 * loss + loss.detach()

            stack.enter_context(patch(f"{module}.token_loss", wrong))
        yield


def a_rank_is_lost(*axes: str) -> AbstractContextManager:
    """Its part is not in what is summed over these axes."""
    reduce, scatter = comm.all_reduce_async, comm.reduce_scatter_async

    def lost(axis: Axis) -> bool:
        return axis.name in axes and axis.index == 1

    def wrong_reduce(x: Tensor, axis: Axis, *more: Any, **how: Any) -> comm.Pending:
        return reduce(x.detach().zero_() if lost(axis) else x, axis, *more)  # in place, as it is reduced

    def wrong_scatter(x: Tensor, axis: Axis, *more: Any) -> comm.Pending:
        return scatter(x * 0 if lost(axis) else x, axis, *more)

    return patch.multiple(comm, all_reduce_async=wrong_reduce, reduce_scatter_async=wrong_scatter)


def master_weights_in_bfloat16() -> AbstractContextManager:
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW) -> None:
        right(self)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype == torch.float32:  # the one process has float64
                p.data.copy_(p.data.bfloat16())

    return patch.object(torch.optim.AdamW, "step", wrong)


# ---- The lessons with a bug in them


class Caught(NamedTuple):
    """A bug, the claim that it must break, and of which versions."""

    bug: Bug
    claim: str = GRADIENT
    versions: tuple[str, ...] = VERSIONS


def small_parameters(training: str, *names: str) -> dict[str, Caught]:
    return {f"{name} doubled": Caught(partial(doubled, training, name)) for name in names}


def failing_claims(
    lesson: str, add_flags: Callable[[Lesson], None], flags: Sequence[str], bugs: Sequence[Bug]
) -> list[list[str]]:
    """Of each bug the claims that fail on rank 0; inside a worker."""
    frame = Lesson(f"{lesson.replace('.', '/')}.py", "", "", "", "")
    add_flags(frame)
    args = frame.parser.parse_args([*flags, "--dtype=bfloat16"])
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0)
    found = []
    for bug in bugs:
        run = Run(args, job, POLICIES[args.dtype])
        with bug(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            import_module(lesson).lesson(run)
        found.append([claim.claim for claim in run.evidence.claims if not claim.holds])
    return found


def claims_catch(
    pool: Pool, lesson: str, add_flags: Callable[[Lesson], None], flags: Sequence[str], cases: Mapping[str, Caught]
) -> None:
    """With two ranks: without a bug every claim holds, with one those fail that should."""
    bugs = [nullcontext, *(case.bug for case in cases.values())]
    none, *found = pool.run(2, failing_claims, lesson, add_flags, flags, bugs, timeout=110)[0]
    assert none == []
    for (name, case), failed in zip(cases.items(), found, strict=True):
        for version in case.versions:
            seen = any(claim.startswith(case.claim) and claim.endswith(version) for claim in failed)
            assert seen, f"{lesson} {version}, {name}: only these failed: {failed}"
