"""Lecture 02: save a combined run while it goes on, and go on in any other layout (Megatron-LM 代码概览).

A checkpoint is a folder `step-00000100` with what one process would hold, cut as the ranks that saved it had it:

    __0_0.distcp, __1_0.distcp, ...   of each rank, boxes of whole tensors: weights in the precision of the update, and
                                      the optimizer's state, under the names of the one-process model
    .metadata                         torch.distributed.checkpoint's index of them
    checkpoint.json                   the model's sizes, size and SHA-256 of each file, and what the caller adds

It is written under another name, the JSON last, and renamed when all ranks have written all to disk: under its own name
it is complete, whenever a rank is killed. All ranks must reach the folder, on several machines a shared one.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from cluster.run.boxes import Boxes, Load, Save
from cluster.run.content import (
    INDEX,
    agreed,
    boxes_of,
    check_file,
    check_shapes,
    check_sizes,
    fingerprint,
    make_states,
    read_content,
    sizes,
    sync,
    together,
    write_content,
)
from cluster.run.worker import Worker
from core.proof.launch import Job

HIDDEN = r"\.step-\d{8,}\.(part|replaced|removed)"  # what an interrupted save leaves
LONGEST = timedelta(minutes=30)  # that a rank waits for others that write more; the loss of one ends the wait at once


class Checkpoints:
    """The checkpoints of one training. All ranks make it, and call its methods, at the same time.

    What goes wrong on any rank is one ValueError, the same on all of them.

    Args:
        folder: of all its checkpoints.
        keep: how many of them.
    """

    def __init__(self, folder: str | Path, worker: Worker, job: Job, keep: int = 2):
        if keep < 1:
            raise ValueError(f"--keep {keep}: the last checkpoint must stay; use --keep 1")
        self.folder, self.worker, self.keep, self.rank = Path(folder), worker, keep, job.rank
        self._group = dist.new_group(backend="gloo", timeout=LONGEST)  # its own: training sends at the same time
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    # ---- Save

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Copy what is to be saved, and write it while training goes on. Waits for an earlier save.

        Afterwards, of the checkpoints up to this one, the last `keep` are there.

        Args:
            step: a checkpoint of the same one is replaced.
            extra: what else is needed to go on, as JSON has it; rank 0's is kept.
        """
        self.wait()
        boxes = {key: each.copied() for key, each in boxes_of(self.worker, once=True).items()}
        content = {"step": step, "model": sizes(self.worker), "extra": extra}
        self._writing = self._thread.submit(self._write, self.folder / f"step-{step:08d}", boxes, json.dumps(content))

    def wait(self) -> None:
        """Until what was saved is on disk."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, target: Path, boxes: dict[str, Boxes], content: str) -> None:
        part = _hidden(target, "part")
        self._first(lambda: shutil.rmtree(part, ignore_errors=True))
        try:
            writer = dcp.FileSystemWriter(part, per_thread_copy_ahead=0)  # no GPU: all has been copied
            with together(f"{target}: cannot be written"):
                dcp.save(boxes, storage_writer=writer, planner=Save(), process_group=self._group)
            mine = [f"__{self.rank}_0.distcp", *([INDEX] if self.rank == 0 else [])]
            files = agreed(lambda: {name: fingerprint(part / name) for name in mine}, self._group)
            whole = json.loads(content) | {"files": {name: each for some in files for name, each in some.items()}}
            self._first(lambda: self._finish(part, target, whole))
        except ValueError as error:  # the disk may be full, and torch does not always say so
            free = self._first(lambda: shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0)
            self._first(lambda: shutil.rmtree(part, ignore_errors=True))
            raise ValueError(
                f"{error}; {free / 1e6:,.1f} MB are free there, use another --save if it needs more"
            ) from None

    def _finish(self, part: Path, target: Path, content: dict[str, Any]) -> None:
        """On rank 0, when all ranks have written."""
        write_content(part, content)
        replaced = _hidden(target, "replaced")
        if target.exists():
            target.rename(replaced)
        part.rename(target)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        until_now = [path for path in self._complete() if _step(path) <= _step(target)]
        for old in until_now[: -self.keep]:
            shutil.rmtree(old.rename(_hidden(old, "removed")), ignore_errors=True)

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
                    shutil.rmtree(path)
            return next(reversed(self._complete()), None)

        return self._first(find)

    def load(self, found: str | Path) -> dict[str, Any]:
        """Weights and optimizer of a checkpoint of any layout into the worker; the `extra` of `save`.

        Raises:
            ValueError: it is of another model, or one of its files is missing, truncated or altered.
        """
        self.wait()
        found, size = Path(found), dist.get_world_size()
        content = self._first(lambda: read_content(found))
        check_sizes(found, content["model"], sizes(self.worker))
        names = sorted(content["files"])[self.rank :: size]
        agreed(lambda: [check_file(found / name, content["files"][name]) for name in names], self._group)
        reader = dcp.FileSystemReader(found)
        boxes: dict[str, Boxes] = {}

        def prepare() -> None:
            index = reader.read_metadata().state_dict_metadata
            make_states(self.worker, index)
            boxes.update(boxes_of(self.worker))
            check_shapes(boxes, index)

        agreed(prepare, self._group)
        with together(f"{found}: cannot be read"):
            dcp.load(boxes, storage_reader=reader, planner=Load(), process_group=self._group)
        for stage in self.worker.stages:
            stage.publish()
        return content["extra"]

    def _complete(self) -> list[Path]:
        """In the order of their steps."""
        return sorted((p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=_step)

    def _first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on all ranks."""
        return agreed(lambda: work() if self.rank == 0 else None, self._group)[0]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")
