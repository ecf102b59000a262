"""CODE 01: ZeRO's memory in practice (ZeRO 显存优化实践). Rajbhandari et al. 2019 (1910.02054), table 1.

    torchrun --nproc_per_node=8 zero/memory.py

The paper's table, calculated; and beside it the same quantities measured, on a model that runs here: the bytes of
weights, gradients and optimizer state on each rank after a backward. With three policies: the paper's mixed precision,
weights and gradients of 2 bytes, and for Adam weights, momentum and variance of 4 (2 + 2 + 12); Megatron-LM's, whose
gradients are added up in 4 bytes (2 + 4 + 12); and float32 (4 + 4 + 8), in which the course's practice runs.

read: memory.py:32-93; then engine/engine.py, evidence/memory.py

Ψ parameters, N ranks, K bytes of optimizer state a parameter
"""

import sys

from core.mesh import Axis
from core.model.gpt import GPT, materialize, token_loss
from core.model.precision import POLICIES, Precision
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations
from zero.ddp import DataParallel
from zero.engine.engine import data_parallel, zero1, zero2, zero3
from zero.evidence.memory import claim_memory, show_course, show_paper
from zero.evidence.training import add_flags, check, data_axis, optimizer_of, teach
from zero.zero1 import Zero1
from zero.zero2 import Zero2
from zero.zero3 import Zero3

PAPER, MEGATRON, FLOAT32 = (POLICIES[name] for name in ("bfloat16-grads", "bfloat16", "float32"))


def formula(kind: str, n: int, precision: Precision = PAPER) -> float:
    """Bytes of model states on each of N ranks, for each of the Ψ parameters."""
    weight, gradient = precision.parameters.itemsize, precision.gradients.itemsize
    k = precision.optimizer_bytes  # momentum and variance, and the master weight where there is one
    return {
        "DP": weight + gradient + k,
        "ZeRO-1": weight + gradient + k / n,
        "ZeRO-2": weight + (gradient + k) / n,
        "ZeRO-3": (weight + gradient + k) / n,
    }[kind]


# The plain version, the engine, and what a rank sends in a step of m micro-batches, in units of Ψ(N-1)/N.
KINDS = {
    "DP": (DataParallel, data_parallel, lambda m, n: 2),
    "ZeRO-1": (Zero1, zero1, lambda m, n: 2),
    "ZeRO-2": (Zero2, zero2, lambda m, n: m + 1),
    "ZeRO-3": (Zero3, zero3, lambda m, n: 3 * m),
}


def measure(run: Run, kind: str, axis: Axis, precision: Precision) -> dict[str, int]:
    """Two steps of training; bytes on this rank after the second backward, and the most there were.

    By kind, and the elements of padding.
    """
    args = run.args
    model = materialize(GPT(configuration(args)), args.seed, run.job.device, precision)
    make_engine = KINDS[kind][1]
    engine = make_engine(model, axis, optimizer_of(run), master=precision.master, elements=args.bucket)
    batch = Text(args.data, args.sequence).batch(args.seed, 0, args.batch)
    inputs, targets = (t.to(run.job.device).chunk(axis.size)[axis.index] for t in batch)
    most = {"weights": 0, "all": 0}

    def sample(*_: object) -> None:
        now = engine.memory_bytes()
        most["weights"] = max(most["weights"], now["weights"])
        most["all"] = max(most["all"], sum(now.values()))

    for block in model.blocks.values():
        block.register_forward_hook(sample)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(sample)

    for _ in range(2):  # the optimizer has no state before its first step
        engine.zero_grad()
        saved = SavedActivations([*model.parameters(), inputs, targets])
        with saved:
            loss = token_loss(model(inputs), targets, args.batch * args.sequence)
        engine.backward(loss)
        after_backward = engine.memory_bytes()
        engine.clip_and_total(args.clip, loss.detach())
        engine.step()
    return after_backward | {
        "padding": sum(bucket.padded - bucket.size for bucket in engine.buckets),
        "most weights": most["weights"],
        "most all": most["all"],
        "activations": saved.peak,
    }


def lesson(run: Run) -> None:
    show_paper(run, formula)
    teach(run, *KINDS[run.args.stage])
    axis = data_axis(run)
    for precision, whose in ((PAPER, "the paper's"), (MEGATRON, "Megatron-LM's"), (FLOAT32, "the course's")):
        measured = {name: run.job.gather(measure(run, name, axis, precision)) for name in KINDS}
        claim_memory(run, precision, whose, formula, measured)
    show_course(run, formula, FLOAT32)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 01",
        "ZeRO memory optimisation in practice",
        "ZeRO 显存优化实践",
        "The paper's table of memory, and the same measured on a model that runs here.",
    )
    add_flags(frame)
    frame.parser.add_argument(
        "--stage", choices=tuple(KINDS), default="ZeRO-3", help="to train with (default %(default)s)"
    )
    sys.exit(frame.main(check, lesson))
