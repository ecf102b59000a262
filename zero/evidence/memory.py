"""CODE 01: the paper's table of memory, and what was measured beside it."""

from collections.abc import Callable

from tabulate import tabulate

from core.model.gpt import GPT
from core.proof.arguments import configuration
from core.proof.lesson import Run
from core.proof.plot import bars

Formula = Callable[[str, int], float]  # bytes of model states for each parameter, of a kind of ZeRO on N ranks

FORMULAS = {"DP": "16Ψ", "ZeRO-1": "4Ψ + 12Ψ/N", "ZeRO-2": "2Ψ + 14Ψ/N", "ZeRO-3": "16Ψ/N"}
DEVICE = 80e9  # bytes
# The paper's table 1, GB on a device: parameters, then ZeRO-1, 2 and 3 for each N. Large figures are truncated there.
RANKS = (1, 4, 16, 64, 256, 1024)
PAPER = {
    7.5e9: ((120, 120, 120), (52.5, 41.3, 30), (35.6, 21.6, 7.5), (31.4, 16.6, 1.88), (30.4, 15.4, 0.47),
            (30.1, 15.1, 0.12)),
    128e9: ((2048, 2048, 2048), (896, 704, 512), (608, 368, 128), (536, 284, 32), (518, 263, 8), (513, 257, 2)),
    1e12: ((16000, 16000, 16000), (7000, 5500, 4000), (4750, 2875, 1000), (4187, 2218, 250), (4046, 2054, 62.5),
           (4011, 2013, 15.6)),
}  # fmt: skip


def show_paper(run: Run, formula: Formula) -> None:
    """Table 1 by the formulas, and the largest model for a device."""
    sharded = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
    header = ("N", *(f"{size / 1e9:g}B {kind}" for size in PAPER for kind in sharded))
    rows = [(n, *(size * formula(kind, n) / 1e9 for size in PAPER for kind in sharded)) for n in RANKS]
    run.say("GB of model states on a device, calculated (the paper's table 1)")
    run.say(tabulate(rows, header, floatfmt=".4g") + "\n")
    largest = [(n, *(DEVICE / formula(kind, n) / 1e9 for kind in FORMULAS)) for n in RANKS]
    run.say(f"the largest model whose states fit {DEVICE / 1e9:g} GB, in 10^9 parameters, calculated")
    run.say(tabulate(largest, ("N", *FORMULAS), floatfmt=".4g") + "\n")
    if run.job.rank:
        return
    for i, kind in enumerate(sharded):
        apart = []  # in units of the last digit that the paper prints
        for size, table in PAPER.items():
            for n, paper in zip(RANKS, table, strict=True):
                last_digit = next(10.0**-digits for digits in range(4) if round(paper[i], digits) == paper[i])
                apart.append(abs(size * formula(kind, n) / 1e9 - paper[i]) / last_digit)
        what = f"{FORMULAS[kind]} against the paper's table, in its last digit"
        run.evidence.claim(what, "less than 1 apart in all 18", 0, max(apart), 1.0)


def claim_memory(run: Run, formula: Formula, measured: dict[str, list[dict[str, int]]]) -> None:
    """Args: measured: by kind and rank; empty but on rank 0."""
    if run.job.rank:
        return
    config, n = configuration(run.args), run.job.world_size
    model = GPT(config)
    size = sum(p.numel() for p in model.parameters())
    rows = []
    for kind, ranks in measured.items():
        states = [rank["weights"] + rank["gradients"] + rank["optimizer"] for rank in ranks]
        expected, padding = size * formula(kind, n), ranks[0]["padding"]
        run.evidence.on_ranks(
            f"bytes of model states, {kind}",
            f"{FORMULAS[kind]} = {expected:,.0f}, within 1 % and {padding} elements of padding",
            expected,
            states,
            0.01 * expected + 16 * padding,
        )
        most = {what: max(rank[what] for rank in ranks) / size for what in ranks[0]}
        rows.append(
            (kind, most["weights"], most["gradients"], most["optimizer"], max(states) / size, formula(kind, n),
             most["activations"], most["most all"])
        )  # fmt: skip

    layer = sum(p.numel() for p in model.blocks["0"].parameters())
    ends = size - config.layers * layer
    expected = 2 * (size / n + ends + min(2, config.layers) * layer)
    run.evidence.on_ranks(
        "bytes of weights at the peak, ZeRO-3",
        f"2Ψ/N, and live both ends and two layers: {expected:,.0f}, within 1 % and padding",
        expected,
        [rank["most weights"] for rank in measured["ZeRO-3"]],
        0.01 * expected + 4 * measured["ZeRO-3"][0]["padding"],
    )

    run.say(f"\nbytes for each of {size:,} parameters, measured on {n} ranks in mixed precision")
    header = ("", "weights", "gradients", "optimizer", "states", "paper", "saved activations", "states at the peak")
    run.say(tabulate(rows, header, floatfmt=".3f"))
    if run.args.plot:
        columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if 1 <= i <= 5}
        bars(run.args.plot, f"Model states on each of {n} ranks", "bytes a parameter", [*measured], columns)
