"""One rank of a combined run: how it trains what `build.py` has put together. Lecture 02.

Gradients are sums, never means: a rank's loss is the sum over its tokens divided by the tokens of the global batch, in
every layout.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from math import hypot
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cluster.run.build import TrainSpec, build_model, loss_function, make_pipeline, shard_optimizer, stages_by_rank
from core.gradients import norm_and_totals
from core.ledger import Ledger, Traffic
from core.mesh import Mesh
from core.model.config import ModelConfig
from core.model.documents import Documents, use_documents
from core.model.gpt import use_masks
from core.model.loss import loss_of
from core.model.seeded import SampleMasks
from core.model.sharding import heads_norms
from core.model.tokens import documents_of
from core.proof.checkpoint import Checkpoints, NamedOptimizer
from core.proof.flight import FLIGHT
from core.proof.launch import Job
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from core.proof.oracle import Oracle
from core.shards import LocalTensor, is_copied, is_first, shard_of
from expert_parallel.engine.choices import Choices, follow
from expert_parallel.engine.experts import Experts
from expert_parallel.engine.layers import expert_parameters, parameters_of_shares
from expert_parallel.engine.router import count_ahead, end_step, evaluating, forget
from pipeline.engine.step import Trace
from pipeline.stages import Copies
from sequence_parallel import context
from sequence_parallel.engine.ulysses import context_parallel
from zero.evidence.muon import account

ALWAYS = {
    "vocabulary", "sequence", "hidden", "layers", "heads", "feed_forward", "tied", "head_bias", "name", "kv_heads",
    "head_size", "gated", "biases", "learned_positions", "latent", "experts", "top_k", "expert_feed_forward",
    "shared_feed_forward", "dense_layers"
}  # fmt: skip
# Of a model's fields these are always named; the others, which older checkpoints do not know, where they are not usual.
MAY_CHANGE = {"dropout", "attention", "capacity", "drop", "aux", "z", "bias_rate"}  # in a model that goes on


def sent_by_axis(ledger: Ledger) -> dict[str, Traffic]:
    """By axis, as the planner calls them, without what it does not count: norms, and where tokens go."""
    by_axis: dict[str, Traffic] = defaultdict(Traffic)
    for (operation, name), entry in ledger.traffic.items():
        if not name.endswith(("norm", "load")) and operation != "token counts":
            axis = "dp" if name.startswith("cp x dp") else name.split()[0]  # "tp layers", "cp inner"
            by_axis[axis].elements += entry.elements
            by_axis[axis].bytes += entry.bytes
    return by_axis


def planned_muon(worker: "Worker") -> float:
    """Elements that this rank sends in a step so that matrices can be orthogonalised, by a count of its shards."""
    found, settings = 0, worker.spec.muon
    for engine in worker.engines if settings else ():
        group = engine.before_update.group
        inner = worker.mesh["tp" if engine is worker.dense_engine else "etp"].size
        head_size, sharded = worker.spec.config.head_dim, engine.shards_optimizer
        found += account(engine.buckets, sharded, group.size, inner, head_size, settings)[0][group.index]
    return found


class Worker:
    """This rank's shards of the model, and how it trains them: a `core.proof.trainable.Trainable`.

    All ranks must make it at the same time.
    """

    compares_states = True

    def __init__(self, spec: TrainSpec, mesh: Mesh):
        layout, self.spec, self.layout, self.mesh = spec.layout, spec, spec.layout, mesh
        self.tp, self.pp = mesh["tp"], mesh["pp"]
        self.same_heads, _ = self.tp.split(spec.config.kv_copies(self.tp.size))  # ranks that hold the same k and v
        zigzag = layout.placement == "zigzag"
        self.attention = context_parallel(mesh["cp"], spec.device, layout.ulysses, zigzag, layout.cp_kind)
        self.model = build_model(spec, mesh, self.attention)
        self.masks = use_masks(self.model, SampleMasks(spec.seed))
        self.documents = None if spec.eos is None else use_documents(self.model, Documents(self.masks))
        self.choices: Choices | None = None
        self.loss = loss_function(spec, self.tp)
        self.copies = Copies(self.model, self.pp, stages_by_rank(layout), layout.split)
        self.of_shares = set(parameters_of_shares(self.model))
        self.experts = set(expert_parameters(self.model))
        self.last_biases = {m.down.bias for m in self.model.modules() if isinstance(m, Experts)}
        self.dense_engine, self.expert_engine = shard_optimizer(self.model, spec, mesh, self.copies)
        self.engines = [engine for engine in (self.dense_engine, self.expert_engine) if engine]
        self.pipeline = make_pipeline(self.model, spec, self.pp, self.loss, self.masks, self.engines)

    # ---- A step

    def zero_grad(self) -> None:
        if self.choices:
            self.choices.forget()
        forget(self.model)
        for engine in self.engines:
            engine.zero_grad()

    def rows(self, batch: int) -> range:
        """Which samples of a batch are this rank's."""
        dp = self.mesh["dp"]
        return range(batch // dp.size * dp.index, batch // dp.size * (dp.index + 1))

    def split(self, batch: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's microbatches (M, B, S/cp) of inputs and targets, (samples, S) each."""
        dp = self.mesh["dp"]
        inputs, targets = (t.chunk(dp.size)[dp.index] for t in batch)
        if self.documents:
            self.documents.seek(documents_of(inputs, self.spec.eos))
        mine = (context.local(t, self.attention) for t in (inputs, targets))
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=self.layout.microbatches) for t in mine)
        return inputs, targets

    def forward_backward(
        self, step: int, inputs: Tensor, targets: Tensor, saved: SavedActivations | None = None,
        trace: Trace | None = None,
    ) -> Tensor:  # fmt: skip
        """Of the global batch, (samples, S) each; this rank's share of the loss. Then the gradients are summed.

        Args:
            saved: counts what is kept for backward.
            trace: measures what a pipeline does.
        """
        self.masks.seek(step, self.mesh["dp"].index * self.layout.microbatches * self.layout.microbatch)
        batch = self.split((inputs, targets))
        if saved:
            saved.ignore(batch)
        if self.counts_ahead():
            self._forward(*batch)
            count_ahead(self.model)
        if self.pipeline:  # in whose step the engines sum over the data ranks
            share = self.pipeline.step(*batch, trace, saved)
            self._sum_over_copies()
        else:
            share = self._one_by_one(*batch, saved)
        self._sum_over_tp()
        return self._once_over_tp(share)

    def counts_ahead(self) -> bool:
        """Whether the balancing loss needs the load of the whole batch before the first backward."""
        moe = self.spec.moe
        return moe is not None and moe.routing.aux > 0 and self.layout.microbatches > 1

    def _sum_over_copies(self) -> None:
        """Over the ranks of pp that have the same parameters, each with the same shard of them."""
        copied: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for engine in self.engines:
            for bucket, own in zip(engine.buckets, engine.own_gradients, strict=True):
                if ranks := self.copies.ranks_of(bucket.members[0].parameter):
                    copied[ranks].append(own)
        self.copies.add_up(copied)

    def _one_by_one(self, inputs: Tensor, targets: Tensor, saved: SavedActivations | None) -> Tensor:
        """Forward and backward of each microbatch, without a pipeline: ZeRO sees each of them."""
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for m, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            last = m == len(inputs) - 1
            FLIGHT.at("forward", m)
            self.masks.at(m * len(x))
            with saved or nullcontext():
                loss = loss_of(self.model, x, y, self.loss)
            for engine in self.engines:
                engine.before_backward(last)
            loss.backward()
            for engine in self.engines:
                engine.after_backward(last)
            total += loss.detach()
        return total

    def _sum_over_tp(self) -> None:
        """What ranks of tp hold alike, but have seen different tokens or heads with; and experts' last biases."""
        if self.layout.sp:
            self.dense_engine.sum_over(self.tp.labelled("replicated"), lambda p: shard_of(p) is None)
        else:
            partial_ = heads_norms(self.model) | self.of_shares
            self.dense_engine.sum_over(self.tp.labelled("heads"), partial_.__contains__)
        self.dense_engine.sum_over(self.same_heads.labelled("heads"), is_copied)
        if self.expert_engine:
            self.expert_engine.sum_over(self.mesh["etp"], self.last_biases.__contains__)

    def _once_over_tp(self, share: Tensor) -> Tensor:
        """Without sp all ranks of tp have the same loss: one of them counts it."""
        return share if self.layout.sp or self.tp.index == 0 else torch.zeros_like(share)

    @torch.no_grad()
    def _forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.pipeline:
            return self.pipeline.forward(inputs, targets)
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for m, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            self.masks.at(m * len(x))
            total += loss_of(self.model, x, y, self.loss)
        return total

    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """The loss of a batch of the size of a step's, on all ranks."""
        with evaluating(self.model):
            share = self._once_over_tp(self._forward(*self.split((inputs, targets))))
        return norm_and_totals([], [self.tp, self.dense_engine.axis, self.pp], share[None])[1][0]

    def clip(self, clip: float, share: Tensor) -> tuple[float, float]:
        """Clip by the norm of the full model's gradient; (norm, loss)."""
        norm, loss = self.dense_engine.norm_and_total(share, [self.tp, self.pp], self._counted)
        if self.expert_engine:
            axes = [self.mesh["ep"], self.mesh["etp"], self.pp]
            of_experts, _ = self.expert_engine.norm_and_total(torch.zeros_like(share), axes, self._counted)
            norm = hypot(norm, of_experts)
        for engine in self.engines:
            engine.clip_by(clip, norm)
        return norm, loss

    def _counted(self, p: nn.Parameter) -> bool:
        """Whether this rank adds a parameter's gradient to the norm: of the ranks that hold it alike, the first."""
        here = self.copies.counted_here(p)
        if p in self.experts:
            return here and (self.mesh["etp"].index == 0 or p not in self.last_biases)
        return here and is_first(p, self.tp)

    def step(self) -> None:
        for engine in self.engines:
            engine.step()
        end_step(self.model)

    def set_lr(self, lr: float) -> None:
        for optimizer, _ in self.named_optimizers():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def close(self) -> None:
        """End what sends messages."""
        self.attention.close()
        if self.pipeline:
            self.pipeline.close()

    def record_choices(self) -> None:
        """Note from now on where each token goes, for `guide`: only where a training is compared, for it costs time."""
        self.choices = Choices(self.model, self._rows)

    def guide(self, run: Run, oracle: Oracle | None) -> None:
        """Mixtures of experts: the one process sends each token where the ranks have sent it."""
        assert self.choices is not None, "record_choices first"
        everyone = run.job.gather(self.choices.found)
        if oracle:
            follow(oracle.model, everyone)

    def _rows(self) -> Tensor:
        """Which tokens of the global batch the micro-batch is of that routers see now: (B, S/cp/tp)."""
        batch, sequence = self.layout.batch, self.spec.config.sequence
        first = self.masks.first_sample + self.masks.offset
        rows = torch.arange(batch * sequence).view(batch, sequence)[first : first + self.layout.microbatch]
        rows = context.local(rows, self.attention)
        return rows.tensor_split(self.tp.size, 1)[self.tp.index]

    # ---- What this rank holds, under the names of the full model

    def gradients(self) -> list[LocalTensor]:
        return self._named(each for engine in self.engines for each in engine.gradients())

    def weights(self) -> list[LocalTensor]:
        return self._named(each for engine in self.engines for each in engine.weights())

    def master_weights(self) -> list[LocalTensor]:
        """In the precision of the update, and what is not trained."""
        return self._named(each for engine in self.engines for each in engine.master_weights())

    def states(self) -> list[LocalTensor]:
        found = [each for engine in self.engines for each in engine.states()]
        return [each._replace(name=(self.model.full_name(each.name[0]), each.name[1])) for each in found]

    def _named(self, tensors: Iterable[LocalTensor]) -> list[LocalTensor]:
        return [each._replace(name=self.model.full_name(each.name)) for each in tensors]

    def named_optimizers(self) -> list[NamedOptimizer]:
        found = [each for engine in self.engines for each in engine.named_optimizers()]
        return [(o, {p: self.model.full_name(name) for p, name in names.items()}) for o, names in found]

    def publish(self) -> None:
        for engine in self.engines:
            engine.publish()

    def checkpoints(self, folder: str | Path, job: Job, keep: int = 2) -> Checkpoints:
        """Where this training is saved, and goes on from."""
        return Checkpoints(folder, self, job, keep, self.identity(), self.saved_elsewhere())

    def identity(self) -> dict[str, Any]:
        """The model's configuration and the optimizer's kind, without what may change in a model that goes on."""
        usual = ModelConfig()
        found = asdict(self.spec.config) | {"experts": 0}
        found = {k: v for k, v in found.items() if k in ALWAYS or v != getattr(usual, k)}
        if self.spec.moe:
            moe = asdict(self.spec.moe)
            features = moe.pop("feed_forward") or found["feed_forward"]
            routing = {k: v for k, v in moe.pop("routing").items() if (k, v) != ("weight_scale", 1.0)}
            found |= routing | {"expert_feed_forward": features, "every": 1} | moe  # as older checkpoints have it
        optimizer, _ = self.named_optimizers()[0]
        found["optimizer"] = type(optimizer).__name__
        found = {name: value for name, value in found.items() if name not in MAY_CHANGE}
        return json.loads(json.dumps(found))  # as it is read again: named tuples are lists

    def saved_elsewhere(self) -> set[str]:
        """What another rank of the pipeline has too, and saves: once is enough."""
        named = self.model.named_parameters()
        return {self.model.full_name(name) for name, p in named if not self.copies.counted_here(p)}
