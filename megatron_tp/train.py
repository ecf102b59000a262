"""CODE 02: Megatron tensor parallelism re-implemented (Megatron 张量并行复现).

    torchrun --nproc_per_node=8 megatron_tp/train.py

The course's own model, with an untied, biased head and positions for 1024 tokens, trained on real text over all ranks:
one training step with the layers of lecture 05, every collective outside of a layer in sight. And what a rank
holds of it on every divisor of the number of ranks (1, 2, 4, 8): less, but not 1/t, because what is
replicated stays whole.

read: train.py:37-66; tensor_parallel.py:82-197; then evidence/memory.py

B batch, S sequence, V vocabulary, t ranks
"""

import argparse
import sys
from dataclasses import replace

import torch
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPTConfig, use_masks
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from core.proof.trainable import Replica
from core.shards import is_first
from megatron_tp.evidence.memory import claim_memory, claim_parameters, measure, show_course, show_memory
from megatron_tp.evidence.rules import check_course
from megatron_tp.evidence.training import build, train_beside_one_process
from megatron_tp.tensor_parallel import parallelize, sum_partial_gradients, vocab_parallel_cross_entropy


class TensorParallel(Replica):
    """A training step: Adam's zero_grad, the two methods here, Adam's step, which needs no other rank."""

    def __init__(self, run: Run, config: GPTConfig, axis: Axis):
        self.axis, self.vocabulary = axis, config.vocabulary
        self.same_heads, _ = axis.split(config.kv_copies(axis.size))  # ranks with the same head of keys and values
        model, adam = build(run, config, axis, parallelize)  # Adam over this rank's shards
        self.masks = use_masks(model, SampleMasks(run.args.seed))
        super().__init__(model, adam, self.forward_backward, self.clip)

    def forward_backward(self, step: int, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, S) each, the same on all ranks; the mean loss of a token, which all ranks have: the first counts it."""
        self.masks.seek(step)
        logits = self.model(tokens)  # (B, S, V/t)
        loss = vocab_parallel_cross_entropy(logits, targets, self.axis, self.vocabulary).mean()
        loss.backward()  # then a shard's gradient is complete, and a replicated parameter's equal on all ranks
        sum_partial_gradients(self.model, self.axis, self.same_heads)  # but for those of which each has a part
        return loss.detach() if self.axis.index == 0 else torch.zeros_like(loss)

    def clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        """Scale the gradients as one process would, by the norm of the full model's; (that norm, the loss)."""
        square = torch.zeros((), dtype=torch.float64, device=share.device)
        for p in self.model.parameters():
            if is_first(p, self.axis):  # what several ranks hold counts once
                square += p.grad.double().square().sum()
        totals = comm.all_reduce(torch.stack([square, share.double()]), self.axis.labelled("norm"))
        norm, loss = totals[0].sqrt().item(), totals[1].item()
        for p in self.model.parameters():
            p.grad *= min(1.0, largest / (norm + 1e-6))
        return norm, loss


def lesson(run: Run) -> None:
    config, ranks = course_model(run.args), run.job.world_size
    held = {}
    for t in (t for t in range(1, ranks + 1) if ranks % t == 0):
        mesh = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=t, dp=ranks // t)
        held[t] = measure(run, config, mesh)
    show_memory(run, held)
    axis = mesh["tp"]  # of all ranks
    replica = TensorParallel(run, config, axis)
    train_beside_one_process(run, config, {"plain": replica})
    claim_parameters(run, config, axis, held)
    claim_memory(run, config, held, replica)
    show_course(run, axis)


def course_model(args: argparse.Namespace) -> GPTConfig:
    config = replace(configuration(args), vocabulary=args.vocabulary, head_bias=True)
    return replace(config, sequence=args.positions)  # rows of the table; samples are shorter


def add_flags(frame: Lesson) -> None:
    add_model_flags(frame, batch=2, sequence=32, hidden=512, heads=8, feed_forward=1024)  # and 8 layers
    frame.parser.add_argument("--vocabulary", type=int, default=1024, help="rows of the embedding (%(default)s)")
    frame.parser.add_argument("--positions", type=int, default=1024, help="rows of the position table (%(default)s)")
    frame.parser.set_defaults(steps=2, untied=True)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 02",
        "Megatron tensor parallelism re-implemented",
        "Megatron 张量并行复现",
        "Parameters and memory of a rank with the course's model on 1, 2, 4, 8 ranks, and training on all of them.",
    )
    add_flags(frame)
    sys.exit(frame.main(check_course, lesson))
