"""CODE 02: Megatron tensor parallelism re-implemented (Megatron 张量并行复现).

    torchrun --nproc_per_node=8 megatron_tp/train.py

The course's own model, with an untied, biased head and positions for 1024 tokens, trained on real text over all ranks;
before that, one step of it on every divisor of the number of ranks (1, 2, 4, 8), to see how the memory of a rank falls,
and why by less than their number: what is not cut stays.
"""

import argparse
import sys
from dataclasses import dataclass, replace

from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPTConfig, use_masks
from core.model.seeded import SampleMasks
from core.model.text import VOCABULARY, Text
from core.proof.arguments import add_model_flags, check_cuts, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations, live_bytes
from core.proof.oracle import TOLERANCE
from core.proof.plot import bars
from megatron_tp.loss import token_loss
from megatron_tp.training import build, parameters_on_a_rank, teach

COURSE = {"vocabulary": 1024, "hidden": 512, "layers": 8, "heads": 8, "feed_forward": 1024, "positions": 1024}
COURSE_PARAMETERS = {1: 18_397_184, 2: 9_473_536, 4: 5_011_712}  # on each rank, by number of ranks


@dataclass(frozen=True)
class Held:
    """What one rank holds at the end of a step, in bytes, and the loss it found."""

    parameters: int  # elements
    weights: int
    gradients: int
    optimizer: int
    activations: int  # saved for backward
    loss: float

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def course_model(args: argparse.Namespace) -> GPTConfig:
    config = replace(configuration(args), vocabulary=args.vocabulary, head_bias=True)
    return replace(config, sequence=args.positions)  # the table; samples are shorter


def one_step(run: Run, config: GPTConfig, axis: Axis) -> Held:
    """One training step over the ranks of `axis`, and what this rank holds then."""
    args = run.args
    model, optimizer = build(run, config, axis)
    use_masks(model, SampleMasks(args.seed))
    inputs, targets = (t.to(run.job.device) for t in Text(args.data, args.sequence).batch(args.seed, 0, args.batch))
    saved = SavedActivations([*model.parameters(), inputs, targets])
    with saved:
        logits = model(inputs)
        loss = token_loss(logits, targets, targets.numel(), axis, config.vocabulary)
    activations = saved.live
    loss.backward()
    optimizer.step()
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return Held(
        sum(p.numel() for p in model.parameters()),
        live_bytes(model.parameters()),
        live_bytes(p.grad for p in model.parameters()),
        live_bytes(value for value in states if value.dim()),  # not the count of steps
        activations,
        loss.item(),
    )


def lesson(run: Run) -> None:
    config, ranks = course_model(run.args), run.job.world_size
    held: dict[int, list[Held]] = {}
    for t in (t for t in range(1, ranks + 1) if ranks % t == 0):
        mesh = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=t, dp=ranks // t)
        mine = one_step(run, config, mesh["tp"]) if mesh["dp"].index == 0 else None  # the others wait
        held[t] = [each for each in run.job.gather(mine) if each]
    axis = mesh["tp"]  # of all ranks
    if held[1]:
        show(run, held)
    teach(run, config, axis)
    if held[1]:
        claim_sizes(run, config, held)


def show(run: Run, held: dict[int, list[Held]]) -> None:
    whole = held[1][0].total
    rows: list[tuple[float, ...]] = []
    for t, ranks in held.items():
        most = max(ranks, key=lambda rank: rank.total)
        sizes = (most.weights, most.gradients, most.optimizer, most.activations, most.total, whole / t)
        rows.append((t, most.parameters, *(size / 1e6 for size in sizes), most.total / (whole / t)))
    header = ("tp", "parameters", "weights", "gradients", "Adam", "activations", "total", "ideal", "x ideal")
    run.say("one step: what a rank holds, in MB; ideal is the total of one process / tp")
    run.say(tabulate(rows, header, floatfmt=".2f", intfmt=",") + "\n")
    if run.args.plot:
        columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if 2 <= i <= 7}
        bars(run.args.plot, "What a rank holds", "MB", [f"tp {t}" for t in held], columns)


def claim_sizes(run: Run, config: GPTConfig, held: dict[int, list[Held]]) -> None:
    is_course = all(getattr(run.args, name) == value for name, value in COURSE.items())
    for t, ranks in held.items():
        expected = parameters_on_a_rank(config, t)
        if is_course and t in COURSE_PARAMETERS:
            expected = COURSE_PARAMETERS[t]
        source = "the course's figure" if is_course and t in COURSE_PARAMETERS else "what is cut / t + what is not"
        name = f"parameters at tp {t}"
        run.evidence.on_ranks(name, f"{source}: {expected:,}", expected, [each.parameters for each in ranks])
    for t, ranks in held.items():
        expected = 4 * parameters_on_a_rank(config, t) * run.dtype.itemsize
        run.evidence.on_ranks(
            f"bytes of weights, gradients and Adam, tp {t}",
            f"4 x parameters = {expected:,}",
            expected,
            [each.weights + each.gradients + each.optimizer for each in ranks],
        )
    even = [t for t in held if config.vocabulary % t == 0]  # elsewhere the logits are padded
    if len(even) > 2:  # of a part that is cut and one that is not two sizes are enough to know both
        second = even[1]
        one, two = (max(rank.activations for rank in held[t]) for t in even[:2])
        cut = (one - two) / (1 - 1 / second)
        for t, ranks in ((t, held[t]) for t in even[2:]):
            expected = cut / t + one - cut
            run.evidence.on_ranks(
                f"bytes saved for backward at tp {t}",
                f"what is cut / t + what is not, from tp 1 and {second}: {expected:,.0f}",
                expected,
                [each.activations for each in ranks],
                1e-9 * expected,
            )
    first = run.reference_losses[0]
    worst = max(abs(each.loss - first) / first for ranks in held.values() for each in ranks)
    sizes = ", ".join(map(str, held))
    run.evidence.claim(f"first loss at tp {sizes}", "one process's", 0, worst, TOLERANCE[run.dtype].loss)


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check_cuts(args, ranks)
    check_model(args)
    if args.vocabulary < VOCABULARY:
        raise ValueError(
            f"--vocabulary {args.vocabulary}: the text is bytes, {VOCABULARY} different ones; use --vocabulary 1024"
        )
    if args.positions < args.sequence:
        raise ValueError(
            f"--positions {args.positions}: a sample has --sequence {args.sequence} tokens, each at a position of its "
            f"own; use --positions {args.sequence}"
        )


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 02",
        "Megatron tensor parallelism re-implemented",
        "Megatron 张量并行复现",
        "Parameters and memory of a rank with the course's model on 1, 2, 4, 8 ranks, and training on all of them.",
    )
    add_model_flags(frame, batch=4, sequence=32)
    frame.parser.add_argument("--vocabulary", type=int, help="rows of the embedding (default %(default)s)")
    frame.parser.add_argument("--positions", type=int, help="rows of the position embedding (default %(default)s)")
    frame.parser.set_defaults(steps=3, untied=True, **COURSE)
    sys.exit(frame.main(refuse, lesson))
