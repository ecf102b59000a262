"""What lecture 05 and CODE 02 share: train a tensor-parallel GPT beside one process."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.proof.lesson import Run
from core.proof.oracle import Oracle
from core.proof.training import Replica, claim_replicated_parameters, train
from core.shards import counted_once
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
    masks, forward = use_masks(model, SampleMasks(args.seed)), Ledger()

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        masks.seek(step)
        with axis.ledger.recording_to(forward):
            loss = loss_of(model(inputs), targets)
        loss.backward()
        # Every rank has the same loss: one of them counts it.
        return loss.detach() if axis.index == 0 else torch.zeros_like(loss)

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], largest, share)

    worst = train(run, {"": Replica(model, optimizer, forward_backward, clip)}, oracle)[""]
    trained = Trained(model, optimizer, oracle, forward)
    if oracle:
        worst.claim(run)
    claim_replicated_parameters(run, model)
    return trained


def parameters_on_a_rank(config: GPTConfig, ranks: int) -> int:
    """By the slide's arithmetic: what is cut, a rank's part of it, and what is not."""
    h, f, layers = config.hidden, config.feed_forward, config.layers
    vocabulary = -(-config.vocabulary // ranks) * ranks
    ends = vocabulary * h * (1 if config.tied else 2) + vocabulary * config.head_bias
    cut = layers * (3 * h * h + 3 * h + h * h + f * h + f + h * f) + ends
    whole = layers * (4 * h + h + h) + 2 * h + config.sequence * h
    return cut // ranks + whole
