"""Lecture 02: the weights of a combined run as safetensors, out and in (Megatron-LM 代码概览).

A published folder (`hf.py`), or one file under our own names, for what no published family has. Files get their full
size first; then every rank writes its shards into them, byte range by byte range, and no rank has more in memory than
its part and a copy of one shard. A file is

    8 bytes, the length of the header | header: JSON of names, types, shapes and ranges | the tensors' bytes
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cluster.run.hf import (
    CONFIG,
    FLOATS,
    INDEX,
    SINGLE,
    Folder,
    Piece,
    expected,
    is_file,
    pieces,
    places,
)
from cluster.run.worker import Worker
from core.model.config import ModelConfig
from core.model.gpt import GPT
from core.model.publish import to_content
from core.proof.checkpoint import LONGEST, agreed
from core.proof.chunks import Chunks
from core.proof.files import sync

NAMES = {dtype: name for name, dtype in FLOATS.items()}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
BESIDE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")  # fmt: skip


def check_export(path: str, config: ModelConfig, model: GPT, source: str | None) -> None:
    """Raises ValueError where a folder cannot be written, or no published family has such a model.

    Args:
        model: all of it, on the meta device.
        source: the folder that is read.
    """
    flag, target = f"--export {path}", Path(os.path.realpath(path))
    if source is not None and target == Path(source).resolve():
        raise ValueError(f"{flag}: is the folder that --hf reads; use another folder")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{flag}: the run is in that folder, which is replaced; use another folder")
    try:
        if target.is_symlink():
            raise ValueError(f"{flag}: is a link that leads to itself; use another folder")
        if target.exists() and not target.is_dir():
            raise ValueError(f"{flag}: is a file; use a folder, or a name that ends in .safetensors")
        if others := not_replaced(target, source):
            raise ValueError(f"{flag}: holds {others[0]}, which an export does not replace; use a new folder")
        if not target.parent.is_dir():
            raise ValueError(f"{flag}: there is no folder {target.parent}; make it, or use another folder")
    except OSError as error:
        raise ValueError(f"{flag}: {error.strerror}; use another folder") from None
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{flag}: nothing can be written beside it; use another folder")
    try:
        if source is None:
            to_content(config)
        expected(config, model)
        if config.score != "sigmoid" and any(name.endswith("router.bias") for name, _ in model.named_parameters()):
            raise ValueError("no published family has a bias of the selection with softmax scores")
    except (KeyError, ValueError) as error:
        why = error if isinstance(error, ValueError) else f"no published family has a parameter {error}"
        raise ValueError(f"{flag}: {why}; use --export {path}.safetensors, with our own names") from None


def not_replaced(target: Path, source: str | None) -> list[str]:
    """What is in a folder and no export writes, by name: others' files, and a tokenizer where none goes along."""
    names = [p.name for p in target.iterdir()] if target.is_dir() else ()
    ours = {CONFIG, INDEX, *(BESIDE if source is not None else ())}
    return sorted(name for name in names if name not in ours and not WEIGHTS.fullmatch(name))


# ---- Out -------------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Where a tensor is."""

    file: str
    start: int  # byte
    dtype: torch.dtype
    shape: tuple[int, ...]


class File(NamedTuple):
    header: bytes
    size: int  # in all


def plan(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], most: int
) -> tuple[dict[str, Range], dict[str, File]]:
    """Where each tensor goes, in their order, and the files: a new one where the last would have over `most` bytes."""
    sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[each] for each in shards[-1]) + size > most:
            shards.append([])
        shards[-1].append(name)
    ranges: dict[str, Range] = {}
    files: dict[str, File] = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            said[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
        header = json.dumps(said).encode()
        header += b" " * (-len(header) % 8)
        header = len(header).to_bytes(8, "little") + header
        files[file] = File(header, len(header) + end)
        for name in names:
            start = len(header) + said[name]["data_offsets"][0]
            ranges[name] = Range(file, start, dtypes[name], shapes[name])
    return ranges, files


def write_piece(file: int, piece: Piece, where: Range) -> None:
    """Write what a rank has of a tensor: full rows of it at once, else row by row.

    Bytes are what is written: a view that is transposed, or lazily negated, is resolved before.
    """
    view = piece.value.detach().T if piece.transposed else piece.value.detach()
    value = torch.empty(view.shape, dtype=where.dtype).copy_(view)
    row = 1 if value.dim() == 1 else where.shape[-1]  # elements of one in the file
    (first, *column), item = [each.start for each in piece.slices], where.dtype.itemsize
    start = where.start + (first * row + sum(column)) * item
    together = value.reshape(1, -1) if value.dim() == 1 or value.shape[1] == row else value
    for i, data in enumerate(together.view(torch.uint8).numpy()):
        rest, at = memoryview(data), start + i * row * item
        while len(rest):  # a call writes 2 GiB at most
            done = os.pwrite(file, rest, at)
            rest, at = rest[done:], at + done


def write(
    worker: Worker, folder: Path, config: ModelConfig | None, model: GPT, most: int, group: Any
) -> dict[str, str]:
    """Fill a folder with the weights, in the type of the parameters; which file has which. All ranks call it.

    Args:
        config: whose published names they get; None: our own.
        model: all of it, on the meta device.

    Raises:
        ValueError: a rank cannot write.
    """
    elsewhere = worker.saved_elsewhere()
    types = {worker.model.full_name(name): p.dtype for name, p in worker.model.named_parameters()}
    weights = {each.name: Chunks(each) for each in worker.master_weights() if each.name not in elsewhere}
    mine = {
        name: (types[name], each.shape, [(tuple(offset), tuple(view.shape)) for offset, view in each.views.items()])
        for name, each in weights.items()
    }
    owners: dict[Any, int] = {}  # of what several ranks have, the first
    dtypes, found, full = {}, Counter(), {}
    for rank, holds in enumerate(agreed(lambda: mine, group)):
        for name, (dtype, shape, chunks) in holds.items():
            dtypes |= dict.fromkeys((place.name for place in places(name, shape, config)), dtype)
            full[name] = shape.numel()
            for offset, sizes in chunks:
                if owners.setdefault((name, offset, sizes), rank) == rank:
                    found[name] += prod(sizes)
    assert found == Counter(full), "the ranks' shards do not make full tensors"
    ranges, files = plan(expected(config, model), dtypes, most)

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, file in files.items():
            (folder / name).write_bytes(file.header)
            os.truncate(folder / name, file.size)

    def fill() -> None:
        numbers: dict[str, int] = {}
        try:
            for name, each in weights.items():
                for offset, view in each.views.items():
                    if owners[name, tuple(offset), tuple(view.shape)] != dist.get_rank():
                        continue
                    for piece in pieces(name, offset, view, each.shape, config):
                        where = ranges[piece.name]
                        if where.file not in numbers:
                            numbers[where.file] = os.open(folder / where.file, os.O_WRONLY)
                        write_piece(numbers[where.file], piece, where)
            for number in numbers.values():
                os.fsync(number)
        finally:
            for number in numbers.values():
                os.close(number)

    def room(problem: Exception | str) -> ValueError:
        free = shutil.disk_usage(folder.parent).free
        return ValueError(f"{problem}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free there")

    def make_where_it_fits() -> None:
        if needed > shutil.disk_usage(folder.parent).free:
            raise room("does not fit")
        make()

    needed = sum(file.size for file in files.values())
    agreed(lambda: make_where_it_fits() if dist.get_rank() == 0 else None, group)
    try:
        agreed(fill, group)
    except ValueError as error:  # others write there too
        raise room(error) from None
    return {name: where.file for name, where in ranges.items()}


def settle(target: Path, old: Path) -> None:
    """What an export replaced is removed; or is itself again, where the export ended between two renames."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def export(worker: Worker, path: str, model: GPT, most: int, source: Folder | None) -> int:
    """Write the full weights; how many numbers. All ranks call it; all of them must reach the folder.

    It is written under another name, and renamed when it is complete.

    Args:
        path: of a published folder, or of one file of our own names, which ends in .safetensors.
        model: all of it, on the meta device.
        most: bytes of a file, but for a tensor that is larger.
        source: the folder that the model is from: what else its `config.json` says, and its tokenizer, go along.

    Raises:
        ValueError: they cannot be written.
    """
    target = Path(os.path.realpath(path))  # what a link leads to is replaced, and not the link
    part, old = (target.with_name(f".{target.name}.{what}") for what in ("part", "replaced"))
    group = dist.new_group(backend="gloo", timeout=LONGEST)  # a rank may have much more to write than another
    first, config = dist.get_rank() == 0, worker.model.config

    def finish_file() -> None:
        (part / SINGLE).replace(target)
        sync(target.parent)

    def finish_folder(files: Mapping[str, str]) -> None:
        dtype = str(worker.spec.precision.parameters).removeprefix("torch.")
        content = dict(source.content) if source else to_content(config)
        content.pop("torch_dtype", None)
        (part / CONFIG).write_text(json.dumps(content | {"dtype": dtype}, indent=2) + "\n")
        if len(set(files.values())) > 1:
            size = sum((part / file).stat().st_size for file in set(files.values()))
            said = {"metadata": {"total_size": size}, "weight_map": files}
            (part / INDEX).write_text(json.dumps(said, indent=2) + "\n")
        for name in BESIDE if source else ():
            if (Path(source.path) / name).is_file():
                shutil.copyfile(Path(source.path) / name, part / name)
        sync(part)
        if others := not_replaced(target, source and source.path):  # put there meanwhile
            raise ValueError(f"holds {others[0]} now, which an export does not replace")
        if target.exists():
            target.rename(old)
        part.rename(target)
        sync(target.parent)

    if first:
        settle(target, old)
    try:
        published = None if is_file(path) else config
        files = write(worker, part, published, model, most, group)
        agreed(lambda: (finish_file() if published is None else finish_folder(files)) if first else None, group)
    except ValueError as error:
        raise ValueError(f"--export {path}: {error}; use a place with enough room") from None
    finally:
        if first:
            shutil.rmtree(part, ignore_errors=True)
            settle(target, old)
        dist.destroy_process_group(group)
    return sum(prod(shape) for shape in expected(published, model).values())
