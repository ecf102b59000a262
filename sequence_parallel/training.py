"""What the lessons of lecture 06 share: train a GPT with tensor and sequence parallelism beside one process."""

from collections import Counter
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
    masks = use_masks(model, SampleMasks(args.seed))
    computed: Counter[str] = Counter()
    for block in model.blocks.values():
        for part, module in (("attention core", block.attention.dropout), ("layer", block.mlp_dropout)):
            module.register_forward_pre_hook(lambda *_, part=part: computed.update([part]))
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    oracle = Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip) if job.rank == 0 else None
    loss_of = partial(token_loss, tokens=args.batch * args.sequence, axis=axis, vocabulary=config.vocabulary)

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        masks.seek(step)
        with axis.ledger.recording_to(forward):
            loss = loss_of(model(inputs), targets)
        loss.backward()
        sum_whole_gradients(model, axis)
        return loss.detach()

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], largest, share)

    trained = Replica(model, optimizer_of(model.parameters()), forward_backward, clip)
    worst = train(run, {"": trained}, oracle)[""]
    if oracle:
        worst.claim(run)
    claim_replicated_parameters(run, model)
    return Trained(model, oracle, forward, computed)
