"""The memory that a rank takes to read and write a published folder: peak.py IN OUT, started by torchrun.

Each rank prints its part, and the most that reading and that writing took besides, in bytes.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.planner.layout import Layout
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.export import export
from cluster.run.hf import Folder, check_numbers
from cluster.run.load import load_published
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.gpt import GPT
from core.model.precision import POLICIES


def resident() -> dict[str, int]:
    """Bytes of this process in memory, now and at most, mapped files too."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:")}


def forget_the_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return resident()["VmRSS"]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layout = Layout(tp=2, pp=2, microbatch=1)
    mesh, folder = make_mesh(layout, "cpu", Ledger(), 60.0), Folder(sys.argv[1], 16)
    sgd = partial(torch.optim.SGD, lr=1.0)
    spec = TrainSpec(folder.config, None, layout, 0, POLICIES["float32"], torch.device("cpu"), sgd, drawn=False)
    model = GPT(folder.config)
    folder.tensors(model)  # what is loaded and made once is no part of it
    check_numbers(torch.zeros(9), "")
    dist.all_gather_object([None] * 4, 0)
    worker = Worker(spec, mesh)  # it has memory for its part, and for gradients
    before = forget_the_peak()
    load_published(worker, folder, model)
    reading = resident()["VmHWM"] - before
    before = forget_the_peak()
    export(worker, sys.argv[2], model, 10**9, folder)
    writing = resident()["VmHWM"] - before
    part = sum(4 * p.numel() for p in worker.model.parameters())
    print(json.dumps([part, reading, writing]) + "\n", end="", flush=True)  # in one, for others print too
    worker.close()


if __name__ == "__main__":
    main()
