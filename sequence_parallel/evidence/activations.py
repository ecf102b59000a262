"""What `activations.py` claims: what a layer keeps, and that recomputation computes twice and changes nothing.

b samples, s tokens in a sample, h hidden, a heads, t ranks
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tabulate import tabulate

from core.mesh import Axis
from core.model.gpt import GPT, Block, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks, generator
from core.model.streams import RandomTracker
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from core.proof.plot import bars
from sequence_parallel.engine.layers import parallelize_block
from sequence_parallel.engine.recompute import KINDS, recompute_block

MEASURED = torch.bfloat16  # the paper counts 16-bit activations, and dropout masks of one byte
Parallelize = Callable[[GPT, Axis], GPT]


def tensor_parallel(model: GPT, axis: Axis) -> GPT:
    parallelize_block(model.blocks["0"], axis, sequence=False)
    return model


def sequence_parallel(model: GPT, axis: Axis) -> GPT:
    parallelize_block(model.blocks["0"], axis)
    return model


def layer(
    run: Run, config: GPTConfig, axis: Axis, parallelize: Parallelize | None, kind: str, dtype: torch.dtype
) -> Block:
    """The first layer of the model, sharded by `parallelize` or full (None)."""
    model = GPT(replace(config, layers=1))
    if parallelize:
        parallelize(model, axis)
    return recompute_block(materialize(model, run.args.seed, run.job.device, dtype).blocks["0"], kind)


def claim_bytes(
    run: Run, config: GPTConfig, axis: Axis, paper: Mapping[str, tuple[str, float]], plain: Parallelize
) -> None:
    """Measure one layer in every mode of the paper's table."""
    s, h, b, t = run.args.sequence, config.hidden, run.args.batch, axis.size
    norms = 2 * 2 * 4 / h  # mean and deviation of each token in two LayerNorms, in float32
    modes: dict[
        str, tuple[Parallelize | None, str, int]
    ] = {  # how sharded, what is recomputed, over how many ranks s is
        "one process": (None, "none", 1),
        "TP": (tensor_parallel, "none", 1),
        "TP + SP": (sequence_parallel, "none", t),
        "TP + SP, plain": (plain, "none", t),
        "TP, selective": (tensor_parallel, "selective", 1),
        "TP + SP, selective": (sequence_parallel, "selective", t),
        "TP, full": (tensor_parallel, "full", 1),
        "TP + SP, full": (sequence_parallel, "full", t),
    }
    found = {}
    for name, (parallelize, kind, ranks) in modes.items():
        block = layer(run, config, axis, parallelize, kind, MEASURED)
        x = torch.ones(b, s // ranks, h, dtype=MEASURED, device=run.job.device, requires_grad=True)
        saved = SavedActivations(block.parameters())
        use_masks(block, SampleMasks(run.args.seed))
        with saved:
            y = block(x)
        found[name] = saved.live / (s * b * h)
        del y
    everyone = run.job.gather(found)
    if not everyone:
        return
    rows = []
    for name, (formula, expected) in paper.items():
        _, kind, ranks = modes[name]
        surplus = 0.0 if kind == "full" else norms / ranks
        measured = [values[name] for values in everyone]
        rows.append((name, formula, expected, max(measured), 100 * (max(measured) / expected - 1)))
        and_norms = f", + {surplus:.4g} for the LayerNorms" if surplus else ""
        run.evidence.on_ranks(
            f"bytes saved / sbh, {name}", f"{formula} = {expected:.4g}{and_norms}", expected + surplus, measured, 1e-9
        )
    run.say("\nbytes that one layer keeps for backward, in units of sbh")
    run.say(tabulate(rows, ("", "paper", "", "measured", "surplus %"), floatfmt=".4f"))
    if run.args.plot:
        pairs = {"paper": [row[2] for row in rows], "measured": [row[3] for row in rows]}
        bars(run.args.plot, f"What a layer keeps for backward, t = {t}", "bytes / sbh", [row[0] for row in rows], pairs)
    run.say("The surplus: both LayerNorms keep the mean and the deviation of each token, which the paper leaves out.")


def count_computed(model: GPT) -> Counter[str]:
    """Counts from now on how often attention cores and layers are computed, over all layers."""
    computed: Counter[str] = Counter()
    for block in model.blocks.values():
        for part, module in (("attention core", block.attention.dropout), ("layer", block.mlp_dropout)):
            module.register_forward_pre_hook(lambda *_, part=part: computed.update([part]))
    return computed


def claim_computed(run: Run, config: GPTConfig, computed: Mapping[str, Counter[str]]) -> None:
    """How often the training has computed what it was told to recompute."""
    everyone = run.job.gather(dict(computed))
    kind, times = run.args.recompute, config.layers * run.args.steps
    for part, n in (("attention core", 1 if kind == "none" else 2), ("layer", 2 if kind == "full" else 1)):
        claim = f"times each {part} is computed a step"
        cases = [
            (f"{claim} ({name}), rank {rank}", n, counts[name][part] / times)
            for name in computed
            for rank, counts in enumerate(everyone)
        ]
        if everyone:
            run.evidence.each(claim, f"{n}, with {kind} recomputation", cases)


def claim_same_gradients(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Recomputation is the same computation, to the last bit, though random numbers were drawn in between."""
    shape = (2, run.args.sequence // axis.size, config.hidden)
    gradients, counts = [], []
    for kind in KINDS:
        block = layer(run, config, axis, sequence_parallel, kind, run.dtype)
        calls = []
        block.attention.dropout.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        x = torch.randn(shape, dtype=torch.float64, generator=generator(run.args.seed, "x", axis.index))
        x = x.to(run.job.device, run.dtype).requires_grad_()
        tracker = use_masks(block, RandomTracker(run.args.seed, axis, run.job.device))
        y = block(x)
        tracker.keep_mask(x.shape, run.args.dropout, "later", None, x.device)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
        counts.append(len(calls))
    for kind, changed, count in list(zip(KINDS, gradients, counts, strict=True))[1:]:
        differing = sum((a != b).sum().item() for a, b in zip(gradients[0], changed, strict=True))
        everyone = run.job.gather((differing, count))
        elements = axis.size * sum(g.numel() for g in changed)
        if everyone:
            name = f"gradients that {kind} recomputation changes"
            run.evidence.claim(name, f"0 of {elements:,}, to the last bit", 0, sum(n for n, _ in everyone))
            run.evidence.on_ranks(f"attention computed, {kind}", "twice", 2, [count for _, count in everyone])
