"""What lecture 05 and CODE 02 share: train a tensor-parallel GPT beside one process."""

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
from megatron_tp.layers import parallelize
from megatron_tp.loss import token_loss


@dataclass
class Trained:
    """A rank's model after the training."""

    model: GPT
    optimizer: torch.optim.Optimizer
    oracle: Oracle | None
    forward: Ledger  # what was sent in the forward passes


def build(run: Run, config: GPTConfig, axis: Axis) -> tuple[GPT, torch.optim.Optimizer]:
    """This rank's part of the GPT, and its optimizer: an ordinary one, over the parameters that are here."""
    model = materialize(parallelize(GPT(config), axis), run.args.seed, run.job.device, run.dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=run.args.lr)


def teach(run: Run, config: GPTConfig, axis: Axis) -> Trained:
    """Train the model over the ranks of `axis`, and claim that it equals one process, and that the ranks stay one."""
    args, job = run.args, run.job
    run.mesh = {"tp": axis.size}
    model, optimizer = build(run, config, axis)
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None
    loss_of = partial(token_loss, tokens=args.batch * args.sequence, axis=axis, vocabulary=config.vocabulary)
    forward = Ledger()

    def forward_backward(step: int, inputs: Tensor, targets: Tensor, draw: Draw) -> Tensor:
        with axis.ledger.also(forward):
            loss = loss_of(model(inputs, draw), targets)
        loss.backward()
        # Every rank has the same loss: one of them counts it.
        return loss.detach() if axis.index == 0 else torch.zeros_like(loss)

    def clip(share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], args.clip, share)

    worst = train(run, Layout(model, optimizer), oracle, forward_backward, clip)
    trained = Trained(model, optimizer, oracle, forward)
    if oracle:
        worst.claim(run)
    claim_whole_parameters(run, model)
    return trained


def parameters_on_a_rank(config: GPTConfig, ranks: int) -> int:
    """By the slide's arithmetic: what is cut, a rank's part of it, and what is not."""
    h, f, layers = config.hidden, config.feed_forward, config.layers
    vocabulary = -(-config.vocabulary // ranks) * ranks
    ends = vocabulary * h * (1 if config.tied else 2) + vocabulary * config.head_bias
    cut = layers * (3 * h * h + 3 * h + h * h + f * h + f + h * f) + ends
    whole = layers * (4 * h + h + h) + 2 * h + config.sequence * h
    return cut // ranks + whole
