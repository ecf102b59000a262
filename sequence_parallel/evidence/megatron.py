"""What `megatron_sp.py` shows and claims: shapes of one layer, and what it sends. Paper: 2205.05198, section 4.2.

b samples, s tokens in a sample, h hidden, L layers, t ranks
"""

from collections.abc import Callable, Mapping

from tabulate import tabulate
from torch import Tensor, nn

from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.proof.lesson import Run
from core.proof.plot import bars
from sequence_parallel.evidence.training import LayerTraffic, Version


def show_shapes(run: Run, model: GPT) -> None:
    """One sample through the first layer: which activation is sharded along the sequence."""
    materialize(model, run.args.seed, run.job.device, run.dtype)
    rows: list[tuple[str, str, str]] = []

    def note(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, arguments: tuple, y: Tensor) -> None:
            shapes = (" x ".join(map(str, x.shape)) for x in (arguments[0], y))
            rows.append((name, *shapes))

        return hook

    modules = {"embed": model.embed, "norm": model.norm, "head": model.head}
    modules |= {f"blocks.0.{name}": m for name, m in model.blocks["0"].named_modules() if "." in name or "_" in name}
    for name, module in modules.items():
        module.register_forward_hook(note(name))
    inputs, _ = Text(run.args.data, run.args.sequence).batch(run.args.seed, 0, 1)
    use_masks(model, SampleMasks(run.args.seed))
    model(inputs.to(run.job.device))
    s = run.args.sequence
    run.say(f"one sample of {s} tokens on rank 0: {s // run.job.world_size} of them where the sequence is sharded")
    run.say(tabulate(rows, ("module", "in", "out")) + "\n")


def claim_traffic(run: Run, config: GPTConfig, t: int, versions: Mapping[str, Version]) -> None:
    """Two halves in place of each all-reduce: the same elements; what the engine gathers again, by itself."""
    traffic = LayerTraffic(run, config, versions)
    h, layers, bs = config.hidden, config.layers, run.args.batch * run.args.sequence
    half = (t - 1) / t  # elements that a rank sends to gather, or to reduce and scatter, one
    gather, scatter, again = ("all-gather",), ("reduce-scatter",), ("all-gather again",)

    def messages(claim: str, formula: str, n: int, operations: tuple[str, ...], direction: str) -> None:
        traffic.claim(claim, formula, n, operations, direction, "messages", label="layers")

    messages("all-gathers of a layer, forward", "2, the paper's g", 2, gather, "forward")
    messages("reduce-scatters, forward", "2, the paper's g-bar", 2, scatter, "forward")
    messages("reduce-scatters, backward", "2, g", 2, scatter, "backward")
    messages("all-gathers, backward", "2, g-bar", 2, gather, "backward")
    messages("all-reduces of a layer", "0", 0, ("all-reduce",), "both")
    traffic.claim(
        "elements a layer sends a microbatch",
        f"8bsh(t-1)/t, as in tensor parallelism = {8 * half * bs * h:,.0f}",
        8 * half * bs * h,
        gather + scatter,
        "both",
        label="layers",
    )
    gathered = 2 * half * bs * h
    traffic.claim(
        "and to gather again what was not saved",
        f"2bsh(t-1)/t = {gathered:,.0f}; the plain version saves it",
        {"plain": 0.0, "engine": gathered},
        again,
        "both",
        label="layers",
    )
    plain, engine = (2 * t + 2) * half * bs, 4 * half * bs
    traffic.claim(
        "elements the loss sends",
        f"4bs(t-1)/t = {engine:,.0f}, where three all-reduces send 6bs(t-1)/t; plain: (2t+2)bs(t-1)/t = {plain:,.0f}",
        {"plain": plain, "engine": engine},
        (*gather, *scatter, "all-to-all"),
        "both",
        label="loss",
    )
    replicated = layers * 6 * h + 2 * h + config.sequence * h
    traffic.claim(
        "elements of replicated parameters' gradients",
        f"(6Lh + 2h + sh) reduced once = {2 * half * replicated:,.0f}",
        2 * half * replicated,
        ("all-reduce",),
        "both",
        label="replicated gradients",
    )
    if run.args.plot and traffic.everyone:
        forward, both = traffic.everyone[0]["engine"]
        times, axis, names = layers * run.args.steps * 1e6, "tp layers", (*gather, *scatter, *again)
        ahead, total = ([sent[name, axis].bytes / times for name in names] for sent in (forward, both))
        sent = {"forward": ahead, "backward": [b - a for a, b in zip(ahead, total, strict=True)]}
        bars(run.args.plot, f"Sent by each of {t} ranks for a layer, in a step", "MB", names, sent)
