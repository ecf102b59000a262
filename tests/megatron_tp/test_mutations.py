"""Put each known bug in, and see which claims of lecture 05 fail: a check that cannot fail proves nothing."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import core.gradients
from core import comm
from core.mesh import Axis
from core.model import gpt
from core.model import streams as rng
from core.model.precision import POLICIES
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, configuration
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from core.shards import Shard, is_copied, shard_of
from megatron_tp import tensor_parallel, train
from megatron_tp.engine import layers, loss
from megatron_tp.evidence import tensor_parallel as evidence
from megatron_tp.evidence import training
from tests.pool import Pool

RANKS = 3  # of 256 bytes and 3 ranks the vocabulary has padding
SIZES = {"steps": 1, "batch": 3, "sequence": 8, "hidden": 24, "heads": 6, "layers": 2, "clip": 0.05}
FLAGS = ["--attention=softmax", "--dropout=0.2", *(f"--{name}={value}" for name, value in SIZES.items())]
LLAMA_FLAGS = [*FLAGS, "--model=llama", "--hidden=32", "--heads=8", "--kv-heads=2"]
COURSE_FLAGS = [*FLAGS, "--feed-forward=48", "--vocabulary=257", "--positions=20"]


# ---- The bugs: in what both versions use, and in the engine


def every_rank_has_the_first_shard() -> AbstractContextManager:
    right = Shard.local
    return patch.object(Shard, "local", lambda self, whole: right(replace(self, index=0), whole))


def qkv_is_sharded_across_heads() -> AbstractContextManager:
    """The fused rows taken as (q|k|v, head, D): a rank gets the queries of all heads, the next the keys."""
    right = gpt.initial_value

    def wrong(name: str, shape: torch.Size, config: gpt.GPTConfig, seed: int) -> Tensor:
        value = right(name, shape, config, seed)
        if "qkv" not in name or dist.get_rank() == 0:
            return value  # the oracle is on rank 0, whose own part is right
        heads = value.unflatten(0, (config.heads, 3, -1))
        return heads.transpose(0, 1).reshape(shape)

    return patch.object(gpt, "initial_value", wrong)


def row_bias_once_a_rank() -> AbstractContextManager:
    def wrong(ctx: object, x: Tensor, weight: Tensor, bias: Tensor, axis: Axis) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return comm.all_reduce(torch.nn.functional.linear(x, weight, bias), axis)

    return patch.object(layers._RowLinear, "forward", staticmethod(wrong))


def f_does_not_sum() -> AbstractContextManager:
    def wrong(x: Tensor, axis: Axis, *op: object, **how: object) -> comm.Pending:
        comm._record("all-reduce", axis, x, 2 * (axis.size - 1) / axis.size)
        return comm.Pending(None, axis, x, "")

    return patch.object(comm, "all_reduce_async", wrong)


def f_is_read_too_early() -> AbstractContextManager:
    right = comm.all_reduce_async

    def wrong(x: Tensor, axis: Axis, *op: object, **how: object) -> comm.Pending:
        early = x.clone()
        pending = right(x, axis, *op, **how)
        return replace(pending, finish=lambda _: early) if axis.name == "tp layers" else pending

    return patch.object(comm, "all_reduce_async", wrong)


def g_sums_in_backward_too() -> AbstractContextManager:
    def wrong(x: Tensor, axis: Axis) -> Tensor:
        return comm._Conjugate.apply(x, lambda t: comm._summed(t, axis), lambda g: comm._summed(g, axis))

    return patch.object(comm, "reduce_from", wrong)


def other_ranks_tokens_are_not_zeroed() -> AbstractContextManager:
    return patch.object(Tensor, "masked_fill_", lambda x, mask, value: x)


def the_largest_logit_is_the_ranks_own() -> AbstractContextManager:
    right = comm.all_reduce

    def wrong(x: Tensor, axis: Axis, op: object = dist.ReduceOp.SUM) -> Tensor:
        return x if op == dist.ReduceOp.MAX else right(x, axis, op)

    return patch.object(comm, "all_reduce", wrong)


def logits_are_gathered() -> AbstractContextManager:
    def wrong(logits: Tensor, targets: Tensor, tokens: int, axis: Axis, vocabulary: int) -> Tensor:
        return gpt.token_loss(comm.gather_from(logits, axis, -1), targets, tokens)

    return patch.object(loss, "token_loss", wrong)


def every_rank_counts_the_loss() -> AbstractContextManager:
    right = core.gradients.clip_and_total

    def wrong(parameters: object, counted: object, axes: list[Axis], clip: float, share: Tensor) -> tuple[float, float]:
        norm, total = right(parameters, counted, axes, clip, share)
        return norm, total * axes[0].size

    return patch.object(training, "clip_and_total", wrong)


def replicated_parameters_counted_by_every_rank() -> AbstractContextManager:
    return patch.object(training, "counted_once", lambda parameters, axis: [p.grad for p in parameters])


def clipped_by_the_local_norm() -> AbstractContextManager:
    right = comm.all_reduce

    def wrong(x: Tensor, axis: Axis, *op: object) -> Tensor:
        mine = x[0].clone()
        right(x, axis, *op)
        if axis.name == "tp norm":
            x[0] = mine
        return x

    return patch.object(comm, "all_reduce", wrong)


def scores_dropped_alike_on_all_ranks() -> AbstractContextManager:
    right = SampleMasks.keep_mask

    def wrong(self: SampleMasks, shape: torch.Size, drop: float, name: str, split: object, device: object) -> Tensor:
        return right(self, shape, drop, name, split and (split[0], 0, split[2]), device)

    return patch.object(SampleMasks, "keep_mask", wrong)


def dropped_differently_outside() -> AbstractContextManager:
    right = SampleMasks.keep_mask

    def wrong(self: SampleMasks, shape: torch.Size, drop: float, name: str, split: object, device: object) -> Tensor:
        other = SampleMasks(self.seed + dist.get_rank(), self.step, self.first_sample + self.offset)
        return right(other, shape, drop, name, split, device)

    return patch.object(SampleMasks, "keep_mask", wrong)


def one_inside_stream_for_all_ranks() -> AbstractContextManager:
    right = rng.RandomTracker.__init__

    def wrong(self: rng.RandomTracker, seed: int, axis: Axis, device: torch.device) -> None:
        right(self, seed, replace(axis, index=0), device)

    return patch.object(rng.RandomTracker, "__init__", wrong)


def one_stream_for_both() -> AbstractContextManager:
    right = rng.RandomTracker.__init__

    def wrong(self: rng.RandomTracker, seed: int, axis: Axis, device: torch.device) -> None:
        right(self, seed, axis, device)
        if axis.index == 0:
            self.streams[rng.SHARDED].set_state(self.streams[rng.REPLICATED].get_state())

    return patch.object(rng.RandomTracker, "__init__", wrong)


def what_should_be_kept_is_dropped() -> AbstractContextManager:
    right = rng.RandomTracker.keep_mask
    return patch.object(rng.RandomTracker, "keep_mask", lambda self, shape, drop, *a: right(self, shape, 1 - drop, *a))


def smoothing_is_not_in_the_gradient() -> AbstractContextManager:
    right = loss._CrossEntropy.backward

    def wrong(ctx: object, gradient: Tensor) -> tuple:
        ctx.smoothing = 0.0
        return right(ctx, gradient)

    return patch.object(loss._CrossEntropy, "backward", staticmethod(wrong))


def smoothing_over_the_padding_too() -> AbstractContextManager:
    right = loss.Shard
    padded = lambda dim, index, count, size: right(dim, index, count, -(-size // count) * count)  # noqa: E731
    return patch.object(loss, "Shard", padded)


def both_streams_seeded_by_rank() -> AbstractContextManager:
    right = rng.RandomTracker.__init__

    def wrong(self: rng.RandomTracker, seed: int, axis: Axis, device: torch.device) -> None:
        right(self, seed + axis.index, axis, device)

    return patch.object(rng.RandomTracker, "__init__", wrong)


def recomputation_goes_on_with_the_streams() -> AbstractContextManager:
    return patch.object(rng.RandomTracker, "contexts", lambda self: (nullcontext(), nullcontext()))


def recomputation_leaves_the_streams_behind() -> AbstractContextManager:
    @contextmanager
    def wrong(self: rng.RandomTracker, states: dict[str, Tensor]) -> Iterator[None]:
        self._set(states)
        yield

    return patch.object(rng.RandomTracker, "replay", wrong)


def one_ranks_layernorm_drifts() -> AbstractContextManager:
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW) -> None:
        right(self)
        if dist.get_rank() == 2:
            self.param_groups[0]["params"][-1].data *= 1 + 1e-15

    return patch.object(torch.optim.AdamW, "step", wrong)


def the_mlp_is_replicated() -> AbstractContextManager:
    right = layers.parallelize

    def wrong(model: gpt.GPT, axis: Axis) -> gpt.GPT:
        whole = {name: block.mlp for name, block in gpt.GPT(model.config).blocks.items()}
        model = right(model, axis)
        for name, block in model.blocks.items():
            block.mlp = whole[name]
        return model

    return patch.object(layers, "parallelize", wrong)


def smoothing_over_the_ranks_shard() -> AbstractContextManager:
    def wrong(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int, smoothing: float = 0.0) -> Tensor:
        return loss.vocab_parallel_cross_entropy(logits, targets, axis, vocabulary, smoothing / axis.size)

    return patch.object(evidence, "vocab_parallel_cross_entropy", wrong)


def the_sum_is_gathered() -> AbstractContextManager:
    def wrong(x: Tensor, axis: Axis, *op: object) -> Tensor:
        if axis.name != "tp layers":
            return right(x, axis, *op)
        return comm.all_gather(x[None], axis).sum(0)

    right = comm.all_reduce
    return patch.object(comm, "all_reduce", wrong)


# ---- The bugs of the plain version


def plain_f_does_not_sum() -> AbstractContextManager:
    return patch.object(tensor_parallel, "f", lambda x, axis: x)


def plain_g_is_missing() -> AbstractContextManager:
    return patch.object(tensor_parallel, "g", lambda x, axis: x)


def plain_g_sums_in_backward_too() -> AbstractContextManager:
    right = tensor_parallel.g
    return patch.object(tensor_parallel, "g", lambda x, axis: tensor_parallel.f(right(x, axis), axis))


def plain_row_bias_once_a_rank() -> AbstractContextManager:
    def wrong(self: tensor_parallel.RowParallelLinear, x: Tensor) -> Tensor:
        return tensor_parallel.g(torch.nn.functional.linear(x, self.weight, self.bias), self.axis)

    return patch.object(tensor_parallel.RowParallelLinear, "forward", wrong)


def plain_embedding_takes_the_next_ranks_rows() -> AbstractContextManager:
    def wrong(p: Tensor) -> Shard:
        mark = shard_of(p)
        return replace(mark, index=(mark.index + 1) % mark.count)

    return patch.object(tensor_parallel, "shard_of", wrong)


def plain_loss_with(change: Callable[[Tensor, Axis, int], tuple[Axis, int]]) -> AbstractContextManager:
    right, all_reduce = tensor_parallel.vocab_parallel_cross_entropy, comm.all_reduce

    def wrong(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int) -> Tensor:
        with patch.object(comm, "all_reduce", lambda x, _, *op: all_reduce(x, axis, *op)):  # with the right ranks
            return right(logits, targets, *change(logits, axis, vocabulary))

    return patch.object(tensor_parallel, "vocab_parallel_cross_entropy", wrong)


def plain_targets_without_the_offset() -> AbstractContextManager:
    return plain_loss_with(lambda logits, axis, vocabulary: (replace(axis, index=0), vocabulary))


def plain_softmax_over_the_padding_too() -> AbstractContextManager:
    return plain_loss_with(lambda logits, axis, vocabulary: (axis, logits.shape[-1] * axis.size))


def course_counts_replicated_parameters_on_every_rank() -> AbstractContextManager:
    return patch.object(train, "is_first", lambda p, axis: True)


def course_clips_by_the_local_norm() -> AbstractContextManager:
    return clipped_by_the_local_norm()


# ---- Which claims each must break


PLAIN_LOSS, PLAIN_GRADIENT = (
    "losses equal one process, all steps (plain)",
    "every gradient equals one process, all steps (plain)",
)
LOSS, GRADIENT, NORM = "losses equal", "every gradient equals", "the global gradient norm"
PARAMETER, REPLICATED = "every parameter after every step", "replicated parameters stay equal on all ranks"
INSIDE, OUTSIDE = "dropout of the scores", "dropout outside"
MUST_FAIL = {
    every_rank_has_the_first_shard: {LOSS, GRADIENT, PARAMETER},
    qkv_is_sharded_across_heads: {LOSS, GRADIENT, PARAMETER},
    row_bias_once_a_rank: {LOSS, GRADIENT},
    f_does_not_sum: {GRADIENT, PARAMETER, REPLICATED},
    f_is_read_too_early: {GRADIENT, PARAMETER},
    g_sums_in_backward_too: {GRADIENT, NORM, "elements the embedding sends"},
    other_ranks_tokens_are_not_zeroed: {LOSS, GRADIENT},
    the_largest_logit_is_the_ranks_own: {LOSS, GRADIENT, "elements the loss sends"},
    logits_are_gathered: {"elements the loss sends", "messages other than all-reduces"},
    every_rank_counts_the_loss: {LOSS},
    replicated_parameters_counted_by_every_rank: {NORM, PARAMETER},
    clipped_by_the_local_norm: {NORM, PARAMETER, REPLICATED},
    scores_dropped_alike_on_all_ranks: {LOSS, GRADIENT},
    dropped_differently_outside: {LOSS, GRADIENT},
    one_inside_stream_for_all_ranks: {INSIDE},
    one_stream_for_both: {"ranks whose two streams are one"},
    what_should_be_kept_is_dropped: {"dropout, scores: share kept", "dropout, outside: share kept"},
    smoothing_is_not_in_the_gradient: {"and its gradient"},
    smoothing_over_the_padding_too: {"loss with label smoothing", "and its gradient"},
    both_streams_seeded_by_rank: {OUTSIDE},
    recomputation_goes_on_with_the_streams: {"elements that recomputation changes"},
    recomputation_leaves_the_streams_behind: {"elements that recomputation changes"},
    one_ranks_layernorm_drifts: {REPLICATED},
    the_mlp_is_replicated: {"bytes of parameters", "bytes of Adam's", "all-reduces of a layer", "elements a layer"},
    smoothing_over_the_ranks_shard: {"loss with label smoothing"},
    the_sum_is_gathered: {"all-reduces of a layer, forward", "elements a layer", "messages other than"},
}
PLAIN_MUST_FAIL = {  # and no claim of the engine
    plain_f_does_not_sum: {PLAIN_GRADIENT, "and backward (plain)", "elements the head sends (plain)"},
    plain_g_is_missing: {PLAIN_LOSS, PLAIN_GRADIENT, "all-reduces of a layer, forward (plain)"},
    plain_g_sums_in_backward_too: {PLAIN_GRADIENT, "and backward (plain)", "elements the loss sends (plain)"},
    plain_row_bias_once_a_rank: {PLAIN_LOSS, PLAIN_GRADIENT},
    plain_embedding_takes_the_next_ranks_rows: {PLAIN_LOSS, PLAIN_GRADIENT},
    plain_targets_without_the_offset: {PLAIN_LOSS, PLAIN_GRADIENT},
    plain_softmax_over_the_padding_too: {PLAIN_LOSS, PLAIN_GRADIENT},
}
COURSE_MUST_FAIL = {
    plain_f_does_not_sum: {GRADIENT},
    course_counts_replicated_parameters_on_every_rank: {NORM, PARAMETER},
    course_clips_by_the_local_norm: {NORM, PARAMETER, REPLICATED},
    every_rank_has_the_first_shard: {LOSS, GRADIENT, "first loss"},
    the_mlp_is_replicated: {"parameters at tp 3", "bytes of weights, gradients and Adam, tp 3"},
}


# ---- Bugs of a Llama's heads, each head of keys and values on two ranks


def llamas_config(args: argparse.Namespace) -> gpt.GPTConfig:
    """With all that a Llama, a Qwen2 or a Qwen3 has."""
    return replace(configuration(args), qkv_bias=True, qk_norm=True)


def gradients_of(which: str, times: int) -> AbstractContextManager:
    """Sum the gradients of heads over the axes with this in their names so often."""
    right = layers.sum_gradients

    def wrong(parameters: object, axis: Axis) -> None:
        parameters = list(parameters)
        for _ in range(times if which in axis.name else 1):
            right(parameters, axis)

    return patch.object(layers, "sum_gradients", wrong)


def keys_are_not_summed() -> AbstractContextManager:
    return gradients_of("tp inner", 0)


def keys_are_summed_twice() -> AbstractContextManager:
    return gradients_of("tp inner", 2)


def heads_norms_are_not_summed() -> AbstractContextManager:
    return gradients_of("tp gradients", 0)


def heads_norms_are_summed_twice() -> AbstractContextManager:
    return gradients_of("tp gradients", 2)


def every_norm_is_summed() -> AbstractContextManager:
    return patch.object(
        layers, "heads_norms", lambda model: {p for name, p in model.named_parameters() if "norm" in name}
    )


def the_norm_counts_every_copy() -> AbstractContextManager:
    def wrong(parameters: object, axis: Axis) -> list[Tensor]:
        return [p.grad for p in parameters if shard_of(p) or axis.index == 0]

    return patch.object(training, "counted_once", wrong)


def queries_meet_the_next_groups_keys(version: object = layers) -> AbstractContextManager:
    """Copies on every second rank, in place of neighbours."""
    right = version.shard

    def wrong(parameter: nn.Parameter, dim: int, axis: Axis, count: int | None = None) -> nn.Parameter:
        found = right(parameter, dim, axis, count)
        if is_copied(found):
            mark = replace(shard_of(found), index=axis.index % count, copy=axis.index // count)
            found = nn.Parameter(mark.local(parameter.detach()))
            found.shard = mark
        return found

    return patch.object(version, "shard", wrong)


def each_layer_communicates_by_itself() -> AbstractContextManager:
    return patch.object(gpt, "products", lambda x, *layers: [layer(x) for layer in layers])


def plain_keys_are_not_summed() -> AbstractContextManager:
    return patch.object(tensor_parallel, "is_copied", lambda p: False)


def plain_sums(*chosen: str) -> AbstractContextManager:
    """Sum what these names end with only, so often as they are given."""

    def wrong(model: gpt.GPT, axis: Axis, same_heads: Axis) -> None:
        for end in chosen:
            for name, p in model.named_parameters():
                if name.endswith(end):
                    comm.all_reduce(p.grad, (same_heads if is_copied(p) else axis).labelled("gradients of heads"))

    return patch.object(tensor_parallel, "sum_partial_gradients", wrong)


KEYS = ("k.weight", "k.bias", "v.weight", "v.bias")


def plain_query_norms_are_not_summed() -> AbstractContextManager:
    return plain_sums(*KEYS, "k_norm.weight")


def plain_values_are_summed_twice() -> AbstractContextManager:
    return plain_sums(*KEYS, *KEYS[2:], "k_norm.weight", "q_norm.weight")


def plain_queries_meet_the_next_groups_keys() -> AbstractContextManager:
    return queries_meet_the_next_groups_keys(tensor_parallel)


def course_keys_are_not_summed() -> AbstractContextManager:
    return patch.object(train, "sum_partial_gradients", lambda model, axis, same_heads: None)


def course_counts_every_copy() -> AbstractContextManager:
    return patch.object(train, "is_first", lambda p, axis: shard_of(p) is not None or axis.index == 0)


HEADS = "elements of keys' and values' weights' gradients"
ENGINE_LOSS, ENGINE_GRADIENT, ENGINE_REPLICATED = (
    "losses equal one process, all steps (engine)",
    "every gradient equals one process, all steps (engine)",
    f"{REPLICATED} (engine)",
)
LLAMA_MUST_FAIL = {
    keys_are_not_summed: {ENGINE_GRADIENT, ENGINE_REPLICATED, f"{HEADS} (engine)"},
    keys_are_summed_twice: {ENGINE_GRADIENT, NORM, f"{HEADS} (engine)"},
    heads_norms_are_not_summed: {ENGINE_GRADIENT, ENGINE_REPLICATED},
    heads_norms_are_summed_twice: {ENGINE_GRADIENT, NORM},
    every_norm_is_summed: {ENGINE_GRADIENT, NORM},
    the_norm_counts_every_copy: {NORM, PARAMETER},
    queries_meet_the_next_groups_keys: {ENGINE_LOSS, ENGINE_GRADIENT},
    each_layer_communicates_by_itself: {"and backward", "elements a layer sends"},
    plain_keys_are_not_summed: {PLAIN_GRADIENT, f"{REPLICATED} (plain)", f"{HEADS} (plain)"},
    plain_query_norms_are_not_summed: {PLAIN_GRADIENT, f"{REPLICATED} (plain)"},
    plain_values_are_summed_twice: {PLAIN_GRADIENT, f"{HEADS} (plain)"},
    plain_queries_meet_the_next_groups_keys: {PLAIN_LOSS, PLAIN_GRADIENT},
}
LLAMA_COURSE_MUST_FAIL = {
    course_keys_are_not_summed: {GRADIENT, REPLICATED},
    course_counts_every_copy: {NORM, PARAMETER},
    plain_queries_meet_the_next_groups_keys: {LOSS, GRADIENT},
}


# ---- The lessons with a bug in them

Bug = Callable[[], AbstractContextManager]


def failing_claims(lesson: Callable[[Run], None], frame: Lesson, flags: list[str], bug: Bug) -> list[str]:
    args = frame.parser.parse_args(flags)
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), POLICIES["float64"])
    with bug():
        try:
            lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


def failing_of_a_llama(bugs: list[Bug], course_bugs: list[Bug]) -> list[list[str]]:
    frame = Lesson("megatron_tp/tensor_parallel.py", "05", "", "", "")
    add_model_flags(frame)
    with patch.object(tensor_parallel, "configuration", llamas_config):
        found = [failing_claims(tensor_parallel.lesson, frame, LLAMA_FLAGS, bug) for bug in bugs]
    frame = Lesson("megatron_tp/train.py", "CODE 02", "", "", "")
    train.add_flags(frame)
    with patch.object(train, "configuration", llamas_config):
        return found + [failing_claims(train.lesson, frame, [*COURSE_FLAGS, *LLAMA_FLAGS], bug) for bug in course_bugs]


def failing_in_tensor_parallel(bugs: list[Bug]) -> list[list[str]]:
    """For each bug, the claims of lecture 05 that fail on rank 0."""
    frame = Lesson("megatron_tp/tensor_parallel.py", "05", "", "", "")
    add_model_flags(frame)
    return [failing_claims(tensor_parallel.lesson, frame, FLAGS, bug) for bug in bugs]


def failing_in_train(bugs: list[Bug]) -> list[list[str]]:
    frame = Lesson("megatron_tp/train.py", "CODE 02", "", "", "")
    train.add_flags(frame)
    return [failing_claims(train.lesson, frame, COURSE_FLAGS, bug) for bug in bugs]


def check(failing: list[list[str]], must_fail: dict[Bug, set[str]], bugs: list[Bug], others: str = "") -> None:
    for bug, failed in zip(bugs, failing, strict=True):
        missed = {claim for claim in must_fail[bug] if not any(f.startswith(claim) for f in failed)}
        assert not missed, f"{bug.__name__}: only these failed: {failed}"
        besides = [f for f in failed if others and others in f]
        assert not besides, f"{bug.__name__}: these should hold"


def test_without_a_bug_every_claim_holds(pool: Pool) -> None:
    assert pool.run(RANKS, failing_in_tensor_parallel, [nullcontext])[0] == [[]]
    assert pool.run(RANKS, failing_in_train, [nullcontext])[0] == [[]]


@pytest.mark.parametrize("quarter", range(4))
def test_the_claims_catch(pool: Pool, quarter: int) -> None:
    bugs = [*MUST_FAIL][quarter::4]
    check(pool.run(RANKS, failing_in_tensor_parallel, bugs, timeout=110)[0], MUST_FAIL, bugs)


def test_the_claims_catch_in_a_llama(pool: Pool) -> None:
    bugs, course_bugs = [nullcontext, *LLAMA_MUST_FAIL], [nullcontext, *LLAMA_COURSE_MUST_FAIL]
    must_fail = LLAMA_MUST_FAIL | {nullcontext: set()}
    found = pool.run(4, failing_of_a_llama, bugs, course_bugs, timeout=110)[0]
    assert found[0] == found[len(bugs)] == []
    check(found[: len(bugs)], must_fail, bugs)
    check(found[len(bugs) :], must_fail | LLAMA_COURSE_MUST_FAIL, course_bugs)


def test_the_claims_catch_in_the_plain_version(pool: Pool) -> None:
    bugs = [*PLAIN_MUST_FAIL]
    check(pool.run(RANKS, failing_in_tensor_parallel, bugs, timeout=110)[0], PLAIN_MUST_FAIL, bugs, "(engine)")


def test_the_claims_catch_in_train(pool: Pool) -> None:
    bugs = [*COURSE_MUST_FAIL]
    check(pool.run(RANKS, failing_in_train, bugs, timeout=110)[0], COURSE_MUST_FAIL, bugs)
