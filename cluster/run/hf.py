"""The weights of a published model (Hugging Face), a folder, read into a combined run. Lecture 02.

    config.json                                   what model it is: `core.model.published`
    model.safetensors                             all tensors; or
    model-00001-of-00002.safetensors, ...         some each, and
    model.safetensors.index.json                  which file has which

Each rank reads its own slices of the tensors of its shards, whatever the layout, straight into its memory: it never has
more than its part and what it reads at a time, which is less than one tensor.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.model.config import ModelConfig
from core.model.gpt import GPT
from core.model.hf import to_published
from core.model.published import dropout_of, from_config, read_json
from core.proof.chunks import Chunks

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that older versions have saved, and that follow from the configuration: masks and rotary frequencies.
BUFFERS = re.compile(r"(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")
SAME = "use the files as published"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_of(size: str) -> int:
    """Of "5GB", "200MB" or a number. Raises ValueError."""
    unit = size[-2:].upper()
    try:
        found = int(float(size[:-2] if unit in UNITS else size) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ValueError(f"--shard-size {size}: must be a size of a file; use 5GB, 200MB or a number of bytes")
    return found


def is_file(path: str) -> bool:
    """Whether a path is of one file of our own names, and not of a published folder."""
    return Path(path).suffix == ".safetensors"


# ---- Where the numbers are -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """One published tensor of a parameter of ours, which is seen as rows: all dimensions but the last are one."""

    name: str
    shape: tuple[int, ...]  # in the file
    rows: Tensor  # int64: which of our rows each of its rows is
    transposed: bool  # its rows are columns in the file

    def slices(self, rows: slice, columns: slice) -> tuple[slice, ...]:
        """Of the tensor in the file, which are so many of our columns of some of its rows."""
        if len(self.shape) == 1:
            return (rows,)
        return (columns, rows) if self.transposed else (rows, columns)


def places(name: str, shape: torch.Size, config: ModelConfig | None) -> list[Place]:
    """The published tensors of one of our parameters; without a configuration, itself.

    Numbers of rows are given their names and turned around as values are: `core.model.hf` says how, and it alone.
    """
    if config is None:
        rows = torch.arange(prod(shape[:-1]) if len(shape) > 1 else shape[0])
        return [Place(name, (len(rows), *shape[-1:] * (len(shape) > 1)), rows, False)]
    if len(shape) == 1:
        return [Place(n, tuple(v.shape), v, False) for n, v in to_published(name, torch.arange(shape[0]), config)]
    rows = torch.arange(prod(shape[:-1])).view(*shape[:-1], 1)
    marked = torch.cat((rows, torch.full_like(rows, -1)), -1)  # two columns, the second of which is no row
    found = []
    for published, value in to_published(name, marked, config):
        transposed = bool((value[-1] == -1).all())
        value = value.T if transposed else value
        there = (len(value), shape[-1])
        found.append(Place(published, there[::-1] if transposed else there, value[:, 0], transposed))
    return found


class Piece(NamedTuple):
    """Rows of a chunk that lie together in a published tensor."""

    value: Tensor  # a view of the chunk: (rows, columns), or (rows)
    name: str
    slices: tuple[slice, ...]
    transposed: bool


def pieces(
    name: str, offset: torch.Size, chunk: Tensor, shape: torch.Size, config: ModelConfig | None
) -> Iterator[Piece]:
    """Of a chunk, which begins at `offset` in the parameter of that name and shape."""
    found = places(name, shape, config)
    owner = torch.empty(sum(len(place.rows) for place in found), dtype=torch.int64)  # by our row: which tensor,
    inside = torch.empty_like(owner)  # and which row of it
    for i, place in enumerate(found):
        owner[place.rows], inside[place.rows] = i, torch.arange(len(place.rows))

    def of_rows(first: int, view: Tensor) -> Iterator[Piece]:
        """Our rows from `first` on."""
        mine, there = owner[first : first + len(view)], inside[first : first + len(view)]
        breaks = (mine.diff() != 0) | (there.diff() != 1)
        edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(view)]
        columns = slice(offset[-1], offset[-1] + view.shape[-1])
        for start, end in pairwise(edges):
            place, row = found[mine[start]], int(there[start])
            slices = place.slices(slice(row, row + end - start), columns)
            yield Piece(view[start:end], place.name, slices, place.transposed)

    if not chunk.numel():
        return
    if len(shape) < 3:
        yield from of_rows(offset[0], chunk)
        return
    for expert, view in enumerate(chunk, offset[0]):
        yield from of_rows(expert * shape[1] + offset[1], view)


# ---- What is in a folder ---------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    file: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


def stored(folder: str) -> dict[str, Stored]:
    """Every tensor of a folder but the known buffers, by its name.

    Raises:
        ValueError: a file is missing or truncated, or the index and the files do not agree.
    """
    flag, path = f"--hf {folder}", Path(folder)
    index: dict[str, str] | None = None
    if (path / INDEX).is_file():
        index = read_json(path / INDEX, flag).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{flag}: {INDEX} has no weight_map; {SAME}")
    found: dict[str, Stored] = {}
    for file in sorted(set(index.values())) if index is not None else [SINGLE]:
        if Path(file).name != file or not (path / file).is_file():
            by = f"which {INDEX} names" if index is not None else f"nor {INDEX}"
            raise ValueError(f"{flag}: has no {file}, {by}; {SAME}")
        with opened(path / file, flag) as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                if index is not None and index.get(name, file) != file:
                    raise ValueError(f"{flag}: {name} is in {file}, and by {INDEX} in {index[name]}; {SAME}")
                tensor = tensors.get_slice(name)
                found[name] = Stored(path / file, tensor.get_dtype(), tuple(tensor.get_shape()))
    if missing := sorted((index or {}).keys() - found.keys()):
        raise ValueError(f"{flag}: {missing[0]} is not in {index[missing[0]]}, where {INDEX} says; {SAME}")
    return {name: each for name, each in found.items() if not BUFFERS.fullmatch(name)}


@contextmanager
def opened(path: Path, flag: str) -> Iterator[Any]:
    """A safetensors file; it is mapped into memory until no tensor of it is left."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{flag}: {path.name} is no safetensors file, or truncated: {error}; {SAME}") from None


def check_numbers(value: Tensor, named: str) -> Tensor:
    """The value. Raises ValueError where it is not finite: the loss of a first step would be NaN, and not say why."""
    rows = value.split(64) if value.numel() else ()  # so that a copy, if it takes one, is small
    if not all(each.isfinite() for some in rows for each in torch.aminmax(some)):
        raise ValueError(f"{named} has NaN or infinity; use a file whose training has not diverged")
    return value


def expected(config: ModelConfig | None, model: GPT) -> dict[str, tuple[int, ...]]:
    """The shapes of the published tensors of a full model, which may be on the meta device, or under our own names.

    Raises:
        KeyError: the family has no such parameter.
    """
    named = [(model.full_name(name), p) for name, p in model.named_parameters()]
    if config is None:
        return {name: tuple(p.shape) for name, p in named}
    return {n: tuple(v.shape) for name, p in named for n, v in to_published(name, p.detach(), config)}


class Folder:
    """A published model.

    Args:
        sequence: tokens in a sample.

    Raises:
        ValueError: `config.json` is of a model that is not built.
    """

    def __init__(self, path: str, sequence: int):
        self.path, self.flag = path, f"--hf {path}"
        self.content = read_json(Path(path) / CONFIG, self.flag)
        self.config = from_config(Path(path) / CONFIG, sequence, self.flag)
        self.dropouts = dropout_of(self.content)
        if missing := self.config.unbuilt():
            raise ValueError(f"{self.flag}: not built: {missing}; use another model")

    def tensors(self, model: GPT) -> dict[str, Stored]:
        """Where each published tensor of the model is; besides, of a tied one, the head, if it has been saved too.

        Args:
            model: all of it, on the meta device.

        Raises:
            ValueError: one is missing, or has another shape, or no floating-point numbers; or there is another one.
        """
        if self.content.get("quantization_config"):
            raise ValueError(
                f"{self.flag}: quantization_config: quantized weights are not built; use a model in bfloat16"
            )
        shapes, found = expected(self.config, model), stored(self.path)
        if self.config.fused_qkv and "wte.weight" in found:  # as GPT-2 was published: the names of its decoder alone
            found = {name if name == "lm_head.weight" else f"transformer.{name}": each for name, each in found.items()}
        if self.config.tied and "lm_head.weight" in found:
            shapes["lm_head.weight"] = shapes[self.embedding]
        for name, shape in shapes.items():
            if name not in found:
                raise ValueError(f"{self.flag}: has no tensor {name}, which the model of its {CONFIG} has; {SAME}")
            if found[name].shape != shape:
                raise ValueError(
                    f"{self.flag}: {name} is {list(found[name].shape)}, and by {CONFIG} {list(shape)}; {SAME}"
                )
            if found[name].dtype not in FLOATS:
                kinds = ", ".join(FLOATS)
                raise ValueError(f"{self.flag}: {name} is of type {found[name].dtype}, which is not built; use {kinds}")
        after = self.config.layers + int(self.content.get("num_nextn_predict_layers") or 0)  # DeepSeek's, left out
        further = re.compile("|".join(rf"model\.layers\.{i}\..*" for i in range(self.config.layers, after)) or "(?!)")
        if more := sorted(name for name in found.keys() - shapes.keys() if not further.fullmatch(name)):
            raise ValueError(f"{self.flag}: has a tensor {more[0]}, which the model of its {CONFIG} has not; {SAME}")
        return {name: found[name] for name in shapes}

    @property
    def embedding(self) -> str:
        """The published name of the token embedding."""
        ((name, _),) = to_published("embed.token.weight", torch.empty(0, 0), self.config)
        return name

    def stored_name(self, name: str, file: Any) -> str:
        """What a tensor is called in the file."""
        plain = name.removeprefix("transformer.")
        return plain if self.config.fused_qkv and plain in file.keys() else name  # noqa: SIM118

    def read(self, weights: Mapping[str, Chunks], tensors: Mapping[str, Stored]) -> None:
        """Fill the chunks that a rank has. A file is mapped while one piece is read, and no longer."""
        for name, each in weights.items():
            for offset, view in each.views.items():
                for piece in pieces(name, offset, view, each.shape, self.config):
                    with opened(tensors[piece.name].file, self.flag) as file:
                        value = file.get_slice(self.stored_name(piece.name, file))[piece.slices]
                        piece.value.copy_(value.T if piece.transposed else value)
                        del value
                    check_numbers(piece.value, f"{self.flag}: {piece.name} in {tensors[piece.name].file.name}")

    def check_head(self, tensors: Mapping[str, Stored], rows: int = 4096) -> None:
        """Raises ValueError where the head of a tied model was saved too, and is another one than the embedding."""
        if not self.config.tied or "lm_head.weight" not in tensors:
            return
        both = self.embedding, "lm_head.weight"
        for first in range(0, self.config.vocabulary, rows):
            blocks = []
            for name in both:
                with opened(tensors[name].file, self.flag) as file:
                    blocks.append(file.get_slice(self.stored_name(name, file))[first : first + rows])
            if not torch.equal(*blocks):
                use = "use files without lm_head.weight, or tie_word_embeddings false"
                raise ValueError(
                    f"{self.flag}: tie_word_embeddings is true, and lm_head.weight is not {both[0]}; {use}"
                )
