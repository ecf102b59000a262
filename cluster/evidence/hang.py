"""Lecture 03, hangs: the processes that hang, what they say, and what is claimed of it."""

import os
import re
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from core.proof.figures import Figure, grid
from core.proof.lesson import Run

MEETING = 30.0  # seconds that the ranks have to meet each other: on a busy machine more than a wait
LONGEST = 25.0  # seconds after which ranks that have not ended are killed, beside the time they may wait
TABLE, WRONG = "who waits for what:", "what is wrong: "


@dataclass(frozen=True)
class Fault:
    """What a rank does, and what must be said of it, as patterns of a rank's number."""

    does: tuple[str, str]
    said: str  # of more than two ranks
    of_two: str  # where neither rank has a majority


EITHER = r"(?=.*rank {rank} )"
OTHER_WAY = (
    r"^rank {rank} is in all-gather (\d+) over dp while .* in all-reduce \1 over dp",
    rf"{EITHER}.*all-reduce (\d+) over dp while .* in all-gather \1|{EITHER}.*all-gather (\d+) over dp while .* in "
    r"all-reduce \2",
)
FAULTS = {
    "skip": Fault(
        ("skips the sum of the gradients", "跳过梯度求和"),
        *OTHER_WAY,
    ),
    "order": Fault(
        ("gathers the losses before it sums the gradients", "先收集损失，后求和梯度"),
        *OTHER_WAY,
    ),
    "gather": Fault(
        ("gathers a report that no other rank sends", "收集其他 rank 都不发送的报告"),
        r"wait for each other: rank 0 in gather \d+ over reports, ranks? \S.* in all-reduce \d+ over dp",
        r"wait for each other: .*rank 0 in gather \d+ over reports",
    ),
    "shape": Fault(
        ("forgets the gradient of the last layer", "漏掉最后一层的梯度"),
        r"^rank {rank} is in all-reduce (\d+) over dp with \(128,\) .* in all-reduce \1 over dp with \(192,\)",
        EITHER + r".*\(128,\)",
    ),
    "dead": Fault(
        ("is killed", "被杀死"),
        r"^rank {rank} died; .* in all-reduce \d+ over dp",
        r"^rank {rank} died; .* in all-reduce \d+ over dp",
    ),
    "slow": Fault(
        ("computes for longer than the others wait", "计算时间超过其他 rank 的等待时限"),
        r"^rank {rank} is slow: .* all-reduce \d+ over dp.*forward of micro-batch",
        r"^rank {rank} is slow: .* all-reduce \d+ over dp.*forward of micro-batch",
    ),
    "send": Fault(
        ("sends what nobody receives", "发送无人接收的消息"),
        r"^rank {rank} waits in send 0 to rank \d+, which has not posted its receive: it waits in all-reduce \d+ over",
        r"^rank {rank} waits in send 0 to rank \d+, which has not posted its receive: it waits in all-reduce \d+ over",
    ),
    "data": Fault(
        ("has a step less of data", "数据少一步"),
        r"^rank {rank} has ended while .* in all-reduce \d+ over dp",
        r"^rank {rank} has ended while .* in all-reduce \d+ over dp",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Heard:
    """How the ranks ended."""

    codes: tuple[int, ...]
    killed: int  # that had not ended by themselves
    said: str  # of all ranks
    seconds: float

    @property
    def tables(self) -> int:
        return self.said.count(TABLE)

    @property
    def wrong(self) -> str:
        """The line that says what is wrong."""
        found = re.search(rf"{WRONG}(.*?)(\n\n|$)", self.said, re.DOTALL)
        return " ".join(found[1].split()) if found else ""

    def names(self, fault: str, rank: int, ranks: int) -> bool:
        """Whether rank, operation and reason are right."""
        expected = FAULTS[fault]
        return re.search((expected.said if ranks > 2 else expected.of_two).format(rank=rank), self.wrong) is not None


class Nursery:
    """Starts the ranks that hang: a process of its own, forked while this one has no thread yet and no process group.

    Only local rank 0 of the first machine has one: the ranks that hang are all on its machine.

    Args:
        work: what each of them does; called with the arguments of `run`.
    """

    def __init__(self, work: Callable[..., None]):
        self._work = work
        if os.environ.get("RANK", "0") != "0":
            return
        self._pipe, theirs = Pipe()
        if os.fork() == 0:
            self._pipe.close()
            self._serve(theirs)
        theirs.close()

    def run(self, ranks: int, *args: object) -> Heard:
        """`work(*args)` on so many ranks, until all have ended; as torchrun does, all are ended when one has failed."""
        self._pipe.send((ranks, args))
        return self._pipe.recv()

    def _serve(self, pipe: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            while True:
                ranks, args = pipe.recv()
                with tempfile.TemporaryDirectory() as folder:
                    pipe.send(self._all(ranks, args, Path(folder), pipe))
        except (EOFError, OSError):  # the lesson is over
            os._exit(0)

    def _all(self, ranks: int, args: tuple, folder: Path, pipe: Connection) -> Heard:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        began = time.monotonic()
        running = {self._fork(rank, ranks, port, args, folder): rank for rank in range(ranks)}
        codes, killed = [0] * ranks, 0
        deadline = began + LONGEST + MEETING
        while running:
            for process, rank in [*running.items()]:
                ended, status = os.waitpid(process, os.WNOHANG)
                if not ended:
                    continue
                del running[process]
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank]:  # torchrun does so, too
                    _signal(running, signal.SIGTERM)
            gone = bool(select.select([pipe], [], [], 0.02)[0])  # nothing is sent meanwhile: it is the end
            if time.monotonic() > deadline or gone:
                killed, deadline = len(running), deadline + LONGEST
                _signal(running, signal.SIGKILL)
        said = "".join((folder / str(rank)).read_text(errors="replace") for rank in range(ranks))
        return Heard((*codes,), killed, said, time.monotonic() - began)

    def _fork(self, rank: int, ranks: int, port: int, args: tuple, folder: Path) -> int:
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            written = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(written, 1)
            os.dup2(written, 2)
            job = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "COLUMNS": 200}  # fmt: skip
            for name in [name for name in os.environ if name.startswith("TORCHELASTIC")]:
                del os.environ[name]  # those of the lesson's own job, and its store
            os.environ.update({name: str(value) for name, value in job.items()})
            self._work(*args)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)


def _signal(processes: Mapping[int, int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


# ---- What is shown and claimed ---------------------------------------------------------------------------------------


def named_fault(fault: str) -> str:
    return "no fault" if fault == "none" else f"--fault {fault}"


def show(run: Run, fault: str, rank: int, heard: Heard) -> None:
    if fault == "none":
        run.say(f"{named_fault(fault)}: {'nothing is said' if not heard.said else heard.said}\n")
        return
    run.say(f"{named_fault(fault)}: rank {rank} {FAULTS[fault].does[0]} ({heard.seconds:.1f} s)\n")
    lines = heard.said[heard.said.find(TABLE) + len(TABLE) :].split(WRONG)[0] if heard.tables else heard.said
    run.say(f"{lines.strip()}\n\n{WRONG}{heard.wrong or 'nothing was said'}\n")


def claim(run: Run, ranks: int, rank: int, found: Mapping[str, Heard]) -> None:
    healthy = found["none"]
    faults = {fault: heard for fault, heard in found.items() if fault != "none"}
    guilty = {fault: 0 if fault == "gather" else rank for fault in faults}
    run.evidence.each(
        "the line names rank, operation and reason",
        "what was done",
        [
            (f"{named_fault(fault)}: named", 1, heard.names(fault, guilty[fault], ranks))
            for fault, heard in faults.items()
        ],
    )
    run.evidence.each(
        "tables that are printed, by all ranks together",
        "1",
        [(f"{named_fault(fault)}: tables", 1, heard.tables) for fault, heard in faults.items()],
    )
    run.evidence.each(
        "ranks that had to be ended from outside",
        "0: the timeout of each ends it",
        [(f"{named_fault(fault)}: ended from outside", 0, heard.killed) for fault, heard in found.items()],
    )
    run.evidence.each(
        "ranks that end as if all were well",
        "0",
        [(f"{named_fault(fault)}: exit code 0", 0, heard.codes.count(0)) for fault, heard in faults.items()],
    )
    run.evidence.claim("without a fault: ranks that end well", f"all {ranks}", ranks, healthy.codes.count(0))
    run.evidence.claim("without a fault: characters that are printed", "0", 0, len(healthy.said))


def figure(ranks: int, found: Mapping[str, Heard]) -> Figure:
    """Of each fault what each rank was in, the guilty one marked."""
    rows = []
    for fault, heard in found.items():
        if fault == "none":
            continue
        cells = []
        for rank in range(ranks):
            line = re.search(rf"^{rank}  +(\S.*?)  +(\S.*?)(  |$)", heard.said, re.MULTILINE)
            text = f"{line[1]} {line[2]}" if line else "–"
            named = re.search(rf"rank {rank}\b", heard.wrong.partition(" while ")[0]) is not None
            cells.append((text, "5" if named else None))
        rows.append((FAULTS[fault].does, cells))
    return grid(
        ("Who waits for what, when the timeout is over", "超时时谁在等待什么"),
        ("the rank", "该 rank"),
        [f"rank {rank}" for rank in range(ranks)],
        rows,
        {"5": ("named in the diagnosis", "诊断中点名的 rank")},
    )
