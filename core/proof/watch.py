"""The heart of a rank: it beats for this rank in the job's store, listens to the others, and tells what has gone wrong.

Its flight record travels with each beat (`core.proof.flight`). When a rank is lost, or a wait has failed, one rank
prints what every rank was in, and what is wrong (`core.proof.diagnosis`): rank 0, or the first that is alive. The
others stay until it has, because torchrun ends all of them as soon as one has exited.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from core.proof.diagnosis import Record, diagnose, table
from core.proof.flight import FLIGHT, host
from core.proof.language import ENGLISH, Catalogue
from core.proof.peers import peer_errors
from core.proof.terminal import columns, fit

BEAT = 0.5  # seconds between two signs of life of a rank
QUIET = 6  # beats without one after which a rank is lost, once something went wrong
WATCHDOG = 4.0  # seconds before NCCL's own watchdog would end a rank in which who waits for what is told
LISTENERS = 2  # ranks that always know all records: should the store be lost with rank 0, rank 1 still has them


class Watch:
    """A heart: beats for this rank in the job's store, listens to the others, and names the one that stopped.

    It speaks when torchrun ends this rank (SIGTERM, because another died), when a wait on another rank fails, and
    when a rank has been silent for half the timeout although nothing waits for it yet.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, on_gpu: bool = False, known: Catalogue = ENGLISH):
        self._known = known
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.beat = min(BEAT, timeout / 10)
        self.quiet = QUIET * self.beat
        self._others = [r for r in range(world_size) if r != rank]
        self._heard: dict[int, tuple[bytes, float]] = {}  # the last beat of each, and when it changed
        self._records: list[bytes] = []  # as they were sent: read when something is wrong
        self._processes: list[tuple[str, int]] = []  # host and number of each rank's
        self._beats = 0
        self._answered = time.monotonic()  # when the store last did
        self._trouble = False  # whether another rank reports that something is wrong: then all of the record is sent
        self._ended = False
        self._overdue = timeout - WATCHDOG if timeout > 2 * WATCHDOG else timeout / 2
        self._on_gpu = on_gpu
        self._reporting = threading.Lock()
        self._thread: threading.Thread | None = None
        if world_size == 1:
            return
        # A connection of its own: the main thread may be blocked on the first one.
        self._store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
        self._store.set(f"record {rank}", self._record())
        self._store.set(str(rank), "0")
        self._store.compare_set("trouble", "", "no")
        with peer_errors("the first barrier"):
            dist.barrier()  # every rank has a first beat
        self._listen()
        self._signals, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # the byte in the socket is what counts: the main thread
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)  # may be in a wait that runs no handler
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, daemon=True).start()

    def _guard(self) -> None:
        """Where the holder of the store is stopped, the store never answers, and the heart itself stands still."""
        while not self._ended:
            time.sleep(self.beat)
            if self._ended or time.monotonic() - self._answered < 0.75 * self.timeout:
                continue
            FLIGHT.freeze()
            if not by_torchrun() and self.rank == 1:
                self._show(self._known_records(), {0: self._life(0) or "shows no sign of life"})
            self._leave_store(f", and has not answered for {0.75 * self.timeout:.0f} s")

    def _watch(self) -> None:
        while not self._ended:
            ready, _, _ = select.select([self._signals], [], [], self.beat)
            try:
                trouble = self._listen()
            except RuntimeError:
                if self._ended:
                    return
                return self._store_lost()
            received = self._signals.recv(64) if ready else b""
            if signal.SIGINT in received:
                leave("interrupted" if self.rank == 0 else "")
            if signal.SIGTERM in received:
                self._settle()
                self.report_loss("ended by SIGTERM")
            if trouble != "no" and self.rank == 0 and not self._reporting.locked():
                self.report_loss(trouble)
            if silent := self._silent(self.timeout / 2):
                self._report([*silent], f"no sign of life for {self.timeout / 2:.0f} s")
            if self._on_gpu and (late := FLIGHT.overdue(self._overdue)):
                self.report_loss(f"{late} has taken {self._overdue:.0f} s")

    def _settle(self) -> None:
        """Another rank died just now: the record is of where this one comes to wait for it, within four beats."""
        until = time.monotonic() + 4 * self.beat
        while not FLIGHT.overdue(0) and time.monotonic() < until:
            time.sleep(self.beat / 10)
        FLIGHT.freeze()

    def failed(self, why: str) -> None:
        """This rank ends with an error of its own: its record says so to the others."""
        FLIGHT.freeze(f"failed: {why}")
        if self._thread:
            with suppress(RuntimeError):
                self._store.set(f"record {self.rank}", self._record())

    def report_loss(self, what: str) -> None:
        """Name the rank that was lost, if one was, and end this process. `what` is what this rank noticed."""
        self._report([], what)

    def _record(self) -> str:
        return json.dumps(FLIGHT.snapshot(self._trouble))

    def _report(self, silent: list[int], what: str) -> None:
        on_heart = threading.current_thread() is self._thread
        if not self._reporting.acquire(blocking=not on_heart):
            return  # the main thread reports; the heart goes on beating
        FLIGHT.freeze()
        first: dict[int, Record] = {}
        if self._others:
            with suppress(RuntimeError):
                self._store.set(f"record {self.rank}", self._record())
                self._store.compare_set("trouble", "no", f"rank {self.rank} reports: {what}")
                if (told := self._told()) is not None:  # who has told it may have left
                    self._blame(told, f"{what}; {self._store.get('trouble').decode()}")
            first = self._read_records()  # before a slow rank has come after all
        began = time.monotonic()
        while self._others and not silent and time.monotonic() < began + self.quiet + self.beat:
            if on_heart:
                with suppress(RuntimeError):
                    self._listen()
            time.sleep(self.beat / 2)
            if time.monotonic() > began + 2 * self.beat and self._all_known():
                break
        if not self._ended:  # then no rank beats any more
            silent = silent or [r for r in self._silent(self.quiet) if self._life(r) != "runs"]
        silent += [r for r in self._others if self._life(r) not in ("runs", "") and r not in silent]
        self._blame(self._tell(first, silent) if self._others else silent, what)

    def _all_known(self) -> bool:
        """Whether the state of every other process can be looked up, so that silence need not be waited for."""
        return all(self._life(rank) for rank in self._others)

    def _life(self, rank: int) -> str:
        if not self._processes:
            self._processes = [json.loads(each)["process"] for each in self._records]
        return life(*self._processes[rank])

    def _tell(self, first: Mapping[int, Record], silent: list[int]) -> list[int]:
        """One rank prints who waits for what. Returns, when it has, the ranks that it thinks are lost."""
        lost = {rank: self._life(rank) for rank in silent}
        lost = {rank: why if why not in ("", "runs") else "shows no sign of life" for rank, why in lost.items()}
        alive = [r for r in range(self.world_size) if r not in lost]
        deadline = time.monotonic() + (0.0 if self.rank == alive[0] else 2 * self.quiet)
        try:
            while (told := self._told()) is None and time.monotonic() < deadline:
                time.sleep(self.beat / 2)
            if told is not None:
                return told
            if self._store.compare_set("told", "", str(self.rank)).decode() != str(self.rank):
                return silent
        except RuntimeError:  # the store is gone, with the rank that held it, which has told all, or with its machine
            if self._trouble or self.rank != alive[0] or self.rank >= LISTENERS:
                return silent  # of the others none knows the records, nor whether a listener has told them, and left
        records = self._read_records()
        if diagnose(records, lost).kind == "unclear" and diagnose(first, lost).kind != "unclear":
            records = first
        self._show(records, lost)
        with suppress(RuntimeError):
            self._store.set("told", json.dumps(silent))
        return silent

    def _show(self, records: Mapping[int, Record], lost: Mapping[int, str]) -> None:
        """Print who waits for what, and what is wrong."""
        finding = diagnose(records, lost)
        shown = table(records, lost, self.world_size, columns(), self._known)
        what, wrong = map(self._known.gettext, ("who waits for what:", f"what is wrong: {finding.text}"))
        print(fit(f"\n{what}\n\n{shown}\n\n{wrong}\n"), file=sys.stderr, flush=True)

    def _told(self) -> list[int] | None:
        """The ranks that are lost, once one rank has said so; while it speaks its number is there."""
        told = self._store.compare_set("told", "", "").decode()
        return json.loads(told) if told.startswith("[") else None

    def messages(self) -> dist.Store:
        """A connection of its own to the job's store, in which ranks compare what they are about to exchange."""
        return dist.PrefixStore("messages", dist.distributed_c10d._get_default_store().clone())

    def end(self) -> None:
        """Stop listening: the job is over."""
        self._ended = True
        if self._thread:
            self._wake.send(b"\0")
            self._thread.join()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _listen(self) -> str:
        """Beat, and hear the others; the trouble that one of them reports, or "no"."""
        self._beats += 1
        self._store.multi_set([f"record {self.rank}", str(self.rank)], [self._record(), str(self._beats)])
        *beats, trouble = self._store.multi_get([*map(str, self._others), "trouble"])
        for other, beat in zip(self._others, beats, strict=True):
            if other not in self._heard or beat != self._heard[other][0]:
                self._heard[other] = (beat, time.monotonic())
        if self.rank < LISTENERS or not self._records:
            self._records = self._store.multi_get([f"record {rank}" for rank in range(self.world_size)])
        self._answered = time.monotonic()
        self._trouble = trouble != b"no" and not trouble.startswith(f"rank {self.rank} ".encode())
        return trouble.decode()

    def _read_records(self) -> dict[int, Record]:
        """The newest of all ranks; those heard before where the store is gone."""
        with suppress(RuntimeError):
            self._records = self._store.multi_get([f"record {rank}" for rank in range(self.world_size)])
        return self._known_records()

    def _known_records(self) -> dict[int, Record]:
        read = {rank: Record.read(json.loads(each)) for rank, each in enumerate(self._records)}
        return read | {self.rank: Record.read(FLIGHT.snapshot(full=True))}

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        silent = [r for r in self._others if now - self._heard[r][1] > seconds]
        return sorted(silent, key=lambda r: self._heard[r][1])

    def _store_lost(self) -> None:
        """The store is gone: with torchrun, which holds it, or else with rank 0."""
        if not self._reporting.acquire(blocking=False):
            return  # the main thread has noticed, and reports
        if self._trouble:
            leave(f"rank {self.rank}: another rank has told what is wrong, and left")
        silent = self._silent(self.quiet / 2) if by_torchrun() else [0]
        if silent and self.rank == min(r for r in range(self.world_size) if r not in silent):
            self._settle()
            self._tell(self._read_records(), silent)
        if silent and by_torchrun():
            self._blame(silent, "and then the job's store")
        self._leave_store("")

    def _leave_store(self, more: str) -> NoReturn:
        holder = "torchrun" if by_torchrun() else "rank 0"
        leave(self._known.gettext(f"rank {self.rank}: lost {holder}, which held the job's store{more}"))

    def _blame(self, silent: list[int], what: str) -> NoReturn:
        if not silent:
            text = f"rank {self.rank}: {what}" + ("" if " reports: " in what else "; every other rank is alive")
            print(self._known.gettext(text), file=sys.stderr, flush=True)
            self._wait_for_others()
        lost = str(silent[0])
        with suppress(RuntimeError):  # the store may be gone with the rank that held it
            # Ranks that leave because of the first loss fall silent too: the first name given is the right one.
            lost = self._store.compare_set("lost", "", lost).decode()
        print(self._known.gettext(f"rank {self.rank}: lost rank {lost} ({what})"), file=sys.stderr, flush=True)
        self._wait_for_others()

    def _wait_for_others(self) -> NoReturn:
        if self.rank == 0:
            time.sleep(2 * self.beat)  # it may hold the store, in which the others read what is wrong
        leave("")


def by_torchrun() -> bool:
    """Whether torchrun holds the job's store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def life(where: str, number: int) -> str:
    """Of the process with this number on this host: runs, died, or is stopped; empty on another machine."""
    if where != host() or not Path("/proc/self/stat").exists():
        return ""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "died"
    return {"Z": "died", "X": "died", "T": "is stopped", "t": "is stopped"}.get(state, "runs")


def came(store: dist.Store, rank: int) -> None:
    """Say in the store that this rank is there, before it meets the others."""
    store.set(f"came {rank}", json.dumps([host(), os.getpid()]))


def missed(store: dist.Store, own: int, world_size: int) -> str:
    """Which ranks never came, or came and are no more, in words; empty where all are there."""
    found = []
    with suppress(RuntimeError):  # the store is gone with the rank that held it
        store.set(f"gave up {own}", "")  # it leaves, and is not the one that others miss
        for rank in range(world_size):
            if not store.check([f"came {rank}"]):
                found.append(f"rank {rank} did not come")
                continue
            state = life(*json.loads(store.get(f"came {rank}")))
            if state not in ("", "runs") and not store.check([f"gave up {rank}"]):
                found.append(f"rank {rank} {state}")
    return ", ".join(found)


def leave(message: str) -> NoReturn:
    """End this process now, with exit code 1."""
    if message:
        print(message, file=sys.stderr, flush=True)
    os._exit(1)  # no destructors: they would wait for the ranks that are gone
