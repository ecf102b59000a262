"""Lecture 02: the weights that a combined run starts with, from a published folder or one file of our own names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from cluster.run.hf import FLOATS, Folder, check_numbers, expected
from cluster.run.worker import Worker
from core.model.gpt import GPT
from core.proof.checkpoint import LONGEST, agreed
from core.proof.chunks import Chunks
from core.proof.files import check_readable


def load_published(worker: Worker, folder: Folder, model: GPT) -> None:
    """Read the weights of a published folder into a worker of any layout. All ranks call it.

    Args:
        model: all of it, on the meta device.

    Raises:
        ValueError: they are not those of the model.
    """

    def read() -> None:
        tensors = folder.tensors(model)
        if dist.get_rank() == 0:
            folder.check_head(tensors)
        folder.read({each.name: Chunks(each) for each in worker.master_weights()}, tensors)

    _read_by_all(worker, read)


def check_init(path: str, model: GPT) -> None:
    """Raises ValueError unless a file of our own names has the weights of a model, which may be on the meta device."""
    same = "use a file of the same model"
    shapes = expected(None, model)
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no dictionary
            if name not in shapes:
                raise ValueError(f"--init {path}: has {name}, which this model has not; {same}")
        for name, shape in shapes.items():
            found = file.get_slice(name) if name in file.keys() else None  # noqa: SIM118
            if found is None or tuple(found.get_shape()) != shape:
                has = found.get_shape() if found else "missing"
                raise ValueError(f"--init {path}: {name} is {has}, not {list(shape)}; {same}")
            if found.get_dtype() not in FLOATS:
                kinds = ", ".join(FLOATS)
                raise ValueError(f"--init {path}: {name} is of type {found.get_dtype()}; use one of {kinds}")


def load_export(worker: Worker, path: str) -> None:
    """Read the weights, and nothing else, of a file of our own names into a worker of any layout. All ranks call it.

    Args:
        path: of a file that `check_init` accepts.

    Raises:
        ValueError: a weight is no number.
    """
    weights = {each.name: Chunks(each) for each in worker.master_weights()}
    _read_by_all(worker, lambda: _read(path, weights))


def _read_by_all(worker: Worker, read: Callable[[], None]) -> None:
    group = dist.new_group(backend="gloo", timeout=LONGEST)
    agreed(read, group)
    dist.destroy_process_group(group)
    worker.publish()


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    check_readable(f"--init {path}", path, "use one that --export wrote")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        use = "use one that --export wrote"
        raise ValueError(f"--init {path}: is no safetensors file, or truncated: {error}; {use}") from None


def _read(path: str, weights: dict[str, Chunks]) -> None:
    """Each rank reads the chunks that it has."""
    with _opened(path) as file:
        for name, each in weights.items():
            found = file.get_slice(name)
            for offset, view in each.views.items():
                ranges = (slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))
                view.copy_(check_numbers(found[tuple(ranges)], f"--init {path}: {name}"))
