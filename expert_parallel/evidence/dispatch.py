"""What `dispatch.py` shows and claims: what the ranks exchange, what they hold, and the all-gather beside it."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate

from core.ledger import Traffic
from core.mesh import axis_groups
from core.model.gpt import GPT, materialize
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.figures import bars, grid, path
from core.proof.lesson import Run
from core.proof.memory import live_bytes
from core.proof.oracle import TOLERANCE
from expert_parallel.engine.layers import DISPATCHERS, parallelize
from expert_parallel.engine.moe import MoE, to_moe
from expert_parallel.engine.router import Choice, Spread
from expert_parallel.engine.routing import MoEConfig
from expert_parallel.evidence.training import Trained, Version, mesh_of

ROWS, COUNTS = ("all-to-all", "ep"), ("all-to-all", "ep counts")  # in the ledger


class Sent(NamedTuple):
    """What one rank exchanged in all layers and steps."""

    chosen: list[int]  # rows for each rank of ep, counted from what the router chose
    forward: float  # elements in all-to-alls of rows
    backward: float
    counts: Traffic  # of token counts


def rows_to(version: Version, choice: Choice, experts: int) -> list[int]:
    """The rows of this rank for each rank of ep, counted from what the router chose."""
    ep = version.mesh["ep"].size
    chosen = choice.experts if choice.kept is None else choice.experts[choice.kept]
    return torch.bincount(chosen.flatten() // (experts // ep), minlength=ep).tolist()


def show_dispatch(run: Run, trained: Trained) -> None:
    version, experts = trained.versions["plain"], run.args.experts
    ep = version.mesh["ep"]
    everyone = run.job.gather((ep.ranks, rows_to(version, version.record.choices[0][0], experts)))
    if not everyone:
        return
    here = experts // ep.size
    first = [rows for ranks, rows in everyone if ranks == ep.ranks]
    header = [f"to rank {r}:\nexperts {i * here}-{(i + 1) * here - 1}" for i, r in enumerate(ep.ranks)]
    table = [(f"rank {rank}", *rows) for rank, rows in zip(ep.ranks, first, strict=True)]
    table.append(("all", *(sum(column) for column in zip(*first, strict=True))))
    run.say(f"\nrows dispatched in the first layer of the first step, ep ranks {list(ep.ranks)}")
    run.say(tabulate(table, ("from", *header)) + "\n")
    most = max(max(rows) for rows in first)
    cells = [(f"rank {r}", [(str(n), n / most) for n in rows]) for r, rows in zip(ep.ranks, first, strict=True)]
    title = (
        "Rows dispatched in the first layer of the first step, from rank to rank",
        "第一步第一层由各 rank 发往各 rank 的行数",
    )
    run.draw(grid(title, ("from, to", "从，到"), [name.replace("\n", " ") for name in header], cells))
    draw_token(run, version, experts)


def draw_token(run: Run, version: Version, experts: int) -> None:
    """The way of rank 0's first token through the first layer, with the shapes on rank 0."""
    ep, choice = version.mesh["ep"], version.record.choices[0][0]
    rows, here = rows_to(version, choice, experts), experts // ep.size
    tokens = len(choice.experts)
    chosen, weights = choice.experts[0].tolist(), choice.weights[0].tolist()
    h, owners = run.args.hidden, [ep.ranks[e // here] for e in chosen]
    pairs = ", ".join(f"e{e} × {w:.3f}" for e, w in zip(chosen, weights, strict=True))
    stops = [
        ("rank 0", ("its tokens, the first of which is followed", "它的 token，跟踪其中第一个"), f"({tokens}, {h})"),
        ("rank 0", ("the router chooses its experts, with weights", "路由器选出专家及权重"), pairs),
        (
            "rank 0",
            ("permute: a row for each choice", "重排：每个选择一行，按专家排序"),
            f"({sum(rows)}, {h})",
        ),
        (
            f"rank 0 → {', '.join(map(str, dict.fromkeys(owners)))}",
            ("all-to-all: rows to each rank of ep", "all-to-all：发往各 rank 的行数"),
            " ".join(map(str, rows)),
        ),
        *(
            (f"rank {owner}", (f"expert {e}, of {here} there", f"专家 {e}（该 rank 有 {here} 个）"), f"(1, {h})")
            for e, owner in zip(chosen, owners, strict=True)
        ),
        (
            f"rank {', '.join(map(str, dict.fromkeys(owners)))} → 0",
            ("all-to-all back, in the order in which they were sent", "all-to-all 发回，顺序与发出时相同"),
            f"({sum(rows)}, {h})",
        ),
        ("rank 0", ("unpermute: the weighted sum of its rows", "还原：各行的加权和"), f"({tokens}, {h})"),
    ]
    title = (
        "The way of one token, rank 0's first, through the first layer",
        "rank 0 的第一个 token 穿过第一层的路径",
    )
    run.draw(path(title, stops))


def sent_by(version: Version, experts: int) -> Sent:
    every = [rows_to(version, choice, experts) for step in version.record.choices for choice in step]
    forward, both = version.forward.traffic[ROWS].elements, version.mesh["ep"].ledger.traffic
    chosen = [sum(rows) for rows in zip(*every, strict=True)]
    return Sent(chosen, forward, both[ROWS].elements - forward, both[COUNTS])


def claim_traffic(run: Run, trained: Trained) -> None:
    """What a rank sends, against what its tokens chose."""
    args, job = run.args, run.job
    for name, version in trained.versions.items():
        if name == "engine" and args.dispatch != "all-to-all":
            continue
        ep = version.mesh["ep"]
        everyone = job.gather(sent_by(version, args.experts))
        if not everyone:
            continue
        h, tokens, k = args.hidden, args.batch * args.sequence // job.world_size, args.top_k
        layers = args.layers * args.steps
        # A rank sends its rows to the experts elsewhere, and back to their ranks the rows that came from there.
        dispatched, combined = [0] * job.world_size, [0] * job.world_size
        for group in axis_groups(version.mesh.sizes, "ep"):
            for rank, (to, other) in itertools.product(group, enumerate(group)):
                if rank != other:
                    dispatched[rank] += everyone[rank].chosen[to]
                    combined[other] += everyone[rank].chosen[to]
        share = sum(dispatched) / (job.world_size * k * tokens * layers)
        expected = [h * (a + b) for a, b in zip(dispatched, combined, strict=True)]
        formula = f"2kTh x off-rank share, a layer 2 x {k} x {tokens} x {h} x {share:.4f} on average"
        formula += "; each rank's own; counted"
        for way, measured in (("forward", [e.forward for e in everyone]), ("backward", [e.backward for e in everyone])):
            what = f"elements in the all-to-alls, {way} ({name})"
            pairs = zip(expected, measured, strict=True)
            run.evidence.each(what, formula, [(f"{what}, rank {r}", *pair) for r, pair in enumerate(pairs)])
        few, several = args.experts * (ep.size - 1) / ep.size, 1.0 if ep.size > 1 else 0.0
        run.evidence.on_ranks(f"exchanges of token counts, a layer ({name})", "1 forward, 0 backward", several,
                              [each.counts.messages / layers for each in everyone])  # fmt: skip
        run.evidence.on_ranks(f"their elements ({name})", f"E(ep-1)/ep = {few:g}; counted", few,
                              [each.counts.elements / layers for each in everyone])  # fmt: skip


def claim_memory(run: Run, trained: Trained, moe: MoEConfig) -> None:
    """Weights of experts, and Adam's two moments, in bytes."""
    full = to_moe(GPT(configuration(run.args)), moe)
    layers = [module.experts for module in full.modules() if isinstance(module, MoE)]
    size = sum(p.numel() for layer in layers for p in layer.parameters())
    second_bias = sum(bias.numel() for layer in layers if (bias := layer.down.bias) is not None)
    for name, version in trained.versions.items():
        states = [s for p in version.experts for s in version.optimizer.state_of(p).values() if s.dim()]
        everyone = run.job.gather((live_bytes(version.experts), live_bytes(states)))
        if not everyone:
            continue
        etp, shards = version.mesh["etp"].size, version.mesh["ep"].size * version.mesh["etp"].size
        replicated = second_bias * (etp - 1) / shards  # over the ranks of etp
        moments = 2 * run.precision.master.itemsize
        kinds = ("weights of experts", run.dtype.itemsize), ("their Adam moments", moments)
        for i, (what, times) in enumerate(kinds):
            expected = times * (size / shards + replicated)
            more = " and the second bias" if replicated else ""
            formula = f"{times * size:,} / {shards}{more} = {expected:,.0f}"
            run.evidence.on_ranks(f"bytes of {what} ({name})", formula, expected, [each[i] for each in everyone])


def compare_dispatchers(run: Run, moe: MoEConfig, ep: int) -> None:
    """The same forward with all-to-all and with all-gather: results, and what a layer sends."""
    args, config = run.args, configuration(run.args)
    if args.etp > 1:
        return
    inputs, _ = Text(args.data, args.sequence).batch(args.seed, 0, args.batch)
    mine = inputs.chunk(run.job.world_size)[run.job.rank].to(run.job.device)
    logits, sent = {}, {}
    for dispatch in DISPATCHERS:
        mesh = mesh_of(run, ep)
        model = parallelize(to_moe(GPT(config), moe), mesh["ep"], mesh["etp"], Spread((mesh["dp"],)), dispatch)
        materialize(model, args.seed, run.job.device, torch.float64)  # in few bits a sum's order decides on an expert
        with torch.no_grad():
            logits[dispatch] = model.eval()(mine)
        traffic = mesh["ep"].ledger.traffic.items()
        sent[dispatch] = sum(each.elements for (_, name), each in traffic if name == "ep") / config.layers
    one, other = logits.values()
    everyone = run.job.gather((((one - other).norm() / one.norm()).item(), *sent.values()))
    if not everyone:
        return
    k, tokens, h = args.top_k, mine.numel(), args.hidden
    difference = max(each[0] for each in everyone)
    most = TOLERANCE["float64"].gradient
    what = "those with all-to-all, in float64"
    run.evidence.claim("logits with all-gather", what, 0, difference, most, correctness=True)
    numbers = 3 if moe.routing.capacity else 2  # experts and weights come along, and what is dropped
    expected = (ep - 1) * tokens * (2 * h + numbers * k)
    formula = f"2(ep-1)Th, and {numbers}k a token = {expected:,}; counted"
    run.evidence.on_ranks("elements with all-gather, forward, a layer", formula, expected, [e[2] for e in everyone])
    crossover(run, k, h, ep, [sum(e[i] for e in everyone) / len(everyone) / (tokens * h) for i in (1, 2)])


def crossover(run: Run, k: int, h: int, ep: int, measured: Sequence[float]) -> None:
    rows = [("measured, mean", ep, k, *measured)]
    rows += [("calculated", n, k, 2 * k * (n - 1) / n, 2.0 * (n - 1)) for n in (2, 4, 8, 16, 32, 64)]
    rows = [(*row, "all-gather" if row[4] < row[3] else "all-to-all" if row[3] < row[4] else "equal") for row in rows]
    run.say(
        "what a layer sends forward, in Th, where tokens choose evenly: 2k(ep-1)/ep or 2(ep-1); they cross at ep = k"
    )
    run.say(tabulate(rows, ("", "ep", "k", *DISPATCHERS, "fewer"), floatfmt=".3f") + "\n")
    columns = {name: [row[3 + i] for row in rows[1:]] for i, name in enumerate(DISPATCHERS)}
    title = f"Sent by a layer forward, k = {k}", f"一层前向的发送量，k = {k}"
    run.draw(bars(title, "Th", [f"ep {row[1]}" for row in rows[1:]], columns), chart=True)
