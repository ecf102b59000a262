"""What the lessons of lecture 06 share: train a GPT with tensor and sequence parallelism beside one process."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.gpt import GPT, GPTConfig, materialize
from core.gradients import clip_and_total
from core.ledger import Ledger
from core.lesson import Run
from core.mesh import Axis
from core.oracle import Oracle
from core.seeded import Draw
from core.shards import counted_once
from core.training import Layout, claim_whole_parameters, train
from sequence_parallel.layers import parallelize, sum_whole_gradients
from sequence_parallel.loss import token_loss
from sequence_parallel.recompute import recompute


@dataclass
class Trained:
    """A rank's model after the training."""

    model: GPT
    oracle: Oracle | None
    forward: Ledger  # what was sent in the forward passes
    computed: Counter[str]  # how often a layer's attention core, and its end, was computed, over layers and steps


def teach(run: Run, config: GPTConfig, axis: Axis, kind: str = "none") -> Trained:
    """Train the model over the ranks of `axis`, and claim that it equals one process, and that the ranks stay one."""
    args, job, forward = run.args, run.job, Ledger()
    run.mesh = {"tp": axis.size}
    model = recompute(parallelize(GPT(config), axis), kind)
    materialize(model, args.seed, job.device, run.dtype)
    computed: Counter[str] = Counter()
    for block in model.blocks.values():
        for part, module in (("attention core", block.attention.dropout), ("layer", block.mlp_dropout)):
            module.register_forward_pre_hook(lambda *_, part=part: computed.update([part]))
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
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], args.clip, share)

    worst = train(run, Layout(model, optimizer_of(model.parameters())), oracle, forward_backward, clip)
    if oracle:
        worst.claim(run)
    claim_whole_parameters(run, model)
    return Trained(model, oracle, forward, computed)
