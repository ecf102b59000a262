"""Put each known bug in, and see which claims of lecture 01 fail: a check that cannot fail proves nothing."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from core import comm
from core.mesh import Axis
from core.model.gpt import GPT
from tests.pool import Pool
from tests.zero.lessons import LESSONS, Bug, Outcome, play_all
from zero import ddp, muon, zero1, zero3, zeropp
from zero.engine import engine
from zero.engine import muon as muon_engine
from zero.engine.buckets import Bucket, InOrder
from zero.engine.engine import Engine
from zero.engine.gathered import GatheredWeights, Unit
from zero.engine.gradients import FullGradients
from zero.engine.muon import Muon
from zero.engine.offload import HostShards
from zero.engine.optimizer import ShardOptimizer
from zero.engine.weights import ReplicatedWeights
from zero.evidence.training import Data

RANKS = dict.fromkeys(LESSONS, 2) | {"zero3": 4, "zeropp": 4}
SIZES = {"steps": 2, "batch": 8, "sequence": 8, "hidden": 16, "heads": 2, "layers": 3, "clip": 0.05, "bucket": 2000}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]


# ---- Bugs in the engine


def averaged_over_the_ranks() -> AbstractContextManager:
    right = Engine.clip_and_total

    def wrong(self: Engine, *arguments: Any) -> tuple[float, float]:
        for shard in self.own_gradients:
            shard /= self.axis.size
        return right(self, *arguments)

    return patch.object(Engine, "clip_and_total", wrong)


def every_microbatch_is_reduced_into_the_sum() -> AbstractContextManager:
    """All-reduce after each micro-batch, of a buffer that holds the sum so far: earlier ones count twice and more."""
    right = Engine.backward
    return patch.object(Engine, "backward", lambda self, loss, last=True: right(self, loss, True))


def only_the_last_microbatch_is_reduced() -> AbstractContextManager:
    right = Engine.backward

    def wrong(self: Engine, loss: Tensor, last: bool = True) -> None:
        self.zero_grad()
        right(self, loss, last)

    return patch.object(Engine, "backward", wrong)


def gradients_are_not_zeroed() -> AbstractContextManager:
    return patch.object(Engine, "zero_grad", lambda self: None)


def all_reduced_and_a_slice_copied() -> AbstractContextManager:
    """As DeepSpeed's first stages do it: right, for 2Ψ where a reduce-scatter sends Ψ."""

    def wrong(x: Tensor, axis: Axis, dim: int = 0) -> comm.Pending:
        pending = comm.all_reduce_async(x.clone(), axis)
        return replace(pending, finish=lambda full: full.chunk(axis.size)[axis.index])

    return patch.object(comm, "reduce_scatter_async", wrong)


def the_bucket_leaves_too_early() -> AbstractContextManager:
    def wrong(self: InOrder, i: int, parameter: nn.Parameter) -> None:
        self._arrived(parameter)
        while self._next < len(self._missing) and self._next <= i:
            self._launch_next()
            gradients = self.launch.__self__
            if isinstance(gradients, FullGradients):  # lest the bucket is read late enough by chance
                for _, pending in gradients.in_flight:
                    pending.work.wait(pending.axis.timeout)

    return patch.object(InOrder, "_complete", wrong)


def clipped_by_the_local_norm() -> AbstractContextManager:
    right = engine.norm_and_totals

    def wrong(counted: list[Tensor], axes: list[Axis], more: Tensor) -> tuple[float, list[float]]:
        local = sum(g.square().sum().item() for g in counted) ** 0.5
        return local, right(counted, axes, more)[1]

    return patch.object(engine, "norm_and_totals", wrong)


def shards_are_shifted() -> AbstractContextManager:
    """Each rank updates the shard after its own with its own gradients."""
    right = Bucket.segments
    return patch.object(Bucket, "segments", lambda self, index: right(self, (index + 1) % dist.get_world_size()))


def other_ranks_weights_are_not_gathered() -> AbstractContextManager:
    return patch.object(ReplicatedWeights, "gather", lambda self, i: None)


def one_ranks_shard_is_not_updated() -> AbstractContextManager:
    right = ShardOptimizer.step

    def wrong(self: ShardOptimizer) -> None:
        if dist.get_rank() == 2:
            for each in self.owned:
                each.shard.grad = None
        right(self)

    return patch.object(ShardOptimizer, "step", wrong)


def layers_are_read_before_they_arrive() -> AbstractContextManager:
    right = Unit.wait

    def wrong(self: Unit) -> None:
        right(self)
        for buffer in self.full:
            if buffer.untyped_storage().nbytes():
                buffer.zero_()

    return patch.object(Unit, "wait", wrong)


def every_rank_trains_on_the_same_samples() -> AbstractContextManager:
    right = Data.microbatches

    def wrong(self: Data, *arguments: Any) -> Any:
        self.axis = replace(self.axis, index=0)
        return right(self, *arguments)

    return patch.object(Data, "microbatches", wrong)


def the_optimizer_is_not_sharded() -> AbstractContextManager:
    right = ShardOptimizer.tensors
    return patch.object(ShardOptimizer, "tensors", lambda self: [t.repeat(dist.get_world_size()) for t in right(self)])


def full_gradients_stay() -> AbstractContextManager:
    right, kept = Bucket.take_gradients, []

    def wrong(self: Bucket, axis: Axis | None = None) -> Tensor:
        before = [(m.parameter, m.parameter.grad) for m in self.members]
        full = right(self, axis)
        for p, gradient in before:
            p.grad = gradient
            kept.append(gradient)
        return full

    return patch.object(Bucket, "take_gradients", wrong)


def no_layer_is_freed_in_forward() -> AbstractContextManager:
    def wrong(self: GatheredWeights, i: int) -> None:
        self._prefetch(i + 2)
        self._forward.walk.layers[i].wait()

    return patch.object(GatheredWeights, "forward_reaches", wrong)


def the_next_layer_is_not_prefetched() -> AbstractContextManager:
    """Each layer is gathered as its forward begins, which waits for it."""
    right = GatheredWeights._prefetch
    return patch.object(GatheredWeights, "_prefetch", lambda self, stop: right(self, stop - 1))


def a_prefetch_is_waited_for_at_once() -> AbstractContextManager:
    """The same collectives in the same order, and nothing is overlapped."""
    right = Unit.gather

    def wrong(self: Unit, forward: bool) -> None:
        right(self, forward)
        self.wait()

    return patch.object(Unit, "gather", wrong)


def one_microbatch_stays_on_the_device() -> AbstractContextManager:
    right = HostShards.arrived
    return patch.object(HostShards, "arrived", lambda self, but: right(self, max(but, 1)))


def the_optimizer_stays_on_the_device() -> AbstractContextManager:
    right = engine.ShardOptimizer
    return patch.object(engine, "ShardOptimizer", lambda *arguments: right(*arguments[:-1], None))


def nothing_is_kept_in_the_node() -> AbstractContextManager:
    right = zeropp.NodeUnit.free

    def wrong(self: zeropp.NodeUnit) -> None:
        right(self)
        self.secondary = []

    return patch.object(zeropp.NodeUnit, "free", wrong)


# ---- Bugs in both versions


def hops_to_the_wrong_node() -> AbstractContextManager:
    right = zeropp.hop

    def wrong(rows: Tensor, axis: Axis, bits: int) -> Tensor:
        return right(rows.flip(0) if axis.name == "across" else rows, axis, bits)

    return patch.object(zeropp, "hop", wrong)


def one_hop_in_full_precision() -> AbstractContextManager:
    right = zeropp.hop
    return patch.object(zeropp, "hop", lambda rows, axis, bits: right(rows, axis, 0 if axis.name == "node" else bits))


def secondary_shards_are_swapped() -> AbstractContextManager:
    right = zeropp.gather_in_node

    def wrong(secondary: Tensor, full: Tensor, node: Axis) -> comm.Pending:
        pending = right(secondary, full, node)
        return replace(pending, finish=lambda full: full.copy_(full.roll(len(secondary))))

    return patch.object(zeropp, "gather_in_node", wrong)


def one_scale_for_all_blocks() -> AbstractContextManager:
    right = zeropp.quantise

    def wrong(x: Tensor, bits: int) -> Tensor:
        packed = right(x, bits)
        start = -(-x.shape[1] // zeropp.BLOCK) * zeropp.BLOCK * bits // 8
        packed[:, start:] = packed[:, start : start + 4].repeat(1, (packed.shape[1] - start) // 4)
        return packed

    return patch.object(zeropp, "quantise", wrong)


def every_rank_orthogonalises_by_itself() -> AbstractContextManager:
    """Its shards only: the others' are zeros."""

    def wrong(x: Tensor, axis: Axis, send: list[int], receive: list[int], label: str = "") -> comm.Pending:
        at, mine = sum(send[: axis.index]), x.new_zeros(sum(receive))
        there = sum(receive[: axis.index])
        mine[there : there + receive[axis.index]] = x[at : at + send[axis.index]]
        return comm.Pending(None, axis, mine, label)

    return patch.object(comm, "all_to_all_async", wrong)


def every_matrix_is_orthogonalised_everywhere() -> AbstractContextManager:
    """The result is right, for N times the work."""
    stack = ExitStack()
    for module in (muon, muon_engine):
        right = module.direction

        def wrong(*arguments: Any, right: Any = right) -> Tensor:
            for _ in range(dist.get_world_size() - 1):
                right(*arguments)
            return right(*arguments)

        stack.enter_context(patch.object(module, "direction", wrong))
    return stack


def all_matrices_on_the_first_rank() -> AbstractContextManager:
    stack = ExitStack()
    for module in (muon, muon_engine):
        stack.enter_context(patch.object(module, "deal", lambda costs, n: [0] * len(costs)))
    return stack


def embeddings_are_matrices_too() -> AbstractContextManager:
    stack = ExitStack()
    for module in (muon, muon_engine):
        stack.enter_context(patch.object(module, "is_matrix", lambda name, p: p.dim() == 2))
    return stack


def momentum_is_not_nesterovs() -> AbstractContextManager:
    right, plain = Muon.nesterov, muon.ZeroMuon.to_owners

    def wrong(self: Muon) -> dict[nn.Parameter, Tensor]:
        return {p: self.state[p]["momentum_buffer"] for p in right(self)}

    stack = ExitStack()
    stack.enter_context(patch.object(Muon, "nesterov", wrong))
    stack.enter_context(patch.object(muon.ZeroMuon, "to_owners", lambda self, _: plain(self, self.momentum.detach())))
    return stack


# ---- Bugs in the plain versions


def plain_directions_stay_with_their_owners() -> AbstractContextManager:
    """Each rank updates what it has of its own matrices only."""
    right = muon.ZeroMuon.to_shards

    def wrong(self: muon.ZeroMuon, directions: list[Tensor], update: Tensor) -> Tensor:
        shard, mine = right(self, directions, update), self.owned[self.axis.index]
        for i in range(len(self.matrices)):
            if i not in mine:
                shard[self.held(i, self.axis.index)] = 0
        return shard

    return patch.object(muon.ZeroMuon, "to_shards", wrong)


def plain_gradients_are_not_reduced() -> AbstractContextManager:
    return patch.object(ddp, "comm", SimpleNamespace(all_reduce=lambda x, axis: x))


def plain_shards_are_shifted() -> AbstractContextManager:
    """The master weights are the next rank's, the gradients this one's."""
    return patch.object(zero1, "own_shard", lambda flat, axis: flat.chunk(axis.size)[(axis.index + 1) % axis.size])


def plain_weights_are_not_gathered() -> AbstractContextManager:
    """The other shards stay as they are, zeros here."""

    def wrong(x: Tensor, axis: Axis) -> Tensor:
        full = x.new_zeros(axis.size, len(x))
        full[axis.index] = x
        return full.flatten()

    return patch.object(zero1, "comm", SimpleNamespace(all_gather=wrong, reduce_scatter=comm.reduce_scatter))


def plain_gradients_stay_after_a_microbatch() -> AbstractContextManager:
    """So the first micro-batch counts again with the second."""
    return patch.object(GPT, "zero_grad", lambda self: None)


def plain_microbatches_overwrite_each_other() -> AbstractContextManager:
    right = zero3.Zero3.reduce_scatter

    def wrong(self: zero3.Zero3, unit: int) -> None:
        self.shards[unit].grad.zero_()
        right(self, unit)

    return patch.object(zero3.Zero3, "reduce_scatter", wrong)


def plain_weights_stay_gathered() -> AbstractContextManager:
    """After forward: backward finds them, and sends Ψ less."""
    right, gathered = zero3.Zero3.gather, set()

    def gather(self: zero3.Zero3, unit: int) -> None:
        if unit in gathered:
            gathered.remove(unit)
        else:
            gathered.add(unit)
            right(self, unit)

    def free(self: zero3.Zero3, unit: int) -> None: ...

    stack = ExitStack()
    stack.enter_context(patch.object(zero3.Zero3, "gather", gather))
    stack.enter_context(patch.object(zero3.Zero3, "free", free))
    return stack


def plain_layers_are_not_freed() -> AbstractContextManager:
    return patch.object(zero3.Zero3, "free", lambda self, unit: None)


def plain_gathered_buffers_are_kept() -> AbstractContextManager:
    """The parameters let go of them, and something else has a hold of them: no memory is saved."""
    right, kept = zero3.set_data, []

    def wrong(parameters: list[nn.Parameter], flat: Tensor) -> None:
        kept.append(flat)
        right(parameters, flat)

    return patch.object(zero3, "set_data", wrong)


LOSS, GRADIENT, NORM, PARAMETER = "losses equal", "every gradient equals", "the global gradient norm", "every parameter"
STATE, SENT, STATES = "the optimizer's state", "elements sent a step", "bytes of model states"
PEAK = "bytes of weights at the peak"
ORDER, LEFT = "layers gathered, used, freed, forward and back", "bytes of full gradients after a micro-batch"
AHEAD, AHEAD_BACK = "next layer in flight all through a forward", "layer before in flight as a backward begins"
PLAIN, ENGINE = "plain", "engine"
BOTH = (PLAIN, ENGINE)
MUST_FAIL: dict[tuple[str, Bug], tuple[tuple[str, ...], set[str]]] = {  # of which versions
    ("zero1", averaged_over_the_ranks): ((ENGINE,), {NORM, STATE}),
    ("ddp", every_microbatch_is_reduced_into_the_sum): ((ENGINE,), {GRADIENT, NORM, SENT}),
    ("zero2", only_the_last_microbatch_is_reduced): ((ENGINE,), {GRADIENT, NORM}),
    ("zero1", gradients_are_not_zeroed): ((ENGINE,), {GRADIENT, NORM, STATE}),
    ("zero1", all_reduced_and_a_slice_copied): (BOTH, {SENT}),
    ("zero2", all_reduced_and_a_slice_copied): (BOTH, {SENT}),
    ("ddp", the_bucket_leaves_too_early): ((ENGINE,), {GRADIENT}),
    ("zero2", the_bucket_leaves_too_early): ((ENGINE,), {GRADIENT}),
    ("zero2", clipped_by_the_local_norm): ((ENGINE,), {NORM, PARAMETER}),
    ("zero1", shards_are_shifted): (BOTH, {GRADIENT}),
    ("zero1", other_ranks_weights_are_not_gathered): ((ENGINE,), {PARAMETER, LOSS}),
    ("zero3", one_ranks_shard_is_not_updated): ((ENGINE,), {PARAMETER, STATE}),
    ("zero3", layers_are_read_before_they_arrive): ((ENGINE,), {LOSS, GRADIENT}),
    ("zero3", every_rank_trains_on_the_same_samples): (BOTH, {LOSS, GRADIENT}),
    ("offload", one_microbatch_stays_on_the_device): ((ENGINE,), {GRADIENT, NORM}),
    ("offload", the_optimizer_stays_on_the_device): ((ENGINE,), {"bytes on the host"}),
    ("zeropp", nothing_is_kept_in_the_node): ((ENGINE,), {"bytes of hpZ", "bytes of qwZ"}),
    ("zeropp", hops_to_the_wrong_node): (BOTH, {GRADIENT}),
    ("zeropp", one_hop_in_full_precision): (BOTH, {"bytes of qgZ: gradients, inside"}),
    ("zeropp", secondary_shards_are_swapped): (BOTH, {GRADIENT}),
    ("zeropp", one_scale_for_all_blocks): (("",), {"qgZ: relative error"}),
    ("memory", the_optimizer_is_not_sharded): (
        ("",),
        {"bytes of model states, ZeRO-1", "bytes of model states, ZeRO-3"},
    ),
    ("memory", no_layer_is_freed_in_forward): (("",), {PEAK}),
    ("memory", full_gradients_stay): (("",), {f"{STATES}, ZeRO-2", f"{STATES}, ZeRO-3"}),
    ("muon", every_rank_orthogonalises_by_itself): (BOTH, {PARAMETER, LOSS, "elements sent a step to owners"}),
    ("muon", every_matrix_is_orthogonalised_everywhere): (BOTH, {"FLOPs of Newton-Schulz"}),
    ("muon", all_matrices_on_the_first_rank): (BOTH, {"FLOPs of Newton-Schulz"}),
    ("muon", embeddings_are_matrices_too): (BOTH, {PARAMETER, STATE, "bytes of optimizer state"}),
    ("muon", momentum_is_not_nesterovs): (BOTH, {PARAMETER}),
    ("muon", plain_directions_stay_with_their_owners): ((PLAIN,), {PARAMETER, LOSS}),
    ("ddp", plain_gradients_are_not_reduced): ((PLAIN,), {GRADIENT, NORM, SENT}),
    ("zero1", plain_shards_are_shifted): ((PLAIN,), {PARAMETER, LOSS}),
    ("zero1", plain_weights_are_not_gathered): ((PLAIN,), {PARAMETER, LOSS, SENT}),
    ("zero2", plain_gradients_stay_after_a_microbatch): ((PLAIN,), {GRADIENT, NORM, LEFT}),
    ("zero2", full_gradients_stay): ((ENGINE,), {GRADIENT, LEFT}),
    ("zero3", full_gradients_stay): ((ENGINE,), {GRADIENT, LEFT}),
    ("zero3", plain_microbatches_overwrite_each_other): ((PLAIN,), {GRADIENT, NORM}),
    ("zero3", plain_weights_stay_gathered): ((PLAIN,), {SENT, ORDER}),
    ("zero3", plain_layers_are_not_freed): ((PLAIN,), {PEAK, ORDER}),
    ("zero3", plain_gathered_buffers_are_kept): ((PLAIN,), {ORDER}),
    ("zero3", no_layer_is_freed_in_forward): ((ENGINE,), {PEAK}),
    ("zero3", the_next_layer_is_not_prefetched): ((ENGINE,), {AHEAD}),
    ("zero3", a_prefetch_is_waited_for_at_once): ((ENGINE,), {AHEAD, AHEAD_BACK}),
}


# ---- The lessons with a bug in them


@pytest.fixture(scope="module")
def outcomes(pool: Pool) -> dict[tuple[str, Bug | None], Outcome]:
    """Of every lesson without a bug and with each of its own."""
    found: dict[tuple[str, Bug | None], Outcome] = {}
    for lesson in LESSONS:
        bugs = [None, *(bug for name, bug in MUST_FAIL if name == lesson)]
        played = pool.run(RANKS[lesson], play_all, [(lesson, FLAGS, bug) for bug in bugs], timeout=300.0)[0]
        found |= {(lesson, bug): outcome for bug, outcome in zip(bugs, played, strict=True)}
    return found


@pytest.mark.parametrize("name", LESSONS)
def test_without_a_bug_every_claim_holds(outcomes: dict, name: str) -> None:
    assert outcomes[name, None].claims
    assert outcomes[name, None].failed == []


@pytest.mark.parametrize(
    ("case", "must_fail"), MUST_FAIL.items(), ids=[f"{name}-{bug.__name__}" for name, bug in MUST_FAIL]
)
def test_the_claims_catch(outcomes: dict, case: tuple[str, Bug], must_fail: tuple[tuple[str, ...], set[str]]) -> None:
    failed, (versions, claims) = outcomes[case].failed, must_fail
    for version in versions:
        missed = {c for c in claims if not any(f.startswith(c) and version in f for f in failed)}
        assert not missed, f"{version}: only these failed: {failed}"
    if len(versions) == 1 and versions[0]:
        assert all(versions[0] in f for f in failed), "the other version has no bug"
