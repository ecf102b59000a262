"""A small training that saves every step, and stands still at one moment of a save, to be killed there.

    saving.py FOLDER STEPS MOMENT

Goes on from the newest checkpoint for so many steps, and says how it found and left weights and optimizer. It stops at
the moment when it saves for the second time.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem

from cluster.planner.layout import Layout
from cluster.run.checkpoint import Checkpoints
from cluster.run.worker import Worker, make_mesh
from core.ledger import Ledger
from core.model.gpt import GPTConfig
from core.model.text import Text
from core.proof.launch import Job, launch

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocabulary=257, sequence=8, hidden=8, layers=2, heads=2)
# Of a file operation: the rank, the event as sys.addaudithook names it, its path, how many of them before.
MOMENTS = {
    "before a data file is opened": (1, "open", "*.part/__1_0.distcp", 0),
    "all data written, before the index": (0, "open", "*.part/.metadata.tmp", 0),
    "index written, not yet under its name": (0, "os.rename", "*.part/.metadata.tmp", 0),
    "another rank hashes its file": (1, "open", "*.part/__1_0.distcp", 1),
    "before the JSON": (0, "open", "*.part/checkpoint.json", 0),
    "all written, before the rename": (0, "os.rename", "*.part", 0),
    "renamed, before older ones are removed": (0, "os.rename", "step-*", 0),
    "while an older one is being removed": (0, "os.remove", "*", 2),
}


def halfway_through_a_data_file(rank: int, halt: Callable[[], None]) -> None:
    right, items = filesystem._write_item, []

    def write(transforms: Any, stream: Any, *rest: Any) -> Any:
        items.append(stream)
        if rank == 0 and len(items) == 8:
            stream.flush()
            halt()
        return right(transforms, stream, *rest)

    filesystem._write_item = write


def halfway_through_the_json(rank: int, halt: Callable[[], None]) -> None:
    def dump(content: Any, file: Any) -> None:
        text = json.dumps(content)
        file.write(text[: len(text) // 2])
        file.flush()
        halt()

    if rank == 0:
        json.dump = dump


def at_file_operation(rank: int, halt: Callable[[], None], moment: str) -> None:
    where, event, pattern, before = MOMENTS[moment]
    seen = []

    def watch(name: str, arguments: tuple) -> None:
        if name == event and rank == where and Path(str(arguments[0])).match(pattern):
            seen.append(name)
            if len(seen) == before + 1:
                halt()

    sys.addaudithook(watch)


PATCHED = {
    "halfway through a data file": halfway_through_a_data_file,
    "halfway through the JSON": halfway_through_the_json,
}


def digest(worker: Worker) -> str:
    found = hashlib.sha256()
    for each in sorted(worker.weights() + worker.master_weights() + worker.states(), key=lambda each: str(each.name)):
        found.update(str(each.name).encode() + each.value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def main(job: Job, folder: str, steps: int, moment: str) -> None:
    def say(what: str, *more: object) -> None:
        sys.stdout.write(json.dumps([job.rank, what, *more]) + "\n")  # at once: two threads speak
        sys.stdout.flush()

    def halt() -> None:
        say("halted")
        time.sleep(600)

    layout = Layout(dp=2, zero=1, microbatch=2)
    mesh = make_mesh(layout, "cpu", Ledger(), job.timeout)
    adam = torch.optim.AdamW
    worker = Worker(CONFIG, None, layout, mesh, 0, torch.float64, CPU, lambda groups: adam(groups, lr=1e-3), 500)
    checkpoints = Checkpoints(folder, worker, job, keep=1)
    found = checkpoints.latest()
    first = checkpoints.load(found)["step"] if found else 0
    say("found", first, digest(worker))
    for step in range(first, first + steps):
        if step == first + 1:
            checkpoints.wait()
            if moment == "between two saves":
                halt()
            if moment in PATCHED:
                PATCHED[moment](job.rank, halt)
            elif moment in MOMENTS:
                at_file_operation(job.rank, halt, moment)
        worker.zero_grad()
        worker.clip(1.0, worker.forward_backward(step, *Text(None, 8).batch(0, step, 4)))
        worker.step()
        say("left", step + 1, digest(worker))
        checkpoints.save(step + 1, {"step": step + 1})
    checkpoints.wait()
    worker.close()


if __name__ == "__main__":
    with launch(CPU, 60.0) as joined:
        main(joined, sys.argv[1], int(sys.argv[2]), sys.argv[3])
