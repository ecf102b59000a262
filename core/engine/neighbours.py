"""The neighbours of this process: which ranks of the job are on its machine."""

import os
from collections.abc import Collection
from contextlib import suppress

import torch.distributed as dist

from core.engine.door import Door
from core.engine.near import Neighbours
from core.proof.flight import host
from core.proof.peers import peer_errors

MEET = "all-gather of who is on which machine"
_known: tuple[dist.ProcessGroup, Neighbours | None] | None = None  # of which job, and who they are


def meet(timeout: float) -> None:
    """Connect to the ranks of this machine, once a job; every rank of it calls this at the same time.

    Where that is not possible for every rank within `timeout` seconds, as on another system than Linux, all go on with
    gloo.

    Raises:
        PeerError: another rank died, or did not come.
    """
    global _known
    job = dist.group.WORLD
    if _known and _known[0] is job:
        return
    leave()
    if dist.get_world_size() == 1 or dist.get_backend() != "gloo":
        return
    found = None
    with suppress(OSError, AttributeError):  # of memfd_create or a socket; no Linux
        found = Door()
    known: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    with peer_errors(MEET):
        dist.all_gather_object(known, (host(), found.name if found else ""))
    neighbours = None
    with suppress(OSError, ValueError):
        if met := found and found.meet(known, dist.get_rank(), timeout / 2):  # others wait for this
            neighbours = Neighbours(*met)
    able = [(False, False)] * dist.get_world_size()
    with peer_errors(MEET):
        dist.all_gather_object(able, (bool(neighbours), bool(neighbours and neighbours.lends)))
    if neighbours:
        neighbours.lends = all(lends for _, lends in able)
        if not all(connected for connected, _ in able):
            neighbours.close()
            neighbours = None
    _known = job, neighbours


def leave() -> None:
    """Close all connections, before the job ends."""
    global _known
    if _known and _known[1]:
        _known[1].close()
    _known = None


os.register_at_fork(after_in_child=leave)  # a child that lives on must not hide that its rank has died


def among(ranks: Collection[int]) -> Neighbours | None:
    """The neighbours of this rank, if all these ranks are on its machine."""
    neighbours = _known and _known[1]
    return neighbours if neighbours and neighbours.has(ranks) else None
