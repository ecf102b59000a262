"""Lecture 06: Megatron-LM sequence parallelism (Megatron-LM SP 代码解析). Korthikanti et al. 2022 (2205.05198).

    torchrun --nproc_per_node=8 sequence_parallel/megatron_sp.py

Tensor parallelism with the rest of the layer cut as well, along the sequence: `layers.py`, and `loss.py` for the end of
the model. What it saves in memory is measured by `activations.py`; this lesson proves that it is right, and that it
sends the same bytes as tensor parallelism.

b samples, s tokens in a sample, h hidden, t ranks
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from tabulate import tabulate
from torch import Tensor, nn

from core.ledger import Ledger, Traffic
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.plot import bars
from sequence_parallel.layers import check, parallelize
from sequence_parallel.training import Trained, teach

Sent = dict[tuple[str, str], Traffic]


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=run.job.world_size)["tp"]
    show_shapes(run, config, axis)
    claim_traffic(run, config, axis, teach(run, config, axis))


def show_shapes(run: Run, config: GPTConfig, axis: Axis) -> None:
    """One sample through the first layer: which activation is cut where."""
    uncounted = replace(axis, ledger=Ledger())
    model = materialize(parallelize(GPT(config), uncounted), run.args.seed, run.job.device, run.dtype)
    rows: list[tuple[str, str, str]] = []

    def note(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, arguments: tuple, y: Tensor) -> None:
            shapes = (" x ".join(map(str, x.shape)) for x in (arguments[0], y))
            rows.append((name, *shapes))

        return hook

    parts = {"embed": model.embed, "norm": model.norm, "head": model.head}
    parts |= {f"blocks.0.{name}": m for name, m in model.blocks["0"].named_modules() if name}
    for name, module in parts.items():
        module.register_forward_hook(note(name))
    inputs, _ = Text(run.args.data, run.args.sequence).batch(run.args.seed, 0, 1)
    use_masks(model, SampleMasks(run.args.seed))
    model(inputs.to(run.job.device))
    order = [row for row in rows if row[0] not in ("blocks.0.attention", "blocks.0.mlp")]
    whole = run.args.sequence
    run.say(f"one sample on rank 0: {whole} tokens where the sequence is whole, {whole // axis.size} where it is cut")
    run.say(tabulate(order, ("module", "in", "out")) + "\n")


def claim_traffic(run: Run, config: GPTConfig, axis: Axis, trained: Trained) -> None:
    """Two halves in place of each all-reduce: the same elements; what is gathered again, stated by itself."""
    everyone = run.job.gather((trained.forward.traffic, axis.ledger.traffic))
    if not everyone:
        return
    t, h, layers, bs = axis.size, config.hidden, config.layers, run.args.batch * run.args.sequence
    half = (t - 1) / t  # elements that a rank sends to gather, or to reduce and scatter, one

    def each(claim: str, formula: str, expected: float, measure: Callable[[Sent, Sent], float]) -> None:
        values = [measure(forward, both) / run.args.steps for forward, both in everyone]
        run.evidence.on_ranks(claim, formula, expected, values, 1e-9 * expected)

    def layer(sent: Sent, *operations: str, what: str = "messages") -> float:
        return sum(getattr(sent[operation, "tp layers"], what) for operation in operations) / layers

    gather, scatter, again = "all-gather", "reduce-scatter", "all-gather again"
    each("all-gathers of a layer, forward", "2, the paper's g", 2, lambda forward, _: layer(forward, gather))
    each("reduce-scatters, forward", "2, the paper's g-bar", 2, lambda forward, _: layer(forward, scatter))
    each("reduce-scatters, backward", "2, g", 2, lambda forward, both: layer(both, scatter) - layer(forward, scatter))
    each("all-gathers, backward", "2, g-bar", 2, lambda forward, both: layer(both, gather) - layer(forward, gather))
    each("all-reduces of a layer", "0", 0, lambda _, both: layer(both, "all-reduce"))
    each(
        "elements a layer sends a microbatch",
        f"8bsh(t-1)/t, as in tensor parallelism = {8 * half * bs * h:,.0f}",
        8 * half * bs * h,
        lambda _, both: layer(both, gather, scatter, what="elements"),
    )
    each(
        "and to gather again what was not saved",
        f"2bsh(t-1)/t = {2 * half * bs * h:,.0f}",
        2 * half * bs * h,
        lambda _, both: layer(both, again, what="elements"),
    )
    each(
        "elements the loss sends",
        f"4bs(t-1)/t = {4 * half * bs:,.0f}, where three all-reduces send 6bs(t-1)/t",
        4 * half * bs,
        lambda _, both: sum(traffic.elements for (_, part), traffic in both.items() if part == "tp loss"),
    )
    whole = layers * 6 * h + 2 * h + config.sequence * h
    each(
        "elements of whole parameters' gradients",
        f"(6Lh + 2h + sh) reduced once = {2 * half * whole:,.0f}",
        2 * half * whole,
        lambda _, both: both["all-reduce", "tp whole gradients"].elements,
    )
    if run.args.plot:
        operations, times = (gather, scatter, again), run.args.steps * 1e6
        ahead, total = ([layer(sent, name, what="bytes") / times for name in operations] for sent in everyone[0])
        sent = {"forward": ahead, "backward": [b - a for a, b in zip(ahead, total, strict=True)]}
        bars(run.args.plot, f"Sent by each of {t} ranks for a layer, in a step", "MB", operations, sent)


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks)
    check_model(args)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Megatron-LM sequence parallelism: code",
        "Megatron-LM SP 代码解析",
        "What tensor parallelism repeats on every rank is cut along the sequence, for the same bytes.",
    )
    add_model_flags(frame, heads=8, layers=4)
    frame.parser.set_defaults(steps=10)
    sys.exit(frame.main(refuse, lesson))
