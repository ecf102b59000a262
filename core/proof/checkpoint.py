"""Save a training while it goes on, and go on in any other layout: one checkpoint for every topic.

A checkpoint is a folder `step-00000100` with what one process would hold, sharded as the ranks that saved it had it:

    __0_0.distcp, __1_0.distcp, ...   of each rank, chunks of full tensors: weights in the precision of the update, and
                                      the optimizer's state, under the names of the one-process model (`chunks.py`)
    .metadata                         torch.distributed.checkpoint's index of them
    checkpoint.json                   what model it is, size and SHA-256 of each file, and what the caller adds

It is written under another name, the JSON last, and renamed when all ranks have written all to disk: under its own name
it is complete, whenever a rank is killed. All ranks must reach the folder, on several machines a shared one.

torch's `async_save` would copy and write in the background too, but has no step after the data are on disk, in which
the files' fingerprints are taken and the folder gets its name.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from core.proof.chunks import INDEX, Chunks, Index, dcp, load, read_index, save
from core.proof.files import remove, sync
from core.proof.launch import Job, collective
from core.shards import LocalTensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

CONTENT = "checkpoint.json"
HIDDEN = r"\.step-\d{8,}\.(part|replaced|removed)"  # what an interrupted save leaves
LONGEST = timedelta(minutes=30)  # that a rank waits for others that write more; the loss of one ends the wait at once
NamedOptimizer = tuple[torch.optim.Optimizer, Mapping[nn.Parameter, str]]  # and the full names of its parameters


class Resumable(Protocol):
    """What can be saved, and loaded into."""

    def master_weights(self) -> list[LocalTensor]:
        """In the precision of the update, what is not trained too: this rank's memory, not copies."""

    def states(self) -> list[LocalTensor]:
        """The optimizer's state, named (parameter, key): this rank's memory."""

    def named_optimizers(self) -> Iterable[NamedOptimizer]:
        """The optimizers that have this state."""

    def publish(self) -> None:
        """Make the model's weights, on all ranks, those of the optimizers."""


class Checkpoints:
    """The checkpoints of one training. All ranks make it, and call its methods, at the same time.

    What goes wrong on any rank is one ValueError, the same on all of them.

    Args:
        folder: of all its checkpoints.
        keep: how many of them.
        model: what must be the same where a training goes on, as JSON has it.
        elsewhere: names that another rank saves, sharded in other places: a tied weight has copies on two pipeline
            stages, and each stage its own ZeRO.
    """

    def __init__(
        self,
        folder: str | Path,
        trained: Resumable,
        job: Job,
        keep: int = 2,
        model: Mapping[str, Any] | None = None,
        elsewhere: Collection[str] = (),
    ):
        if keep < 1:
            raise ValueError(f"--keep {keep}: the last checkpoint must stay; use --keep 1")
        self.folder, self.trained, self.keep, self.rank = Path(folder), trained, keep, job.rank
        self.model, self.elsewhere = dict(model or {}), elsewhere
        self._group = dist.new_group(backend="gloo", timeout=LONGEST)  # its own: training sends at the same time
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        dcp()  # here, because the thread would import it while this one may import what needs it too

    # ---- Save

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Copy what is to be saved, and write it while training goes on. Waits for an earlier save.

        Afterwards, of the checkpoints up to this one, the last `keep` are there.

        Args:
            step: a checkpoint of the same one is replaced.
            extra: what else is needed to go on, as JSON has it; rank 0's is kept.
        """
        self.wait()
        chunks = {name: each.copied() for name, each in chunks_of(self.trained, self.elsewhere).items()}
        content = json.dumps({"step": step, "model": self.model, "extra": extra})
        self._writing = self._thread.submit(self._write, self.folder / f"step-{step:08d}", chunks, content)

    def wait(self) -> None:
        """Until what was saved is on disk."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, target: Path, chunks: dict[str, Chunks], content: str) -> None:
        part = _hidden(target, "part")
        self._first(lambda: shutil.rmtree(part, ignore_errors=True))
        try:
            save(part, chunks, self._group)
            mine = [f"__{self.rank}_0.distcp", *([INDEX] if self.rank == 0 else [])]
            by_rank = agreed(lambda: {name: fingerprint(part / name) for name in mine}, self._group)
            files = {name: each for files in by_rank for name, each in files.items()}
            self._first(lambda: self._finish(part, target, json.loads(content) | {"files": files}))
        except ValueError as error:  # the disk may be full, and torch does not always say so
            free = self._first(lambda: shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0)
            self._first(lambda: shutil.rmtree(part, ignore_errors=True))
            advice = f"{free / 1e6:,.1f} MB are free there, use another --save if it needs more"
            raise ValueError(f"{target}: {error}; {advice}") from None

    def _finish(self, part: Path, target: Path, content: dict[str, Any]) -> None:
        """On rank 0, when all ranks have written."""
        write_content(part, content)
        replaced = _hidden(target, "replaced")
        if target.exists():
            target.rename(replaced)
        part.rename(target)
        sync(self.folder)
        remove(replaced)
        until_now = [path for path in self._complete() if _step(path) <= _step(target)]
        for old in until_now[: -self.keep]:
            remove(old.rename(_hidden(old, "removed")))

    # ---- Load

    def latest(self) -> Path | None:
        """The newest checkpoint. Removes what interrupted saves have left."""
        self.wait()

        def find() -> Path | None:
            for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
                if not re.fullmatch(HIDDEN, path.name):
                    continue
                target = self.folder / path.stem[1:]
                if path.suffix == ".replaced" and not target.exists():  # killed between two renames
                    path.rename(target)
                else:
                    remove(path)
            return next(reversed(self._complete()), None)

        return self._first(find)

    def passed_over(self) -> list[str]:
        """What has a checkpoint's name and is none: it lacks the file that is written last."""
        return self._first(lambda: [path.name for path in self._named() if path not in self._complete()])

    def load(self, found: str | Path) -> dict[str, Any]:
        """Weights and optimizer state from a checkpoint of any layout; the `extra` of `save`.

        Raises:
            ValueError: it is of another model, or one of its files is missing, truncated or altered.
        """
        self.wait()
        found, ranks = Path(found), dist.get_world_size()
        content = self._first(lambda: read_content(found))
        check_model(found, content["model"], self.model)
        names = sorted(content["files"])[self.rank :: ranks]  # each rank reads some of all bytes
        agreed(lambda: [check_file(found / name, content["files"][name]) for name in names], self._group)

        def read() -> None:
            make_states(self.trained.named_optimizers(), read_index(found))
            load(found, chunks_of(self.trained))

        agreed(read, self._group)
        self.trained.publish()
        return content["extra"]

    def _named(self) -> list[Path]:
        """In the order of their steps."""
        return sorted((p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=_step)

    def _complete(self) -> list[Path]:
        return [path for path in self._named() if (path / CONTENT).is_file()]

    def _first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on all ranks."""
        return agreed(lambda: work() if self.rank == 0 else None, self._group)[0]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def agreed(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on every rank; its OSError or ValueError on any of them is a ValueError on all."""
    try:
        mine = work(), None
    except (OSError, ValueError) as error:
        mine = None, str(error)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    beside = threading.current_thread() is not threading.main_thread()  # while the main thread trains
    with collective("all-gather", "agreeing on a checkpoint", group, "a checkpoint", beside):
        dist.all_gather_object(everyone, mine, group)
    for _, problem in everyone:
        if problem:
            raise ValueError(problem)
    return [result for result, _ in everyone]


# ---- What is in a checkpoint -----------------------------------------------------------------------------------------


def chunks_of(trained: Resumable, but: Collection[str] = ()) -> dict[str, Chunks]:
    """What this rank has of weights and optimizer state, by "weights|parameter" and "states|parameter|key"."""
    weights = [(("weights", each.name), each) for each in trained.master_weights()]
    states = [(("states", *each.name), each) for each in trained.states()]
    return {"|".join(key): Chunks(each) for key, each in weights + states if key[1] not in but}


def make_states(optimizers: Iterable[NamedOptimizer], index: Index) -> None:
    """Give the optimizers states like those saved, to be read into: none, if saved before the first step."""
    saved: dict[str, dict[str, TensorStorageMetadata]] = {}
    for name, each in index.items():
        kind, parameter, *key = name.split("|")
        if kind == "states":
            saved.setdefault(parameter, {})[key[0]] = each
    for optimizer, names in optimizers:
        described, state = optimizer.state_dict(), {}
        for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            state[number] = {
                key: torch.zeros_like(p) if each.size else torch.zeros((), dtype=each.properties.dtype)
                for key, each in saved.get(names[p], {}).items()
            }
        optimizer.load_state_dict(described | {"state": state})  # it knows on which device a step is counted


def check_model(found: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, where two models differ."""
    for name in {**saved, **here}:
        if saved.get(name) != here.get(name):
            raise ValueError(
                f"{found}: its model has {name} {saved.get(name)}, this run's {here.get(name)}; use another folder, "
                f"or the flag of {name} as it was"
            )


# ---- Files -----------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> list[Any]:
    """[bytes, SHA-256] of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        return [file.tell(), digest.hexdigest()]


def check_file(path: Path, expected: list[Any]) -> None:
    """Raises ValueError unless the file is as it was written."""
    use = "use an earlier checkpoint"
    if not path.is_file():
        raise ValueError(f"{path}: is missing; {use}")
    size, digest = fingerprint(path)
    if size != expected[0]:
        raise ValueError(f"{path}: has {size} bytes, {expected[0]} were written; {use}")
    if digest != expected[1]:
        raise ValueError(f"{path}: is altered, its SHA-256 is not the one recorded; {use}")


def read_content(found: Path) -> dict[str, Any]:
    """What `checkpoint.json` says. Raises ValueError where it is missing, truncated or altered."""
    path = found / CONTENT
    if not path.is_file():
        raise ValueError(f"{found}: is no checkpoint, it lacks {CONTENT}; use a folder that a run has saved")
    try:
        read = json.loads(path.read_text())
        right = _sha256(read["content"]) == read["sha256"]
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(f"{path}: is truncated or altered; use an earlier checkpoint")
    return read["content"]


def write_content(folder: Path, content: dict[str, Any]) -> None:
    """Write `checkpoint.json`, to disk with all names in the folder."""
    with (folder / CONTENT).open("w") as file:
        json.dump({"sha256": _sha256(content), "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
