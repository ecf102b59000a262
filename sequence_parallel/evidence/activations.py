"""What `activations.py` claims: what a layer keeps, and that recomputation computes twice and changes nothing.

b samples, s tokens in a sample, h hidden, a heads, t ranks
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from core.mesh import Axis
from core.model.gpt import GPT, Block, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks, generator
from core.model.sharding import key_value_rows
from core.model.streams import RandomTracker
from core.proof.figures import bars
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from sequence_parallel.engine.layers import parallelize_block
from sequence_parallel.engine.recompute import KINDS, recompute_block

MEASURED = torch.bfloat16  # the paper counts 16-bit activations, and dropout masks of one byte
CORE_TWICE = ("selective", "operators", "full")  # where the core makes the matrix of scores
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


def table_of_llama(config: GPTConfig, b: int, t: int) -> dict[str, tuple[str, float]]:
    """What the paper's table says of GPT, counted in the same way: bytes of one layer in units of sbh.

    2 norms' input and output 8, 2 masks; of attention Q, K, V, for each head of Q, and the output 8q, its scores as in
    the paper; of the MLP the gate, its silu, up and their product 8f. Selective recomputation keeps K and V as they are
    before they are repeated. Without what is pointwise 4 of the norms and 4f of the MLP are gone; by operators, the
    masks and what attention makes too. r: the cosines and sines of a sample's positions, in float32.

    q features of all queries, k of a rank's keys, D of a head
    """
    h, d, f = config.hidden, config.head_dim, config.feed_forward
    q, k = config.query_size, key_value_rows(config, t) // 2
    scores, r = 5 * config.heads * config.sequence, 4 * d / (b * h)
    inside = (8 * q + 8 * f + scores) / h
    kept = (4 * q + 8 * f) / (h * t) + 4 * k / h + r
    text, selective = "(8q + 8f + 5as)/(ht) + r", "(4q + 8f)/(ht) + 4k/h + r"
    fewer, least = text.replace("8f", "4f"), selective.replace("8f", "4f")
    products = 4 * f / (h * t)
    return {
        "one process": ("10 + (8q + 8f + 5as)/h + r", 10 + inside + r),
        "TP": (f"10 + {text}", 10 + inside / t + r),
        "TP + SP": (f"10/t + {text}", (10 + inside) / t + r),
        "TP + SP, plain": (f"4 + 6/t + {text}", 4 + (6 + inside) / t + r),
        "TP, selective": (f"10 + {selective}", 10 + kept),
        "TP + SP, selective": (f"10/t + {selective}", 10 / t + kept),
        "TP, pointwise": (f"6 + {fewer}", 6 + inside / t - products + r),
        "TP + SP, pointwise": (f"6/t + {fewer}", (6 + inside) / t - products + r),
        "TP, operators": (f"4 + {least}", 4 + kept - products),
        "TP + SP, operators": (f"4/t + {least}", 4 / t + kept - products),
        "TP, full": ("2", 2),
        "TP + SP, full": ("2/t", 2 / t),
    }


def claim_bytes(
    run: Run, config: GPTConfig, axis: Axis, paper: Mapping[str, tuple[str, float]], plain: Parallelize
) -> None:
    """Measure one layer in every mode of the paper's table."""
    s, h, b, t = run.args.sequence, config.hidden, run.args.batch, axis.size
    numbers = ("mean", "deviation") if config.norm == "layer" else ("scale",)
    norms = 2 * len(numbers) * 4 / h  # of each token in two norms, in float32
    modes: dict[
        str, tuple[Parallelize | None, str, int]
    ] = {  # how sharded, what is recomputed, over how many ranks s is
        "one process": (None, "none", 1),
        "TP": (tensor_parallel, "none", 1),
        "TP + SP": (sequence_parallel, "none", t),
        "TP + SP, plain": (plain, "none", t),
    }
    for kind in KINDS[1:]:
        modes |= {f"TP, {kind}": (tensor_parallel, kind, 1), f"TP + SP, {kind}": (sequence_parallel, kind, t)}
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
        surplus = norms / ranks if kind in ("none", "selective") else 0.0  # the others forget it
        measured = [values[name] for values in everyone]
        rows.append((name, formula, expected, max(measured), 100 * (max(measured) / expected - 1)))
        and_norms = f", + {surplus:.4g} for the norms" if surplus else ""
        run.evidence.on_ranks(
            f"bytes saved / sbh, {name}", f"{formula} = {expected:.4g}{and_norms}", expected + surplus, measured, 1e-9
        )
    run.say("\nbytes that one layer keeps for backward, in units of sbh")
    whose = "paper" if config.norm == "layer" else "counted"
    run.say(tabulate(rows, ("", whose, "", "measured", "surplus %"), floatfmt=".4f"))
    pairs = {whose: [row[2] for row in rows], "measured": [row[3] for row in rows]}
    title = f"What a layer keeps for backward, t = {t}", f"一层为反向保存的量，t = {t}"
    run.draw(bars(title, ("bytes / sbh", "字节 / sbh"), [row[0] for row in rows], pairs), chart=True)
    run.say(f"The surplus: both norms keep the {' and the '.join(numbers)} of each token, which the paper leaves out.")


def products_again(config: GPTConfig, b: int, t: int, kind: str) -> tuple[str, float]:
    """FLOP of matrix products of one layer that a rank computes twice: 2 a weight and token, 2 a score and feature.

    Of GPT, f = 4h, all are 24bsh^2/t + 4bs^2h/t. Of attention's two products one is enough, QK^T: what the other reads
    is there before it is computed, and then torch stops. (Full: a mask is drawn after the last product.)
    """
    s, h, q, f = config.sequence, config.hidden, config.query_size, config.feed_forward
    rows = q // t + key_value_rows(config, t) + q // t  # of Q, K and V, and of the output
    scores = 2 * b * s * s * q / t
    products = 2 * b * s * (h * rows + (3 if config.gated else 2) * h * f / t)
    if kind == "full":
        return "2bs(weights) + 4bs^2q/t", products + 2 * scores
    return ("2bs^2q/t", scores) if kind in CORE_TWICE else ("0", 0.0)


def claim_flops(run: Run, config: GPTConfig, axis: Axis) -> None:
    """What backward computes more than without recomputation, as torch counts the FLOP of matrix products."""
    b, s, t = run.args.batch, run.args.sequence, axis.size
    found = {}
    for kind in KINDS:
        block = layer(run, config, axis, sequence_parallel, kind, run.dtype)
        use_masks(block, SampleMasks(run.args.seed))
        y = block(torch.ones(b, s // t, config.hidden, dtype=run.dtype, device=run.job.device, requires_grad=True))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        found[kind] = counter.get_total_flops()
    everyone = run.job.gather(found)
    if not everyone:
        return
    rows, (_, layer_forward) = [], products_again(config, b, t, "full")
    for kind in KINDS:
        formula, expected = products_again(config, b, t, kind)
        measured = [values[kind] - values["none"] for values in everyone]
        run.evidence.on_ranks(f"FLOP computed again, {kind}", f"{formula} = {expected:.5g}", expected, measured, 1e-9)
        rows.append((kind, formula, expected, max(measured), 100 * max(measured) / layer_forward))
    run.say("\nFLOP of matrix products that one layer computes again, TP + SP")
    run.say(tabulate(rows, ("", "counted", "", "measured", "% of forward"), floatfmt=(".0f",) * 4 + (".1f",)))


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
    for part, n in (("attention core", 2 if kind in CORE_TWICE else 1), ("layer", 2 if kind == "full" else 1)):
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
            n = 2 if kind in CORE_TWICE else 1
            run.evidence.on_ranks(f"attention computed, {kind}", f"{n} times", n, [count for _, count in everyone])
