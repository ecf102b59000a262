"""One rank of a combined run: the topics put together, in the order in which they cut the model. Lecture 02.

    stages of the pipeline   pipeline.stages.cut                 pp
    heads, features, rows    megatron_tp or, with sp,
                             sequence_parallel .parallelize      tp
    the sequence             sequence_parallel.context           cp
    experts                  expert_parallel                     ep, etp, edp
    optimizer, gradients     zero                                dp x cp, and edp for experts

Each treats what the others have left. Gradients are sums, never means: a rank's loss is the sum over its tokens divided
by the tokens of the global batch, in every layout.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from math import hypot

import torch
from einops import rearrange
from torch import Tensor, nn

import megatron_tp.layers
import megatron_tp.loss
import sequence_parallel.layers
import sequence_parallel.loss
from cluster.planner.layout import Layout
from core.gradients import norm_and_totals
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.proof.memory import SavedActivations
from core.shards import LocalTensor, shard_of
from expert_parallel.experts import Experts
from expert_parallel.gating import Spread, count_ahead, end_step, forget
from expert_parallel.layers import expert_parameters, parallelize
from expert_parallel.moe import MoEConfig, to_moe
from pipeline.runtime import Pipeline
from pipeline.schedules import build, held, size
from pipeline.stages import Copies, cut, each_stage
from sequence_parallel import context
from sequence_parallel.hybrid import context_parallel
from sequence_parallel.recompute import recompute
from zero.ddp import DataParallel
from zero.flat import BUCKET_ELEMENTS
from zero.optimizer import MakeOptimizer
from zero.stage import Stage
from zero.zero1 import Zero1
from zero.zero2 import Zero2
from zero.zero3 import Zero3

STAGES: tuple[type[Stage], ...] = (DataParallel, Zero1, Zero2, Zero3)


def make_mesh(layout: Layout, device_type: str, ledger: Ledger, timeout: float) -> Mesh:
    names = ("tp", "cp", "dp", "pp", "ep", "etp")
    return Mesh(device_type, ledger, timeout, **{name: getattr(layout, name) for name in names})


class Worker:
    """This rank's part of the model, and how it trains; what `core.proof.training.train` compares with one process.

    All ranks must make it at the same time.

    Args:
        layout: one that `cluster.rules.check` accepts.
        bucket: elements that ZeRO sends at once, about.
    """

    compares_states = True

    def __init__(
        self,
        config: GPTConfig,
        moe: MoEConfig | None,
        layout: Layout,
        mesh: Mesh,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        make_optimizer: MakeOptimizer,
        bucket: int = BUCKET_ELEMENTS,
    ):
        self.moe, self.layout, self.mesh = moe, layout, mesh
        self.counts_ahead = moe is not None and moe.routing.aux > 0 and layout.microbatches > 1
        self.tp, self.pp = mesh["tp"], mesh["pp"]
        self.data = mesh.joined("cp", "dp")
        self.attention = context_parallel(mesh["cp"], device, layout.ulysses, layout.placement == "zigzag")
        schedule = build(layout.schedule, layout.pp, layout.microbatches, layout.v)
        stages, everyone = size(schedule)[0], held(schedule)

        model = cut(GPT(config), everyone[self.pp.index], stages)
        tokens = layout.batch * config.sequence
        self.loss_of = partial(token_loss, tokens=tokens)
        if layout.tp > 1:
            topic = sequence_parallel if layout.sp else megatron_tp
            topic.layers.parallelize(model, self.tp)
            self.loss_of = partial(topic.loss.token_loss, tokens=tokens, axis=self.tp, vocabulary=config.vocabulary)
        if layout.cp > 1:
            context.parallelize(model, self.attention)
        if moe:
            axes = (mesh["dp"], mesh["cp"], *((self.tp,) if layout.sp else ()))
            spread = Spread(axes, self.tp if layout.sp else None, layout.microbatches)
            parallelize(to_moe(model, moe), mesh["ep"], mesh["etp"], spread)
        self.model = materialize(recompute(model, layout.recompute), seed, device, dtype)
        self.masks = use_masks(self.model, SampleMasks(seed))

        self.copies = Copies(self.model, self.pp, everyone)
        self.experts = set(expert_parameters(self.model))
        self.last_biases = {m.down.bias for m in self.model.modules() if isinstance(m, Experts)}
        master = torch.float32 if dtype == torch.bfloat16 else dtype
        zero = partial(STAGES[layout.zero], self.model, make_optimizer=make_optimizer, master=master, elements=bucket)
        if moe:
            self.rest = zero(axis=self.data, only=lambda p: p not in self.experts)
            self.stages = [self.rest, zero(axis=mesh["edp"], only=self.experts.__contains__)]
        else:
            self.rest = zero(axis=self.data)
            self.stages = [self.rest]

        here = config.sequence // layout.sequence_parts  # tokens of a sample between the layers
        self.pipeline = Pipeline(
            each_stage(self.model, everyone[self.pp.index], stages), self.loss_of, schedule, self.pp,
            (layout.microbatch, here, config.hidden), dtype, device, self.masks,
        ) if layout.pp > 1 else None  # fmt: skip

    # ---- A step

    def zero_grad(self) -> None:
        for stage in self.stages:
            stage.zero_grad()

    def split(self, batch: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's microbatches (M, B, S/cp) of inputs and targets, (samples, S) each."""
        dp, m = self.mesh["dp"], self.layout.microbatches
        mine = (context.part(t.chunk(dp.size)[dp.index], self.attention) for t in batch)
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in mine)
        return inputs, targets

    def forward_backward(
        self, step: int, inputs: Tensor, targets: Tensor, saved: SavedActivations | None = None
    ) -> Tensor:
        """Of the global batch, (samples, S) each; this rank's share of the loss. Then the gradients are summed.

        Args:
            saved: counts what is kept for backward.
        """
        self.masks.seek(step, self.mesh["dp"].index * self.layout.microbatches * self.layout.microbatch)
        batch = self.split((inputs, targets))
        if saved:
            saved.ignore(batch)
        if self.counts_ahead:
            self._forward(*batch)
            count_ahead(self.model)
        if self.pipeline:
            share = self.pipeline.step(*batch, saved=saved)
            self.copies.sum_gradients()
            for stage in self.stages:
                stage.reduce()
        else:
            share = self._microbatches(*batch, saved)
        if self.layout.sp:  # each rank of tp has seen its own tokens
            self.rest.sum_over(self.tp.labelled("whole gradients"), lambda p: shard_of(p) is None)
        if len(self.stages) > 1:
            self.stages[1].sum_over(self.mesh["etp"], self.last_biases.__contains__)
        return self._counted(share)

    def _microbatches(self, inputs: Tensor, targets: Tensor, saved: SavedActivations | None) -> Tensor:
        """All forwards and backwards without a pipeline: ZeRO sees each of them."""
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for m, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            last = m == len(inputs) - 1
            self.masks.at(m * len(x))
            with saved or nullcontext():
                loss = self.loss_of(self.model(x), y)
            for stage in self.stages:
                stage.before_backward(last)
            loss.backward()
            for stage in self.stages:
                stage.after_backward(last)
            total += loss.detach()
        return total

    @torch.no_grad()
    def _forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.pipeline:
            return self.pipeline.forward(inputs, targets)
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for m, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            self.masks.at(m * len(x))
            total += self.loss_of(self.model(x), y)
        return total

    def _counted(self, share: Tensor) -> Tensor:
        """Without sp all ranks of tp have the same loss: one of them counts it."""
        return share if self.layout.sp or self.tp.index == 0 else torch.zeros_like(share)

    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """The loss of a batch of the size of a step's, on all ranks."""
        self.model.eval()
        share = self._counted(self._forward(*self.split((inputs, targets))))
        self.model.train()
        forget(self.model)
        _, (loss,) = norm_and_totals([], [self.tp, self.data, self.pp], share[None])
        return loss

    def clip(self, clip: float, share: Tensor) -> tuple[float, float]:
        """Clip by the norm of the whole model's gradient; (norm, loss)."""
        tp, pp, etp = self.tp, self.pp, self.mesh["etp"]

        def counts(p: nn.Parameter) -> bool:
            if p in self.experts:
                return etp.index == 0 or p not in self.last_biases
            return (tp.index == 0 or shard_of(p) is not None) and self.copies.counted_here(p)

        norm, loss = self.rest.norm_and_total(share, [tp, pp], counts)
        if len(self.stages) > 1:
            of_experts, _ = self.stages[1].norm_and_total(torch.zeros_like(share), [self.mesh["ep"], etp, pp], counts)
            norm = hypot(norm, of_experts)
        for stage in self.stages:
            stage.clip_by(clip, norm)
        return norm, loss

    def step(self) -> None:
        for stage in self.stages:
            stage.step()
        end_step(self.model)

    def set_lr(self, lr: float) -> None:
        for group in (g for stage in self.stages for o in stage.optimizers for g in o.optimizer.param_groups):
            group["lr"] = lr

    # ---- What this rank holds, under the names of the whole model

    def gradients(self) -> list[LocalTensor]:
        return self._named(piece for stage in self.stages for piece in stage.gradients())

    def weights(self) -> list[LocalTensor]:
        return self._named(piece for stage in self.stages for piece in stage.weights())

    def master_weights(self) -> list[LocalTensor]:
        """In the precision of the update, and what is not trained."""
        return self._named(piece for stage in self.stages for piece in stage.master_weights())

    def states(self) -> list[LocalTensor]:
        pieces = [piece for stage in self.stages for piece in stage.states()]
        return [piece._replace(name=(self.model.full_name(piece.name[0]), piece.name[1])) for piece in pieces]

    def _named(self, pieces: Iterable[LocalTensor]) -> list[LocalTensor]:
        return [piece._replace(name=self.model.full_name(piece.name)) for piece in pieces]

    def close(self) -> None:
        """End what sends messages."""
        self.attention.close()
        if self.pipeline:
            self.pipeline.close()
