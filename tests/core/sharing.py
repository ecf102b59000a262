"""As if ranks shared a GPU, on a CPU: what would be on the host is marked, and only messages may read it.

python tests/core/sharing.py LESSON FLAG...      a rank of a lesson, with torchrun's environment
"""

import functools
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from core.engine import direct
from core.proof import host

COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single", "isend", "irecv",
               "send", "recv")  # fmt: skip


class OnHost(torch.Tensor):
    """A tensor that messages may read, and what copies it: a kernel of the device could not."""

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        assert name in ("copy_", "__get__"), f"{name} reads a tensor that is on the host"
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


seen: dict[str, int] = {}


@contextmanager
def shared() -> Iterator[None]:
    """As if all tensors were on a GPU that ranks share; every tensor handed to a collective must be on the host."""
    pinned = host.pinned

    def only_host(name: str) -> Callable:
        right = getattr(dist, name)

        @functools.wraps(right)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for each in args:
                assert not isinstance(each, Tensor) or isinstance(each, OnHost), f"{name} of a tensor on the device"
            seen[name] = seen.get(name, 0) + 1
            with torch._C.DisableTorchFunctionSubclass():
                return right(*args, **kwargs)

        return checked

    with ExitStack() as entered:
        enter = entered.enter_context
        enter(patch.object(host, "is_needed", lambda x, group: not isinstance(x, OnHost)))
        enter(patch.object(host, "pinned", lambda x: pinned(x).as_subclass(OnHost)))
        for name in COLLECTIVES:
            checked = only_host(name)
            for module in (dist, dist.distributed_c10d):  # a batch asks which of the two it is
                enter(patch.object(module, name, checked))
        yield


def far() -> AbstractContextManager:
    """As if no other rank were on this machine: all goes over gloo."""
    return patch.object(direct, "among", lambda ranks: None)


if __name__ == "__main__":
    del sys.argv[0]
    try:
        with shared():
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"{sum(seen.values())} messages through the host", file=sys.stderr)
