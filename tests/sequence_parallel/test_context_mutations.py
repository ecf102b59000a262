"""Put each known bug of a cut sequence in, and see which claims fail: a check that cannot fail proves nothing."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import core.proof.arguments
from core import comm
from core.mesh import Axis
from core.model.gpt import GPT
from core.p2p import PointToPoint
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from sequence_parallel import context_training, hybrid, long_context, ring, ring_attention, ulysses
from sequence_parallel.ring import GRADIENTS, RingAttention, Tile
from sequence_parallel.ulysses import Ulysses
from tests.pool import Pool

RANKS = 4
SIZES = {"steps": 2, "batch": 2, "sequence": 16, "hidden": 16, "heads": 4, "layers": 2, "clip": 0.05}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
ALL = slice(None)


# ---- The bugs of everything around attention


def gradients_are_not_summed_because_dp_is_1() -> AbstractContextManager:
    return patch.object(context_training, "sum_gradients", lambda parameters, axis: None)


def gradients_are_averaged() -> AbstractContextManager:
    right = context_training.sum_gradients

    def wrong(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
        all_of_them = list(parameters)
        right(all_of_them, axis)
        for p in all_of_them:
            p.grad /= axis.size

    return patch.object(context_training, "sum_gradients", wrong)


def positions_start_at_0_on_every_rank() -> AbstractContextManager:
    right = context_training.parallelize

    def wrong(model: GPT, attention: Any) -> GPT:
        right(model, attention).embed.position._forward_pre_hooks.clear()
        return model

    return patch.object(context_training, "parallelize", wrong)


def targets_are_those_of_neighbouring_tokens() -> AbstractContextManager:
    right, calls = context_training.part, []

    def wrong(x: Tensor, attention: Any) -> Tensor:
        calls.append(x)
        return right(x, attention) if len(calls) % 2 else x.chunk(dist.get_world_size(), 1)[dist.get_rank()]

    return patch.object(context_training, "part", wrong)


def the_loss_is_the_mean_of_this_ranks_tokens() -> AbstractContextManager:
    right = context_training.token_loss
    return patch.object(context_training, "token_loss", lambda x, y, tokens: right(x, y, y.numel()))


# ---- The bugs of the ring


def tiles(change: Callable[[RingAttention, int, int, Tile | None], Tile | None]) -> AbstractContextManager:
    right = RingAttention.tile
    return patch.object(RingAttention, "tile", lambda self, step, n: change(self, step, n, right(self, step, n)))


def zigzag_takes_the_other_half() -> AbstractContextManager:
    def swap(self: RingAttention, step: int, n: int, tile: Tile | None) -> Tile | None:
        if not self.zigzag:
            return tile
        early, late = slice(n // 2), slice(n // 2, None)
        other = {str(ALL): ALL, str(early): late, str(late): early}
        return Tile(other[str(tile.rows)], other[str(tile.columns)], tile.causal)

    return tiles(swap)


def zigzag_computes_whole_blocks() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: Tile(ALL, ALL, step == 0) if self.zigzag else tile)


def the_diagonal_has_no_mask() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: tile and tile._replace(causal=False))


def only_the_diagonal_has_a_mask() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: tile or Tile(ALL, ALL, causal=False))


def contiguous_pieces_are_dealt_from_the_end() -> AbstractContextManager:
    """The work of each rank and step is the same, but of the wrong queries and keys."""
    right = RingAttention.positions

    def wrong(self: RingAttention, sequence: int) -> Tensor:
        return right(self, sequence) if self.zigzag else torch.arange(sequence).chunk(self.pieces)[-1 - self.axis.index]

    return patch.object(RingAttention, "positions", wrong)


def every_block_has_the_diagonals_mask() -> AbstractContextManager:
    return tiles(lambda self, step, n, tile: tile and tile._replace(causal=True))


def outputs_are_averaged() -> AbstractContextManager:
    return patch.object(ring, "join", lambda out, lse, more, more_lse: out.add_(more).div_(2))


def the_lse_is_not_joined() -> AbstractContextManager:
    right = ring.join

    def wrong(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
        right(out, lse.clone(), more, more_lse)

    return patch.object(ring, "join", wrong)


def passing(change: Callable[[Callable, Tensor, str, int], Callable]) -> AbstractContextManager:
    right = RingAttention.pass_on

    def wrong(self: RingAttention, x: Tensor, kind: str, step: int) -> Callable[[], Tensor]:
        last = kind == GRADIENTS and step == self.ranks - 1
        return change(lambda: right(self, x, kind, step), x, kind, last)

    return patch.object(RingAttention, "pass_on", wrong)


def gradients_stop_one_rank_before_their_owner() -> AbstractContextManager:
    return passing(lambda send, x, kind, last: (lambda: x) if last else send())


def gradients_are_not_passed_on() -> AbstractContextManager:
    """Each rank keeps what it has computed for other ranks' keys."""
    return passing(lambda send, x, kind, last: (lambda: x) if kind == GRADIENTS else send())


def a_message_is_read_before_it_has_arrived() -> AbstractContextManager:
    right = PointToPoint.receive

    def wrong(self: PointToPoint, into: Tensor, *rest: Any) -> Callable[[], Tensor]:
        arrive = right(self, into, *rest)
        early = torch.zeros_like(into)
        return lambda: arrive() if into.dim() == 1 else (arrive(), early)[1]  # the clock's may arrive

    return patch.object(PointToPoint, "receive", wrong)


def messages_are_waited_for_at_once() -> AbstractContextManager:
    def wait(send: Callable, x: Tensor, kind: str, last: bool) -> Callable[[], Tensor]:
        arrived = send()()
        return lambda: arrived

    return passing(wait)


def keys_and_values_are_gathered() -> AbstractContextManager:
    """Right, but a matrix of scores of all keys, and other messages."""

    def wrong(self: RingAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        where = torch.cat(everyones_positions(self, q.shape[2] * self.ranks))
        k, v = (comm.gather_for(x, self.axis, 2) for x in (k, v))
        future = where > self.positions(len(where)).unsqueeze(-1)
        scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5).masked_fill(
            future, -torch.inf
        )
        with self.computing(0, 1.0):
            pass
        return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    return patch.object(RingAttention, "__call__", wrong)


def everyones_positions(self: RingAttention, sequence: int) -> list[Tensor]:
    pieces = torch.arange(sequence).chunk(self.pieces)
    both = [(pieces[r], pieces[-1 - r]) if self.zigzag else (pieces[r],) for r in range(self.ranks)]
    return [torch.cat(each) for each in both]


# ---- The bugs of Ulysses


def parts_are_joined_in_the_wrong_order() -> AbstractContextManager:
    def wrong(axis: Axis, cut: int, joined: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        equal = [1] * axis.size
        received = [comm.all_to_all(torch.stack(x.chunk(axis.size, cut)), axis, equal, equal) for x in tensors]
        return tuple(torch.cat(x.flip(0).unbind(), joined) for x in received)

    return patch.object(ulysses, "switch", wrong)


def everything_is_gathered() -> AbstractContextManager:
    def wrong(axis: Axis, cut: int, joined: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(comm.all_gather(x, axis, joined).chunk(axis.size, cut)[axis.index] for x in tensors)

    return patch.object(ulysses, "switch", wrong)


def heads_of_keys_are_repeated_in_turn() -> AbstractContextManager:
    def wrong(self: Tensor, times: int, dim: int) -> Tensor:
        return torch.cat([self] * times, dim)

    return patch.object(Tensor, "repeat_interleave", wrong)


def every_rank_has_its_groups_first_tokens() -> AbstractContextManager:
    def wrong(self: Ulysses, sequence: int) -> Tensor:
        return self.inner.positions(sequence).chunk(self.axis.size)[0]

    return patch.object(Ulysses, "positions", wrong)


LOSS, GRADIENT, NORM = "losses equal", "every gradient equals", "the global gradient norm"
PARAMETER, WHOLE = "every parameter after every step", "replicated parameters stay equal on all ranks"
SUMMED, SMALL, ALONE = "elements sent to sum all gradients", "bfloat16", "one head of keys and values"
AROUND: dict[Callable, set[str]] = {
    gradients_are_not_summed_because_dp_is_1: {GRADIENT, NORM, PARAMETER, WHOLE, SUMMED},
    gradients_are_averaged: {GRADIENT, NORM},
    positions_start_at_0_on_every_rank: {LOSS, GRADIENT},
    targets_are_those_of_neighbouring_tokens: {LOSS, GRADIENT},
    the_loss_is_the_mean_of_this_ranks_tokens: {LOSS, GRADIENT, NORM},
}
ZIGZAG: dict[Callable, set[str]] = AROUND | {
    zigzag_takes_the_other_half: {LOSS, GRADIENT, ALONE, SMALL},
    zigzag_computes_whole_blocks: {LOSS, "zigzag: blocks of work, most", "zigzag: virtual time", "contiguous / zigzag"},
    the_diagonal_has_no_mask: {LOSS, GRADIENT, ALONE, "zigzag: blocks of work, most"},
    outputs_are_averaged: {LOSS, GRADIENT, ALONE, SMALL},
    the_lse_is_not_joined: {LOSS, GRADIENT, ALONE, SMALL},
    gradients_stop_one_rank_before_their_owner: {GRADIENT, ALONE, "messages, backward", "elements of their gradients"},
    gradients_are_not_passed_on: {GRADIENT, ALONE, "messages, backward", "elements of their gradients"},
    a_message_is_read_before_it_has_arrived: {LOSS, GRADIENT, ALONE, SMALL},
    messages_are_waited_for_at_once: {"messages in flight while", "and backward"},
    contiguous_pieces_are_dealt_from_the_end: {"contiguous: output and gradients"},
    keys_and_values_are_gathered: {
        "messages of a layer, forward", "messages, backward", "elements of a layer, forward",
        "bytes attention keeps", "elements of the largest tensor", "elements sent then",
    },
}  # fmt: skip
CONTIGUOUS: dict[Callable, set[str]] = {
    only_the_diagonal_has_a_mask: {LOSS, GRADIENT, ALONE, "contiguous: blocks"},
    every_block_has_the_diagonals_mask: {LOSS, GRADIENT, ALONE, "contiguous: blocks"},
}
ULYSSES: dict[Callable, set[str]] = {
    parts_are_joined_in_the_wrong_order: {LOSS, GRADIENT, "4 heads of keys and values", SMALL},
    everything_is_gathered: {"all-to-alls of a layer, forward", "all-to-alls, backward", "elements sent forward, 2"},
    heads_of_keys_are_repeated_in_turn: {"2 heads of keys and values"},
    every_rank_has_its_groups_first_tokens: {LOSS, GRADIENT},
}
HYBRID: dict[Callable, set[str]] = {
    gradients_are_not_summed_because_dp_is_1: {GRADIENT, NORM, PARAMETER, WHOLE, SUMMED},
    positions_start_at_0_on_every_rank: {LOSS, GRADIENT},
    every_rank_has_its_groups_first_tokens: {LOSS, GRADIENT},
    zigzag_takes_the_other_half: {LOSS, GRADIENT, ALONE, SMALL},
    keys_and_values_are_gathered: {"messages of a layer", "elements sent across, forward", "bytes attention keeps"},
    everything_is_gathered: {"all-to-alls of a layer", "elements sent inside, forward"},
}
TABLE: dict[Callable, set[str]] = {
    gradients_are_not_summed_because_dp_is_1: {"Ulysses: gradient", "ring: gradient", "hybrid: gradient"},
    keys_and_values_are_gathered: {
        f"ring: {what}, s {s}, c 4"
        for what in ("messages of a layer", "elements sent", "bytes kept for backward")
        for s in (16, 64)
    },
}
LESSONS = {
    "ulysses": (ulysses, [], ULYSSES),
    "zigzag": (ring_attention, ["--placement=zigzag"], ZIGZAG),
    "contiguous": (ring_attention, ["--placement=contiguous"], CONTIGUOUS),
    "hybrid": (hybrid, ["--ulysses=2", "--placement=zigzag"], HYBRID),
    "long_context": (long_context, [], TABLE),
}


# ---- The lessons with a bug in them


def failing_claims(name: str, bugs: list[Callable[[], AbstractContextManager] | None]) -> list[list[str]]:
    """Run a lesson inside a worker with each of the bugs; the claims that failed, on rank 0."""
    script, flags, _ = LESSONS[name]
    return [failing(script, flags, bug) for bug in bugs]


def failing(script: ModuleType, flags: list[str], bug: Callable[[], AbstractContextManager] | None) -> list[str]:
    frame = Lesson("sequence_parallel/lesson.py", "06", "", "", "")
    core.proof.arguments.add_model_flags(frame)
    frame.parser.add_argument("--placement")
    frame.parser.add_argument("--ulysses", type=int)
    args = frame.parser.parse_args(FLAGS + flags)
    run = Run(args, Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 30.0), torch.float64)
    with bug() if bug else nullcontext():
        try:
            script.lesson(run)
        except Stop as stop:
            return [f"stopped: {stop}"]
    return [claim.claim for claim in run.evidence.claims if not claim.holds]


@pytest.mark.parametrize("name", LESSONS)
def test_the_claims_catch(pool: Pool, name: str) -> None:
    """Without a bug every claim holds; with one those fail that should."""
    bugs = LESSONS[name][2]
    none, *found = pool.run(RANKS, failing_claims, name, [None, *bugs], timeout=110)[0]
    assert none == []
    for (bug, must_fail), failed in zip(bugs.items(), found, strict=True):
        missed = {claim for claim in must_fail if not any(f.startswith(claim) for f in failed)}
        assert not missed, f"{bug.__name__}: only these failed: {failed}"
