"""Put each known bug of a sharded sequence in, and see which claims fail: a check that cannot fail proves nothing."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

import sequence_parallel.engine.ulysses
from core import comm
from core.mesh import Axis
from core.model import documents
from core.model.gpt import GPT
from core.p2p import PointToPoint
from sequence_parallel import all_gather, context, hybrid, ring_attention, ulysses
from sequence_parallel.engine import all_gather as gathering
from sequence_parallel.engine import ring
from sequence_parallel.engine.all_gather import OverlappedAllGather
from sequence_parallel.engine.blocks import attend_in_products
from sequence_parallel.engine.ring import GRADIENTS, OverlappedRing, Tile
from sequence_parallel.engine.ulysses import OverlappedUlysses
from sequence_parallel.evidence import training
from tests.pool import Pool
from tests.sequence_parallel.failing import claims_catch, equal

RANKS = 4
SIZES = {"steps": 1, "batch": 2, "sequence": 16, "hidden": 16, "heads": 4, "layers": 1, "clip": 0.05}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
ALL = slice(None)


# ---- The bugs of everything around attention


def scores_are_kept_in_full() -> AbstractContextManager:
    """The engine's blocks by explicit products: right, and a matrix for every head."""
    return patch.object(ring, "attend", attend_in_products)


def plain_scores_are_of_all_keys() -> AbstractContextManager:
    """Made for the keys of all ranks before this rank's are taken."""
    right = ring_attention.probabilities

    def wrong(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        _ = q @ k.repeat(1, 1, 1, RANKS, 1).mT
        return right(q, k, *rest)

    return patch.object(ring_attention, "probabilities", wrong)


def gradients_are_not_summed_because_dp_is_1() -> AbstractContextManager:
    return patch.object(training, "sum_gradients", lambda parameters, axis: None)


def gradients_are_averaged() -> AbstractContextManager:
    right = training.sum_gradients

    def wrong(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
        all_of_them = list(parameters)
        right(all_of_them, axis)
        for p in all_of_them:
            p.grad /= axis.size

    return patch.object(training, "sum_gradients", wrong)


def positions_start_at_0_on_every_rank() -> AbstractContextManager:
    right = training.parallelize

    def wrong(model: GPT, attention: Any) -> GPT:
        del right(model, attention).embed.positions
        return model

    return patch.object(training, "parallelize", wrong)


def targets_are_those_of_neighbouring_tokens() -> AbstractContextManager:
    right, calls = context.local, []

    def wrong(x: Tensor, attention: Any) -> Tensor:
        calls.append(x)
        return right(x, attention) if len(calls) % 2 else x.chunk(dist.get_world_size(), 1)[dist.get_rank()]

    return patch.object(context, "local", wrong)


def the_loss_is_the_mean_of_this_ranks_tokens() -> AbstractContextManager:
    right = context.token_loss
    return patch.object(context, "token_loss", lambda x, y, tokens: right(x, y, y.numel()))


# ---- The bugs of the ring


def tiles(change: Callable[[OverlappedRing, int, int, Tile | None], Tile | None]) -> AbstractContextManager:
    right = OverlappedRing.tile
    return patch.object(OverlappedRing, "tile", lambda self, step, n: change(self, step, n, right(self, step, n)))


def zigzag_takes_the_other_half() -> AbstractContextManager:
    def swap(self: OverlappedRing, step: int, n: int, tile: Tile | None) -> Tile | None:
        if not self.zigzag:
            return tile
        early, late = slice(n // 2), slice(n // 2, None)
        other = {str(ALL): ALL, str(early): late, str(late): early}
        return Tile(other[str(tile.rows)], other[str(tile.columns)], tile.causal)

    return tiles(swap)


def zigzag_computes_full_blocks() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: Tile(ALL, ALL, step == 0) if self.zigzag else tile)


def the_diagonal_has_no_mask() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: tile and tile._replace(causal=False))


def only_the_diagonal_has_a_mask() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: tile or Tile(ALL, ALL, causal=False))


def contiguous_chunks_are_dealt_from_the_end() -> AbstractContextManager:
    """The work of each rank and step is the same, but of the wrong queries and keys."""
    right = OverlappedRing.positions

    def wrong(self: OverlappedRing, sequence: int) -> Tensor:
        return (
            right(self, sequence) if self.zigzag else torch.arange(sequence).chunk(self.multiple)[-1 - self.axis.index]
        )

    return patch.object(OverlappedRing, "positions", wrong)


def every_block_has_the_diagonals_mask() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: tile and tile._replace(causal=True))


def outputs_are_averaged() -> AbstractContextManager:
    return patch.object(ring, "merge", lambda out, lse, more, more_lse: out.add_(more).div_(2))


def the_lse_is_not_merged() -> AbstractContextManager:
    right = ring.merge

    def wrong(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
        right(out, lse.clone(), more, more_lse)

    return patch.object(ring, "merge", wrong)


def passing(change: Callable[[Callable, Tensor, str, int], Callable]) -> AbstractContextManager:
    right = OverlappedRing.pass_on

    def wrong(self: OverlappedRing, x: Tensor, kind: str, step: int) -> Callable[[], Tensor]:
        last = kind == GRADIENTS and step == self.ranks - 1
        return change(lambda: right(self, x, kind, step), x, kind, last)

    return patch.object(OverlappedRing, "pass_on", wrong)


def gradients_stop_one_rank_before_their_owner() -> AbstractContextManager:
    return passing(lambda send, x, kind, last: (lambda: x) if last else send())


def gradients_are_not_passed_on() -> AbstractContextManager:
    """Each rank keeps what it has computed for other ranks' keys."""
    return passing(lambda send, x, kind, last: (lambda: x) if kind == GRADIENTS else send())


def a_message_is_read_before_it_has_arrived() -> AbstractContextManager:
    right = PointToPoint.receive

    def wrong(self: PointToPoint, into: Tensor, sender: int, kind: str, tag: int) -> Callable[[], Tensor]:
        arrive = right(self, into, sender, kind, tag)
        early = torch.zeros_like(into)
        return lambda: arrive() if kind == "clock" else (arrive(), early)[1]

    return patch.object(PointToPoint, "receive", wrong)


def messages_are_waited_for_at_once() -> AbstractContextManager:
    def wait(send: Callable, x: Tensor, kind: str, last: bool) -> Callable[[], Tensor]:
        arrived = send()()
        return lambda: arrived

    return passing(wait)


def keys_and_values_are_gathered() -> AbstractContextManager:
    """Right, but a matrix of scores of all keys, and other messages."""

    def wrong(self: OverlappedRing, q: Tensor, k: Tensor, v: Tensor, *_: None) -> Tensor:
        where = torch.cat(everyones_positions(self, q.shape[2] * self.ranks))
        k, v = (comm.gather_for(x, self.axis, 2) for x in (k, v))
        future = where > self.positions(len(where)).unsqueeze(-1)
        scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5).masked_fill(
            future, -torch.inf
        )
        with self.computing(0, 1.0):
            pass
        return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    return patch.object(OverlappedRing, "__call__", wrong)


def everyones_positions(self: OverlappedRing, sequence: int) -> list[Tensor]:
    chunks = torch.arange(sequence).chunk(self.multiple)
    both = [(chunks[r], chunks[-1 - r]) if self.zigzag else (chunks[r],) for r in range(self.ranks)]
    return [torch.cat(each) for each in both]


# ---- The bugs of all-gather


def runs_take_each_others_masks() -> AbstractContextManager:
    right = OverlappedAllGather.runs

    def wrong(self: OverlappedAllGather, tokens: int) -> list[tuple[slice, int]]:
        where, firsts = zip(*right(self, tokens), strict=True)
        return list(zip(where, firsts[::-1], strict=True))

    return patch.object(OverlappedAllGather, "runs", wrong)


def a_run_sees_its_own_future() -> AbstractContextManager:
    right = gathering.attend
    return patch.object(gathering, "attend", lambda q, k, v, causal, *rest: right(q, k, v, False, *rest))


def gathered_keys_stay_in_the_order_of_ranks() -> AbstractContextManager:
    def wrong(self: OverlappedAllGather, pending: comm.Pending) -> Tensor:
        self.note(f"wait for {gathering.GATHER}")
        return pending.wait()

    return patch.object(OverlappedAllGather, "arrived", wrong)


def gradients_of_keys_are_this_ranks_alone() -> AbstractContextManager:
    def wrong(self: OverlappedAllGather, sums: Tensor) -> Tensor:
        return sums[:, :, self.positions(sums.shape[2])]

    return patch.object(OverlappedAllGather, "scattered", wrong)


def gradients_are_scattered_in_the_order_of_the_sequence() -> AbstractContextManager:
    return patch.object(OverlappedAllGather, "scattered", lambda self, sums: comm.reduce_scatter(sums, self.axis, 2))


def the_gather_is_waited_for_at_once() -> AbstractContextManager:
    right = OverlappedAllGather.gather

    def wrong(self: OverlappedAllGather, k: Tensor, v: Tensor) -> comm.Pending:
        pending = right(self, k, v)
        self.arrived(pending)
        return pending

    return patch.object(OverlappedAllGather, "gather", wrong)


def all_heads_of_keys_are_gathered() -> AbstractContextManager:
    right = OverlappedAllGather.__call__

    def wrong(self: OverlappedAllGather, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return right(self, q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)), *rest)

    return patch.object(OverlappedAllGather, "__call__", wrong)


def the_output_is_kept_twice() -> AbstractContextManager:
    """In another order in memory than what follows keeps."""
    right = OverlappedAllGather.__call__
    return patch.object(OverlappedAllGather, "__call__", lambda self, *args: right(self, *args).contiguous())


def plain_runs_have_no_mask() -> AbstractContextManager:
    right = documents.visible

    def wrong(starts: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.ones_like(right(starts, queries, keys))

    return patch.object(all_gather.documents, "visible", wrong)


def plain_keys_stay_in_the_order_of_ranks() -> AbstractContextManager:
    return patch.object(all_gather.AllGather, "gather", lambda self, x: comm.gather_for(x, self.axis, 2))


def plain_gradients_of_keys_are_this_ranks_alone() -> AbstractContextManager:
    return patch.object(all_gather.comm, "gather_for", comm.gather_from)


# ---- The bugs of Ulysses


def shards_are_joined_in_the_wrong_order() -> AbstractContextManager:
    def wrong(axis: Axis, sharded: int, gathered: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        equal = [1] * axis.size
        received = [comm.all_to_all(torch.stack(x.chunk(axis.size, sharded)), axis, equal, equal) for x in tensors]
        return tuple(torch.cat(x.flip(0).unbind(), gathered) for x in received)

    return patch.object(sequence_parallel.engine.ulysses, "switch", wrong)


def everything_is_gathered() -> AbstractContextManager:
    def wrong(axis: Axis, sharded: int, gathered: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(comm.all_gather(x, axis, gathered).chunk(axis.size, sharded)[axis.index] for x in tensors)

    return patch.object(sequence_parallel.engine.ulysses, "switch", wrong)


def heads_of_keys_are_repeated_in_turn() -> AbstractContextManager:
    def wrong(self: Tensor, times: int, dim: int) -> Tensor:
        return torch.cat([self] * times, dim)

    return patch.object(Tensor, "repeat_interleave", wrong)


def every_rank_has_its_groups_first_tokens() -> AbstractContextManager:
    def wrong(self: OverlappedUlysses, sequence: int) -> Tensor:
        return self.inner.positions(sequence).chunk(self.axis.size)[0]

    return patch.object(OverlappedUlysses, "positions", wrong)


# ---- The bugs of the plain versions


def plain_blocks_are_merged_without_rescaling() -> AbstractContextManager:
    def wrong(o: Tensor, lse: Tensor, o_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
        return o + o_block, torch.logaddexp(lse, lse_block)

    return patch.object(ring_attention, "merge", wrong)


def plain_keys_and_values_go_the_other_way() -> AbstractContextManager:
    right = ring_attention.to_next

    def wrong(x: Tensor, axis: Axis) -> Tensor:
        return right(x, replace(axis, ranks=axis.ranks[::-1], index=axis.size - 1 - axis.index))

    return patch.object(ring_attention, "to_next", wrong)


def plain_diagonal_has_no_mask() -> AbstractContextManager:
    right = ring_attention.probabilities
    return patch.object(
        ring_attention, "probabilities", lambda q, k, scale, seen, lse=None: right(q, k, scale, None, lse)
    )


def plain_zigzag_takes_the_other_half() -> AbstractContextManager:
    right = ring_attention.visible
    return patch.object(ring_attention, "visible", lambda axis, *a: right(replace(axis, index=-1 - axis.index), *a))


def plain_backward_uses_the_blocks_softmax() -> AbstractContextManager:
    """P of this block of keys by itself, not that of all keys."""
    right = ring_attention.probabilities
    return patch.object(ring_attention, "probabilities", lambda q, k, scale, seen, lse=None: right(q, k, scale, seen))


def plain_gradients_stay_where_they_are() -> AbstractContextManager:
    """The sums for other ranks' keys do not travel with these."""
    right, zeros = ring_attention.to_next, torch.zeros_like
    sums: list[Tensor] = []

    def note(x: Tensor, **options: Any) -> Tensor:
        sums.append(zeros(x, **options))
        return sums[-1]

    def wrong(x: Tensor, axis: Axis) -> Tensor:
        return x if any(x is each for each in sums) else right(x, axis)

    class Torch:
        zeros_like = staticmethod(note)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    stack = ExitStack()
    stack.enter_context(patch.object(ring_attention, "to_next", wrong))
    stack.enter_context(patch.object(ring_attention, "torch", Torch()))
    return stack


def plain_heads_come_back_out_of_order() -> AbstractContextManager:
    right = ulysses.heads_to_tokens

    def wrong(x: Tensor, axis: Axis) -> Tensor:
        return rearrange(right(x, axis), "b (c a) s d -> c b a s d", c=axis.size).flip(0).transpose(0, 1).flatten(1, 2)

    return patch.object(ulysses, "heads_to_tokens", wrong)


def plain_tokens_are_joined_in_the_wrong_order() -> AbstractContextManager:
    right = ulysses.tokens_to_heads

    def wrong(x: Tensor, axis: Axis) -> Tensor:
        return rearrange(right(x, axis), "b a (c s) d -> b a (s c) d", c=axis.size)

    return patch.object(ulysses, "tokens_to_heads", wrong)


def plain_ranks_have_their_groups_first_tokens() -> AbstractContextManager:
    def wrong(self: hybrid.Hybrid, sequence: int) -> Tensor:
        return self.ring.positions(sequence).chunk(self.inner.size)[0]

    return patch.object(hybrid.Hybrid, "positions", wrong)


LOSS, GRADIENT, NORM, PARAMETER, REPLICAS = equal("engine")
PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_NORM, PLAIN_PARAMETER, PLAIN_REPLICAS = equal("plain")
SUMMED, SMALL, ALONE = "elements sent to sum all gradients", "bfloat16", "one head of keys and values"
PLAIN_ALONE = "zigzag, plain: output and gradients"
AROUND: dict[Callable, set[str]] = {
    gradients_are_not_summed_because_dp_is_1: {
        GRADIENT,
        NORM,
        PARAMETER,
        REPLICAS,
        PLAIN_GRADIENT,
        PLAIN_NORM,
        PLAIN_PARAMETER,
        PLAIN_REPLICAS,
        SUMMED,
    },
    gradients_are_averaged: {GRADIENT, NORM, PLAIN_GRADIENT, PLAIN_NORM},
    positions_start_at_0_on_every_rank: {LOSS, GRADIENT, PLAIN_LOSS, PLAIN_GRADIENT},
    targets_are_those_of_neighbouring_tokens: {LOSS, GRADIENT, PLAIN_LOSS, PLAIN_GRADIENT},
    the_loss_is_the_mean_of_this_ranks_tokens: {LOSS, GRADIENT, NORM, PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_NORM},
}
PLAIN_RING: dict[Callable, set[str]] = {
    plain_blocks_are_merged_without_rescaling: {PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_ALONE},
    plain_keys_and_values_go_the_other_way: {PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_ALONE},
    plain_diagonal_has_no_mask: {PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_ALONE},
    plain_zigzag_takes_the_other_half: {PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_ALONE},
    plain_backward_uses_the_blocks_softmax: {PLAIN_GRADIENT, PLAIN_ALONE},
    plain_gradients_stay_where_they_are: {PLAIN_GRADIENT, PLAIN_ALONE, "messages, backward (plain)"},
}
ZIGZAG: dict[Callable, set[str]] = AROUND | PLAIN_RING | {
    zigzag_takes_the_other_half: {LOSS, GRADIENT, ALONE, SMALL},
    zigzag_computes_full_blocks: {LOSS, "zigzag: blocks of work, most", "zigzag: virtual time", "contiguous / zigzag"},
    the_diagonal_has_no_mask: {LOSS, GRADIENT, ALONE, "zigzag: blocks of work, most"},
    outputs_are_averaged: {LOSS, GRADIENT, ALONE, SMALL},
    the_lse_is_not_merged: {LOSS, GRADIENT, ALONE, SMALL},
    gradients_stop_one_rank_before_their_owner: {
        GRADIENT, ALONE, "messages, backward (engine)", "elements of their gradients",
    },
    gradients_are_not_passed_on: {GRADIENT, ALONE, "messages, backward (engine)", "elements of their gradients"},
    a_message_is_read_before_it_has_arrived: {LOSS, GRADIENT, ALONE, SMALL},
    messages_are_waited_for_at_once: {"messages in flight while", "and backward"},
    contiguous_chunks_are_dealt_from_the_end: {"contiguous: output and gradients"},
    keys_and_values_are_gathered: {
        "messages of a layer, forward (engine)", "messages, backward (engine)", "elements of a layer, forward (engine)",
        "bytes attention keeps",
        "bytes of the largest tensor, s = 4dc, engine", "elements sent then",
    },
    scores_are_kept_in_full: {"bytes of the largest tensor, s = 4dc, engine"},
    plain_scores_are_of_all_keys: {"bytes of the largest tensor, s = 4dc, plain"},
}  # fmt: skip
CONTIGUOUS: dict[Callable, set[str]] = {
    only_the_diagonal_has_a_mask: {LOSS, GRADIENT, ALONE, "contiguous: blocks"},
    every_block_has_the_diagonals_mask: {LOSS, GRADIENT, ALONE, "contiguous: blocks"},
    plain_diagonal_has_no_mask: {PLAIN_LOSS, PLAIN_GRADIENT, "contiguous, plain: output and gradients"},
    plain_blocks_are_merged_without_rescaling: {PLAIN_LOSS, PLAIN_GRADIENT, "contiguous, plain: output and gradients"},
}
FLIGHT = "blocks computed with the gather in flight"
GATHERED: dict[Callable, set[str]] = AROUND | {
    runs_take_each_others_masks: {LOSS, GRADIENT, ALONE, SMALL, "zigzag: output"},
    a_run_sees_its_own_future: {LOSS, GRADIENT, ALONE, SMALL, "contiguous: output"},
    gathered_keys_stay_in_the_order_of_ranks: {LOSS, GRADIENT, ALONE, SMALL},
    gradients_of_keys_are_this_ranks_alone: {GRADIENT, ALONE, "reduce-scatters, backward (engine)"},
    gradients_are_scattered_in_the_order_of_the_sequence: {GRADIENT, ALONE, SMALL},
    the_gather_is_waited_for_at_once: {f"{FLIGHT}, forward", f"{FLIGHT}, backward"},
    all_heads_of_keys_are_gathered: {"elements sent then"},
    plain_runs_have_no_mask: {PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_ALONE},
    plain_keys_stay_in_the_order_of_ranks: {PLAIN_LOSS, PLAIN_GRADIENT, PLAIN_ALONE},
    plain_gradients_of_keys_are_this_ranks_alone: {PLAIN_GRADIENT, PLAIN_ALONE, "reduce-scatters, backward (plain)"},
}
ULYSSES: dict[Callable, set[str]] = {
    shards_are_joined_in_the_wrong_order: {LOSS, GRADIENT, "4 heads of keys and values", SMALL},
    everything_is_gathered: {
        "all-to-alls of a layer, forward (engine)", "all-to-alls, backward (engine)", "elements sent forward, 2",
    },
    heads_of_keys_are_repeated_in_turn: {"2 heads of keys and values"},
    every_rank_has_its_groups_first_tokens: {LOSS, GRADIENT},
    plain_heads_come_back_out_of_order: {PLAIN_LOSS, PLAIN_GRADIENT, "plain: output and gradients"},
    plain_tokens_are_joined_in_the_wrong_order: {PLAIN_LOSS, PLAIN_GRADIENT, "plain: output and gradients"},
}  # fmt: skip
HYBRID: dict[Callable, set[str]] = {
    gradients_are_not_summed_because_dp_is_1: {GRADIENT, NORM, PARAMETER, REPLICAS, SUMMED},
    positions_start_at_0_on_every_rank: {LOSS, GRADIENT},
    every_rank_has_its_groups_first_tokens: {LOSS, GRADIENT},
    zigzag_takes_the_other_half: {LOSS, GRADIENT, ALONE, SMALL},
    keys_and_values_are_gathered: {
        "messages of a layer, forward (engine)", "elements sent across, forward (engine)", "bytes attention keeps",
    },
    everything_is_gathered: {"all-to-alls of a layer, forward (engine)", "elements sent inside, forward (engine)"},
    plain_ranks_have_their_groups_first_tokens: {PLAIN_LOSS, PLAIN_GRADIENT},
    plain_heads_come_back_out_of_order: {PLAIN_LOSS, PLAIN_GRADIENT, "plain: output and gradients"},
}  # fmt: skip
TABLE: dict[Callable, set[str]] = {
    the_output_is_kept_twice: {f"all-gather: bytes kept for backward, s {s}, c 4" for s in (16, 64)},
    gradients_are_not_summed_because_dp_is_1: {equal(name)[1] for name in ("Ulysses", "ring", "all-gather", "hybrid")},
    keys_and_values_are_gathered: {
        f"ring: {what}, s {s}, c 4"
        for what in ("messages of a layer", "elements sent", "bytes kept for backward")
        for s in (16, 64)
    },
}
LESSONS = {
    "ulysses": ("ulysses", [], ULYSSES),
    "zigzag": ("ring_attention", ["--placement=zigzag"], ZIGZAG),
    "contiguous": ("ring_attention", ["--placement=contiguous"], CONTIGUOUS),
    "all_gather": ("all_gather", ["--placement=zigzag"], GATHERED),
    "hybrid": ("hybrid", ["--ulysses=2", "--placement=zigzag"], HYBRID),
    "long_context": ("long_context", [], TABLE),
}


@pytest.mark.parametrize("name", LESSONS)
def test_the_claims_catch(pool: Pool, name: str) -> None:
    lesson, flags, bugs = LESSONS[name]
    claims_catch(pool, RANKS, lesson, FLAGS + flags, bugs)
