"""CODE 01: ZeRO's memory in practice (ZeRO 显存优化实践). Rajbhandari et al. 2019 (1910.02054), table 1.

    torchrun --nproc_per_node=8 zero/memory.py

The paper's table, calculated; and beside it the same quantities measured, on a model that runs here: the bytes of
weights, gradients and optimizer state that each rank holds after a backward, in mixed precision as in the paper: 2-byte
weights and gradients, and 4-byte weights, momentum and variance for Adam (K = 12).

Ψ parameters, N ranks
"""

import sys
from functools import partial

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import SavedActivations
from core.proof.plot import bars
from zero.ddp import DataParallel
from zero.stage import Stage
from zero.training import add_flags, check, teach
from zero.zero1 import Zero1
from zero.zero2 import Zero2
from zero.zero3 import Zero3

STAGES: dict[str, type[Stage]] = {"DP": DataParallel, "ZeRO-1": Zero1, "ZeRO-2": Zero2, "ZeRO-3": Zero3}
FORMULAS = {"DP": "16Ψ", "ZeRO-1": "4Ψ + 12Ψ/N", "ZeRO-2": "2Ψ + 14Ψ/N", "ZeRO-3": "16Ψ/N"}
ELEMENTS = {"DP": lambda m: 2, "ZeRO-1": lambda m: 2, "ZeRO-2": lambda m: m + 1, "ZeRO-3": lambda m: 3 * m}
# The paper's table 1, GB on a device: parameters, then stages 1, 2, 3 for each N. Large figures are cut, not rounded.
RANKS = (1, 4, 16, 64, 256, 1024)
PAPER = {
    7.5e9: ((120, 120, 120), (52.5, 41.3, 30), (35.6, 21.6, 7.5), (31.4, 16.6, 1.88), (30.4, 15.4, 0.47),
            (30.1, 15.1, 0.12)),
    128e9: ((2048, 2048, 2048), (896, 704, 512), (608, 368, 128), (536, 284, 32), (518, 263, 8), (513, 257, 2)),
    1e12: ((16000, 16000, 16000), (7000, 5500, 4000), (4750, 2875, 1000), (4187, 2218, 250), (4046, 2054, 62.5),
           (4011, 2013, 15.6)),
}  # fmt: skip
DEVICE = 80e9  # bytes


def formula(stage: str, n: int) -> float:
    """Bytes for each parameter on a device."""
    return {"DP": 16, "ZeRO-1": 4 + 12 / n, "ZeRO-2": 2 + 14 / n, "ZeRO-3": 16 / n}[stage]


def show_paper(run: Run) -> None:
    """Table 1 by the formulas, and the largest model for a device."""
    stages = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
    header = ("N", *(f"{size / 1e9:g}B {stage}" for size in PAPER for stage in stages))
    rows = [(n, *(size * formula(stage, n) / 1e9 for size in PAPER for stage in stages)) for n in RANKS]
    run.say("GB of model states on a device, calculated (the paper's table 1)")
    run.say(tabulate(rows, header, floatfmt=".4g") + "\n")
    largest = [(n, *(DEVICE / formula(stage, n) / 1e9 for stage in STAGES)) for n in RANKS]
    run.say(f"the largest model whose states fit {DEVICE / 1e9:g} GB, in 10^9 parameters, calculated")
    run.say(tabulate(largest, ("N", *STAGES), floatfmt=".4g") + "\n")
    if run.job.rank == 0:
        for i, stage in enumerate(stages):
            apart = [
                abs(size * formula(stage, n) / 1e9 - paper[i]) / _digit(paper[i])
                for size, table in PAPER.items()
                for n, paper in zip(RANKS, table, strict=True)
            ]
            what = f"{FORMULAS[stage]} against the paper's table, in its last digit"
            run.evidence.claim(what, "less than 1 apart in all 18", 0, max(apart), 1.0)


def _digit(figure: float) -> float:
    """One unit of the last digit that the paper prints of this figure."""
    text = f"{figure:g}"
    return 10.0 ** -len(text.partition(".")[2])


def measure(run: Run, config: GPTConfig, axis: Axis, stage_of: type[Stage]) -> dict[str, int]:
    """Two steps of training in mixed precision; what this rank holds after the second backward, and the most it did."""
    args = run.args
    model = materialize(GPT(config), args.seed, run.job.device, torch.bfloat16)
    stage = stage_of(model, axis, partial(torch.optim.AdamW, lr=args.lr), None, torch.float32, args.bucket)
    inputs, targets = (t.to(run.job.device) for t in Text(args.data, args.sequence).batch(args.seed, 0, args.batch))
    inputs, targets = (t.chunk(axis.size)[axis.index] for t in (inputs, targets))
    most = {"weights": 0, "all": 0}

    def sample(*_: object) -> None:
        now = stage.held()
        now["all"] = sum(now.values())
        for what in most:
            most[what] = max(most[what], now[what])

    for block in model.blocks.values():
        block.register_forward_hook(sample)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(sample)
    for _ in range(2):  # the optimizer has no state before its first step
        stage.zero_grad()
        saved = SavedActivations([*model.parameters(), inputs, targets])
        with saved:
            loss = token_loss(model(inputs), targets, args.batch * args.sequence)
        stage.backward(loss)
        held = stage.held()
        stage.clip_and_total(args.clip, loss.detach())
        stage.step()
    padding = sum(bucket.padded - bucket.size for bucket in stage.buckets)
    return (
        held
        | {"padding": padding}
        | {f"most {what}": value for what, value in most.items()}
        | {"activations": saved.peak}
    )


def lesson(run: Run) -> None:
    config, n = configuration(run.args), run.job.world_size
    show_paper(run)
    teach(run, STAGES[run.args.stage], lambda m, _: ELEMENTS[run.args.stage](m))
    size = sum(p.numel() for p in GPT(config).parameters())
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, dp=n)["dp"]
    measured = {name: run.job.gather(measure(run, config, axis, kind)) for name, kind in STAGES.items()}
    if run.job.rank:
        return
    rows = []
    for name, ranks in measured.items():
        states = [rank["weights"] + rank["gradients"] + rank["optimizer"] for rank in ranks]
        expected, padding = size * formula(name, n), ranks[0]["padding"]
        run.evidence.each(
            f"bytes of model states, {name}",
            f"{FORMULAS[name]} = {expected:,.0f}, within 1 % and {padding} elements of padding",
            [(f"bytes of model states, {name}, rank {rank}", expected, value) for rank, value in enumerate(states)],
            0.01 * expected + 16 * padding,
        )
        kinds = ("weights", "gradients", "optimizer", "activations", "most all")
        rows.append((name, *(max(rank[kind] for rank in ranks) / size for kind in kinds[:3]), max(states) / size,
                     formula(name, n), *(max(rank[kind] for rank in ranks) / size for kind in kinds[3:])))  # fmt: skip
    block = sum(p.numel() for p in GPT(config).blocks["0"].parameters())
    live = size - config.layers * block + min(2, config.layers) * block
    expected = 2 * (size / n + live)
    run.evidence.each(
        "bytes of weights at the peak, ZeRO-3",
        f"2Ψ/N, and live both ends and two layers: {expected:,.0f}, within 1 % and padding",
        [
            (f"weights at the peak, rank {rank}", expected, r["most weights"])
            for rank, r in enumerate(measured["ZeRO-3"])
        ],
        0.01 * expected + 4 * measured["ZeRO-3"][0]["padding"],
    )
    run.say(f"\nbytes for each of {size:,} parameters, measured on {n} ranks in mixed precision")
    header = ("", "weights", "gradients", "optimizer", "states", "paper", "saved activations", "states at the peak")
    run.say(tabulate(rows, header, floatfmt=".3f"))
    if run.args.plot:
        columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if 1 <= i <= 5}
        bars(run.args.plot, f"Model states on each of {n} ranks", "bytes a parameter", [*STAGES], columns)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 01",
        "ZeRO memory optimisation in practice",
        "ZeRO 显存优化实践",
        "The paper's table of memory, and the same measured on a model that runs here.",
    )
    add_flags(frame)
    frame.parser.add_argument(
        "--stage", choices=tuple(STAGES), default="ZeRO-3", help="to train with (default %(default)s)"
    )
    sys.exit(frame.main(check, lesson))
