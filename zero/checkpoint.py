"""Save a training to one file, and load it into any stage of ZeRO on any number of ranks. Lecture 01.

The file holds what one process would hold: whole weights, in the precision of the update, and whole optimizer state, by
parameter name. So it does not matter who had sharded them. torch.distributed.checkpoint writes and reads it.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from core.proof.launch import Job
from core.shards import full_tensors, shard_of
from zero.stage import Stage


def save(folder: str, stage: Stage, job: Job) -> None:
    """Write weights and optimizer state into `folder`, which holds one data file and its index. Every rank calls it.

    The folder appears under its name when it is complete, and replaces an older one.

    Raises:
        ValueError: the model is cut by tensor or pipeline parallelism as well, which this file cannot say.
    """
    if stage.axis.size != job.world_size or any(shard_of(p) for p in stage.model.parameters()):
        raise ValueError(f"{folder}: only a model that ZeRO alone has sharded can be saved; use dp over all ranks")
    pieces = [("weights", stage.master_weights()), ("states", stage.states())]
    if not stage.shards_optimizer and stage.axis.index:
        pieces = []  # every rank has all of it
    mine = [piece._replace(name=_key(kind, piece.name), value=piece.value.cpu().clone()) for kind, all_ in pieces
            for piece in all_]  # fmt: skip
    everyone = job.gather(mine)
    if job.rank == 0:
        target = Path(folder)
        temporary, older = (target.with_name(f".{target.name}.{what}") for what in ("part", "old"))
        for path in (temporary, older):
            shutil.rmtree(path, ignore_errors=True)
        whole = dict(full_tensors(piece for rank in everyone for piece in rank))
        dcp.save(whole, storage_writer=dcp.FileSystemWriter(temporary), no_dist=True)
        if target.exists():
            target.rename(older)
        temporary.rename(target)
        shutil.rmtree(older, ignore_errors=True)
    job.share(None)  # no rank goes on, or reads it, before it is there


def load(folder: str, stage: Stage) -> None:
    """Read what `save` wrote into a stage of the same model and optimizer. Each rank reads one parameter at a time.

    Raises:
        ValueError: there is no checkpoint, or a parameter is missing in it or has another shape.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise ValueError(f"{folder}: is no checkpoint; use a folder that zero.checkpoint.save has written")
    reader = dcp.FileSystemReader(folder)
    index = reader.read_metadata().state_dict_metadata

    def read(key: str, shape: torch.Size | None = None) -> Tensor:
        if key not in index:
            raise ValueError(f"{folder}: has no {key}; use a checkpoint of the same model")
        found = index[key]
        if shape is not None and found.size != shape:
            raise ValueError(
                f"{folder}: {key} is {tuple(found.size)}, not {tuple(shape)}; use a checkpoint of the same sizes"
            )
        value = {key: torch.empty(found.size, dtype=found.properties.dtype)}
        dcp.load(value, storage_reader=reader, no_dist=True)
        return value[key]

    names = {p: name for name, p in stage.model.named_parameters()}
    states: dict[str, list[str]] = {}
    for key in index:
        kind, name, *which = key.split("|")
        if kind == "states":
            states.setdefault(name, []).append(*which)
    for optimizer in stage.optimizers:
        for each in optimizer.owned:
            name, shape = names[each.member.parameter], each.member.parameter.shape
            each.piece.data.copy_(read(_key("weights", name), shape).flatten()[each.first : each.end])
            state = optimizer.optimizer.state[each.piece]
            state.clear()  # a checkpoint from before the first step has none
            for key in states.get(name, []):
                value = read(_key("states", (name, key)))
                if value.dim():  # a copy of this part: a view would keep the whole
                    value = value.flatten()[each.first : each.end].to(each.piece.device, each.piece.dtype, copy=True)
                state[key] = value
    stage.load_frozen(lambda name, shape: read(_key("weights", name), shape))
    stage.publish()


def _key(kind: str, name: str | tuple[str, str]) -> str:
    return "|".join((kind, name) if isinstance(name, str) else (kind, *name))
