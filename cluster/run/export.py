"""Lecture 02: the weights of a combined run as one safetensors file, out and in (Megatron-LM 代码概览)."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster.run.worker import Worker
from core.proof.checkpoint import agreed, chunks_of
from core.proof.chunks import Chunks, load, read_index, save
from core.proof.launch import Job


def export(worker: Worker, job: Job, path: str) -> None:
    """Write the full weights, in the precision of the update. All ranks call it.

    The ranks write their shards as a checkpoint beside the file, which rank 0 reads into memory-mapped files: not even
    it need have the full weights in its memory.

    Raises:
        ValueError: they cannot be written.
    """
    target = Path(path)
    shards, full, part = (target.with_name(f".{target.name}.{what}") for what in ("shards", "full", "part"))
    first = job.rank == 0
    weights = {n: each for n, each in chunks_of(worker, worker.saved_elsewhere()).items() if n.startswith("weights|")}

    def remove() -> None:
        for folder in (shards, full):
            shutil.rmtree(folder, ignore_errors=True)

    def join() -> None:
        full.mkdir()
        tensors = {}
        for i, (name, each) in enumerate(read_index(shards).items()):
            file, dtype = str(full / str(i)), each.properties.dtype
            tensors[name] = torch.from_file(file, shared=True, size=each.size.numel(), dtype=dtype).view(each.size)
        load(shards, tensors)
        save_file({name.removeprefix("weights|"): value for name, value in tensors.items()}, part)
        part.replace(target)

    agreed(lambda: remove() if first else None)
    try:
        save(shards, weights)
        agreed(lambda: join() if first else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        if first:
            remove()


def load_export(worker: Worker, path: str) -> None:
    """Read the weights, and nothing else, of such a file into a worker of any layout. All ranks call it.

    Raises:
        ValueError: it is no such file, or truncated, or of another model.
    """
    weights = {each.name: Chunks(each) for each in worker.master_weights()}
    everywhere = {name for names in agreed(lambda: list(weights)) for name in names}
    agreed(lambda: _read(path, weights, everywhere))
    worker.publish()


def _read(path: str, weights: dict[str, Chunks], everywhere: set[str]) -> None:
    """Each rank reads the chunks that it has."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            if more := sorted(found.keys() - everywhere):
                raise ValueError(f"{path}: has {more[0]}, which this model has not; use a file of the same model")
            for name, each in weights.items():
                shape = found[name].get_shape() if name in found else "missing"
                if shape != list(each.shape):
                    use = "use a file of the same model"
                    raise ValueError(f"{path}: {name} is {shape}, not {list(each.shape)}; {use}")
            for name, each in weights.items():
                for offset, view in each.views.items():
                    ranges = (slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))
                    view.copy_(found[name][tuple(ranges)])
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file, or truncated: {error}; use one that export wrote") from None
