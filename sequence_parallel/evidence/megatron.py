"""What `megatron_sp.py` shows and claims: shapes of one layer, and what it sends. Paper: 2205.05198, section 4.2.

b samples, s tokens in a sample, h hidden, L layers, t ranks
"""

from collections.abc import Callable, Mapping
from textwrap import fill

from tabulate import tabulate
from torch import Tensor, nn

from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.model.sharding import copied_parameters, replicated_parameters
from core.model.text import Text
from core.proof.figures import bars, grid
from core.proof.lesson import Run
from sequence_parallel.evidence.training import LayerTraffic, Version, count


def show_shapes(run: Run, model: GPT) -> None:
    """One sample through the first layer: which activation is sharded along the sequence."""
    materialize(model, run.args.seed, run.job.device, run.dtype)
    rows: list[tuple[str, str, str]] = []

    def note(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, arguments: tuple, y: Tensor) -> None:
            tensors = (arguments[0], y[0] if isinstance(y, tuple) else y)
            rows.append((name, *(" x ".join(map(str, x.shape)) for x in tensors)))

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
    if run.job.rank == 0:
        draw_shapes(run, rows)
    run.say("g, as in 2205.05198: all-gather forward, reduce-scatter backward; ḡ: the reverse.")
    run.say("(In lectures 04 and 05, as in 1909.08053, g is an all-reduce forward. That one is f̄ here: the loss's.)\n")


def draw_shapes(run: Run, rows: list[tuple[str, str, str]]) -> None:
    """The same table, in colours: sharded along the sequence, or all of it."""
    part = str(run.args.sequence // run.job.world_size)

    def cell(shape: str) -> tuple[str, str]:
        return shape, "0" if shape.split(" x ")[1] == part else "1"

    legend = {
        "0": ("this rank's part of the sequence", "本 rank 的那段序列"),
        "1": ("the whole sequence", "整个序列"),
    }
    title = "One sample through the first layer on rank 0", "一个样本在 rank 0 上穿过第一层"
    cells = [(name, [cell(x), cell(y)]) for name, x, y in rows]
    run.draw(grid(title, ("module", "模块"), [("in", "输入"), ("out", "输出")], cells, legend))


def claim_traffic(run: Run, config: GPTConfig, t: int, versions: Mapping[str, Version]) -> None:
    """Two halves in place of each all-reduce: the same elements; what the engine gathers again, by itself."""
    traffic = LayerTraffic(run, config, versions)
    h, layers, bs = config.hidden, config.layers, run.args.batch * run.args.sequence
    half = (t - 1) / t  # elements that a rank sends to gather, or to reduce and scatter, one
    gather, scatter, again = ("all-gather",), ("reduce-scatter",), ("all-gather again",)

    def messages(claim: str, formula: str, n: int, operations: tuple[str, ...], direction: str) -> None:
        traffic.claim(claim, formula, n, operations, direction, "messages", label="layers")

    messages("all-gathers of a layer, forward", "2, this paper's g", 2, gather, "forward")
    messages("reduce-scatters, forward", "2, this paper's g-bar", 2, scatter, "forward")
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
        {"plain": 0.0, "engine": gathered, "our loss": gathered},
        again,
        "both",
        label="layers",
    )
    replicated = replicated_parameters(config)
    of = "6Lh + 2h + sh" if config.fused_qkv and config.biases else "norms" + ", biases" * config.biases
    traffic.claim(
        "elements of replicated parameters' gradients",
        f"({of}) reduced once = {2 * half * replicated:,.0f}",
        2 * half * replicated,
        ("all-reduce",),
        "both",
        label="replicated gradients",
    )
    if (copies := config.kv_copies(t)) > 1:
        heads = 2 * (copies - 1) / copies * layers * copied_parameters(config, t)
        claim, formula = "elements of keys' and values' weights' gradients", f"reduced over {copies} ranks"
        traffic.claim(claim, f"{formula} = {heads:,.0f}", heads, ("all-reduce",), "both", label="gradients of heads")
    if traffic.everyone:
        forward, both = traffic.everyone[0]["engine"]
        times, axis, names = layers * run.args.steps * 1e6, "tp layers", (*gather, *scatter, *again)
        ahead, total = ([sent[name, axis].bytes / times for name in names] for sent in (forward, both))
        sent = {"forward": ahead, "backward": [b - a for a, b in zip(ahead, total, strict=True)]}
        title = f"Sent by each of {t} ranks for a layer, in a step", f"{t} 个 rank 中每个一步为一层发送的量"
        run.draw(bars(title, "MB", names, sent), chart=True)


def claim_loss(run: Run, t: int, versions: Mapping[str, Version]) -> None:
    """Megatron-LM's loss, in the plain version and the engine, and ours beside it; with the bytes of each."""
    traffic = LayerTraffic(run, versions["plain"].model.config, versions)
    one = (t - 1) / t * run.args.batch * run.args.sequence
    loss, reduced, ours = {"direction": "both", "label": "loss"}, ("all-reduce",), ("all-to-all", "all-gather")
    traffic.claim(
        "elements Megatron-LM's loss sends",
        f"3bs, each all-reduced, as in lecture 05: 6bs(t-1)/t = {6 * one:,.0f}",
        {"plain": 6 * one, "engine": 6 * one},
        reduced,
        **loss,
    )
    traffic.claim(
        "elements our loss sends in its place",
        f"not the paper's: 2bs all-to-all, 2bs gathered: 4bs(t-1)/t = {4 * one:,.0f}",
        {"our loss": 4 * one},
        ours,
        **loss,
    )
    for names, others, whose in ((("plain", "engine"), ours, "Megatron-LM's"), (("our loss",), reduced, "ours")):
        claim, none = f"messages of any other kind, {whose}", dict.fromkeys(names, 0.0)
        traffic.claim(claim, "0", none, (*others, "reduce-scatter"), **loss, what="messages")
    if not traffic.everyone or t == 1:
        return
    sent = {name: count(both, (*reduced, *ours), "bytes", "loss") / run.args.steps
            for name, (_, both) in traffic.everyone[0].items()}  # fmt: skip
    ways = {"plain": "Megatron-LM's, plain", "engine": "Megatron-LM's, engine", "our loss": "ours"}
    how = "all-reduces of maximum, sum, target"
    hows = {"plain": how, "engine": how, "our loss": "all-to-all of lse and target; all-gather of lse and gradient"}
    rows = [(ways[name], fill(hows[name], 30), f"{size:,.0f}") for name, size in sent.items()]
    run.say("\n" + tabulate(rows, ("the loss", "collectives", "bytes a rank sends a step"), disable_numparse=True,
                            colalign=("left", "left", "right")))  # fmt: skip
    ratio = sent["our loss"] / sent["engine"]
    run.evidence.claim("bytes of our loss / Megatron-LM's", "4bs / 6bs = 0.667; counted", 2 / 3, ratio, 1e-9)
