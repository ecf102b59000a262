"""CODE 02: what a rank holds of the course's model at the end of a step, on 1, 2, 4 and 8 ranks.

Every layer is as large as the next, so a step is measured with one layer and with two, and all layers follow.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.precision import POLICIES, MasterOptimizer
from core.model.seeded import SampleMasks
from core.model.sharding import key_value_rows, parameters_on_a_rank
from core.model.text import Text
from core.proof.figures import bars
from core.proof.lesson import Run
from core.proof.memory import SavedActivations, live_bytes
from core.proof.oracle import TOLERANCE, relative_difference
from core.proof.trainable import Replica
from megatron_tp.engine import layers, loss
from megatron_tp.evidence.training import build

COURSE = GPTConfig(1024, 1024, 512, layers=8, heads=8, feed_forward=1024, tied=False, head_bias=True)
COURSE_PARAMETERS = {1: 18_397_184, 2: 9_473_536, 4: 5_011_712}  # on each rank, by number of ranks


class Held(NamedTuple):
    """Bytes that one rank holds at the end of a step, and the loss of that step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # saved for backward
    loss: float

    @property
    def trained(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.trained + self.activations


Sizes = Mapping[int, list[Held]]  # of every rank, by the number of ranks


def measure(run: Run, config: GPTConfig, mesh: Mesh) -> list[Held]:
    """What each rank of tp holds of the full model; on rank 0. With dp > 1 the other replicas wait."""
    mine = None
    if mesh["dp"].index == 0:
        one, two = (_step(run, replace(config, layers=n), mesh["tp"]) for n in (1, 2))
        sizes = (a + (config.layers - 1) * (b - a) for a, b in zip(one[:4], two[:4], strict=True))
        mine = Held(*sizes, two.loss)
    return [each for each in run.job.gather(mine) if each]


def _first_batch(run: Run) -> tuple[Tensor, Tensor]:
    args = run.args
    inputs, targets = Text(args.data, args.sequence).batch(args.seed, 0, args.batch)
    return inputs.to(run.job.device), targets.to(run.job.device)


def _step(run: Run, config: GPTConfig, axis: Axis) -> Held:
    model, optimizer = build(run, config, axis, layers.parallelize)
    use_masks(model, SampleMasks(run.args.seed))
    inputs, targets = _first_batch(run)
    saved = SavedActivations([*model.parameters(), inputs, targets])
    with saved:
        mean = loss.token_loss(model(inputs), targets, targets.numel(), axis, config.vocabulary)
    activations = saved.live
    mean.backward()
    optimizer.step()
    return Held(*_trained_bytes(model, optimizer), activations, mean.item())


def _loss_of_one_process(run: Run, config: GPTConfig) -> float:
    model = materialize(GPT(config), run.args.seed, run.job.device, torch.float64)
    use_masks(model, SampleMasks(run.args.seed))
    inputs, targets = _first_batch(run)
    return token_loss(model(inputs), targets, targets.numel()).item()


def _trained_bytes(model: GPT, optimizer: MasterOptimizer) -> tuple[int, int, int]:
    gradients = live_bytes(p.grad for p in model.parameters())
    return live_bytes(model.parameters()), gradients, live_bytes(optimizer.tensors())


def show_memory(run: Run, held: Sizes) -> None:
    if not held[1]:
        return
    one_process = held[1][0].total
    rows = []
    for t, ranks in held.items():
        most = max(ranks, key=lambda rank: rank.total)
        sizes = (*most[:4], most.total, one_process / t)
        rows.append((t, *(size / 1e6 for size in sizes), most.total / (one_process / t)))
    header = ("tp", "weights", "gradients", "Adam", "activations", "total", "ideal", "x ideal")
    run.say("one step: what a rank holds, in MB; ideal is the total of one process / tp")
    run.say(tabulate(rows, header, floatfmt=".2f", intfmt=",") + "\n")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if 1 <= i <= 4}
    ideal, formula = [row[6] for row in rows], ("ideal: one process / tp", "理想值：单进程 / tp")
    title, groups = ("What a rank holds", "一个 rank 持有什么"), [f"tp {t}" for t in held]
    run.draw(bars(title, "MB", groups, columns, stacked=True, expected=ideal, formula=formula), chart=True)


def parameters(config: GPTConfig, axis: Axis) -> int:
    """Elements of this rank's shards; takes no memory."""
    return sum(p.numel() for p in layers.parallelize(GPT(config), axis).parameters())


def claim_parameters(run: Run, config: GPTConfig, axis: Axis, sizes: Sizes) -> None:
    """How many parameters each rank has, for every number of ranks."""
    if run.job.rank:
        return
    for t in sizes:
        expected, source = parameters_on_a_rank(config, t), "sharded / t + replicated"
        if config == COURSE and t in COURSE_PARAMETERS:
            expected, source = COURSE_PARAMETERS[t], "the course's figure"
        ranks = (replace(axis, ranks=(*range(t),), index=rank, group=None) for rank in range(t))
        measured = [parameters(config, rank) for rank in ranks]
        run.evidence.on_ranks(f"parameters at tp {t}", f"{source}: {expected:,}", expected, measured)


def copied_activations(run: Run, config: GPTConfig, ranks: int) -> float:
    """Bytes of keys and values that a rank saves beyond its 1/t of them, because other ranks have the same heads."""
    if config.attention == "softmax":  # saves them as they are repeated, for each of its query heads
        return 0
    rows = key_value_rows(config, ranks) - config.key_value_size / ranks
    return config.layers * run.args.batch * run.args.sequence * rows * run.dtype.itemsize


def claim_memory(run: Run, config: GPTConfig, sizes: Sizes, trained: Replica) -> None:
    """Bytes on each rank, for every number of ranks, and of the model that has been trained on all of them."""
    in_training = run.job.gather(sum(_trained_bytes(trained.model, trained.optimizer)))
    if run.job.rank:
        return
    on_ranks = run.evidence.on_ranks
    for t, ranks in sizes.items():
        expected = parameters_on_a_rank(config, t) * run.precision.bytes
        name = f"bytes of weights, gradients and Adam, tp {t}"
        formula = f"{run.precision.bytes} bytes a parameter: {expected:,}"
        on_ranks(name, formula, expected, [held.trained for held in ranks])
    on_ranks(f"the same of the model trained at tp {t}", formula, expected, in_training)
    even = [t for t in sizes if config.vocabulary % t == 0]  # elsewhere the logits are padded
    if len(even) > 2:  # from two sizes what is sharded and what is replicated are both known
        second = even[1]
        copied = {t: copied_activations(run, config, t) for t in even}
        one, two = (max(rank.activations for rank in sizes[t]) - copied[t] for t in even[:2])
        sharded = (one - two) / (1 - 1 / second)
        for t in even[2:]:
            expected = sharded / t + one - sharded + copied[t]
            and_copies = f" + k and v of {config.query_groups} heads" if copied[t] else ""
            on_ranks(
                f"bytes saved for backward at tp {t}",
                f"sharded / t + replicated{and_copies}, from tp 1 and {second}: {expected:,.0f}",
                expected,
                [rank.activations for rank in sizes[t]],
                1e-9 * expected,
            )
    expected = _loss_of_one_process(run, replace(config, layers=2))
    worst = max(relative_difference(rank.loss, expected) for ranks in sizes.values() for rank in ranks)
    name = f"first loss at tp {', '.join(map(str, sizes))}, of two layers"
    run.evidence.claim(name, "one process's", 0, worst, TOLERANCE[run.precision.name].loss, correctness=True)


# What the course's practice prints: parameters and MB, in one process and on a rank of four. Its feed-forward is 4h.
PRACTICE = replace(COURSE, feed_forward=2048)
PRINTED = {1: ("26,793,984", "564.16 MB"), 4: ("7,110,912", "244.33 MB, saves 56.7 %")}
LOSSES = "7.668 to 0.0008 on 4 ranks; 0.0023 in one process"
LOSSES_OFF = (
    "No equality is checked. The gradient of the input is reduced again in backward, the column layer has no f, the "
    "bias of the row layer is added once a rank, and replicated weights are drawn differently on each rank. The labels "
    "are the inputs."
)


def show_course(run: Run, axis: Axis) -> None:
    """The course's figures, and what they should be: from sharded meta models, and by this training's losses."""
    bytes_each = POLICIES["float32"].bytes
    count = {
        config: {t: parameters(config, replace(axis, ranks=(*range(t),), index=0, group=None)) for t in PRINTED}
        for config in (PRACTICE, COURSE)
    }
    states = {t: elements * bytes_each / 1e6 for t, elements in count[PRACTICE].items()}
    more = {t: float(megabytes.split()[0]) - states[t] for t, (_, megabytes) in PRINTED.items()}
    why = {
        1: f"Right are the weights, gradients and Adam's moments, in float32 {bytes_each} bytes a parameter.",
        4: f"Sharding saves so much of these. The figures have {more[1]:.0f} MB more in one process, and "
        f"{more[4]:.0f} MB on a rank: hardly any of that is sharded.",
    }
    rows = []
    for t, (printed, _) in PRINTED.items():
        sizes = f"Right with a feed-forward of {PRACTICE.feed_forward:,}; with the {COURSE.feed_forward:,} here it is "
        right = f"{count[PRACTICE][t]:,}"
        rows.append((f"parameters of a rank, tp {t}", printed, right, f"{sizes}{count[COURSE][t]:,}."))
    for t, (_, printed) in PRINTED.items():
        saved = f", saves {100 * (1 - states[t] / states[1]):.1f} %" if t > 1 else ""
        rows.append((f"memory of a rank, tp {t}", printed, f"{states[t]:.2f} MB{saved}", why[t]))
    apart = max(map(relative_difference, run.losses, run.reference_losses), default=0.0)
    rows.append(("loss", LOSSES, f"one process's: here {apart:.1g} apart", LOSSES_OFF))
    run.say_course(rows)
