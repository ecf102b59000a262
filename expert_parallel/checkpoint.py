"""CODE 04: weights on disk, and from one layout of the experts to another (专家并行大规模训练).

A checkpoint is a folder with a file a rank: of each parameter this rank's part, and which part that is. To convert a
layout is to join the parts and to cut again; it needs no process group.
"""

import io
from collections.abc import Mapping
from dataclasses import astuple, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis, axis_groups, axis_sizes
from core.model.gpt import GPT, GPTConfig
from core.proof.files import write_file
from core.shards import LocalTensor, Shard, full_tensors, shard_of
from expert_parallel.gating import Spread
from expert_parallel.layers import parallelize
from expert_parallel.moe import MoEConfig, to_moe

Weights = dict[str, Tensor]  # whole parameters by name


def write(folder: Path, rank: int, pieces: list[LocalTensor]) -> None:
    """This rank's file: {name: [part, of which part each cut is (dim, index, count, size), the outermost last]}."""
    held: dict[str, tuple[Tensor, list[tuple[int, ...]]]] = {}
    for name, value, mark in pieces:
        cuts = []
        while mark:
            cuts.append(astuple(replace(mark, parent=None))[:4])
            mark = mark.parent
        held[name] = (value.detach().cpu().clone(), cuts)
    buffer = io.BytesIO()
    torch.save(held, buffer)
    write_file(str(folder / f"rank{rank:05d}.pt"), buffer.getvalue())


def read(folder: Path) -> Weights:
    """The whole parameters.

    Raises:
        ValueError: a file is missing, or the parts of a parameter do not make a whole.
    """
    pieces: list[LocalTensor] = []
    for path in sorted(folder.glob("rank*.pt")):
        for name, (value, cuts) in torch.load(path, weights_only=True).items():
            mark = None
            for cut in reversed(cuts):
                mark = Shard(*cut, parent=mark)
            pieces.append(LocalTensor(name, value, mark))
    whole = dict(full_tensors(pieces))
    if missing := sorted({piece.name for piece in pieces} - set(whole)) or (["anything"] if not pieces else []):
        raise ValueError(f"{folder}: lacks a part of {missing[0]}; use the files of all ranks")
    return whole


def cut(
    weights: Mapping[str, Tensor], config: GPTConfig, moe: MoEConfig, ranks: int, ep: int, etp: int
) -> list[list[LocalTensor]]:
    """What each of `ranks` ranks holds, where the experts are spread over ep x etp of them. Needs no process."""
    sizes = axis_sizes(ranks, dp=ranks, ep=ep, etp=etp)
    parts = []
    for rank in range(ranks):
        lines = {name: next(line for line in axis_groups(sizes, name) if rank in line) for name in ("ep", "etp")}
        axes = (Axis(n, (*line,), line.index(rank), None, Ledger(), timedelta(0)) for n, line in lines.items())
        model = parallelize(to_moe(GPT(config), moe), *axes, Spread())
        marks = {name: shard_of(p) for name, p in model.named_parameters()}
        parts.append([LocalTensor(n, m.local(weights[n]) if m else weights[n], m) for n, m in marks.items()])
    return parts


def convert(source: Path, target: Path, config: GPTConfig, moe: MoEConfig, ranks: int, ep: int, etp: int = 1) -> None:
    """Read a checkpoint of any layout and write it as one of this layout.

    Raises:
        ValueError: the target holds a checkpoint already, whose other ranks' files would stay among the new ones; the
            source is not whole; or the layout is not possible.
    """
    target.mkdir(exist_ok=True)
    if any(target.glob("rank*.pt")):
        raise ValueError(f"{target}: holds a checkpoint, and a file of it could stay; use a new folder")
    for rank, pieces in enumerate(cut(read(source), config, moe, ranks, ep, etp)):
        write(target, rank, pieces)


def load(model: GPT, weights: Mapping[str, Tensor]) -> GPT:
    """Give a real model, or this rank's part of one, these weights."""
    for name, p in model.named_parameters():
        mark = shard_of(p)
        p.data.copy_(mark.local(weights[name]) if mark else weights[name])
    return model
