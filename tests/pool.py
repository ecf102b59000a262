"""Gloo workers for the tests, forked from one process that has imported torch once.

`Pool.run` calls a function on n ranks that stay alive between the tests; `Pool.script` runs a lesson as torchrun
would, in fresh processes. Both end within a timeout and show what the failing rank said.
"""

import contextlib
import gc
import io
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.engine import neighbours
from core.proof.flight import FLIGHT
from core.proof.matching import Checker

ROOT = Path(__file__).parent.parent
FOLDERS = ("core", "zero", "megatron_tp", "sequence_parallel", "pipeline", "expert_parallel", "cluster")
LARGEST = 8


@dataclass
class Outcome:
    """How a lesson ended on each rank."""

    codes: list[int]
    out: str  # of all ranks
    err: str
    seconds: float


@dataclass
class Running:
    """A lesson under way: several can be at once, where they mostly wait."""

    processes: list[Any]
    folder: Path
    began: float
    timeout: float

    def said(self, stream: str) -> str:
        """What all ranks have written so far to `out` or `err`."""
        written = (self.folder / f"{rank}.{stream}" for rank in range(len(self.processes)))
        return "".join(path.read_text() for path in written if path.exists())  # a rank may not have begun

    def join(self, rank: int) -> None:
        """Wait until the rank has ended, or the time is up."""
        self.processes[rank].join(max(0.0, self.began + self.timeout - time.monotonic()))

    def end(self) -> Outcome:
        """Wait until all ranks have ended; raises AssertionError, after killing them, when the time is up."""
        for rank in range(len(self.processes)):
            self.join(rank)
        seconds = time.monotonic() - self.began
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hung:
            self.processes[rank].kill()
            self.processes[rank].join()
        outcome = Outcome([p.exitcode for p in self.processes], self.said("out"), self.said("err"), seconds)
        assert not hung, f"ranks {hung} did not end within {self.timeout} s\n{outcome.out}\n{outcome.err}"
        return outcome


class WorkerError(AssertionError):
    """A rank failed; the message holds its traceback."""


class Pool:
    """The workers of a test session.

    Args:
        preload: modules that the workers are forked with, besides ours; the first pool of a process decides.
        check_messages: as `--check-messages` of a lesson: ranks compare what they are about to exchange.
    """

    def __init__(self, preload: Sequence[str] = (), check_messages: bool = False) -> None:
        self._check = check_messages
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # not that an address has no name, see _ask_nobody
        self._context = multiprocessing.get_context("forkserver")
        # torch.optim imports torch._dynamo when the first optimizer is made, which takes a second.
        files = (path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
        ours = [".".join(path.with_suffix("").parts) for path in files if path.stem.isidentifier()]
        usual = ["torch", "torch._dynamo", "einops", "tabulate", "tests.pool", *ours]
        self._context.set_forkserver_preload([*usual, *preload])
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[tuple[Any, Connection]] = []
        self._jobs: list[Running] = []
        self._store: dist.TCPStore | None = None  # where the workers meet; a file would be polled
        self._calls = 0

    def run(self, ranks: int, function: Callable, *args: Any, timeout: float = 60.0) -> list[Any]:
        """function(*args) on each of `ranks` ranks of a fresh process group; the results in rank order.

        Raises:
            WorkerError: a rank raised, or none peer_errors for `timeout` seconds.
        """
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self._workers) < LARGEST:
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._store.port, self._check), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, mine))
        self._calls += 1
        for rank in range(ranks):
            self._workers[rank][1].send((function, args, rank, ranks, str(self._calls), timeout))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        waiting = {self._workers[rank][1]: rank for rank in range(ranks)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._discard()
                raise WorkerError(f"ranks {sorted(waiting.values())} gave no answer within {timeout} s")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    good, results[rank] = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
                except EOFError:
                    good, results[rank] = False, "the process died"
                if not good:
                    self._discard()  # the other ranks may be waiting for it
                    raise WorkerError(f"rank {rank} of {ranks}:\n{results[rank]}")
        return [results[rank] for rank in range(ranks)]

    def script(self, ranks: int, script: str, *flags: str, **options: Any) -> Outcome:
        """Run a lesson on `ranks` ranks to its end; the options are those of `start`."""
        return self.start(ranks, script, *flags, **options).end()

    def start(
        self,
        ranks: int,
        script: str,
        *flags: str,
        timeout: float = 90.0,
        torchrun: bool = True,
        started: int | None = None,
        before: Callable[[int], None] | None = None,
    ) -> "Running":
        """Start a lesson on `ranks` ranks, with torchrun's environment or as plain python.

        Args:
            started: start only the first so many ranks: enough for what happens before any process group exists.
            before: what each rank calls with its number before the script begins.
        """
        began = time.monotonic()
        port = _free_port()
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        processes = []
        for rank in range(ranks if started is None else started):
            job = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
            environment = {name: str(value) for name, value in job.items()} if torchrun else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            begin = partial(before, rank) if before else None
            arguments = (script, flags, environment, str(folder / str(rank)), self._check, begin)
            processes.append(self._context.Process(target=_play, args=arguments, daemon=True))
            processes[-1].start()
        self._jobs.append(Running(processes, folder, began, timeout))
        return self._jobs[-1]

    def _discard(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()

    def close(self) -> None:
        self._discard()
        for process in (process for job in self._jobs for process in job.processes):
            process.kill()  # left by a test that failed
        self._folder.cleanup()


def _ask_nobody() -> None:
    """torch's store asks for the name of every address that connects: seconds where a name server does not answer."""
    os.environ["RES_OPTIONS"] = "attempts:0"


def _collect_less() -> None:
    """What is imported is not looked through for garbage each time, and what is small not often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _work(connection: Connection, port: int, check_messages: bool) -> None:
    """The life of one worker."""
    _ask_nobody()
    torch.set_num_threads(1)
    _collect_less()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            function, args, rank, ranks, call, timeout = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(call, store),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout / 2),
            )
            FLIGHT.reset()
            if check_messages:
                FLIGHT.checker = Checker(dist.PrefixStore(f"messages of {call}", store), rank)
            result = function(*args)
            dist.barrier()
            answer = (True, result)
        except BaseException:
            answer = (False, traceback.format_exc())
        # As bytes: through a pipe, multiprocessing would put each tensor in shared memory of its own, a slow way.
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        connection.send_bytes(buffer.getbuffer())
        if not answer[0]:
            time.sleep(timeout)  # killed with the other ranks; leaving first would make them fail too, and hide this
        function = args = result = answer = None
        _leave_group()


def _leave_group() -> None:
    """Gloo takes 10 ms a peer to close its connections, one after another: a thread waits for that.

    A group that something still holds goes on looking for messages a hundred times a second.
    """
    groups = list(dist.distributed_c10d._world.pg_map)
    neighbours.leave()
    dist.destroy_process_group()
    gc.collect()
    threading.Thread(target=groups.clear, daemon=True).start()


def _play(
    script: str,
    flags: Sequence[str],
    environment: dict[str, str],
    log: str,
    check_messages: bool,
    before: Callable[[], None] | None,
) -> None:
    """Be one rank of a lesson: its output in files, its exit code this process's."""
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _ask_nobody()
    torch.set_num_threads(1)
    _collect_less()
    FLIGHT.checked = check_messages
    path = ROOT / script
    sys.argv = [str(path), *flags]
    sys.path[0] = str(path.parent)
    if before:
        before()
    runpy.run_path(str(path), run_name="__main__")


def _free_port() -> int:
    """A port below those that the system hands out by itself: between this probe and the script's start one of these
    would now and then be given to a connection of another test."""
    for port in random.Random().sample(range(20000, 32768), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20000 to 32767")
