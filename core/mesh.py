"""Named axes over the ranks: which ranks share a tensor, a sequence, a batch, a pipeline. Lecture 03.

Megatron's order string says which axis varies fastest: in `tp-cp-ep-dp-pp` neighbouring ranks differ in tp. Expert
layers fold the same ranks differently: the dense world is tp x cp x dp x pp, the expert world etp x ep x edp x pp.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from core.engine import neighbours
from core.ledger import Ledger
from core.proof.rulebook import AXES, EXPERT_RANKS, RANKS
from core.proof.rules import check

ORDER = "tp-cp-ep-dp-pp"
DENSE = ("tp", "cp", "dp", "pp")
EXPERT = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}  # name in the order string: axis of the expert world


@dataclass(frozen=True)
class Axis:
    """This rank's group of ranks along one axis. `group` is None where the axis has one rank and nothing is sent."""

    name: str
    ranks: tuple[int, ...]  # global ranks along the axis
    index: int  # this rank's index among them
    group: dist.ProcessGroup | None
    ledger: Ledger
    timeout: timedelta  # of every wait

    @property
    def size(self) -> int:
        return len(self.ranks)

    def labelled(self, label: str) -> "Axis":
        """The same ranks, whose traffic the ledger keeps apart as that of one module of the model."""
        return replace(self, name=f"{self.name} {label}")

    def split(self, inner: int) -> tuple["Axis", "Axis"]:
        """Groups of `inner` neighbouring ranks: (this rank's group, the ranks of its index in every group).

        All ranks of the axis must call it at the same time.

        Raises:
            ValueError: the groups would not be equal.
        """
        if inner < 1 or self.size % inner:
            raise ValueError(f"{self.size} ranks cannot be split into groups of {inner}; use a divisor of {self.size}")
        group, index = divmod(self.index, inner)
        ranks = self.ranks[group * inner : (group + 1) * inner], self.ranks[index::inner]
        return _along(f"{self.name} inner", ranks[0], [self]), _along(f"{self.name} outer", ranks[1], [self])


def _along(name: str, ranks: Sequence[int], known: Sequence[Axis]) -> Axis:
    """The axis over `ranks`, this one among them. Its group is that of the known axis with the same ranks, or new."""
    ledger, timeout, me = known[0].ledger, known[0].timeout, known[0].ranks[known[0].index]
    group = next((axis.group for axis in known if axis.ranks == (*ranks,)), None)
    if group is None and len(ranks) > 1:  # only these ranks take part
        group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return Axis(name, (*ranks,), ranks.index(me), group, ledger, timeout)


def axis_sizes(
    world_size: int, *, tp: int = 1, cp: int = 1, dp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1
) -> dict[str, int]:
    """All axis sizes, with edp derived.

    Raises:
        ValueError: the dense axes do not multiply to the number of ranks, or ep x etp does not divide tp x cp x dp.
    """
    sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "ep": ep, "etp": etp}
    inside = tp * cp * dp  # ranks of one pipeline stage
    check(SimpleNamespace(**sizes, inside=inside, ranks=inside * pp, world=world_size), (*AXES, RANKS, EXPERT_RANKS))
    return sizes | {"edp": inside // (ep * etp)}


def axis_names(order: str, *, expert: bool) -> list[str]:
    """The axes of the dense world or the expert's, the fastest varying first.

    Raises:
        ValueError: the order string does not name each axis once.
    """
    axes = order.split("-")
    if sorted(axes) != sorted(ORDER.split("-")):
        raise ValueError(f"--order {order}: must name each of tp, cp, ep, dp and pp once; use --order {ORDER}")
    names = [EXPERT.get(p) for p in axes] if expert else [p if p in DENSE else None for p in axes]
    return [name for name in names if name]


def is_expert(kind: str) -> bool:
    """Whether a kind of group, such as "dp-cp" or "ep", is one of the expert world."""
    return not set(kind.split("-")) <= set(DENSE)


def axis_groups(sizes: dict[str, int], kind: str, order: str = ORDER, expert: bool = False) -> list[list[int]]:
    """All groups of ranks that differ along the axes of `kind` only, such as "dp" or "dp-cp"; needs no process.

    A rank is the sum of its index x stride over the axes. The stride of an axis is the product of the sizes before it
    in the order string. `kind` is a mask over the axes: where it holds, the index runs inside a group; where it does
    not, the index says which group. In the dense world, or the expert's if `expert` or if `kind` has an axis of it.
    """
    masked, names = kind.split("-"), axis_names(order, expert=expert or is_expert(kind))
    assert set(masked) <= set(names), f"{kind}: the axes of one world are {', '.join(names)}"
    inside, groups, stride = [0], [0], 1
    for name in names:
        steps = range(0, sizes[name] * stride, stride)
        if name in masked:
            inside = [step + offset for step in steps for offset in inside]
        else:
            groups = [step + first for step in steps for first in groups]
        stride *= sizes[name]
    return [[first + offset for offset in inside] for first in groups]


def check_pipelines(sizes: dict[str, int], order: str) -> None:
    """Raises ValueError unless both worlds have the same pipelines, so that a stage holds its own experts."""
    if axis_groups(sizes, "pp", order) != axis_groups(sizes, "pp", order, expert=True):
        raise ValueError(f"--order {order}: pp must be the same in both worlds; use --order {ORDER}")


class Mesh:
    """The axes of this rank, as `mesh["pp"]`. Groups are made for axes of more than one rank, by DeviceMesh.

    Every rank of the job must build it at the same time, with the same sizes (see `axis_sizes`). The axes of the
    expert world (ep, etp, edp) exist where ep or etp is given. No wait over an axis takes more than `timeout` seconds.

    Raises:
        ValueError: the sizes do not fit the ranks, or the order would put an expert group across pipeline stages.
    """

    def __init__(self, device_type: str, ledger: Ledger, timeout: float, order: str = ORDER, **sizes: int):
        self.sizes = axis_sizes(dist.get_world_size(), **sizes)
        self.order = order
        limit = timedelta(seconds=timeout)
        check_pipelines(self.sizes, order)
        neighbours.meet(timeout)
        self._axes: dict[str, Axis] = {}
        for expert in (False, True) if {"ep", "etp"} & set(sizes) else (False,):
            names = axis_names(order, expert=expert)[::-1]  # an array's last index varies fastest
            wide = [n for n in names if self.sizes[n] > 1]
            shape = [self.sizes[n] for n in wide]
            ranks = torch.arange(dist.get_world_size()).reshape(shape)
            if "cuda:gloo" in dist.get_backend_config():  # CPU, or GPUs that ranks share, see `core.proof.host`
                device_type = "cpu"
            device_mesh = DeviceMesh(device_type, ranks, mesh_dim_names=(*wide,)) if wide else None
            for name in names:
                if name not in self._axes:  # pp is in both worlds, with the same groups
                    group, here = device_mesh.get_group(name) if name in wide else None, dist.get_rank()
                    along = (*dist.get_process_group_ranks(group),) if group else (here,)
                    if group is not None:  # DeviceMesh takes no timeout; NCCL's watchdog reads this one
                        dist.distributed_c10d._set_pg_timeout(limit, group)
                    self._axes[name] = Axis(name, along, along.index(here), group, ledger, limit)

    def __getitem__(self, name: str) -> Axis:
        return self._axes[name]

    def joined(self, *names: str) -> Axis:
        """Several axes of the dense world as one, in the order of the ranks: gradients are summed over dp and cp.

        All ranks of the job must call it at the same time.
        """
        groups = axis_groups(self.sizes, "-".join(names), self.order)
        ranks = next(group for group in groups if dist.get_rank() in group)
        return _along(" x ".join(names), ranks, [self[name] for name in names])
