"""What a rank holds of a tensor, as boxes in the whole: how torch.distributed.checkpoint writes it, and reads it back.

A box is an offset in the whole tensor and a view of this rank's memory. The format joins boxes of any shape, so what
one layout has written any other reads, straight into its place, and no rank ever holds a whole tensor.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from core.shards import FlatShard, LocalTensor

Extent = tuple[tuple[int, ...], tuple[int, ...]]  # offset and sizes


def cover(first: int, end: int, shape: Sequence[int]) -> Iterator[Extent]:
    """Elements first:end of a tensor of `shape`, flattened, as at most 2 dims - 1 boxes, in the order of the elements.

    Whole rows in the middle; before and after them a part of a row, covered in the same way.
    """
    if len(shape) == 1:
        yield (first,), (end - first,)
        return
    row = prod(shape[1:])
    start, stop = -(-first // row), end // row  # of the whole rows

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


class Boxes:
    """The boxes of a piece. None has padding, because the whole tensor has none."""

    def __init__(self, piece: LocalTensor):
        value, mark = piece.value, piece.shard
        if isinstance(mark, FlatShard):
            extents = list(cover(mark.first, mark.end, mark.shape))
            flat = value.view(-1).split([prod(sizes) for _, sizes in extents])
            boxes = [(offset, part.view(sizes)) for (offset, sizes), part in zip(extents, flat, strict=True)]
            shape, mark = mark.shape, mark.parent
        else:
            boxes, shape = [((0,) * value.dim(), value)], value.shape
        while mark:  # the tensor is itself a part
            dim, parts, boxes = mark.dim, boxes, []
            for offset, view in parts:
                start = mark.start + offset[dim]
                inside = min(view.shape[dim], mark.size - start)
                if inside > 0:
                    boxes.append(((*offset[:dim], start, *offset[dim + 1 :]), view.narrow(dim, 0, inside)))
            shape, mark = (*shape[:dim], mark.size, *shape[dim + 1 :]), mark.parent
        self.whole = torch.Size(shape)
        self.views = {torch.Size(offset): view for offset, view in boxes}

    def copied(self) -> "Boxes":
        """To the CPU, with memory of their own."""
        self.views = {offset: view.detach().to("cpu", copy=True) for offset, view in self.views.items()}
        return self

    # What torch.distributed.checkpoint asks.

    def size(self) -> torch.Size:
        return self.whole

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        chunks = zip(self.__create_chunk_list__(), self.views.values(), strict=True)
        return [
            WriteItem(
                MetadataIndex(key, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(view), self.whole),
            )
            for chunk, view in chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, view.shape) for offset, view in self.views.items()]


class Save(DefaultSavePlanner):
    """Writes boxes. What several ranks hold in the same box one of them writes, the one that has least to write."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].views[index.offset]


class Load(DefaultLoadPlanner):
    """Reads into boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Boxes], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].views[index.offset]
