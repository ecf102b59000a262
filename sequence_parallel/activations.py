"""Lecture 06: activation memory and recomputation (Megatron-LM SP 代码解析). Korthikanti et al. 2022 (2205.05198).

    torchrun --nproc_per_node=8 sequence_parallel/activations.py

The paper's table 2: the bytes that one layer keeps for backward, with tensor parallelism, sequence parallelism, and
recomputation, counted as autograd saves them in bfloat16. And the proof that recomputation changes nothing: it trains
with dropout, as one process does, and its gradients are those without recomputation to the last bit.

b samples, s tokens in a sample, h hidden, a heads, t ranks
"""

import argparse
import sys
from dataclasses import replace

import torch
from tabulate import tabulate

from core.gpt import GPT, Block, GPTConfig, materialize
from core.ledger import Ledger, SavedActivations
from core.lesson import Lesson, Run
from core.mesh import Axis, Mesh
from core.plot import bars
from core.seeded import Draw, generator
from core.training import add_model_flags, check_model, configuration
from sequence_parallel.layers import check, parallelize_block
from sequence_parallel.recompute import KINDS, recompute_block
from sequence_parallel.training import teach

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
    teach(run, config, axis, run.args.recompute)
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
        with saved:
            y = block(x, Draw(run.args.seed, 0, 0))
        found.append(saved.live / (s * b * h))
        del y
    everyone = run.job.gather(found)
    if not everyone:
        return
    rows = []
    for i, (name, _, _, _, formula, expected, surplus) in enumerate(modes):
        measured = [values[i] for values in everyone]
        rows.append((name, formula, expected, max(measured), 100 * (max(measured) / expected - 1)))
        cases = [(f"bytes saved, {name}, rank {rank}", expected, value) for rank, value in enumerate(measured)]
        and_norms = f", + {surplus:.4g} for the LayerNorms" if surplus else ""
        run.evidence.each(
            f"bytes saved by a layer / sbh, {name}",
            f"{formula} = {expected:.4g}{and_norms}",
            cases,
            surplus + 1e-9,
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


def claim_same_gradients(run: Run, config: GPTConfig, axis: Axis) -> None:
    """Recomputation is the same computation: no gradient differs in a bit."""
    gradients = []
    shape = (2, config.sequence // axis.size, config.hidden)
    for kind in KINDS:
        block = layer(run, config, axis, True, kind, run.dtype)
        x = torch.randn(shape, dtype=torch.float64, generator=generator(run.args.seed, "x", axis.index))
        x = x.to(run.job.device, run.dtype).requires_grad_()
        y = block(x, Draw(run.args.seed, 1, 0))
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    for kind, changed in list(zip(KINDS, gradients, strict=True))[1:]:
        differing = sum((a != b).sum().item() for a, b in zip(gradients[0], changed, strict=True))
        everyone = run.job.gather(differing)
        elements = axis.size * sum(g.numel() for g in changed)
        run.evidence.claim(
            f"gradients that {kind} recomputation changes", f"0 of {elements:,}, to the last bit", 0, sum(everyone)
        )


def refuse(args: argparse.Namespace, ranks: int) -> None:
    config = check_model(args)
    check(config, ranks, args.sequence)
    if config.feed_forward != 4 * config.hidden:
        raise ValueError(
            f"--feed-forward {config.feed_forward}: the paper's formulas are those of 4 times --hidden; "
            f"use --feed-forward {4 * config.hidden}"
        )
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
    frame.parser.add_argument("--recompute", choices=KINDS, default="full", help="in training (default %(default)s)")
    sys.exit(frame.main(refuse, lesson))
