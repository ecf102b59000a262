"""What the lessons of lecture 06 share: train a GPT with tensor and sequence parallelism beside one process."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.gpt import GPT, GPTConfig, materialize
from core.ledger import Ledger
from core.lesson import Run
from core.mesh import Axis
from core.oracle import Oracle
from core.seeded import Draw
from core.shards import shard_of
from core.training import Layout, clip_and_total, train
from sequence_parallel.layers import counted_once, parallelize, sum_whole_gradients
from sequence_parallel.loss import token_loss
from sequence_parallel.recompute import recompute


@dataclass
class Trained:
    """A rank's model after the training."""

    model: GPT
    oracle: Oracle | None
    forward: Ledger  # what was sent in the forward passes


def teach(run: Run, config: GPTConfig, axis: Axis, kind: str = "none") -> Trained:
    """Train the model over the ranks of `axis`, and claim that it equals one process, and that the ranks stay one."""
    args, job, forward = run.args, run.job, Ledger()
    run.mesh = {"tp": axis.size}
    model = recompute(parallelize(GPT(config), axis), kind)
    materialize(model, args.seed, job.device, run.dtype)
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None
    loss_of = partial(token_loss, tokens=args.batch * args.sequence, axis=axis, vocabulary=config.vocabulary)

    def forward_backward(step: int, inputs: Tensor, targets: Tensor, draw: Draw) -> Tensor:
        with axis.ledger.also(forward):
            loss = loss_of(model(inputs, draw), targets)
        loss.backward()
        sum_whole_gradients(model, axis)
        return loss.detach()

    def clip(share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model, axis), [axis], args.clip, share)

    worst = train(run, Layout(model, optimizer_of(model.parameters())), oracle, forward_backward, clip)
    whole = {n: p.detach().cpu() for n, p in model.named_parameters() if shard_of(p) is None}
    copies = job.gather(whole)
    if oracle:
        worst.claim(run)
        differing = sum((copies[0][n] != other[n]).sum().item() for other in copies for n in whole)
        what = f"{sum(p.numel() for p in whole.values()):,} elements a rank"
        run.evidence.claim("parameters that every rank holds whole", f"differ in 0 of {what}", 0, differing)
    return Trained(model, oracle, forward)
