"""What `upcycle.py` claims: the mixture starts where the dense model ended, trains on, and fits any layout."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis, axis_groups, axis_sizes
from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.precision import MasterOptimizer
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.chunks import Chunks, convert, load_full, read_index, save, write
from core.proof.figures import grid
from core.proof.lesson import Run
from core.proof.oracle import TOLERANCE, relative_difference
from core.shards import LocalTensor, shard_of
from expert_parallel.engine.layers import parallelize
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import Spread
from expert_parallel.engine.routing import MoEConfig
from expert_parallel.evidence.flags import ep_of, moe_of
from expert_parallel.evidence.training import claim_equal, engine, mesh_of, train_versions

Weights = dict[str, Tensor]  # full parameters by name


def shards(config: GPTConfig, moe: MoEConfig, ranks: int, ep: int, etp: int = 1) -> list[list[LocalTensor]]:
    """What each of `ranks` ranks holds, without its numbers, where the experts are sharded over ep x etp of them.

    Raises:
        ValueError: the layout is not possible.
    """
    sizes, found = axis_sizes(ranks, dp=ranks, ep=ep, etp=etp), []
    for rank in range(ranks):
        groups = {name: next(g for g in axis_groups(sizes, name) if rank in g) for name in ("ep", "etp")}
        axes = (Axis(n, (*g,), g.index(rank), None, Ledger(), timedelta(0)) for n, g in groups.items())
        model = parallelize(to_moe(GPT(config), moe), *axes, Spread())
        found.append([LocalTensor(name, p, shard_of(p)) for name, p in model.named_parameters()])
    return found


def load(model: GPT, weights: Mapping[str, Tensor]) -> GPT:
    """Give a real model, or this rank's shards of one, these weights."""
    for name, p in model.named_parameters():
        mark = shard_of(p)
        p.data.copy_(mark.local(weights[name]) if mark else weights[name])
    return model


def compare_layouts(run: Run, upcycle: Callable[..., Weights], more_experts: Callable[[Weights, int], Weights]) -> None:
    """Dense to mixture, to more experts, to another layout; and train on."""
    args, job, config, moe = run.args, run.job, configuration(run.args), moe_of(run.args)
    ep = ep_of(args, job.world_size)
    with tempfile.TemporaryDirectory() as here:
        folder = Path(job.share(here if job.rank == 0 else None))
        dense_loss = 0.0
        if job.rank == 0:
            dense, dense_loss = train_dense(run, config)
            mixture = upcycle(dense, config, moe, args.seed)
            write(folder / "mixture", [[LocalTensor(name, value, None) for name, value in mixture.items()]])
            convert(folder / "mixture", folder / "spread", shards(config, moe, job.world_size, ep))
        job.share(None)
        weights = load_full(folder / "spread")
        claim_start(run, config, moe, weights, more_experts(weights, 2), job.share(dense_loss))

        version = engine(run, moe, mesh_of(run, ep))
        load(version.model, weights)
        claim_equal(run, train_versions(run, moe, {"engine": version}, start=partial(load, weights=weights)))
        named = version.model.named_parameters()
        save(folder / "trained", {name: Chunks(LocalTensor(name, p, shard_of(p))) for name, p in named})
        claim_layouts(run, config, moe, folder, ep)
        job.share(None)


def train_dense(run: Run, config: GPTConfig) -> tuple[Weights, float]:
    """A few steps in one process; the weights, and the loss after them on the batch of the next step."""
    args = run.args
    model, text = materialize(GPT(config), args.seed, run.job.device, run.precision), Text(args.data, config.sequence)
    adamw = partial(torch.optim.AdamW, lr=args.lr)
    optimizer = MasterOptimizer(model.parameters(), adamw, run.precision.master)
    for step in range(args.steps + 1):
        inputs, targets = (t.to(run.job.device) for t in text.batch(args.seed, step, args.batch))
        loss = token_loss(model(inputs), targets, targets.numel())
        if step < args.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, loss.item()


def loss_of(run: Run, config: GPTConfig, moe: MoEConfig, weights: Weights) -> float:
    """Of these weights on the batch after the dense training, with the experts over ep ranks; on rank 0."""
    args, job = run.args, run.job
    mesh = mesh_of(run, ep_of(args, job.world_size))
    model = parallelize(to_moe(GPT(config), moe), mesh["ep"], mesh["etp"], Spread((mesh["dp"],)))
    load(materialize(model, args.seed, job.device, run.precision), weights)
    batch = Text(args.data, config.sequence).batch(args.seed, args.steps, args.batch)
    inputs, targets = (t.chunk(job.world_size)[job.rank].to(job.device) for t in batch)
    with torch.no_grad():
        share = token_loss(model(inputs), targets, args.batch * args.sequence).item()
    return sum(job.gather(share) or [0.0])


def claim_start(run: Run, config: GPTConfig, moe: MoEConfig, weights: Weights, doubled: Weights, dense: float) -> None:
    tolerance, claim, routing = TOLERANCE[run.precision.name].loss, run.evidence.claim, moe.routing
    e, k = routing.experts, routing.top_k
    twice = replace(routing, experts=2 * e, top_k=2 * k)
    start = loss_of(run, config, moe, weights)
    with_more = loss_of(run, config, replace(moe, routing=twice), doubled)
    if run.job.rank:
        return
    run.say(f"loss of the dense model on a batch it has not seen: {dense:.6f}")
    run.say(f"with {e} experts, {k} a token: {start:.6f}; with {2 * e}, {2 * k} a token: {with_more:.6f}\n")
    if not routing.capacity and (routing.sums_to_one or (routing.score == "softmax-topk" and k == e)):
        claim("loss of the mixture at its start", f"the dense model's, {dense:.6f}", 0,
              relative_difference(start, dense), tolerance)  # fmt: skip
    # One sigmoid is not divided by its sum, two are; and a group is as good as k / top_groups of its experts, rounded.
    full_groups = routing.top_groups == routing.groups or k % routing.top_groups == 0
    if full_groups and twice.sums_to_one == routing.sums_to_one:
        claim(f"loss with {2 * e} experts, {2 * k} a token", f"that with {e} and {k}: {start:.6f}", 0,
              relative_difference(with_more, start), tolerance)  # fmt: skip


def claim_layouts(run: Run, config: GPTConfig, moe: MoEConfig, folder: Path, ep: int) -> None:
    """From this layout to each other one, and back: every file is the same to the last bit."""
    if run.job.rank:
        return
    experts, features, n = moe.routing.experts, config.feed_forward, run.job.world_size
    rows = []
    for ranks, to, etp in ((r, e, x) for r in (1, 2, 4, 8) for e in (1, 2, 4, 8) for x in (1, 2) if e * x <= r):
        if ranks % (to * etp) or experts % to or features % etp:
            continue
        there, back = folder / f"{ranks}-{to}-{etp}", folder / f"back-{ranks}-{to}-{etp}"
        convert(folder / "trained", there, shards(config, moe, ranks, to, etp))
        convert(there, back, shards(config, moe, n, ep))
        differing = different(folder / "trained", back)
        size = max(path.stat().st_size for path in there.iterdir())
        rows.append((ranks, to, etp, ranks // (to * etp), f"{size / 1e6:.2f}", differing))
    run.say("\nthe trained checkpoint in other layouts, and back")
    run.say(tabulate(rows, ("ranks", "ep", "etp", "edp", "largest file, MB", "elements that differ afterwards")) + "\n")
    cells = [(f"{ranks} ranks: ep {to}, etp {etp}, edp {edp}", [(size, None), (str(bad), 0.0 if bad == 0 else "3")])
             for ranks, to, etp, edp, size, bad in rows]  # fmt: skip
    columns = [("largest file, MB", "最大文件，MB"), ("elements that differ afterwards", "转回后不同的元素")]
    title = "The trained checkpoint in other layouts, and back", "训练好的检查点转换到其他布局再转回"
    run.draw(grid(title, ("layout", "布局"), columns, cells))
    what = f"elements changed by {len(rows)} layouts and the way back"
    run.evidence.claim(what, "0, bit by bit", 0, sum(row[-1] for row in rows))


def different(one: Path, other: Path) -> int:
    """Elements that differ between two checkpoints; all of a parameter that is sharded in another way."""
    a, b = load_full(one), load_full(other)
    chunks = [{name: {*map(str, each.chunks)} for name, each in read_index(folder).items()} for folder in (one, other)]
    assert a.keys() == b.keys()
    return sum(int((a[n] != b[n]).sum()) if chunks[0][n] == chunks[1][n] else a[n].numel() for n in a)
