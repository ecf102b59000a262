"""ZeRO-Offload for real runs: copies beside backward, in a stream of their own. Ren et al. 2021 (2101.06840).

What it adds to the plain version in `offload.py`: as backward finishes a bucket, this rank's shard of its gradient goes
down to the host while backward goes on; and each updated bucket goes up while the host updates the next.
"""

from functools import partial

import torch
from torch import Tensor

from core.ledger import Ledger
from zero.engine.buckets import Bucket
from zero.engine.engine import Engine
from zero.engine.sharding import Scope, Sharding, shard_gradients
from zero.engine.weights import ReplicatedWeights

HOST = torch.device("cpu")


class HostShards:
    """This rank's shards of the gradients, in host memory."""

    def __init__(self, buckets: list[Bucket], ledger: Ledger):
        self.own = [torch.zeros(bucket.length, dtype=bucket.gradient_dtype, device=HOST) for bucket in buckets]
        self.in_flight: list[tuple[int, Tensor, torch.Event | None]] = []
        self._ledger = ledger
        device = buckets[0].device
        # Not in backward's stream, where what is computed next would wait for the copy.
        self._stream = torch.Stream(device) if device.type == "cuda" else None

    def zero(self) -> None:
        self.wait()  # for what a step that failed has left
        for shard in self.own:
            shard.zero_()

    def add(self, i: int, gradient: Tensor) -> None:
        """Start to copy a shard to the host; it is added there once it has arrived."""
        self.arrived(but=1)
        copy = torch.empty(gradient.shape, dtype=gradient.dtype, device=HOST, pin_memory=gradient.is_cuda)
        event = None
        if self._stream is None:
            copy.copy_(gradient)
        else:
            self._stream.wait_stream(torch.accelerator.current_stream())
            with self._stream:
                copy.copy_(gradient, non_blocking=True)
            gradient.record_stream(self._stream)
            event = self._stream.record_event()
        self.in_flight.append((i, copy, event))
        self._ledger.record("to the host", "host", gradient.numel(), gradient.element_size())

    def wait(self) -> None:
        self.arrived(but=0)

    def arrived(self, but: int) -> None:
        """Add up what was copied, `but` for the last so many shards."""
        while len(self.in_flight) > but:
            i, copy, event = self.in_flight.pop(0)
            if event is not None:
                event.synchronize()
            self.own[i] += copy


class UploadedWeights(ReplicatedWeights):
    """Whose updated shards have come from the host."""

    def gather(self, i: int) -> None:
        self.axis.ledger.record("to the device", "host", self.own[i].numel(), self.own[i].element_size())
        super().gather(i)


def shard_on_host(scope: Scope) -> Sharding:
    """ZeRO-2 with gradients and optimizer state on the host: 2Ψ bytes on the device."""
    return shard_gradients(scope, partial(HostShards, ledger=scope.axis.ledger), UploadedWeights)


zero_offload = partial(Engine, shard_on_host, host=HOST)
