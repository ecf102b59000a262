"""Which chunks of the full tensors a rank holds, as torch.distributed.checkpoint writes them, and reads them back.

A chunk is an offset in the full tensor and a view of this rank's memory. The format joins chunks of any shape, so what
one layout has written any other reads, straight into its memory, and no rank ever holds a full tensor that it has only
a shard of.

`Chunks` speaks the protocol of torch.distributed.checkpoint that DTensor speaks too (`__create_write_items__` and so
on), so its default planners save and load it. It is no DTensor, because two things that are saved here have no
placement, as one sees on two ranks:

    DTensor.from_local(torch.zeros(129, 4), mesh, [Shard(0)]).shape     (258, 4): of a vocabulary of 257 rows, padded
                                                                        locally to 129 each, it counts the padding too
    Shard(0) of a (3, 4) tensor                                         8 elements and 4: ZeRO's flat halves are 6 each,
                                                                        and the second begins inside a row

A DTensor also needs the process group of its mesh; `write` and `convert` lay tensors out for ranks that do not run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.proof.peers import peer_errors
from core.shards import FlatShard, LocalTensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import WriteItem

INDEX = ".metadata"  # torch.distributed.checkpoint's file that says where which chunk is
Index = Mapping[str, "TensorStorageMetadata"]
Extent = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


@cache
def dcp() -> Any:
    """torch.distributed.checkpoint. With DTensor and sympy it would be a third of what `import cluster.train` takes, on
    every rank, and few runs save: imported by the first that reads or writes."""
    import_module("torch.distributed.checkpoint.planner")
    return import_module("torch.distributed.checkpoint")


def cover(first: int, end: int, shape: Sequence[int]) -> Iterator[Extent]:
    """Elements first:end of a tensor of `shape`, flattened, as at most 2 dims - 1 extents, in the order of elements.

    Full rows in the middle; before and after them a part of a row, covered in the same way.
    """
    if len(shape) == 1:
        yield (first,), (end - first,)
        return
    row = prod(shape[1:])
    start, stop = -(-first // row), end // row  # of the full rows

    def within(i: int, first: int, end: int) -> Iterator[Extent]:
        return (((i, *offset), (1, *sizes)) for offset, sizes in cover(first, end, shape[1:]))

    if start > stop:  # all in one row
        yield from within(stop, first - stop * row, end - stop * row)
        return
    if first < start * row:
        yield from within(start - 1, first - (start - 1) * row, row)
    if start < stop:
        yield (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])
    if stop * row < end:
        yield from within(stop, 0, end - stop * row)


def chunks_of(local: LocalTensor) -> tuple[torch.Size, dict[torch.Size, Tensor]]:
    """The full shape, and this rank's chunks by their offsets. None has padding, because the full tensor has none."""
    value, mark = local.value.detach(), local.shard
    if isinstance(mark, FlatShard):
        extents = list(cover(mark.first, mark.end, mark.shape))
        flat = value.view(-1).split([prod(sizes) for _, sizes in extents])
        chunks = [(offset, part.view(sizes)) for (offset, sizes), part in zip(extents, flat, strict=True)]
        shape, mark = mark.shape, mark.parent
    else:
        chunks, shape = [((0,) * value.dim(), value)], value.shape
    while mark:  # that tensor is itself a shard
        dim, inner, chunks = mark.dim, chunks, []
        for offset, view in inner:
            start = mark.start + offset[dim]
            unpadded = min(view.shape[dim], mark.size - start)
            if unpadded > 0:
                chunks.append(((*offset[:dim], start, *offset[dim + 1 :]), view.narrow(dim, 0, unpadded)))
        shape, mark = (*shape[:dim], mark.size, *shape[dim + 1 :]), mark.parent
    return torch.Size(shape), {torch.Size(offset): view for offset, view in chunks}


class Chunks(Tensor):
    """A full tensor of which only this rank's chunks exist: good for saving and loading, and nothing else."""

    views: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, local: LocalTensor) -> "Chunks":
        shape, views = chunks_of(local)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=local.value.dtype, device=local.value.device)
        made.views = views
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> None:
        raise NotImplementedError(f"{operation} of a tensor of which a rank has some chunks")

    def copied(self) -> "Chunks":
        """To the CPU, with memory of their own."""
        self.views = {offset: view.to("cpu", copy=True) for offset, view in self.views.items()}
        return self

    def __create_write_items__(self, name: str, _: object) -> "list[WriteItem]":
        plan, metadata = dcp().planner, dcp().metadata
        chunks = zip(self.__create_chunk_list__(), self.views.values(), strict=True)
        return [
            plan.WriteItem(
                metadata.MetadataIndex(name, chunk.offsets),
                plan.WriteItemType.SHARD,
                tensor_data=plan.TensorWriteData(chunk, metadata.TensorProperties.create_from_tensor(view), self.shape),
            )
            for chunk, view in chunks
        ]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        make = dcp().metadata.ChunkStorageMetadata
        return [make(offset, view.shape) for offset, view in self.views.items()]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        return self.views[index.offset]


# ---- A folder of them ------------------------------------------------------------------------------------------------


def save(folder: Path, chunks: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write what the ranks of `group` hold, each rank a file. Of equal chunks one is written, by whom has least to do.

    Raises:
        ValueError: a rank cannot write, or the chunks do not make full tensors; the same on all ranks.
    """
    try:
        with peer_errors(f"writing {folder}"):
            # Nothing is on a GPU, where copying ahead would help.
            writer = dcp().FileSystemWriter(folder, per_thread_copy_ahead=0)
            dcp().save(dict(chunks), storage_writer=writer, process_group=group)
    except dcp().CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise ValueError(f"cannot be written: rank {rank}: {cause}") from error


def read_index(folder: Path) -> Index:
    """What is in a folder that `save` has written. Raises ValueError where there is nothing."""
    return _opened(folder)[1].state_dict_metadata


def _opened(folder: Path) -> "tuple[FileSystemReader, Metadata]":
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: is no checkpoint, it lacks {INDEX}; use a folder that a run has saved")
    reader = dcp().FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    return reader, metadata


def load(folder: Path, chunks: Mapping[str, Tensor]) -> None:
    """Read into these tensors, which may be plain ones, from a folder of any layout. Needs no process group.

    Raises:
        ValueError: one of them is not there, or has another shape; or a file is missing or spoilt.
    """
    reader, metadata = _opened(folder)
    for name, each in chunks.items():
        found = metadata.state_dict_metadata.get(name)
        if found is None:
            raise ValueError(f"{folder}: has no {name}; use a checkpoint of the same model")
        if found.size != each.shape:
            shapes = f"{tuple(found.size)}, not {tuple(each.shape)}"
            raise ValueError(f"{folder}: {name} is {shapes}; use a checkpoint of the same sizes")
    planner = dcp().DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(chunks), metadata)
    try:
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: cannot be read: {error}; use the files of all ranks") from error


def load_full(folder: Path) -> dict[str, Tensor]:
    """All full tensors of a folder."""
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in read_index(folder).items()}
    load(folder, tensors)
    return tensors


def write(folder: Path, ranks: Sequence[Iterable[LocalTensor]]) -> None:
    """What `save` writes where each rank holds these tensors, but by this one process alone.

    Raises:
        ValueError: the chunks do not make full tensors.
    """
    writer, planners = dcp().FileSystemWriter(folder), [dcp().DefaultSavePlanner() for _ in ranks]
    writer.set_up_storage_writer(True)
    for rank, (planner, tensors) in enumerate(zip(planners, ranks, strict=True)):
        planner.set_up_planner({each.name: Chunks(each) for each in tensors}, is_coordinator=rank == 0)
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    folder.mkdir(exist_ok=True)
    plans = writer.prepare_global_plan(plans)
    written = [
        writer.write_data(planner.finish_plan(plan), planner) for plan, planner in zip(plans, planners, strict=True)
    ]
    writer.finish(metadata, [each.wait() for each in written])


def convert(source: Path, target: Path, ranks: Sequence[Sequence[LocalTensor]]) -> None:
    """Read a folder of any layout and write it as one in which each rank holds these tensors. Needs no process group.

    Args:
        ranks: their values are not read, only their shapes; they may be on the meta device.

    Raises:
        ValueError: the target holds a checkpoint already, of which files could stay among the new ones; the source
            lacks a tensor or a file; or its tensors have other shapes.
    """
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: holds a checkpoint, and a file of it could stay; use a new folder")
    index = read_index(source)
    filled = []
    for tensors in ranks:
        dtypes = [index[each.name].properties.dtype if each.name in index else None for each in tensors]
        filled.append([each._replace(value=torch.zeros(each.value.shape, dtype=dtype))
                       for each, dtype in zip(tensors, dtypes, strict=True)])  # fmt: skip
        load(source, {each.name: Chunks(each) for each in filled[-1]})
    write(target, filled)
