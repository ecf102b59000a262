"""Join and leave the job: ranks, device, backend, and one clear error instead of a hang.

`torchrun` starts one process a rank and sets RANK, WORLD_SIZE, LOCAL_RANK, ..., and how often it has started them;
nothing else is read.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from core.comm import PeerError, peer_errors
from core.proof.files import Unwritable

BEAT = 0.5  # seconds between two signs of life of a rank
QUIET = 6 * BEAT  # seconds without one after which a rank is lost, once something went wrong
SHORTEST_TIMEOUT = 5.0


class Stop(Exception):
    """Stops all ranks together with one message from rank 0 and exit code 1. Every rank must raise it."""


@dataclass(frozen=True)
class ProcessInfo:
    """Where this process stands among those that torchrun started; alone without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    by_torchrun: bool


def process_info() -> ProcessInfo:
    """Read torchrun's environment variables."""

    def number(name: str, alone: int) -> int:
        return int(os.environ.get(name, alone))

    return ProcessInfo(
        number("RANK", 0),
        number("WORLD_SIZE", 1),
        number("LOCAL_RANK", 0),
        number("LOCAL_WORLD_SIZE", 1),
        number("GROUP_RANK", 0),
        "RANK" in os.environ,
    )


def choose_device(requested: str, here: ProcessInfo) -> tuple[torch.device, str]:
    """The device of this rank for `--device auto|cpu|cuda`, and why, in words.

    Raises:
        ValueError: cuda was asked for and there are fewer GPUs on this machine than ranks.
    """
    # A kernel loaded at its first use may wait for the whole device, and so for a message that waits for that kernel.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    gpus = torch.accelerator.device_count() if accelerator and accelerator.type == "cuda" else 0
    ranks = here.local_world_size
    if requested == "cpu":
        return torch.device("cpu"), "requested"
    if gpus >= ranks:
        return torch.device("cuda", here.local_rank), f"{gpus} GPUs for {ranks} ranks on this machine"
    if requested == "cuda":
        some = f"; or torchrun --nproc_per_node={gpus}" if gpus else ""
        raise ValueError(
            f"--device cuda: {ranks} ranks on this machine need as many GPUs, it has {gpus}; use --device cpu{some}"
        )
    return torch.device("cpu"), f"{gpus} GPUs for {ranks} ranks on this machine"


@dataclass(frozen=True)
class Job:
    """This rank's membership in the running job."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    timeout: float  # seconds any wait may take

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on rank 0; an empty list elsewhere. For reports, not for training."""
        values = [None] * self.world_size if self.rank == 0 else None
        with peer_errors("gathering a report"):
            dist.gather_object(value, values)
        return values or []

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        box = [value]
        with peer_errors("sharing a report"):
            dist.broadcast_object_list(box)
        return box[0]


def meeting_place(here: ProcessInfo, timeout: timedelta) -> dist.Store:
    """The job's store. Where torchrun starts ranks again it keeps the store, with the addresses of those that died."""
    if not here.by_torchrun:
        return dist.HashStore()
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    # On several machines the counts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start a store.
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"start {start}", store)


def speaks_for_machine(here: ProcessInfo) -> bool:
    """Whether this rank is the one of its machine that tells why a run is refused; needs no process group.

    Under torchrun the first to come, by the store that torchrun itself keeps: it ends all others when one has exited,
    also a local rank 0 that is still importing.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return here.local_rank == 0
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=SHORTEST_TIMEOUT)))
        return store.add(f"refused on node {here.node}, start {start}", 1) == 1
    except RuntimeError:
        return here.local_rank == 0


@contextmanager
def launch(device: torch.device, timeout: float) -> Iterator[Job]:
    """Be a rank of the job: process group, watch over the other ranks, and an orderly end.

    Args:
        timeout: seconds that any wait may take.

    A rank that dies, or shows no sign of life for half of `timeout`, ends every other rank within `timeout`, each
    naming it, with exit code 1. `Stop` ends all ranks with its message.
    """
    here = process_info()
    backend = "gloo" if device.type == "cpu" else "nccl"
    backends = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"  # objects and clocks stay on the CPU
    if device.type != "cpu":
        torch.accelerator.set_device_index(here.local_rank)
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            backends, store=meeting_place(here, limit), rank=here.rank, world_size=here.world_size, timeout=limit
        )
        watch = Watch(here.rank, here.world_size, timeout)
        chosen: list[str] = [""] * here.world_size
        dist.all_gather_object(chosen, backend)
    except (RuntimeError, ValueError) as error:
        _leave(f"rank {here.rank}: could not meet the other ranks within {timeout:.0f} s: {str(error).splitlines()[0]}")
    if len(set(chosen)) > 1:
        if here.rank == 0:
            where = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(chosen))
            print(f"--device: the machines chose differently ({where}); use --device cpu", file=sys.stderr, flush=True)
        watch.end()
        dist.barrier()
        sys.exit(2)
    try:
        try:
            yield Job(here.rank, here.world_size, device, backend, timeout)
            code = 0
        except Stop as stop:
            if here.rank == 0:
                print(f"stopped: {stop}", file=sys.stderr, flush=True)
            code = 1
        with peer_errors("the end of the job"):
            dist.barrier()  # nobody leaves, and looks dead, while another still works
            watch.end()
            dist.barrier()  # nor takes the store away while another still listens
    except (PeerError, dist.DistError) as error:
        watch.report_loss(str(error))
    except Unwritable as error:
        _leave(f"stopped: {error}")
    except Exception:
        # Printed here, not at exit: the other ranks notice at once, and torchrun ends this one while they do.
        traceback.print_exc()
        _leave(f"rank {here.rank}: failed with the error above")
    dist.destroy_process_group()
    if code:
        sys.exit(code)


class Watch:
    """A heart: beats for this rank in the job's store, listens to the others, and names the one that stopped.

    It speaks when torchrun ends this rank (SIGTERM, because another died), when a wait on another rank fails, and
    when a rank has been silent for half the timeout although nothing waits for it yet.
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.timeout = rank, timeout
        self._others = [r for r in range(world_size) if r != rank]
        self._heard: dict[int, tuple[bytes, float]] = {}  # the last beat of each, and when it changed
        self._beats = 0
        self._ended = False
        self._thread: threading.Thread | None = None
        if world_size == 1:
            return
        # A connection of its own: the main thread may be blocked on the first one.
        self._store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
        self._store.set(str(rank), "0")
        with peer_errors("the first barrier"):
            dist.barrier()  # every rank has a first beat
        self._listen()
        self._signals, wake = socket.socketpair()
        wake.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # the byte in the socket is what counts: the main thread
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)  # may sit in a wait that runs no handler
        self._wake = wake
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended:
            ready, _, _ = select.select([self._signals], [], [], BEAT)
            try:
                self._listen()
            except RuntimeError:
                if self._ended:
                    return
                if silent := self._silent(QUIET / 2):
                    self._blame(silent, "and then the job's store")
                by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                _leave(f"rank {self.rank}: lost {'torchrun' if by_torchrun else 'rank 0'}, which held the job's store")
            received = self._signals.recv(64) if ready else b""
            if signal.SIGINT in received:
                _leave("interrupted" if self.rank == 0 else "")
            if signal.SIGTERM in received:
                self.report_loss("ended by SIGTERM")
            if silent := self._silent(self.timeout / 2):
                self._blame(silent, f"no sign of life for {self.timeout / 2:.0f} s")

    def report_loss(self, what: str) -> NoReturn:
        """Name the rank that was lost, if one was, and leave. `what` is what this rank noticed."""
        deadline = time.monotonic() + QUIET + BEAT
        while self._others and time.monotonic() < deadline:
            if threading.current_thread() is self._thread:
                with suppress(RuntimeError):
                    self._listen()
            time.sleep(BEAT / 2)
        self._blame(self._silent(QUIET), what)

    def end(self) -> None:
        """Stop listening: the job is over."""
        self._ended = True
        if self._thread:
            self._wake.send(b"\0")
            self._thread.join()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _listen(self) -> None:
        self._beats += 1
        self._store.set(str(self.rank), str(self._beats))
        for other, beat in zip(self._others, self._store.multi_get([str(r) for r in self._others]), strict=True):
            if other not in self._heard or beat != self._heard[other][0]:
                self._heard[other] = (beat, time.monotonic())

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        silent = [r for r in self._others if now - self._heard[r][1] > seconds]
        return sorted(silent, key=lambda r: self._heard[r][1])

    def _blame(self, silent: list[int], what: str) -> NoReturn:
        if not silent:
            _leave(f"rank {self.rank}: {what}; every other rank is alive")
        lost = str(silent[0])
        with suppress(RuntimeError):  # the store may be gone with the rank that held it
            # Ranks that leave because of the first loss fall silent too: the first name given is the right one.
            lost = self._store.compare_set("lost", "", lost).decode()
        print(f"rank {self.rank}: lost rank {lost} ({what})", file=sys.stderr, flush=True)
        if self.rank == 0:
            time.sleep(2 * BEAT)  # it may hold the store, in which the others read the name
        _leave("")


def _leave(message: str) -> NoReturn:
    if message:
        print(message, file=sys.stderr, flush=True)
    os._exit(1)  # no destructors: they would wait for the ranks that are gone
