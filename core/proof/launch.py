"""Join and leave the job: ranks, device, backend, and one clear error instead of a hang.

`torchrun` starts one process a rank and sets RANK, WORLD_SIZE, LOCAL_RANK, ..., and how often it has started them;
nothing else is read.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from core.engine import neighbours
from core.proof.files import Unwritable
from core.proof.flight import FLIGHT, Group
from core.proof.language import ENGLISH, Catalogue
from core.proof.matching import Checker, MismatchError
from core.proof.peers import PeerError, peer_errors
from core.proof.places import follow_backward
from core.proof.rulebook import SHARED_GPU
from core.proof.rules import check
from core.proof.watch import Watch, by_torchrun, came, leave, missed

SHORTEST_TIMEOUT = 5.0
LINGER = 3.0  # seconds by which ranks may give up later than rank 0 does


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


def choose_device(requested: str, here: ProcessInfo, share: bool = False) -> tuple[torch.device, str]:
    """The device of this rank for `--device auto|cpu|cuda`, and why, in words.

    Args:
        share: several ranks may be on one GPU (`--share-gpu`).

    Raises:
        ValueError: cuda was asked for and this machine has fewer GPUs than ranks; or none to share, or enough.
    """
    # A kernel loaded at its first use may wait for the whole device, and so for a message that waits for that kernel.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    gpus = torch.accelerator.device_count() if accelerator and accelerator.type == "cuda" else 0
    ranks = here.local_world_size
    if share:
        sharing = SimpleNamespace(device=requested, gpus=gpus, local_ranks=ranks)
        check(sharing, SHARED_GPU)
        why = f"{gpus} GPU{'s' * (gpus > 1)} for {ranks} ranks on this machine, shared; messages through host memory"
        return torch.device("cuda", here.local_rank % gpus), why
    if requested == "cpu":
        return torch.device("cpu"), "requested"
    if gpus >= ranks:
        return torch.device("cuda", here.local_rank), f"{gpus} GPUs for {ranks} ranks on this machine"
    if requested == "cuda":
        some = f", --device cuda --share-gpu, or torchrun --nproc_per_node={gpus}" if gpus else ""
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
        with collective("gather", "gathering a report"):
            dist.gather_object(value, values)
        return values or []

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        box = [value]
        with collective("broadcast", "sharing a report"):
            dist.broadcast_object_list(box)
        return box[0]


@contextmanager
def collective(operation: str, what: str, group: dist.ProcessGroup | None = None, name: str = "the job",
               background: bool = False) -> Iterator[None]:  # fmt: skip
    """One of all ranks that has no tensor, in the flight record; `what` is the wait in words.

    Raises:
        PeerError: it failed.
    """
    call = FLIGHT.start(operation, Group.of_all(name, group or dist.group.WORLD))
    phase = FLIGHT.wait(call, background)
    with peer_errors(what):
        yield
    FLIGHT.done(call, phase, torch.device("cpu"))


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
    if not by_torchrun():
        return here.local_rank == 0
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=SHORTEST_TIMEOUT)))
        return store.add(f"refused on node {here.node}, start {start}", 1) == 1
    except RuntimeError:
        return here.local_rank == 0


@contextmanager
def launch(
    device: torch.device,
    timeout: float,
    check_messages: bool = False,
    known: Catalogue = ENGLISH,
    meeting: float | None = None,
    share: bool = False,
) -> Iterator[Job]:
    """Be a rank of the job: process group, watch over the other ranks, and an orderly end.

    Args:
        timeout: seconds that any wait may take.
        check_messages: compare what ranks are about to exchange before they do, see `core.proof.matching.Checker`.
        known: the reader's language, for `Stop` and for what is said of a hang.
        meeting: seconds that the ranks have to meet; as `timeout` where it is None.
        share: other ranks may be on this GPU; messages go through the host, see `core.proof.host`.

    A rank that dies, or shows no sign of life for half of `timeout`, ends every other rank within `timeout`, each
    naming it, with exit code 1. `Stop` ends all ranks with its message.
    """
    here = process_info()
    backend = "gloo" if device.type == "cpu" or share else "nccl"
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"  # objects and clocks stay on the CPU
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    limit, place = timedelta(seconds=timeout if meeting is None else meeting), None
    apart = f"rank {here.rank}: could not meet the other ranks within {limit.total_seconds():.0f} s: "
    holder = "" if here.rank == 0 or by_torchrun() else "rank 0, which holds "
    silent = f"{apart}{holder}the job's store{',' if holder else ''} did not answer"
    patience = threading.Timer(2 * limit.total_seconds(), leave, [silent])
    patience.daemon = True
    patience.start()
    try:
        place = meeting_place(here, limit)
        came(place, here.rank)
        dist.init_process_group(backends, store=place, rank=here.rank, world_size=here.world_size, timeout=limit)
        FLIGHT.reset()
        follow_backward()
        watch = Watch(here.rank, here.world_size, timeout, device.type != "cpu", known)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), dist.group.WORLD)
        chosen: list[str] = [""] * here.world_size
        dist.all_gather_object(chosen, backend)
    except (RuntimeError, ValueError) as error:
        why = missed(place, here.rank, here.world_size) if place else ""
        if not place and here.rank and not by_torchrun():
            apart += "rank 0, which holds the job's store, did not answer: "
        print(apart + (why or str(error).splitlines()[0]), file=sys.stderr, flush=True)
        if here.rank == 0 and not by_torchrun():
            time.sleep(LINGER)  # it holds the store, in which the others look up who is missing
        leave("")
    patience.cancel()
    if len(set(chosen)) > 1:
        if here.rank == 0:
            where = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(chosen))
            print(f"--device: the machines chose differently ({where}); use --device cpu", file=sys.stderr, flush=True)
        watch.end()
        dist.barrier()
        sys.exit(2)
    if (check_messages or FLIGHT.checked) and here.world_size > 1:
        FLIGHT.checker = Checker(watch.messages(), here.rank)
    try:
        try:
            yield Job(here.rank, here.world_size, device, backend, timeout)
            code = 0
        except Stop as stop:
            if here.rank == 0:
                print(known.gettext(f"stopped: {stop}"), file=sys.stderr, flush=True)
            code = 1
        FLIGHT.state = "ended"
        with collective("barrier", "the end of the job"):
            dist.barrier()  # nobody leaves, and looks dead, while another still works
            watch.end()
            neighbours.leave()
            dist.barrier()  # nor takes the store away while another still listens
    except (PeerError, MismatchError, dist.DistError) as error:
        watch.report_loss(str(error))
    except Unwritable as error:
        watch.failed(str(error))
        leave(f"stopped: {error}")
    except Exception as error:
        watch.failed(f"{type(error).__name__}: {error}")
        # Printed here, not at exit: the other ranks notice at once, and torchrun ends this one while they do.
        traceback.print_exc()
        leave(f"rank {here.rank}: failed with the error above")
    dist.destroy_process_group()
    if code:
        sys.exit(code)
