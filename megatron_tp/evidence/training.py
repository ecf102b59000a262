"""What lecture 05 and CODE 02 share: train a tensor-parallel GPT in several versions beside one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.precision import MasterOptimizer
from core.model.seeded import SampleMasks
from core.model.sharding import parameters_on_a_rank
from core.proof.comparison import claim_equal, claim_replicated_parameters
from core.proof.lesson import Run
from core.proof.oracle import Oracle
from core.proof.trainable import Replica
from core.proof.training import train
from core.shards import counted_once

Parallelize = Callable[[GPT, Axis], GPT]


@dataclass
class Version:
    """One way to train: the plain one, or the engine's."""

    replica: Replica  # this rank's shards, and how they are trained
    axis: Axis  # with a ledger of its own
    forward: Ledger  # what was sent in the forward passes

    @property
    def model(self) -> GPT:
        return self.replica.model


def build(run: Run, config: GPTConfig, axis: Axis, parallelize: Parallelize) -> tuple[GPT, MasterOptimizer]:
    """This rank's shards of the model, and an ordinary optimizer over them."""
    model = materialize(parallelize(GPT(config), axis), run.args.seed, run.job.device, run.precision)
    return model, MasterOptimizer(model.parameters(), partial(torch.optim.AdamW, lr=run.args.lr), run.precision.master)


def version(
    run: Run, config: GPTConfig, axis: Axis, parallelize: Parallelize, token_loss: Callable[..., Tensor],
    sum_partial_gradients: Callable[[GPT, Axis, Axis], None],
) -> Version:  # fmt: skip
    """Train what `parallelize` makes with `token_loss`, clipped by the norm of the full model's gradient."""
    args, axis, forward = run.args, replace(axis, ledger=Ledger()), Ledger()
    model, optimizer = build(run, config, axis, parallelize)
    loss_of = partial(token_loss, tokens=args.batch * args.sequence, axis=axis, vocabulary=config.vocabulary)
    masks = use_masks(model, SampleMasks(args.seed))
    same_heads, _ = axis.split(config.kv_copies(axis.size))

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        masks.seek(step)
        with axis.ledger.recording_to(forward):
            loss = loss_of(model(inputs), targets)
        loss.backward()
        sum_partial_gradients(model, axis, same_heads)
        # Every rank has the same loss: one of them counts it.
        return loss.detach() if axis.index == 0 else torch.zeros_like(loss)

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        return clip_and_total(model.parameters(), counted_once(model.parameters(), axis), [axis], largest, share)

    return Version(Replica(model, optimizer, forward_backward, clip), axis, forward)


def held_by_formula(run: Run, config: GPTConfig, t: int) -> tuple[str, list[float]]:
    """Bytes of weights, gradients and Adam on each of t ranks: what is sharded, and what is replicated."""
    expected = parameters_on_a_rank(config, t) * run.precision.bytes
    return f"{run.precision.bytes} bytes x (sharded / t + replicated) = {expected:,}", [expected] * t


def train_beside_one_process(run: Run, config: GPTConfig, replicas: Mapping[str, Replica]) -> None:
    """Train every version, and claim that it equals one process, and that what is replicated stays equal."""
    args, job = run.args, run.job
    run.mesh = {"tp": job.world_size}
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    oracle = Oracle(config, args.seed, job.device, optimizer_of, args.clip) if job.rank == 0 else None
    compared = train(run, replicas, oracle)
    run.formula = held_by_formula(run, config, job.world_size)
    if oracle:
        claim_equal(run, compared)
    claim_replicated_parameters(run, {name: replica.model for name, replica in replicas.items()})
