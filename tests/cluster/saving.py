"""A small training that saves every step, watched at one moment of a save.

    saving.py FOLDER STEPS MOMENT     goes on from the newest checkpoint for so many steps, and stands still at that
                                      moment of its second save, to be killed there
    saving.py FOLDER                  comes to another moment in every save, and takes a copy of the folder as it is on
                                      disk then, as a kill would leave it; then it loads every copy

It says how it found and left weights and optimizer.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem

from cluster.planner.layout import Layout
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.gpt import GPTConfig
from core.model.precision import POLICIES
from core.model.text import Text
from core.proof.checkpoint import Checkpoints
from core.proof.launch import Job, launch

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocabulary=257, sequence=8, hidden=8, layers=2, heads=2)
# Of a file operation: the rank, the event as sys.addaudithook names it, its path, how many of them before.
OPERATIONS = {
    "before a data file is opened": (1, "open", "*.part/__1_0.distcp", 0),
    "all data written, before the index": (0, "open", "*.part/.metadata.tmp", 0),
    "index written, not yet under its name": (0, "os.rename", "*.part/.metadata.tmp", 0),
    "another rank hashes its file": (1, "open", "*.part/__1_0.distcp", 1),
    "before the JSON": (0, "open", "*.part/checkpoint.json", 0),
    "all written, before the rename": (0, "os.rename", "*.part", 0),
    "renamed, before older ones are removed": (0, "os.rename", "step-*", 0),
    "while an older one is being removed": (0, "os.remove", "*", 2),
}
MOMENTS = ["between two saves", "halfway through a data file", "halfway through the JSON", *OPERATIONS]
SAVED = MOMENTS[-2:]  # those at which the new checkpoint is there


class Trap:
    """Calls `act` once, when this rank comes to the moment that is set."""

    def __init__(self, rank: int, act: Callable[[], None]):
        self.rank, self.act, self.moment, self.seen = rank, act, "", 0
        self._write_item, self._dump = filesystem._write_item, json.dump
        filesystem._write_item, json.dump = self.write_item, self.dump
        sys.addaudithook(self.operation)

    def set(self, moment: str) -> None:
        self.moment, self.seen = moment, 0
        if moment == "between two saves":
            self.act()

    def write_item(self, transforms: Any, stream: Any, *rest: Any) -> Any:
        if self.moment == "halfway through a data file" and self.rank == 0:
            self.seen += 1
            if self.seen == 8:
                stream.flush()
                self.act()
        return self._write_item(transforms, stream, *rest)

    def dump(self, content: Any, file: Any) -> None:
        text = json.dumps(content)
        file.write(text[: len(text) // 2])
        if self.moment == "halfway through the JSON":
            file.flush()
            self.act()
        file.write(text[len(text) // 2 :])

    def operation(self, name: str, arguments: tuple) -> None:
        if self.moment in OPERATIONS:
            rank, event, pattern, before = OPERATIONS[self.moment]
            if name == event and rank == self.rank and Path(str(arguments[0])).match(pattern):
                self.seen += 1
                if self.seen == before + 1:
                    self.act()


def digest(worker: Worker) -> str:
    found = hashlib.sha256()
    for each in sorted(worker.weights() + worker.master_weights() + worker.states(), key=lambda each: str(each.name)):
        found.update(str(each.name).encode() + each.value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class Training:
    """Two ranks under ZeRO-1."""

    def __init__(self, job: Job):
        layout = Layout(dp=2, zero=1, microbatch=2)
        mesh = make_mesh(layout, "cpu", Ledger(), job.timeout)
        adamw = partial(torch.optim.AdamW, lr=1e-3)
        self.worker = Worker(TrainSpec(CONFIG, None, layout, 0, POLICIES["float64"], CPU, adamw, bucket=500), mesh)
        self.job = job

    def say(self, what: str, *more: object) -> None:
        sys.stdout.write(json.dumps([self.job.rank, what, *more]) + "\n")  # at once: two threads speak
        sys.stdout.flush()

    def checkpoints(self, folder: str | Path) -> Checkpoints:
        return self.worker.checkpoints(folder, self.job, keep=1)

    def find(self, checkpoints: Checkpoints, moment: str) -> int:
        found = checkpoints.latest()
        first = checkpoints.load(found)["step"] if found else 0
        self.say("found", moment, first, digest(self.worker))
        return first

    def step(self, step: int, checkpoints: Checkpoints) -> None:
        self.worker.zero_grad()
        self.worker.clip(1.0, self.worker.forward_backward(step, *Text(None, 8).batch(0, step, 4)))
        self.worker.step()
        self.say("left", step + 1, digest(self.worker))
        checkpoints.save(step + 1, {"step": step + 1})


def until_killed(training: Training, folder: str, steps: int, moment: str) -> None:
    def halt() -> None:
        training.say("halted")
        time.sleep(600)

    trap, checkpoints = Trap(training.job.rank, halt), training.checkpoints(folder)
    first = training.find(checkpoints, moment)
    for step in range(first, first + steps):
        if step == first + 1:
            checkpoints.wait()
            trap.set(moment)
        training.step(step, checkpoints)
    checkpoints.wait()


def at_every_moment(training: Training, folder: str) -> None:
    copies = Path(f"{folder} copies")
    copy = partial(shutil.copytree, folder)
    trap, checkpoints = Trap(training.job.rank, lambda: copy(copies / trap.moment)), training.checkpoints(folder)
    training.find(checkpoints, "at the start")
    for step, moment in enumerate(["", *MOMENTS]):
        if moment != "between two saves" or training.job.rank == 0:
            trap.set(moment)
        training.step(step, checkpoints)
        checkpoints.wait()
    for moment in MOMENTS:
        checkpoints = training.checkpoints(copies / moment)
        training.find(checkpoints, moment)


if __name__ == "__main__":
    with launch(CPU, 60.0) as joined:
        trained = Training(joined)
        if len(sys.argv) == 2:
            at_every_moment(trained, sys.argv[1])
        else:
            until_killed(trained, sys.argv[1], int(sys.argv[2]), sys.argv[3])
        trained.worker.close()
