"""Put each known bug in, and see which claims of Megatron's lessons fail: a check that cannot fail proves nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import sequence_parallel.evidence.activations
from core import comm
from core.ledger import Ledger
from core.mesh import Axis
from core.model import gpt
from core.model.gpt import GPT, Dropout
from core.model.seeded import SampleMasks
from core.model.streams import RandomTracker
from core.shards import Shard, is_copied, shard_of
from sequence_parallel import activations, megatron_sp
from sequence_parallel.engine import layers, loss, recompute
from sequence_parallel.evidence import training
from tests.pool import Pool
from tests.sequence_parallel.failing import claims_catch, equal

RANKS = 2
SIZES = {"steps": 2, "batch": 4, "sequence": 8, "hidden": 16, "heads": 4, "layers": 1, "clip": 0.05}
FLAGS = ["--attention=softmax", "--dropout=0.2", *(f"--{name}={value}" for name, value in SIZES.items())]


# ---- The bugs


def sum_only(chosen: Callable[[str], bool], factor: float = 1.0, version: Any = layers) -> AbstractContextManager:
    """Sum over the ranks only those gradients whose name is chosen."""

    def wrong(model: GPT, axis: Axis, same_heads: Axis) -> None:
        for name, p in model.named_parameters():
            if shard_of(p) is None and chosen(name):
                comm.all_reduce(p.grad, axis.labelled("replicated gradients"))
                p.grad *= factor

    return patch.object(version, "sum_replicated_gradients", wrong)


def nothing_is_summed() -> AbstractContextManager:
    return sum_only(lambda name: False)


def layernorms_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: "norm" not in name)


def row_biases_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: not name.endswith(("out.bias", "down.bias")))


def positions_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: "position" not in name)


def averaged_instead_of_summed() -> AbstractContextManager:
    return sum_only(lambda name: True, 1 / RANKS)


def sharded_gradients_are_summed_too() -> AbstractContextManager:
    right = layers.sum_replicated_gradients

    def wrong(model: GPT, axis: Axis, same_heads: Axis) -> None:
        right(model, axis, same_heads)
        comm.all_reduce(model.blocks["0"].mlp.up.bias.grad, axis)

    return patch.object(layers, "sum_replicated_gradients", wrong)


def every_rank_has_the_first_shard() -> AbstractContextManager:
    right = Shard.local
    return patch.object(Shard, "local", lambda self, full: right(replace(self, index=0), full))


def every_rank_has_the_first_positions() -> AbstractContextManager:
    right = layers.PositionShard.__init__
    return patch.object(layers.PositionShard, "__init__", lambda self, x, axis: right(self, x, replace(axis, index=0)))


def row_bias_once_a_rank() -> AbstractContextManager:
    def wrong(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
        return comm.scatter_from(F.linear(x, self.weight, self.bias), self.axis, 1)

    return patch.object(layers.RowParallelLinear, "forward", wrong)


def dropped_alike(dim: int) -> AbstractContextManager:
    right = SampleMasks.keep_mask

    def wrong(self: SampleMasks, shape: torch.Size, drop: float, name: str, split: Any, device: torch.device) -> Tensor:
        if split and len(shape) == dim:
            split = (split[0], 0, split[2])
        return right(self, shape, drop, name, split, device)

    return patch.object(SampleMasks, "keep_mask", wrong)


def residual_stream_dropped_alike_on_all_ranks() -> AbstractContextManager:
    return dropped_alike(3)


def scores_dropped_alike_on_all_ranks() -> AbstractContextManager:
    return dropped_alike(4)


def gathered_again_too_late() -> AbstractContextManager:
    right = comm.all_gather_async

    def wrong(x: Tensor, axis: Axis, dim: int = 0, label: str = "all-gather") -> comm.Pending:
        pending = right(x, axis, dim, label)
        return replace(pending, finish=lambda r: pending.finish(r).zero_()) if "again" in label else pending

    return patch.object(comm, "all_gather_async", wrong)


def gradient_scattered_too_early() -> AbstractContextManager:
    right = comm.reduce_scatter_async

    def wrong(x: Tensor, axis: Axis, dim: int = 0) -> comm.Pending:
        early = x.chunk(axis.size, dim)[axis.index].clone()
        pending = right(x, axis, dim)
        return (
            replace(pending, finish=lambda _: early) if x.requires_grad is False and axis.name == "tp head" else pending
        )

    return patch.object(comm, "reduce_scatter_async", wrong)


def g_takes_its_shard_in_backward() -> AbstractContextManager:
    """All-gather forward, but backward only this rank's shard, as if all ranks used the result alike."""

    def wrong(self: layers.ColumnParallelLinear, x: Tensor) -> Tensor:
        return F.linear(comm.gather_from(x, self.axis, 1), self.weight, self.bias)

    return patch.object(layers.ColumnParallelLinear, "forward", wrong)


def the_gathered_input_is_saved() -> AbstractContextManager:
    right = layers.ColumnParallelLinear.forward

    def wrong(self: layers.ColumnParallelLinear, x: Tensor) -> Tensor:
        if not self.sequence:
            return right(self, x)
        return F.linear(comm.gather_for(x, self.axis, 1), self.weight, self.bias)

    return patch.object(layers.ColumnParallelLinear, "forward", wrong)


def all_reduced_instead_of_scattered() -> AbstractContextManager:
    def wrong(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
        y = comm.reduce_from(F.linear(x, self.weight), self.axis)
        return comm.split_to(y, self.axis, 1) + self.bias

    return patch.object(layers.RowParallelLinear, "forward", wrong)


def tokens_of_the_loss_out_of_order() -> AbstractContextManager:
    right = loss.rearrange

    def wrong(x: Tensor, pattern: str, **sizes: int) -> Tensor:
        return right(x, pattern.replace("(t s)", "(s t)"), **sizes)

    return patch.object(loss, "rearrange", wrong)


def the_loss_gathers_its_numbers() -> AbstractContextManager:
    right = comm.all_to_all

    def wrong(x: Tensor, axis: Axis, *splits: Any) -> Tensor:
        if axis.name != "tp loss":
            return right(x, axis, *splits)
        return comm.all_gather(x[None].contiguous(), axis)[:, axis.index]

    return patch.object(comm, "all_to_all", wrong)


def one_ranks_layernorm_drifts() -> AbstractContextManager:
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW) -> None:
        right(self)
        if dist.get_rank() == 1:
            self.param_groups[0]["params"][-1].data *= 1 + 1e-15

    return patch.object(torch.optim.AdamW, "step", wrong)


def replicated_parameters_counted_by_every_rank() -> AbstractContextManager:
    return patch.object(training, "counted_once", lambda parameters, axis: [p.grad for p in parameters])


def nothing_is_forgotten() -> AbstractContextManager:
    stack = ExitStack()
    for module in (recompute, sequence_parallel.evidence.activations):
        stack.enter_context(patch.object(module, "recompute_block", lambda block, kind: block))
    return stack


def masks_of_two_bytes() -> AbstractContextManager:
    right = SampleMasks.keep_mask
    return patch.object(SampleMasks, "keep_mask", lambda self, *a: right(self, *a).to(torch.bfloat16))


def random_numbers_are_not_restored() -> AbstractContextManager:
    return patch.object(RandomTracker, "contexts", lambda self: (nullcontext(), nullcontext()))


def the_training_does_not_recompute() -> AbstractContextManager:
    return patch.object(training, "recompute", lambda model, kind: model)


def nothing_is_emptied() -> AbstractContextManager:
    """What is computed again is kept too: by the products that read it."""
    right = recompute.Forgotten.take

    def wrong(self: recompute.Forgotten) -> Any:
        result = right(self)
        for y in self.results:
            y.untyped_storage().emptied = False
        return result

    return patch.object(recompute.Forgotten, "take", wrong)


def what_is_inside_is_kept() -> AbstractContextManager:
    """Its results are emptied, and what it saves for its own backward is not: silu of the gate."""
    return patch.object(recompute, "saved_tensors_hooks", lambda *hooks: nullcontext())


def the_gated_product_is_kept() -> AbstractContextManager:
    """Only the norms are forgotten."""
    right = recompute.forget

    def wrong(module: Any, name: str, user: Any) -> None:
        if name != "activation":
            right(module, name, user)

    return patch.object(recompute, "forget", wrong)


def only_the_layers_input_is_kept() -> AbstractContextManager:
    """Any recomputation is full."""
    right = recompute.recompute_block
    kind = lambda kind: kind if kind == "none" else "full"  # noqa: E731
    return patch.object(sequence_parallel.evidence.activations, "recompute_block", lambda b, k: right(b, kind(k)))


def a_dropout_is_not_restored() -> AbstractContextManager:
    """In backward another mask is drawn, where no mask is saved."""
    right = recompute._DrawnTwice.forward

    def wrong(ctx: Any, *args: Any) -> Tensor:
        y = right(ctx, *args)
        ctx.same_masks = nullcontext()
        return y

    return patch.object(recompute._DrawnTwice, "forward", staticmethod(wrong))


def a_mask_less() -> AbstractContextManager:
    right = Dropout.forward
    return patch.object(Dropout, "forward", lambda self, x: x if "mlp" in self.name else right(self, x))


# ---- The bugs of the plain versions


def plain_replicated_gradients_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: False, version=megatron_sp)


def plain_layernorms_are_not_summed() -> AbstractContextManager:
    return sum_only(lambda name: "norm" not in name, version=megatron_sp)


def plain_g_takes_its_shard_in_backward() -> AbstractContextManager:
    return patch.object(megatron_sp, "g", lambda x, axis: comm.gather_from(x, axis, 1))


def plain_row_bias_once_a_rank() -> AbstractContextManager:
    def wrong(self: megatron_sp.RowParallelLinear, x: Tensor) -> Tensor:
        return megatron_sp.g_bar(F.linear(x, self.weight, self.bias), self.axis)

    return patch.object(megatron_sp.RowParallelLinear, "forward", wrong)


def plain_positions_are_the_first_on_every_rank() -> AbstractContextManager:
    right = megatron_sp.PositionShard.__init__
    first = lambda self, x, axis: right(self, x, replace(axis, index=0))  # noqa: E731
    return patch.object(megatron_sp.PositionShard, "__init__", first)


def plain_loss_knows_its_shard_of_the_vocabulary() -> AbstractContextManager:
    return patch.object(megatron_sp, "f_bar", lambda x, axis: x)


def the_loss_overlooks_the_target() -> AbstractContextManager:
    """The target's logit is that of the shard's first row, where another rank has the target."""
    return patch.object(Tensor, "masked_fill", lambda self, mask, value, right=Tensor.masked_fill: (
        self.clone() if value == 0.0 and isinstance(value, float) and self.dim() == 2 else right(self, mask, value)
    ))  # fmt: skip


def the_papers_loss_is_ours() -> AbstractContextManager:
    """As it was once: the number of tokens times fewer elements, and not what Megatron-LM does."""
    return patch.object(megatron_sp, "token_loss", lambda *args: comm.reduce_from(
        loss.token_loss(*args), replace(args[3], ledger=Ledger())
    ))  # fmt: skip


def every_rank_counts_the_loss() -> AbstractContextManager:
    right = training.version
    return patch.object(training, "version", lambda *args: right(*args[:-1], True))


def the_plain_training_does_not_recompute() -> AbstractContextManager:
    return patch.object(activations, "recompute", lambda model, kind: model)


def plain_recomputation_stops_the_gradient() -> AbstractContextManager:
    """What is recomputed gives a gradient to its own parameters only."""
    right = activations.Recompute.backward

    def wrong(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x * 0 for x in right(ctx, gradient)[2:])

    return patch.object(activations.Recompute, "backward", staticmethod(wrong))


LOSS, GRADIENT, NORM, PARAMETER, REPLICAS = equal("engine")
OUR_LOSS, OUR_GRADIENT, *_ = equal("our loss")
PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_NORM, PLAIN_PARAMETER, PLAIN_REPLICAS = equal("plain")
SP: dict[Callable, set[str]] = {
    nothing_is_summed: {GRADIENT, PARAMETER, REPLICAS, "elements of replicated"},
    layernorms_are_not_summed: {GRADIENT, PARAMETER, REPLICAS},
    row_biases_are_not_summed: {GRADIENT, PARAMETER, REPLICAS},
    positions_are_not_summed: {GRADIENT, PARAMETER, REPLICAS},
    averaged_instead_of_summed: {GRADIENT, NORM},
    sharded_gradients_are_summed_too: {GRADIENT, NORM},
    every_rank_has_the_first_shard: {LOSS, GRADIENT, PARAMETER, PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_PARAMETER},
    every_rank_has_the_first_positions: {LOSS, GRADIENT},
    row_bias_once_a_rank: {LOSS, GRADIENT},
    residual_stream_dropped_alike_on_all_ranks: {LOSS, GRADIENT, PLAIN_LOSS, PLAIN_GRADIENT},
    scores_dropped_alike_on_all_ranks: {LOSS, GRADIENT, PLAIN_LOSS, PLAIN_GRADIENT},
    gathered_again_too_late: {GRADIENT},
    gradient_scattered_too_early: {GRADIENT},
    g_takes_its_shard_in_backward: {GRADIENT, "reduce-scatters, backward (engine)"},
    the_gathered_input_is_saved: {"and to gather again"},
    all_reduced_instead_of_scattered: {
        "reduce-scatters, forward (engine)",
        "all-reduces of a layer (engine)",
        "elements a layer sends a microbatch (engine)",
    },
    tokens_of_the_loss_out_of_order: {OUR_LOSS, OUR_GRADIENT},
    the_loss_gathers_its_numbers: {"elements our loss sends in its place", "bytes of our loss / Megatron-LM's"},
    the_papers_loss_is_ours: {
        "elements Megatron-LM's loss sends (plain)", "elements Megatron-LM's loss sends (engine)",
        "messages of any other kind, Megatron-LM's",
    },
    the_loss_overlooks_the_target: {LOSS, PLAIN_LOSS},
    every_rank_counts_the_loss: {LOSS, PLAIN_LOSS},
    one_ranks_layernorm_drifts: {REPLICAS, PLAIN_REPLICAS},
    replicated_parameters_counted_by_every_rank: {NORM, PARAMETER, PLAIN_NORM, PLAIN_PARAMETER},
    plain_replicated_gradients_are_not_summed: {
        PLAIN_GRADIENT, PLAIN_PARAMETER, PLAIN_REPLICAS, "elements of replicated parameters' gradients (plain)"
    },
    plain_layernorms_are_not_summed: {PLAIN_GRADIENT, PLAIN_PARAMETER, PLAIN_REPLICAS},
    plain_g_takes_its_shard_in_backward: {PLAIN_GRADIENT, "reduce-scatters, backward (plain)"},
    plain_row_bias_once_a_rank: {PLAIN_LOSS, PLAIN_GRADIENT},
    plain_positions_are_the_first_on_every_rank: {PLAIN_LOSS, PLAIN_GRADIENT},
    plain_loss_knows_its_shard_of_the_vocabulary: {
        LOSS, GRADIENT, PLAIN_LOSS, PLAIN_GRADIENT, "elements Megatron-LM's loss sends (plain)"
    },
}  # fmt: skip
ACTIVATIONS: dict[Callable, set[str]] = {
    the_gathered_input_is_saved: {
        "bytes saved / sbh, TP + SP, rank 0",
        "bytes saved / sbh, TP + SP, selective, rank 1",
    },
    nothing_is_forgotten: {
        "attention computed, full",
        "bytes saved / sbh, TP, selective",
        "bytes saved / sbh, TP + SP, selective",
        "bytes saved / sbh, TP, full",
        "bytes saved / sbh, TP, pointwise",
        "bytes saved / sbh, TP + SP, operators",
        "FLOP computed again, full",
    },
    masks_of_two_bytes: {"bytes saved / sbh, one process", "bytes saved / sbh, TP", "bytes saved / sbh, TP + SP"},
    random_numbers_are_not_restored: {"gradients that full", "gradients that selective"},
    the_training_does_not_recompute: {
        "times each attention core is computed a step (engine)", "times each layer is computed a step (engine)"
    },
    nothing_is_emptied: {"bytes saved / sbh, TP, pointwise", "bytes saved / sbh, TP + SP, operators"},
    the_gated_product_is_kept: {"bytes saved / sbh, TP, pointwise", "bytes saved / sbh, TP + SP, operators"},
    only_the_layers_input_is_kept: {
        "bytes saved / sbh, TP, pointwise", "bytes saved / sbh, TP + SP, operators", "FLOP computed again, pointwise",
        "FLOP computed again, operators", "FLOP computed again, selective",
    },
    a_dropout_is_not_restored: {"gradients that operators"},
    a_mask_less: {"bytes saved / sbh, one process", "bytes saved / sbh, TP + SP, selective"},
    residual_stream_dropped_alike_on_all_ranks: {LOSS, GRADIENT, PLAIN_LOSS, PLAIN_GRADIENT},
    the_plain_training_does_not_recompute: {
        "times each attention core is computed a step (plain)", "times each layer is computed a step (plain)"
    },
    plain_recomputation_stops_the_gradient: {PLAIN_GRADIENT, PLAIN_PARAMETER},
}  # fmt: skip


# ---- Bugs of a Llama's heads: one head of keys and values, on both ranks


def keys_are_not_summed(version: Any = layers) -> AbstractContextManager:
    return patch.object(version, "is_copied", lambda p: False)


def plain_keys_are_not_summed() -> AbstractContextManager:
    return keys_are_not_summed(megatron_sp)


def keys_are_summed_twice() -> AbstractContextManager:
    right = layers.sum_replicated_gradients

    def wrong(model: GPT, axis: Axis, same_heads: Axis) -> None:
        right(model, axis, same_heads)
        for p in filter(is_copied, model.parameters()):
            comm.all_reduce(p.grad, same_heads)

    return patch.object(layers, "sum_replicated_gradients", wrong)


def the_norm_counts_every_copy() -> AbstractContextManager:
    def wrong(parameters: Any, axis: Axis) -> list[Tensor]:
        return [p.grad for p in parameters if shard_of(p) or axis.index == 0]

    return patch.object(training, "counted_once", wrong)


def each_layer_communicates_by_itself() -> AbstractContextManager:
    return patch.object(gpt, "products", lambda x, *layers: [layer(x) for layer in layers])


HEADS = "elements of keys' and values' weights' gradients"
LLAMA: dict[Callable, set[str]] = {
    keys_are_not_summed: {GRADIENT, REPLICAS, f"{HEADS} (engine)"},
    plain_keys_are_not_summed: {PLAIN_GRADIENT, PLAIN_REPLICAS, f"{HEADS} (plain)"},
    keys_are_summed_twice: {GRADIENT, NORM},
    the_norm_counts_every_copy: {NORM, PARAMETER, PLAIN_NORM, PLAIN_PARAMETER},
    each_layer_communicates_by_itself: {
        "all-gathers of a layer, forward (plain)", "all-gathers of a layer, forward (engine)",
        "reduce-scatters, backward (engine)", "and to gather again what was not saved (engine)",
    },
}  # fmt: skip


def test_the_claims_of_megatron_sp_catch_in_a_llama(pool: Pool) -> None:
    claims_catch(pool, RANKS, "megatron_sp", [*FLAGS, "--model=llama", "--kv-heads=1"], LLAMA)


def test_the_claims_of_megatron_sp_catch(pool: Pool) -> None:
    claims_catch(pool, RANKS, "megatron_sp", FLAGS, SP)


def test_the_claims_of_activations_catch(pool: Pool) -> None:
    claims_catch(pool, RANKS, "activations", FLAGS, ACTIVATIONS)


GATED: dict[Callable, set[str]] = {
    what_is_inside_is_kept: {"bytes saved / sbh, TP, pointwise", "bytes saved / sbh, TP + SP, operators"},
    the_gated_product_is_kept: {"bytes saved / sbh, TP, pointwise", "bytes saved / sbh, TP + SP, operators"},
}


def test_the_claims_of_activations_catch_in_a_llama(pool: Pool) -> None:
    claims_catch(pool, RANKS, "activations", [*FLAGS, "--model=llama", "--kv-heads=2"], GATED)
