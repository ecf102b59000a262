"""CODE 04: convert weights (专家并行大规模训练): an MLP to experts, experts to more experts, a layout to any other.

    torchrun --nproc_per_node=8 expert_parallel/upcycle.py

Sparse upcycling, Komatsuzaki et al. 2022 (2212.05055): a trained dense model becomes a mixture whose experts are copies
of its MLP, and trains on. Where the weights of a token's experts sum to 1, equal experts are the MLP they were copied
from, so the mixture starts as good as the dense model. More experts from fewer: each n times over, of which each token
takes n K: a router that cannot tell copies apart takes all copies of an expert, or none.

A trained checkpoint fits any other layout of the experts: `checkpoint.py`.

E experts, K for each token
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, initial_value, materialize, token_loss
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.proof.oracle import TOLERANCE, relative_difference
from core.shards import LocalTensor, shard_of
from expert_parallel.checkpoint import Weights, convert, load, read, write
from expert_parallel.gating import Spread
from expert_parallel.layers import parallelize
from expert_parallel.moe import MoEConfig, to_moe
from expert_parallel.training import add_flags, check, claim_equal, ep_of, moe_of, train_with

# ---- Whole weights to whole weights ----------------------------------------------------------------------------------


def upcycle(dense: Mapping[str, Tensor], config: GPTConfig, moe: MoEConfig, seed: int) -> Weights:
    """The weights of the dense GPT as those of one with mixtures: copies of its MLPs, and new routers.

    Raises:
        ValueError: an expert would not have the size of the MLP, or there would be a shared one besides.
    """
    if moe.shared or (moe.feed_forward or config.feed_forward) != config.feed_forward:
        raise ValueError(
            "an expert is a copy of the MLP, and nothing is added to it; use the same feed-forward, shared 0"
        )
    made: Weights = {}
    for name, p in to_moe(GPT(config), moe).named_parameters():
        source = name.replace("mlp.experts.", "mlp.")
        if source in dense:
            copies = p.shape[0] if source != name else 1
            made[name] = dense[source].repeat(copies, *[1] * dense[source].dim()) if source != name else dense[source]
        elif name.endswith("router.bias"):
            made[name] = p.detach().clone()
        else:
            made[name] = initial_value(name, p.shape, config, seed).to(next(iter(dense.values())).dtype)
    return made


def more_experts(weights: Mapping[str, Tensor], times: int) -> Weights:
    """Each expert, and its row of the router, `times` over; for `times` as many experts a token."""
    return {
        name: value.repeat_interleave(times, 0) if ".experts." in name or ".router." in name else value
        for name, value in weights.items()
    }


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    args, job, config, moe = run.args, run.job, configuration(run.args), moe_of(run.args)
    ep = ep_of(args, job.world_size)
    with tempfile.TemporaryDirectory() as here:
        folder = Path(job.share(here if job.rank == 0 else None))
        dense_loss = 0.0
        if job.rank == 0:
            dense, dense_loss = train_dense(run, config)
            for name in ("mixture", "trained", "doubled"):
                (folder / name).mkdir()
            write(
                folder / "mixture",
                0,
                [LocalTensor(n, v, None) for n, v in upcycle(dense, config, moe, args.seed).items()],
            )
            convert(folder / "mixture", folder / "spread", config, moe, job.world_size, ep)
        job.share(None)
        weights = read(folder / "spread")
        claim_start(run, config, moe, weights, ep, job.share(dense_loss if job.rank == 0 else None))

        def go_on(model: GPT, moe: MoEConfig) -> GPT:
            return load(materialize(to_moe(model, moe), args.seed, job.device, run.dtype), weights)

        trained = train_with(run, moe, ep, reference=go_on, watch=lambda model: load(model, weights))
        claim_equal(run, trained)
        write(
            folder / "trained", job.rank, [LocalTensor(n, p, shard_of(p)) for n, p in trained.model.named_parameters()]
        )
        job.gather(None)  # all files are there
        claim_layouts(run, config, moe, folder, ep)
        job.share(None)


def train_dense(run: Run, config: GPTConfig) -> tuple[Weights, float]:
    """A few steps in one process; the weights, and the loss after them on the batch of the next step."""
    args = run.args
    model = materialize(GPT(config), args.seed, run.job.device, run.dtype)
    optimizer, text = torch.optim.AdamW(model.parameters(), lr=args.lr), Text(args.data, config.sequence)
    for step in range(args.steps + 1):
        inputs, targets = (t.to(run.job.device) for t in text.batch(args.seed, step, args.batch))
        loss = token_loss(model(inputs), targets, targets.numel())
        if step < args.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, loss.item()


def loss_of(run: Run, config: GPTConfig, moe: MoEConfig, weights: Weights, ep: int) -> float:
    """Of these weights on the batch after the dense training, with the experts over ep ranks."""
    args, job = run.args, run.job
    mesh = Mesh(job.device.type, Ledger(), job.timeout, dp=job.world_size, ep=ep)
    model = parallelize(to_moe(GPT(config), moe), mesh["ep"], mesh["etp"], Spread((mesh["dp"],)))
    load(materialize(model, args.seed, job.device, run.dtype), weights)
    batch = Text(args.data, config.sequence).batch(args.seed, args.steps, args.batch)
    inputs, targets = (t.chunk(job.world_size)[job.rank].to(job.device) for t in batch)
    with torch.no_grad():
        share = token_loss(model(inputs), targets, args.batch * args.sequence).item()
    return sum(job.gather(share) or [0.0])


def claim_start(run: Run, config: GPTConfig, moe: MoEConfig, weights: Weights, ep: int, dense: float) -> None:
    tolerance, claim = TOLERANCE[run.dtype].loss, run.evidence.claim
    start = loss_of(run, config, moe, weights, ep)
    twice = replace(moe.routing, experts=2 * moe.routing.experts, top_k=2 * moe.routing.top_k)
    doubled = loss_of(run, config, replace(moe, routing=twice), more_experts(weights, 2), ep)
    if run.job.rank:
        return
    e, k = moe.routing.experts, moe.routing.top_k
    run.say(f"loss of the dense model on a batch it has not seen: {dense:.6f}")
    run.say(f"with {e} experts, {k} a token: {start:.6f}; with {2 * e}, {2 * k} a token: {doubled:.6f}\n")
    if not moe.routing.capacity and (moe.routing.sums_to_one or (moe.routing.score == "softmax-topk" and k == e)):
        claim(
            "loss of the mixture at its start",
            f"the dense model's, {dense:.6f}",
            0,
            relative_difference(start, dense),
            tolerance,
        )
    # One sigmoid is not divided by its sum, two are; and a group is as good as K / top_groups of its experts, rounded.
    whole_groups = moe.routing.top_groups == moe.routing.groups or k % moe.routing.top_groups == 0
    if whole_groups and twice.sums_to_one == moe.routing.sums_to_one:
        claim(
            f"loss with {2 * e} experts, {2 * k} a token",
            f"that with {e} and {k}: {start:.6f}",
            0,
            relative_difference(doubled, start),
            tolerance,
        )


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
        convert(folder / "trained", there, config, moe, ranks, to, etp)
        convert(there, back, config, moe, n, ep)
        differing = sum(
            different(folder / "trained" / f"rank{rank:05d}.pt", back / f"rank{rank:05d}.pt") for rank in range(n)
        )
        size = max(path.stat().st_size for path in there.iterdir())
        rows.append((ranks, to, etp, ranks // (to * etp), f"{size / 1e6:.2f}", differing))
    run.say("\nthe trained checkpoint in other layouts, and back")
    run.say(tabulate(rows, ("ranks", "ep", "etp", "edp", "largest file, MB", "elements that differ afterwards")) + "\n")
    what = f"elements changed by {len(rows)} layouts and the way back"
    run.evidence.claim(what, "0, bit by bit", 0, sum(row[-1] for row in rows))


def different(one: Path, other: Path) -> int:
    """Elements that differ between two files of a checkpoint; all of a parameter that is cut in another way."""
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    assert a.keys() == b.keys()
    return sum(
        int((a[n][0] != b[n][0]).sum()) if a[n][1] == b[n][1] and a[n][0].shape == b[n][0].shape else a[n][0].numel()
        for n in a
    )


def refuse(args: argparse.Namespace, ranks: int) -> None:
    args.ep, args.etp, args.dispatch = 0, 1, "all-to-all"
    check(args, ranks)
    if args.shared:
        raise ValueError(
            f"--shared {args.shared}: an expert is a copy of the MLP, and nothing is added; use --shared 0"
        )


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: converting weights",
        "专家并行大规模训练",
        "A dense model becomes a mixture, a mixture gets more experts, and a checkpoint fits any layout, bit by bit.",
    )
    add_flags(frame, layers=2, feed_forward=128)
    sys.exit(frame.main(refuse, lesson))
