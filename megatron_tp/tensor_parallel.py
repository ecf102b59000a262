"""Lecture 05: tensor parallelism, the code (Megatron-LM TP 代码解析). Shoeybi et al. 2019 (1909.08053).

    torchrun --nproc_per_node=8 megatron_tp/tensor_parallel.py

The reference GPT with its layers replaced by `layers.py`, its loss by `loss.py`, and, at the end, its dropout masks by
the two streams of `rng.py`. Everything else is the one-process code: the optimizer does not know of the other ranks.

b samples, s tokens in a sample, h hidden, V vocabulary, t ranks
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core import comm
from core.ledger import Ledger, Traffic
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import generator
from core.model.streams import RandomTracker
from core.model.text import Text
from core.proof.arguments import add_model_flags, check_cuts, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import live_bytes
from core.proof.oracle import TOLERANCE
from core.proof.plot import bars
from core.shards import Shard, shard_of
from megatron_tp.layers import parallelize
from megatron_tp.loss import vocab_parallel_cross_entropy
from megatron_tp.training import Trained, parameters_on_a_rank, teach

DROP, SMOOTHING = 0.2, 0.1
Sent = dict[tuple[str, str], Traffic]


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=run.job.world_size)["tp"]
    show_cuts(run, config, axis)
    trained = teach(run, config, axis)
    claim_traffic(run, config, axis, trained)
    claim_memory(run, config, axis, trained)
    claim_smoothing(run, config, axis, trained)
    claim_streams(run, config, axis)


def show_cuts(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Which parameter is cut how; the first layer stands for all."""
    whole = dict(GPT(config).named_parameters())
    rows = [
        (name, _shape(whole[name]), _shape(p), _how(p))
        for name, p in parallelize(GPT(config), axis).named_parameters()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    ]
    run.say(tabulate(rows, ("parameter", "whole", f"on each of {axis.size} ranks", "cut")) + "\n")


def _shape(p: Tensor) -> str:
    return " x ".join(map(str, p.shape))


def _how(p: Tensor) -> str:
    mark = shard_of(p)
    if mark is None:
        return "no"
    padding = mark.length * mark.count - mark.size
    return f"by {'rows' if mark.dim == 0 else 'columns'}" + (f", {padding} rows of padding" if padding else "")


def claim_traffic(run: Run, config: GPTConfig, axis: Axis, trained: Trained) -> None:
    """The all-reduces of a layer, and of both ends of the model."""
    everyone = run.job.gather((trained.forward.traffic, axis.ledger.traffic))
    if not everyone:
        return
    t, h, bs = axis.size, config.hidden, run.args.batch * run.args.sequence
    ring = 2 * (t - 1) / t  # elements that a rank sends to all-reduce one

    def each(claim: str, formula: str, expected: float, measure: Callable[[Sent, Sent], float]) -> None:
        values = [measure(forward, both) / run.args.steps for forward, both in everyone]
        run.evidence.on_ranks(claim, formula, expected, values, 1e-9 * expected)

    def of(sent: Sent, part: str) -> Traffic:
        return sent["all-reduce", f"tp {part}"]

    def in_layer(sent: Sent) -> float:
        return of(sent, "layers").messages / config.layers

    n = 2 * (t > 1)
    each("all-reduces of a layer, forward", "2, the paper's g", n, lambda forward, _: in_layer(forward))
    each("and backward", "2, the paper's f", n, lambda forward, both: in_layer(both) - in_layer(forward))
    whole = 4 * ring * bs * h
    each(
        "elements a layer sends a microbatch",
        f"8bsh(t-1)/t = {whole:,.0f}",
        whole,
        lambda _, both: of(both, "layers").elements / config.layers,
    )
    reduced, gathered = 3 * ring * bs, ring / 2 * bs * config.vocabulary
    each(
        "elements the loss sends",
        f"3bs, each reduced: {reduced:,.0f}; to gather bsV logits: {gathered:,.0f}",
        reduced,
        lambda _, both: of(both, "loss").elements,
    )
    for part, name in (("embedding", "g"), ("head", "f")):
        each(
            f"elements the {part} sends",
            f"bsh, reduced once, by {name}: {ring * bs * h:,.0f}",
            ring * bs * h,
            lambda _, both, part=part: of(both, part).elements,
        )
    each(
        "messages other than all-reduces",
        "0: nothing is gathered",
        0,
        lambda _, both: sum(traffic.messages for (operation, _), traffic in both.items() if operation != "all-reduce"),
    )
    if run.args.plot:
        parts, (forward, both) = ("embedding", "layers", "head", "loss"), everyone[0]
        ahead, total = ([of(sent, part).bytes / run.args.steps / 1e6 for part in parts] for sent in (forward, both))
        sent = {"forward": ahead, "backward": [b - a for a, b in zip(ahead, total, strict=True)]}
        bars(run.args.plot, f"All-reduced by each of {t} ranks in a step", "MB sent", parts, sent)


def claim_memory(run: Run, config: GPTConfig, axis: Axis, trained: Trained) -> None:
    """What a rank holds of parameters and optimizer state."""
    states = ((p, value) for p in trained.model.parameters() for value in trained.optimizer.state[p].values())
    moments = [value for p, value in states if value.shape == p.shape]
    everyone = run.job.gather((live_bytes(trained.model.parameters()), live_bytes(moments)))
    expected = parameters_on_a_rank(config, axis.size) * run.dtype.itemsize
    for i, (what, times) in enumerate((("parameters", 1), ("Adam's two moments", 2))):
        formula = f"what is cut / t + what is not = {times * expected:,}"
        run.evidence.on_ranks(f"bytes of {what}", formula, times * expected, [held[i] for held in everyone])


def claim_smoothing(run: Run, config: GPTConfig, axis: Axis, trained: Trained) -> None:
    """The loss with label smoothing is torch's, which needs the logits gathered; one column less makes it padded."""
    inputs, targets = (t.to(run.job.device) for t in Text(run.args.data, run.args.sequence).batch(run.args.seed, 0, 2))
    vocabulary = config.vocabulary - 1
    targets = targets % vocabulary
    with torch.no_grad():
        logits = trained.model.eval()(inputs)[..., : -(-vocabulary // axis.size)]
    whole = comm.all_gather(logits, axis, -1)[..., :vocabulary].requires_grad_()
    ours = vocab_parallel_cross_entropy(logits.requires_grad_(), targets, axis, vocabulary, SMOOTHING)
    theirs = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=SMOOTHING)
    mine = Shard(2, axis.index, axis.size, vocabulary).local(torch.autograd.grad(theirs.square().sum(), whole)[0])
    gradient = torch.autograd.grad(ours.square().sum(), logits)[0]
    apart = [((a - b).norm() / b.norm()).item() for a, b in ((ours.flatten(), theirs), (gradient, mine))]
    everyone, tolerance = run.job.gather(apart), TOLERANCE[run.dtype]
    if everyone:
        name, formula = f"loss with label smoothing {SMOOTHING}", "torch's, of gathered logits"
        run.evidence.on_ranks(name, formula, 0, [loss for loss, _ in everyone], tolerance.loss)
        run.evidence.on_ranks(
            "and its gradient", formula, 0, [gradient for _, gradient in everyone], tolerance.gradient
        )


class Recorded(RandomTracker):
    """Remembers the masks, by the name of the dropout."""

    masks: defaultdict[str, list[Tensor]]

    def keep_mask(self, shape: torch.Size, drop: float, name: str, *where: object) -> Tensor:
        mask = super().keep_mask(shape, drop, name, *where)
        self.masks[name].append(mask.cpu())
        return mask


def claim_streams(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Dropout from two streams of random numbers, in one layer, computed plainly and with recomputation."""
    config = replace(config, dropout=DROP, attention="softmax", layers=1)
    block = materialize(parallelize(GPT(config), axis), run.args.seed, run.job.device, run.dtype).blocks["0"]
    x = torch.randn(2, 16, config.hidden, dtype=torch.float64, generator=generator(run.args.seed, "x"))
    x = x.to(run.job.device, run.dtype).requires_grad_()
    results = []
    for recomputed in (False, True):
        tracker = Recorded(run.args.seed, axis, run.job.device)
        tracker.masks = defaultdict(list)
        again = {"use_reentrant": False, "context_fn": tracker.contexts}
        use_masks(block, tracker)
        y = checkpoint(block, x, **again) if recomputed else block(x)
        tracker.keep_mask(x.shape, DROP, "later", None, x.device)  # what is drawn meanwhile must not disturb it
        gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        tracker.keep_mask(x.shape, DROP, "later", None, x.device)  # nor be disturbed by it
        results.append((*gradients, *tracker.masks["later"]))
    changed = sum((a.cpu() != b.cpu()).sum().item() for a, b in zip(*results, strict=True))
    everyone = run.job.gather((tracker.masks, changed))
    if not everyone:
        return
    inside, outside = "blocks.0.attention.scores", "blocks.0.attention"
    masks = [{name: drawn[name][0].flatten() for name in (inside, outside)} for drawn, _ in everyone]
    claim = run.evidence.claim
    pairs = list(combinations(masks, 2))
    if pairs:
        different = sum(not torch.equal(a[outside], b[outside]) for a, b in pairs)
        same = sum(torch.equal(a[inside], b[inside]) for a, b in pairs)
        claim("dropout outside: masks that two ranks draw differently", f"0 of {len(pairs)}", 0, different)
        claim("dropout of the scores: masks that two ranks share", f"0 of {len(pairs)}", 0, same)
    shortest = min(mask.numel() for mask in masks[0].values())
    one = sum(torch.equal(mask[inside][:shortest], mask[outside][:shortest]) for mask in masks)
    claim("ranks whose two streams are one", "0", 0, one)
    for name, what in ((inside, "scores"), (outside, "outside")):
        sigma = (DROP * (1 - DROP) / masks[0][name].numel()) ** 0.5
        kept = [mask[name].double().mean().item() for mask in masks]
        run.evidence.on_ranks(f"dropout, {what}: share kept", f"1 - {DROP}, within 6 sigma", 1 - DROP, kept, 6 * sigma)
    claim("elements that recomputation changes", "0, to the last bit", 0, sum(changed for _, changed in everyone))


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check_cuts(args, ranks)
    check_model(args)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "05",
        "Megatron-LM tensor parallelism: code",
        "Megatron-LM TP 代码解析",
        "Column- and row-parallel layers, a cut vocabulary, and two streams of random numbers.",
    )
    add_model_flags(frame, heads=8, layers=4)
    frame.parser.set_defaults(steps=10)
    sys.exit(frame.main(refuse, lesson))
