"""Lecture 05: which parameter is sharded how, what a step sends, what a rank holds, and the loss with smoothing."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from core import comm
from core.ledger import Traffic
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig
from core.model.sharding import copied_parameters, parameters_on_a_rank
from core.model.text import Text
from core.proof.figures import bars, shards
from core.proof.lesson import Run
from core.proof.memory import live_bytes
from core.proof.oracle import TOLERANCE
from core.shards import Shard, shard_of
from megatron_tp.engine.loss import vocab_parallel_cross_entropy
from megatron_tp.evidence.training import Version

SMOOTHING = 0.1
REPLICATED = "on every rank", "每个 rank 一份"
Sent = dict[tuple[str, str], Traffic]
Versions = Mapping[str, Version]


def show_shards(run: Run, full: GPT, sharded: GPT) -> None:
    """Which parameter is sharded how; the first layer stands for all."""
    shapes = {name: _shape(p) for name, p in full.named_parameters()}
    rows = [
        (name, shapes[name], _shape(p), _how(name, p))
        for name, p in sharded.named_parameters()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    ]
    run.say(tabulate(rows, ("parameter", "full", f"on each of {run.job.world_size} ranks", "sharded")))
    if run.job.rank == 0:
        draw_shards(run, full, sharded)
    run.say("\nThe slide's Y = XA has A as (in, out); torch stores its transpose, a weight of (out, in).")
    run.say("g, as in 1909.08053: all-reduce forward, identity backward; f: the reverse.")
    run.say("(In lecture 06, as in 2205.05198, g is an all-gather forward, and this g is called f̄.)\n")


def draw_shards(run: Run, full: GPT, sharded: GPT) -> None:
    """Of the embedding, the first layer and the head, each matrix as torch stores it."""
    shapes = {name: tuple(p.shape) for name, p in full.named_parameters()}
    tensors = [
        (name, shapes[name], mark.dim if (mark := shard_of(p)) else None, _how(name, p) if mark else REPLICATED)
        for name, p in sharded.named_parameters()
        if p.dim() == 2 and (not name.startswith("blocks.") or name.startswith("blocks.0."))
    ]
    title = "Which rank has which rows or columns, as torch stores them", "每个 rank 有哪些行或列（按 torch 的存法）"
    run.draw(shards(title, tensors, run.job.world_size))


def _shape(p: Tensor) -> str:
    return " x ".join(map(str, p.shape))


def _how(name: str, p: Tensor) -> str:
    """As the slide says it: of its A, the transpose of torch's weight."""
    mark = shard_of(p)
    if mark is None:
        return "no"
    padding = mark.length * mark.count - mark.size
    if name.startswith("embed."):
        how = "rows of the table, a token each"
    elif mark.dim == 0:
        how = "columns of A, rows in torch" if p.dim() == 2 else "as the columns of A"
    else:
        how = "rows of A, columns in torch"
    return how + (f", {padding} of padding" if padding else "")


def claim_traffic(run: Run, config: GPTConfig, versions: Versions) -> None:
    """The all-reduces of a layer, and of both ends of the model."""
    everyone = run.job.gather({name: (v.forward.traffic, v.axis.ledger.traffic) for name, v in versions.items()})
    if not everyone:
        return
    t, h, bs = run.job.world_size, config.hidden, run.args.batch * run.args.sequence
    ring = 2 * (t - 1) / t  # elements that a rank sends to all-reduce one

    def each(claim: str, formula: str, expected: float, measure: Callable[[Sent, Sent], float]) -> None:
        cases = [
            (f"{claim} ({name}), rank {rank}", expected, measure(*sent[name]) / run.args.steps)
            for name in versions
            for rank, sent in enumerate(everyone)
        ]
        run.evidence.each(claim, f"{formula}; counted", cases, 1e-9 * expected)

    def of(sent: Sent, label: str) -> Traffic:
        return sent["all-reduce", f"tp {label}"]

    def in_layer(sent: Sent) -> float:
        return of(sent, "layers").messages / config.layers

    n = 2 if t > 1 else 0  # one rank sends nothing
    each("all-reduces of a layer, forward", "2, the paper's g", n, lambda forward, _: in_layer(forward))
    each("and backward", "2, the paper's f", n, lambda forward, both: in_layer(both) - in_layer(forward))
    layer = 4 * ring * bs * h
    each(
        "elements a layer sends a micro-batch",
        f"8bsh(t-1)/t = {layer:,.0f}",
        layer,
        lambda _, both: of(both, "layers").elements / config.layers,
    )
    reduced, gathered = 3 * ring * bs, ring / 2 * bs * config.vocabulary
    each(
        "elements the loss sends",
        f"3bs, each reduced: {reduced:,.0f}; to gather bsV logits: {gathered:,.0f}",
        reduced,
        lambda _, both: of(both, "loss").elements,
    )
    for label, name in (("embedding", "g"), ("head", "f")):
        each(
            f"elements the {label} sends",
            f"bsh, reduced once, by {name}: {ring * bs * h:,.0f}",
            ring * bs * h,
            lambda _, both, label=label: of(both, label).elements,
        )
    if (copies := config.kv_copies(t)) > 1:
        summed = 2 * (copies - 1) / copies * config.layers * copied_parameters(config, t)
        each(
            "elements of keys' and values' weights' gradients",
            f"reduced over the {copies} ranks with the same heads: {summed:,.0f}",
            summed,
            lambda _, both: both["all-reduce", "tp inner gradients of heads"].elements,
        )
    each(
        "messages other than all-reduces",
        "0: nothing is gathered",
        0,
        lambda _, both: sum(traffic.messages for (operation, _), traffic in both.items() if operation != "all-reduce"),
    )
    labels, (forward, both) = ("embedding", "layers", "head", "loss"), everyone[0]["plain"]
    ahead, total = ([of(sent, label).bytes / run.args.steps / 1e6 for label in labels] for sent in (forward, both))
    series = {"forward": ahead, "backward": [b - a for a, b in zip(ahead, total, strict=True)]}
    title = f"All-reduced by each of {t} ranks in a step", f"{t} 个 rank 中每个一步 all-reduce 的发送量"
    run.draw(bars(title, ("MB sent", "发送 MB"), labels, series), chart=True)


def claim_memory(run: Run, config: GPTConfig, versions: Versions) -> None:
    """Bytes of parameters and optimizer state on a rank."""

    def measured(replica: object) -> tuple[int, int]:
        parameters, state_of = [*replica.model.parameters()], replica.optimizer.state_of
        moments = [value for p in parameters for value in state_of(p).values() if value.shape == p.shape]
        return live_bytes(parameters), live_bytes(moments)

    everyone = run.job.gather({name: measured(version.replica) for name, version in versions.items()})
    size, precision = parameters_on_a_rank(config, run.job.world_size), run.precision
    kinds = ("parameters", precision.parameters.itemsize), ("Adam's two moments", 2 * precision.master.itemsize)
    for i, (what, times) in enumerate(kinds):
        cases = [
            (f"bytes of {what} ({name}), rank {rank}", times * size, found[name][i])
            for name in versions
            for rank, found in enumerate(everyone)
        ]
        run.evidence.each(f"bytes of {what}", f"sharded / t + replicated = {times * size:,}", cases)


def claim_smoothing(run: Run, axis: Axis, model: GPT) -> None:
    """The engine's loss with label smoothing is torch's, of gathered logits; the last column is taken for padding."""
    inputs, targets = (t.to(run.job.device) for t in Text(run.args.data, run.args.sequence).batch(run.args.seed, 0, 2))
    with torch.no_grad():
        logits = model.eval()(inputs)
    vocabulary = logits.shape[-1] * axis.size - 1
    targets, mark = targets % vocabulary, Shard(2, axis.index, axis.size, vocabulary)
    logits = logits[..., : mark.length]  # shorter on one rank only
    full = comm.all_gather(logits, axis, -1)[..., :vocabulary].double().requires_grad_()
    ours = vocab_parallel_cross_entropy(logits.requires_grad_(), targets, axis, vocabulary, SMOOTHING)
    theirs = F.cross_entropy(full.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=SMOOTHING)
    gradient = torch.autograd.grad(ours.square().sum(), logits)[0]
    expected = mark.local(torch.autograd.grad(theirs.square().sum(), full)[0])

    def apart(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    everyone = run.job.gather((apart(ours.flatten(), theirs), apart(gradient, expected)))
    if everyone:
        losses, gradients = zip(*everyone, strict=True)
        on_ranks, formula = run.evidence.on_ranks, "torch's, of gathered logits in float64"
        tolerance = TOLERANCE[run.precision.name]
        name = f"loss with label smoothing {SMOOTHING}"
        on_ranks(name, formula, 0, losses, tolerance.loss, correctness=True)
        on_ranks("and its gradient", formula, 0, gradients, tolerance.gradient, correctness=True)
