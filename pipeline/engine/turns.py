"""F&B: a forward and a backward on one device, where one computes while the other's rows are in flight. Lecture 08.

Of a mixture of experts half the time may be all-to-all. DeepSeek-V3 (2412.19437), section 3.2.1, splits a layer into
attention, dispatch, MLP and combine, and sets a forward of one direction of DualPipe against a backward of the other:

         computes                in flight meanwhile
    1    F attention, router     B combine: gradients of what the experts have made
    2    B MLP                   F dispatch
    3    F MLP                   B dispatch: gradients of what the experts have read
    4    B attention             F combine
    1    F attention, router     B combine, of the layer before

No layer is split by hand for it: each of the two runs as it always does, but on a thread of its own, of which only one
computes at a time. Who would wait for rows hands the turn over, so the turns follow the table by themselves, whatever
is in a layer: dense ones have no turn to give, a recomputed forward has its own. (torchtitan runs them on two threads,
too; DeepSeek's DualPipe leaves `overlapped_forward_backward` to who writes the model.) Turns depend on nothing but the
layers, so all ranks of ep have the same, and their collectives meet.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class _OtherFailed(Exception):
    """Ends one of the two where the other has failed."""


class Turns:
    """Runs two computations by turns.

    Args:
        device: on which both compute.
        save, restore: what both set while they compute, such as the micro-batch that masks are for: it is saved when
            one gives the turn away, and restored when it has it again.
    """

    def __init__(
        self, device: torch.device, save: Callable[[], Any] = tuple, restore: Callable[[Any], None] = lambda _: None
    ):
        self.save, self.restore = save, restore
        self.has: int | None = None  # whose turn it is, 0 or 1; None where nothing runs beside what computes now
        self._device = device
        self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = [False, False]
        self._failure: BaseException | None = None
        self._thread: ThreadPoolExecutor | None = None

    def together(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Run both, which call `give`. The first has the first turn; when one has ended the other goes on to its end.

        The second runs on another thread: with gradients, and without this one's hooks. Tensors that are fake here are
        fake there.

        Raises:
            what the one that failed has raised. The other does not go on.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "turns", initializer=self._use_device)
        self.has, self._ended, self._failure = 0, [False, False], None
        running = self._thread.submit(self._run, 1, second, _get_current_dispatch_mode_stack())
        self._run(0, first)
        wait([running])
        self.has = None
        if self._failure:
            raise self._failure

    def give(self) -> None:
        """Let the other one compute until it gives the turn back, or ends. Called where one would wait."""
        me = self.has
        if me is None or self._ended[1 - me]:
            return
        state = self.save()
        self._hand_over(1 - me)
        self._go[me].acquire()
        self.restore(state)
        if self._failure:
            raise _OtherFailed

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _run(self, me: int, compute: Callable[[], None], modes: Sequence[TorchDispatchMode] = ()) -> None:
        if me:
            self._go[me].acquire()
        try:
            with ExitStack() as entered:
                for mode in modes:
                    entered.enter_context(mode)
                if not self._failure:
                    compute()
        except BaseException as error:  # whatever it is: raised on the main thread
            self._failure = self._failure or error
        self._ended[me] = True
        if not self._ended[1 - me]:
            self._hand_over(1 - me)

    def _hand_over(self, to: int) -> None:
        self.has = to
        self._go[to].release()

    def _use_device(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)
