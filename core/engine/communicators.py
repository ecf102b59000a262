"""NCCL's communicators for the messages of an axis, opened before the first one."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from core.mesh import Axis

Route = tuple[int, int, str]  # sender and receiver, as indices on the axis, and kind


class Communicators:
    """One for each lane of these routes; every rank of the axis makes them at the same time.

    NCCL runs the messages of one communicator on one stream, in the order of the calls: a receive posted ahead would
    hold up the sends behind it. So a lane never both sends and receives on one rank. The first message makes the
    connection and blocks until both ends are there, hence one round in a fixed order.
    """

    def __init__(self, axis: Axis, routes: Sequence[Route], device: torch.device):
        self._groups = {
            lane: dist.new_group([*axis.ranks], timeout=axis.timeout, use_local_synchronization=True)
            for lane in sorted({self._lane(*route) for route in routes})
        }
        probe = torch.zeros(1, device=device)
        dist.all_reduce(probe, group=axis.group)  # all its ranks: `exchange` must not be the group's first call
        for route in sorted(routes):
            sender, receiver, _ = route
            if axis.index == sender:
                dist.send(probe, axis.ranks[receiver], self.of(*route))
            elif axis.index == receiver:
                dist.recv(probe, axis.ranks[sender], self.of(*route))

    def of(self, sender: int, receiver: int, kind: str) -> dist.ProcessGroup:
        return self._groups[self._lane(sender, receiver, kind)]

    @staticmethod
    def _lane(sender: int, receiver: int, kind: str) -> tuple[str, bool, int]:
        return kind, sender < receiver, sender % 2
