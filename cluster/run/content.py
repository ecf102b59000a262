"""What a checkpoint of a combined run contains, how its files are checked, and how ranks agree on what went wrong."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cluster.run.boxes import Boxes
from cluster.run.worker import Worker
from core.comm import peer_errors

CONTENT, INDEX = "checkpoint.json", ".metadata"
FREE = {"dropout", "attention", "capacity", "drop", "aux", "z", "bias_rate"}  # what may change in a model that goes on
Index = Mapping[str, TensorStorageMetadata]

# ---- Together --------------------------------------------------------------------------------------------------------


def agreed(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on every rank; its OSError or ValueError on any of them is a ValueError on all."""
    try:
        mine = work(), None
    except (OSError, ValueError) as error:
        mine = None, str(error)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with peer_errors("agreeing on a checkpoint"):
        dist.all_gather_object(everyone, mine, group)
    for _, problem in everyone:
        if problem:
            raise ValueError(problem)
    return [result for result, _ in everyone]


@contextmanager
def together(what: str) -> Iterator[None]:
    """The errors of torch.distributed.checkpoint, which are on all ranks, in one line."""
    try:
        with peer_errors(what):
            yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise ValueError(f"{what}: rank {rank}: {cause}") from error


# ---- What is in a checkpoint -----------------------------------------------------------------------------------------


def boxes_of(worker: Worker, once: bool = False) -> dict[str, Boxes]:
    """What this rank holds, by kind and name.

    Args:
        once: leave out what another stage of the pipeline has, too, cut at other places.
    """
    model = worker.model
    copies = {model.full_name(n) for n, p in model.named_parameters() if not worker.copies.counted_here(p)}
    weights = [(("weights", each.name), each) for each in worker.master_weights()]
    states = [(("states", *each.name), each) for each in worker.states()]
    return {"|".join(key): Boxes(each) for key, each in weights + states if not (once and key[1] in copies)}


def check_shapes(boxes: Mapping[str, Boxes], index: Index) -> None:
    """Raises ValueError unless all of it is in the checkpoint, of the same shape."""
    for key, each in boxes.items():
        if key not in index or index[key].size != each.whole:
            raise ValueError(f"{key} {tuple(each.whole)} is not in the checkpoint; use one of the same model")


def make_states(worker: Worker, index: Index) -> None:
    """Give the optimizers states like those saved, to be read into: none, if saved before the first step."""
    saved: dict[str, dict[str, TensorStorageMetadata]] = {}
    for key, tensor in index.items():
        kind, name, *which = key.split("|")
        if kind == "states":
            saved.setdefault(name, {})[which[0]] = tensor
    names = {p: worker.model.full_name(name) for name, p in worker.model.named_parameters()}
    for part in (part for stage in worker.stages for part in stage.optimizers):
        described = part.optimizer.state_dict()
        order = {p: i for i, p in enumerate(p for g in part.optimizer.param_groups for p in g["params"])}
        described["state"] = {
            order[each.piece]: {
                key: torch.zeros_like(each.piece) if tensor.size else torch.zeros((), dtype=tensor.properties.dtype)
                for key, tensor in saved.get(names[each.member.parameter], {}).items()
            }
            for each in part.owned
        }
        part.optimizer.load_state_dict(described)  # knows on which device a step is counted


def sizes(worker: Worker) -> dict[str, Any]:
    """The model's configuration, and the optimizer's kind."""
    found = asdict(worker.model.config) | {"experts": 0}
    if worker.moe:
        moe = asdict(worker.moe)
        found |= moe.pop("routing") | {"expert_feed_forward": moe.pop("feed_forward") or found["feed_forward"]} | moe
    return found | {"optimizer": type(worker.rest.optimizers[0].optimizer).__name__}


def check_sizes(found: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ValueError, naming the field, where the models differ in more than what may change."""
    for name in saved | here:
        if saved.get(name) != here.get(name) and name not in FREE:
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
        whole = _sha256(read["content"]) == read["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
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


def sync(folder: Path) -> None:
    """The names in a folder, to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
