"""Lecture 06: activation memory and recomputation (Megatron-LM SP 代码解析). Korthikanti et al. 2022 (2205.05198).

    torchrun --nproc_per_node=8 sequence_parallel/activations.py

The paper's table 2: the bytes that one layer keeps for backward, with tensor parallelism, sequence parallelism, and
recomputation, counted as autograd saves them in bfloat16. And the proof that recomputation changes nothing: with it a
GPT trains as one process does, dropout included, and the gradients of a layer are the same to the last bit.

b samples, s tokens in a sample, h hidden, a heads, t ranks
"""

import argparse
import sys
from dataclasses import replace

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, Block, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks, generator
from core.model.streams import RandomTracker
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations
from core.proof.plot import bars
from sequence_parallel.layers import check, parallelize_block
from sequence_parallel.recompute import KINDS, recompute_block
from sequence_parallel.training import Trained, teach

MEASURED = torch.bfloat16  # the paper counts 16-bit activations, and dropout masks of one byte


def layer(run: Run, config: GPTConfig, axis: Axis | None, sequence: bool, kind: str, dtype: torch.dtype) -> Block:
    """The first layer of the model, cut over `axis` or whole (None)."""
    model = GPT(replace(config, layers=1))
    if axis is not None:
        parallelize_block(model.blocks["0"], axis, sequence)
    return recompute_block(materialize(model, run.args.seed, run.job.device, dtype).blocks["0"], kind)


def lesson(run: Run) -> None:
    config = configuration(run.args)
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=run.job.world_size)["tp"]
    claim_computed(run, config, teach(run, config, axis, run.args.recompute))
    claim_bytes(run, config, axis)
    claim_same_gradients(run, config, axis)


def claim_bytes(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Measure one layer in every mode, against the paper's formula."""
    a, s, h, b, t = config.heads, run.args.sequence, config.hidden, run.args.batch, axis.size
    core = 5 * a * s / h  # scores, their softmax and its mask, in units of sbh bytes
    norms = 4 * statistics_bytes(run) / h  # mean and deviation of each token in two LayerNorms
    modes = [
        ("one process", None, False, "none", "34 + 5as/h", 34 + core, norms),
        ("TP", axis, False, "none", "10 + 24/t + 5as/(ht)", 10 + 24 / t + core / t, norms),
        ("TP + SP", axis, True, "none", "(34 + 5as/h)/t", (34 + core) / t, norms / t),
        ("TP, selective", axis, False, "selective", "10 + 24/t", 10 + 24 / t, norms),
        ("TP + SP, selective", axis, True, "selective", "34/t", 34 / t, norms / t),
        ("TP, full", axis, False, "full", "2", 2, 0),
        ("TP + SP, full", axis, True, "full", "2/t", 2 / t, 0),
    ]
    found = []
    for _, where, sequence, kind, *_ in modes:
        block = layer(run, config, where, sequence, kind, MEASURED)
        x = torch.ones(b, s // t if sequence else s, h, dtype=MEASURED, device=run.job.device, requires_grad=True)
        saved = SavedActivations(block.parameters())
        use_masks(block, SampleMasks(run.args.seed))
        with saved:
            y = block(x)
        found.append(saved.live / (s * b * h))
        del y
    everyone = run.job.gather(found)
    if not everyone:
        return
    rows = []
    for i, (name, _, _, _, formula, expected, surplus) in enumerate(modes):
        measured = [values[i] for values in everyone]
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


def statistics_bytes(run: Run) -> int:
    """Of one number that a LayerNorm keeps of a token: it depends on the device."""
    x = torch.ones(1, 8, dtype=MEASURED, device=run.job.device)
    return torch.native_layer_norm(x, (8,), None, None, 1e-5)[1].dtype.itemsize


def claim_computed(run: Run, config: GPTConfig, trained: Trained) -> None:
    """How often the training has computed what it was told to recompute."""
    everyone = run.job.gather(trained.computed)
    kind = run.args.recompute
    for part, n in (("attention core", 1 if kind == "none" else 2), ("layer", 2 if kind == "full" else 1)):
        times = [computed[part] / (config.layers * run.args.steps) for computed in everyone]
        if everyone:
            run.evidence.on_ranks(f"times each {part} is computed a step", f"{n}, with {kind} recomputation", n, times)


def claim_same_gradients(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Recomputation is the same computation, to the last bit, though random numbers were drawn in between."""
    shape = (2, run.args.sequence // axis.size, config.hidden)
    gradients, counts = [], []
    for kind in KINDS:
        block = layer(run, config, axis, True, kind, run.dtype)
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


def refuse(args: argparse.Namespace, ranks: int) -> None:
    if args.feed_forward not in (0, 4 * args.hidden):
        raise ValueError(
            f"--feed-forward {args.feed_forward}: the paper's formulas are those of 4 times --hidden; "
            f"use --feed-forward 0"
        )
    check(args, ranks)
    check_model(args)
    if args.attention != "softmax" or not args.dropout:
        raise ValueError(
            f"--attention {args.attention} --dropout {args.dropout}: the paper's formulas count every intermediate of "
            "attention, and three dropout masks; use --attention softmax --dropout 0.1"
        )


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Activation memory and recomputation",
        "Megatron-LM SP 代码解析",
        "The bytes that a layer keeps for backward, cut by tensor and sequence parallelism and by recomputation.",
    )
    add_model_flags(frame, heads=8, layers=2, hidden=128, batch=8, attention="softmax", dropout=0.1)
    frame.parser.set_defaults(steps=10)
    frame.parser.add_argument("--recompute", choices=KINDS, default="full", help="in training (default %(default)s)")
    sys.exit(frame.main(refuse, lesson))
