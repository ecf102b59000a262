"""In which order weights are gathered, used and freed, and gradients freed: seen at the borders of layers. Lecture 01.

Nothing is taken from what the versions say of themselves: at each border it is looked up which layers' weights have
memory, and what is still in flight. A layer's weights are freed when the storage that held them is gone, whoever else
may have had a hold of it.

L layers, m micro-batches a step
"""

import re
import time
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from core.proof.lesson import Run
from core.proof.memory import live_bytes
from zero.engine.gathered import GatheredWeights
from zero.evidence.pictures import draw_events
from zero.evidence.training import Fast, Plain

# Of one layer and micro-batch. The plain version computes a layer's forward again in its backward.
IN_ORDER = re.compile("gathered forward freed gathered (forward )?backward freed")


class Events:
    """What happens to the layers of one version while it trains.

    Attributes:
        by_layer: of each layer what happened to it, in order: gathered, freed, forward, backward, and the end of a
            micro-batch.
        prefetched: how often the next layer was in flight when a forward began and when it had ended, and the layer
            before when a backward began.
        left: the most bytes of full gradients after a micro-batch.
    """

    def __init__(self, version: Plain | Fast):
        self.layers = [list(block.parameters()) for block in version.model.blocks.values()]
        self.by_layer: list[list[str]] = [[] for _ in self.layers]
        self.order: list[tuple[int, str]] = []  # (layer, event), until the end of the first micro-batch
        self.prefetched = {"forward": 0, "backward": 0}
        self.left = 0
        self._patience = 1.0  # seconds, of all looks together
        self._parameters = list(version.model.parameters())
        self._gathered: list[StorageWeakRef | None] = [None] * len(self.layers)
        weights = version.engine.sharding.weights if isinstance(version, Fast) else None
        self._units = weights.walks[0].layers if isinstance(weights, GatheredWeights) else None
        # After the hooks of the version itself, so that what these do is seen.
        for i, block in enumerate(version.model.blocks.values()):
            self._watch_layer(i, block)
        version.model.norm.register_forward_pre_hook(lambda *_: self._look())
        version.model.register_forward_hook(lambda *_: self._look())
        version.data.microbatches = self._watch_microbatches(version.data.microbatches)

    def _watch_layer(self, i: int, block: nn.Module) -> None:
        in_flight_before = False

        def begins(*_: object) -> None:
            nonlocal in_flight_before
            self._look()
            self._note(i, "forward")
            in_flight_before = self._in_flight(i + 1)

        def ends(_: nn.Module, __: tuple, output: Tensor) -> None:
            self.prefetched["forward"] += in_flight_before and self._in_flight(i + 1)
            self._look()
            if output.requires_grad:
                output.register_hook(backward_begins)

        def backward_begins(_: Tensor) -> None:
            self._look()
            self._note(i, "backward")
            self.prefetched["backward"] += self._in_flight(i - 1)

        block.register_forward_pre_hook(begins)
        block.register_forward_hook(ends)

    def _watch_microbatches(self, right: Callable[..., Iterator]) -> Callable[..., Iterator]:
        def watched(*arguments: object) -> Iterator:
            for microbatch in right(*arguments):
                yield microbatch
                self._look()  # all of it is done: the next is asked for
                self.left = max(self.left, live_bytes(p.grad for p in self._parameters if p.grad is not None))
                for i in range(len(self.by_layer)):
                    self._note(i, "end")

        return watched

    def _note(self, layer: int, event: str) -> None:
        if not any("end" in events for events in self.by_layer):
            self.order.append((layer, event))
        self.by_layer[layer].append(event)

    def _look(self) -> None:
        for i, parameters in enumerate(self.layers):
            storage = parameters[0].untyped_storage()
            here = StorageWeakRef(storage)
            full = storage.nbytes() >= sum(p.numel() * p.element_size() for p in parameters)
            before = self._gathered[i]
            if before is not None and not (full if before == here else not self._gone(before)):
                self._note(i, "freed")
                self._gathered[i] = before = None
            if before is None and full:
                self._note(i, "gathered")
                self._gathered[i] = here

    def _gone(self, storage: StorageWeakRef) -> bool:
        """Whether nobody has a hold of it. The backend's thread lets go of a buffer a moment after its collective."""
        while not storage.expired() and self._patience > 0:
            time.sleep(0.001)
            self._patience -= 0.001
        return storage.expired()

    def _in_flight(self, i: int) -> bool:
        """Whether the gathering of layer i has begun and nobody has waited for it yet."""
        return self._units is not None and 0 <= i < len(self._units) and bool(self._units[i].in_flight)

    def in_order(self) -> int:
        """How many layers, over all micro-batches, were gathered, used and freed in that order, forward and back."""
        microbatches = (part.strip() for events in self.by_layer for part in " ".join(events).split("end"))
        return sum(IN_ORDER.fullmatch(part) is not None for part in microbatches)


class Order:
    """The events of every version, by name; see `claim_weights` and `claim_gradients`."""

    def __init__(self) -> None:
        self.of: dict[str, Events] = {}

    def watch(self, name: str, version: Plain | Fast) -> None:
        self.of[name] = Events(version)

    def claim_weights(self, run: Run) -> None:
        """ZeRO-3: gathered before, freed after; the engine prefetches."""
        times = run.args.steps * run.args.microbatches
        for name, events in self.of.items():
            layers = len(events.layers)
            found = run.job.gather((events.in_order(), *events.prefetched.values()))
            if not found:
                continue
            draw_events(run, name, events.order[:-1], layers)
            in_order, forward, backward = zip(*found, strict=True)
            if name == "engine" or len(found) > 1:  # the plain one has nothing to free where a shard is all of a layer
                run.evidence.on_ranks(
                    f"layers gathered, used, freed, forward and back, {name}",
                    f"in this order, all L of each micro-batch = {layers * times}, by the order of events",
                    layers * times,
                    in_order,
                )
            if name == "plain":  # it waits for every layer
                continue
            expected = (layers - 1) * times
            formula = f"all but the last, L-1 of each micro-batch = {expected}, by the order of events"
            run.evidence.on_ranks(f"next layer in flight all through a forward, {name}", formula, expected, forward)
            run.evidence.on_ranks(f"layer before in flight as a backward begins, {name}", formula, expected, backward)

    def claim_gradients(self, run: Run) -> None:
        """ZeRO-2 and 3: nothing of the full gradients is left after a micro-batch."""
        for name, events in self.of.items():
            found = run.job.gather(events.left)
            if found:
                claim = f"bytes of full gradients after a micro-batch, {name}"
                run.evidence.on_ranks(claim, "0: freed in each", 0, found)
