"""Lecture 02: the weights of a combined run as one file, in the safetensors format (Megatron-LM 代码概览).

8 bytes, little-endian: the length of the header; the header, JSON: {name: {"dtype", "shape", "data_offsets": [first,
end]}}, offsets counted from its end; then the tensors, row by row, one after another.
"""

import json
import mmap
import os
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from cluster.run.boxes import Boxes, Load, Save
from cluster.run.content import agreed, boxes_of, together
from cluster.run.worker import Worker
from core.proof.launch import Job
from core.shards import LocalTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export(worker: Worker, job: Job, path: str) -> None:
    """Write the whole weights, in the precision of the update. All ranks call it.

    The ranks write their parts as a checkpoint beside the file; rank 0 joins them, one parameter at a time.

    Raises:
        ValueError: they cannot be written.
    """
    target = Path(path)
    parts, part = (target.with_name(f".{target.name}.{what}") for what in ("parts", "part"))
    first = job.rank == 0
    agreed(lambda: shutil.rmtree(parts, ignore_errors=True) if first else None)
    weights = {key: each for key, each in boxes_of(worker, once=True).items() if key.startswith("weights|")}
    with together(f"{path}: cannot be written"):
        dcp.save(weights, storage_writer=dcp.FileSystemWriter(parts), planner=Save())

    def finish() -> None:
        _join(parts, part)
        part.replace(target)
        shutil.rmtree(parts)

    agreed(lambda: finish() if first else None)


def load_export(worker: Worker, path: str) -> None:
    """Read the weights, and nothing else, of such a file into a worker of any layout. All ranks call it.

    Raises:
        ValueError: it is no such file, or truncated, or of another model.
    """
    names = {name for some in agreed(lambda: [each.name for each in worker.master_weights()]) for name in some}
    agreed(lambda: _read(worker, Path(path), names))
    for stage in worker.stages:
        stage.publish()


def _join(parts: Path, target: Path) -> None:
    """The tensors of a checkpoint as one file."""
    reader = dcp.FileSystemReader(parts)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, True)
    of = {key.split("|")[1]: (key, found) for key, found in index.state_dict_metadata.items()}
    names = sorted(of, key=lambda name: (-of[name][1].properties.dtype.itemsize, name))  # so each is aligned
    header, end = {}, 0
    for name in names:
        dtype, shape = of[name][1].properties.dtype, of[name][1].size
        first, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            key, found = of[name]
            value = torch.empty(found.size, dtype=found.properties.dtype)
            planner = Load()
            planner.set_up_planner({key: Boxes(LocalTensor(name, value, None))}, index, True)
            reader.read_data(planner.create_local_plan(), planner).wait()
            file.write(value.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _read(worker: Worker, path: Path, names: set[str]) -> None:
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # read only where it is touched
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        header.pop("__metadata__", None)
        end = start
        for each in sorted(header.values(), key=lambda each: each["data_offsets"]):
            end += prod(each["shape"]) * DTYPES[each["dtype"]].itemsize
            if each["data_offsets"][1] != end - start:
                raise ValueError("its tensors do not follow each other")
        if end != len(whole):
            raise ValueError(f"it has {len(whole)} bytes, and its header says {end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no safetensors file, or truncated: {error}; use one that export wrote") from None
    if more := sorted(header.keys() - names):
        raise ValueError(f"{path}: has {more[0]}, which this model has not; use a file of the same model")
    pieces = [(each.name, Boxes(each)) for each in worker.master_weights()]
    for name, boxes in pieces:
        if name not in header or tuple(header[name]["shape"]) != tuple(boxes.whole):
            found = header.get(name, {}).get("shape", "missing")
            raise ValueError(f"{path}: {name} is {found}, not {list(boxes.whole)}; use a file of the same model")
    for name, boxes in pieces:
        value = _tensor(whole, start, header[name])
        for offset, view in boxes.views.items():
            view.copy_(value[tuple(slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))])


def _tensor(whole: mmap.mmap, start: int, described: dict[str, Any]) -> Tensor:
    dtype, shape = DTYPES[described["dtype"]], described["shape"]
    return torch.frombuffer(whole, dtype=dtype, count=prod(shape), offset=start + described["data_offsets"][0]).view(
        shape
    )
