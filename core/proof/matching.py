"""Shapes and types that differ between the ranks of a collective are found before they corrupt or abort.

Without it gloo ends the process that gets more bytes than it expects, and takes equal bytes of another shape or type
for what they are not; NCCL waits, or corrupts. `--check-messages` turns it on.
"""

import json
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence

import torch.distributed as dist

from core.proof.flight import Call, in_words

LEFT = 256  # calls that one rank has left in the store to compare with


class MismatchError(RuntimeError):
    """Ranks were about to exchange tensors that do not fit each other."""


class Checker:
    """Compares what ranks are about to exchange, before they do, in a store beside it.

    Who comes first to a call leaves in the store what it is about to do; the others compare theirs with it before they
    join. So a tensor that does not fit is never sent, and nobody waits for the check: it is one question to the store.
    """

    def __init__(self, store: dist.Store, rank: int):
        self.store, self.rank = store, rank
        self._left: deque[str] = deque()
        self._tags: dict[Hashable, int] = defaultdict(int)

    def compare(self, call: Call, more: object = "", tag: int = 0) -> None:
        """Raises MismatchError where another rank's call of this number is another, or has another tensor."""
        if call.direction:
            self._tags[call.lane, tag] += 1
            key = f"{call.lane} {tag} {self._tags[call.lane, tag]}"
            mine = f"{tuple(call.shape)} {call.dtype}"
        else:
            key = f"{call.lane} {call.number}"
            shape = ("rows", *call.shape[1:]) if call.uneven else tuple(call.shape)
            mine = " ".join(filter(None, (call.operation, str(shape), str(call.dtype), str(more))))
        first = self.store.compare_set(key, "", f"{self.rank} {mine}").decode()
        other, _, theirs = first.partition(" ")
        if theirs != mine:
            raise MismatchError(f"{in_words(call)}: rank {self.rank} has {mine}, rank {other} has {theirs}")
        if not call.direction:
            self._forget_later(key, int(other))
        elif int(other) != self.rank:  # both sides have been here
            self.store.delete_key(key)

    def compare_rows(self, call: Call, send: Sequence[int], receive: Sequence[int]) -> None:
        """All-to-all: each rank must expect from each other what that sends. Of each pair the later one compares."""
        me, key = call.ranks.index(self.rank), f"{call.lane} {call.number} rows"
        self.store.append(key, json.dumps([me, [*send], [*receive]]) + "\n")
        for line in self.store.get(key).decode().splitlines():
            peer, sends, expects = json.loads(line)
            for sender, receiver, there, here in (
                (me, peer, send[peer], expects[me]),
                (peer, me, sends[me], receive[peer]),
            ):
                if there != here:
                    raise MismatchError(
                        f"{in_words(call)}: rank {call.ranks[sender]} sends {there} rows to rank "
                        f"{call.ranks[receiver]}, which expects {here}"
                    )
        self._forget_later(key, call.ranks[0])

    def _forget_later(self, key: str, by: int) -> None:
        """One rank removes what was left for a call, when it is so many calls on that all have been there."""
        if by == self.rank:
            self._left.append(key)
            if len(self._left) > LEFT:
                self.store.delete_key(self._left.popleft())
