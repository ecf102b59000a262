"""CODE 01: the paper's table of memory, and what was measured beside it."""

from collections.abc import Callable

from tabulate import tabulate

from core.model.gpt import GPT
from core.model.precision import Precision
from core.proof.arguments import configuration
from core.proof.figures import bars
from core.proof.lesson import Run

Formula = Callable[..., float]  # bytes of model states for each parameter, of a kind of ZeRO, on N ranks, by a policy

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


def written(kind: str, precision: Precision) -> str:
    """The formula, with this policy's numbers: of the paper's, 4Ψ + 12Ψ/N for ZeRO-1."""
    weight, gradient, k = precision.parameters.itemsize, precision.gradients.itemsize, precision.optimizer_bytes
    return {
        "DP": f"{weight + gradient + k}Ψ",
        "ZeRO-1": f"{weight + gradient}Ψ + {k}Ψ/N",
        "ZeRO-2": f"{weight}Ψ + {gradient + k}Ψ/N",
        "ZeRO-3": f"{weight + gradient + k}Ψ/N",
    }[kind]


def claim_memory(
    run: Run, precision: Precision, whose: str, formula: Formula, measured: dict[str, list[dict[str, int]]]
) -> None:
    """What was measured with one policy, against its formulas.

    Args:
        whose: policy that is.
        measured: by kind and rank; empty but on rank 0.
    """
    if run.job.rank:
        return
    config, n = configuration(run.args), run.job.world_size
    model = GPT(config)
    size = sum(p.numel() for p in model.parameters())
    rows = []
    for kind, ranks in measured.items():
        states = [rank["weights"] + rank["gradients"] + rank["optimizer"] for rank in ranks]
        expected, padding = size * formula(kind, n, precision), ranks[0]["padding"]
        run.evidence.on_ranks(
            f"bytes of model states, {kind}, {precision.name}",
            f"{written(kind, precision)} = {expected:,.0f}, within 1 % and {padding} elements of padding",
            expected,
            states,
            0.01 * expected + precision.bytes * padding,
        )
        most = {what: max(rank[what] for rank in ranks) / size for what in ranks[0]}
        rows.append(
            (kind, most["weights"], most["gradients"], most["optimizer"], max(states) / size,
             formula(kind, n, precision), most["activations"], most["most all"])
        )  # fmt: skip

    layer = sum(p.numel() for p in model.blocks["0"].parameters())
    ends = size - config.layers * layer
    weight = precision.parameters.itemsize
    expected = weight * (size / n + ends + min(2, config.layers) * layer)
    run.evidence.on_ranks(
        f"bytes of weights at the peak, ZeRO-3, {precision.name}",
        f"{weight}Ψ/N, and live both ends and two layers: {expected:,.0f}, within 1 % and padding",
        expected,
        [rank["most weights"] for rank in measured["ZeRO-3"]],
        0.01 * expected + 2 * weight * measured["ZeRO-3"][0]["padding"],
    )

    run.say(f"\nbytes for each of {size:,} parameters, measured on {n} ranks, with {whose} policy ({precision.name})")
    header = ("", "weights", "gradients", "optimizer", "states", "formula", "saved activations", "states at the peak")
    run.say(tabulate(rows, header, floatfmt=".3f"))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if 1 <= i <= 3}
    title = (
        f"Model states on each of {n} ranks, {whose} policy ({precision.name})",
        f"{n} 个 rank 上每个的模型状态（{precision.name}）",
    )
    unit, formulas = ("bytes a parameter", "字节/参数"), " · ".join(f"{k} {written(k, precision)}" for k in measured)
    expected = [formula(kind, n, precision) for kind in measured]
    figure = bars(title, unit, [*measured], columns, stacked=True, expected=expected, formula=formulas)
    run.draw(figure, chart=whose == "the paper's")


# What the course's practice prints of 4 GPUs: peaks in GB, what they save in %, and what it calls the theory.
COURSE = {"ZeRO-1": ("0.169", "47.3", "56.2"), "ZeRO-2": ("0.135", "57.8", "65.6"), "ZeRO-3": ("0.136", "57.4", "75.0")}
OFF = {
    "ZeRO-1": "The theory is that of 16-bit weights (2 + 2 + 12), and the run is in float32 (4 + 4 + 8). Six tensors "
    "are dealt to four ranks, so one rank has none; only rank 0 is printed.",
    "ZeRO-2": "The same; and DDP's peak, 0.320 GB, counts its copy of the gradients in buckets.",
    "ZeRO-3": "All layers are gathered at once, so the peak is no lower than ZeRO-2's.",
}


def show_course(run: Run, formula: Formula, precision: Precision) -> None:
    """The course's figures, and what they should be by the formula that this lesson has measured."""
    rows = []
    for kind, (peak, saved, theory) in COURSE.items():
        right = 100 * (1 - formula(kind, 4, precision) / formula("DP", 4, precision))
        rows.append((f"{kind}, 4 ranks", f"{peak} GB, saves {saved} %, theory {theory} %", f"{right:g} %", OFF[kind]))
    run.say_course(rows)
