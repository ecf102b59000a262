"""CODE 04: expert parallelism (专家并行大规模训练). GShard (2006.16668), section 3; folding: 2504.14960, section 3.2.

    torchrun --nproc_per_node=8 expert_parallel/dispatch.py

Data parallelism for all but the experts: each rank has its own samples. The experts are spread over the ranks, so in
each of their layers a token travels to the ranks of its experts, and back. `layers.py` has the layer.

b samples in a step, s tokens of a sample, h hidden, N ranks of which ep have different experts, T = bs/N tokens of a
rank, E experts, k of them for each token
"""

import itertools
import sys
from collections.abc import Sequence

import torch
from tabulate import tabulate

from core.ledger import Ledger
from core.mesh import Mesh, axis_groups
from core.model.gpt import GPT, materialize
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.proof.memory import live_bytes
from core.proof.oracle import TOLERANCE
from core.proof.plot import bars
from expert_parallel.gating import Choice, Spread
from expert_parallel.layers import DISPATCHERS, expert_parameters, parallelize
from expert_parallel.moe import MoE, MoEConfig, to_moe
from expert_parallel.training import (
    Trained,
    add_flags,
    add_parallel_flags,
    check,
    claim_equal,
    ep_of,
    moe_of,
    train_with,
)


def lesson(run: Run) -> None:
    args, moe = run.args, moe_of(run.args)
    ep = ep_of(args, run.job.world_size)
    trained = train_with(run, moe, ep, args.etp, args.dispatch)
    show_dispatch(run, trained)
    claim_equal(run, trained)
    if args.dispatch == "all-to-all":
        claim_traffic(run, trained)
    claim_memory(run, trained, moe)
    if args.etp == 1:
        compare_dispatchers(run, moe, ep)


def rows_to(trained: Trained, choice: Choice) -> list[int]:
    """The rows of this rank for each rank of ep, counted from what the router chose."""
    ep = trained.mesh["ep"].size
    here = trained.loads[0].shape[1] // ep  # experts of a rank
    experts = choice.experts if choice.kept is None else choice.experts[choice.kept]
    return torch.bincount(experts.flatten() // here, minlength=ep).tolist()


def show_dispatch(run: Run, trained: Trained) -> None:
    everyone = run.job.gather((trained.mesh["ep"].ranks, rows_to(trained, trained.choices[0][0])))
    if not everyone:
        return
    ep, first = trained.mesh["ep"], [rows for ranks, rows in everyone if ranks == everyone[0][0]]
    here = trained.loads[0].shape[1] // ep.size
    header = [f"to rank {r}: experts {i * here}-{(i + 1) * here - 1}" for i, r in enumerate(ep.ranks)]
    table = [(f"rank {rank}", *rows) for rank, rows in zip(ep.ranks, first, strict=True)]
    table.append(("all", *(sum(column) for column in zip(*first, strict=True))))
    run.say(f"\nrows dispatched in the first layer of the first step, ep ranks {list(ep.ranks)}")
    run.say(tabulate(table, ("from", *(name.replace(": ", ":\n") for name in header))) + "\n")


def claim_traffic(run: Run, trained: Trained) -> None:
    """What a rank sends, against what its tokens chose."""
    args, ep = run.args, trained.mesh["ep"]
    every = [rows_to(trained, choice) for step in trained.choices for choice in step]
    chosen = [sum(rows) for rows in zip(*every, strict=True)]  # rows for each rank of ep, all layers and steps
    ahead, both = trained.forward.traffic, ep.ledger.traffic
    rows, counts = ("all-to-all", "ep"), ("token counts", "ep")
    everyone = run.job.gather((chosen, ahead[rows].elements, both[rows].elements, both[counts]))
    if not everyone:
        return
    h, tokens, k = args.hidden, args.batch * args.sequence // run.job.world_size, args.top_k
    layers = sum(map(len, trained.choices))
    groups = axis_groups(trained.mesh.sizes, "ep")
    # A rank sends its rows to the experts elsewhere, and back to their ranks the rows that came from there.
    out, back = [0] * len(everyone), [0] * len(everyone)
    for group in groups:
        for rank, (to, other) in itertools.product(group, enumerate(group)):
            if rank != other:
                out[rank] += everyone[rank][0][to]
                back[other] += everyone[rank][0][to]
    share = sum(out) / (len(everyone) * k * tokens * layers)
    names = [f"rank {rank}" for rank in range(len(everyone))]
    expected = [h * (a + b) for a, b in zip(out, back, strict=True)]
    for way, measured in (
        ("forward", [each[1] for each in everyone]),
        ("backward", [each[2] - each[1] for each in everyone]),
    ):
        what = f"elements in the all-to-alls, {way}"
        cases = zip((f"{what}, {name}" for name in names), expected, measured, strict=True)
        formula = f"2kTh x off-rank share, a layer 2 x {k} x {tokens} x {h} x {share:.4f} on average; each rank's own"
        run.evidence.each(what, formula, cases)
    on_ranks, few = run.evidence.on_ranks, args.experts * (ep.size - 1) / ep.size
    messages = [each[3].messages / layers for each in everyone]
    on_ranks("exchanges of token counts, a layer", "1 forward, 0 backward", float(ep.size > 1), messages)
    on_ranks("their elements", f"E(ep-1)/ep = {few:g}", few, [each[3].elements / layers for each in everyone])


def claim_memory(run: Run, trained: Trained, moe: MoEConfig) -> None:
    """Weights of experts, and Adam's two moments, in bytes."""
    experts = expert_parameters(trained.model)
    states = [s for p in experts for s in trained.optimizer.state[p].values() if s.dim()]
    everyone = run.job.gather((live_bytes(experts), live_bytes(states)))
    if not everyone:
        return
    whole = to_moe(GPT(configuration(run.args)), moe)
    layers = [module.experts for module in whole.modules() if isinstance(module, MoE)]
    size = run.dtype.itemsize * sum(p.numel() for layer in layers for p in layer.parameters())
    parts = trained.mesh["ep"].size * trained.mesh["etp"].size
    # The second bias is whole on the ranks of etp.
    again = (
        run.dtype.itemsize * sum(layer.down.bias.numel() for layer in layers) * (trained.mesh["etp"].size - 1) / parts
    )
    for i, (what, times) in enumerate((("weights of experts", 1), ("their Adam moments", 2))):
        expected = times * (size / parts + again)
        formula = f"{times * size:,} / {parts}" + (" and the second bias" if again else "") + f" = {expected:,.0f}"
        run.evidence.on_ranks(f"bytes of {what}", formula, expected, [each[i] for each in everyone])


def compare_dispatchers(run: Run, moe: MoEConfig, ep: int) -> None:
    """The same forward with all-to-all and with all-gather: results, and what a layer sends."""
    args, config = run.args, configuration(run.args)
    inputs, _ = Text(args.data, args.sequence).batch(args.seed, 0, args.batch)
    mine = inputs.chunk(run.job.world_size)[run.job.rank].to(run.job.device)
    logits, sent = {}, {}
    for dispatch in DISPATCHERS:
        mesh = Mesh(run.job.device.type, Ledger(), run.job.timeout, dp=run.job.world_size, ep=ep)
        model = parallelize(to_moe(GPT(config), moe), mesh["ep"], mesh["etp"], Spread((mesh["dp"],)), dispatch)
        materialize(model, args.seed, run.job.device, run.dtype)
        with torch.no_grad():
            logits[dispatch] = model.eval()(mine)
        traffic = mesh["ep"].ledger.traffic.items()
        sent[dispatch] = sum(each.elements for (_, name), each in traffic if name == "ep") / config.layers
    one, other = logits.values()
    apart = ((one - other).norm() / one.norm()).item()
    everyone = run.job.gather((apart, *sent.values()))
    if not everyone:
        return
    k, tokens, h = args.top_k, mine.numel(), args.hidden
    difference = max(each[0] for each in everyone)
    run.evidence.claim("logits with all-gather", "those with all-to-all", 0, difference, TOLERANCE[run.dtype].gradient)
    drops = moe.routing.capacity > 0
    expected = 2 * (ep - 1) * tokens * h + (ep - 1) * tokens * (2 + drops) * k  # k experts and k weights come along
    formula = (
        f"2(ep-1)Th, and 2k for a token = {expected:,}" if not drops else f"2(ep-1)Th, and 3k a token = {expected:,}"
    )
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
    if run.args.plot:
        columns = {name: [row[3 + i] for row in rows[1:]] for i, name in enumerate(DISPATCHERS)}
        bars(run.args.plot, f"Sent by a layer forward, k = {k}", "Th", [f"ep {row[1]}" for row in rows[1:]], columns)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: the layer across ranks",
        "专家并行大规模训练",
        "Tokens travel to the ranks of their experts and back: permute, all-to-all, experts, all-to-all, weighted sum.",
    )
    add_flags(frame, hidden=64)
    add_parallel_flags(frame)
    frame.parser.set_defaults(shared=32)
    sys.exit(frame.main(check, lesson))
