"""How a training is laid out over the ranks: every choice that the topics leave open, in one value. Lecture 03.

tp tensor, cp context, dp data, pp pipeline parallel ranks; ep and etp fold the experts over the ranks of tp x cp x dp
"""

import argparse
from dataclasses import dataclass, fields
from math import lcm

from pipeline.schedules import SCHEDULES
from sequence_parallel.recompute import KINDS
from sequence_parallel.ring import PLACEMENTS

FOLDED = ("zb-v", "dualpipev")  # rank r holds stages r and 2p-1-r


@dataclass(frozen=True)
class Layout:
    """One layout. `cluster.rules.check` says whether it can be run."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    dp: int = 1
    v: int = 1  # stages a rank holds: 2 or more of interleaved, 2 of zb-v and dualpipev
    sp: bool = False  # sequence parallelism beside tp
    ulysses: int = 1  # of the cp ranks of a sequence, how many cut its heads; the rest is a ring
    placement: str = "zigzag"  # of a sequence's tokens on that ring
    schedule: str = "1f1b"
    zero: int = 0  # stage of ZeRO over dp x cp; 0: data parallelism
    microbatch: int = 1  # samples
    microbatches: int = 1  # of a pipeline in a step
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def batch(self) -> int:
        """Samples in a step."""
        return self.dp * self.microbatch * self.microbatches

    @property
    def data(self) -> int:
        """Ranks that sum their gradients: each has seen other tokens."""
        return self.dp * self.cp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pp * self.v

    @property
    def pieces(self) -> int:
        """What a sequence must be a multiple of, for cp."""
        ring = max(1, self.cp // max(1, self.ulysses))
        return lcm(self.cp, 2 * ring) if self.placement == "zigzag" and ring > 1 else self.cp

    @property
    def sequence_parts(self) -> int:
        """Into how many parts a sample's tokens are cut between the layers' matrix products."""
        return self.cp * (self.tp if self.sp else 1)

    def held(self, rank: int) -> list[int]:
        """The stages that rank `rank` of the pipeline holds."""
        if self.schedule in FOLDED:
            return [rank, 2 * self.pp - 1 - rank]
        if self.schedule == "dualpipe":
            return sorted({rank, self.pp - 1 - rank})
        return [chunk * self.pp + rank for chunk in range(self.v)]

    def flags(self) -> list[str]:
        """Those of `cluster/train.py` that say this layout, without the ones at their defaults."""
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                found += [flag_of(field.name)] * value
            elif value != field.default or field.name in ("tp", "pp", "dp"):
                found += [flag_of(field.name), str(value)]
        return found

    def __str__(self) -> str:
        return " ".join(self.flags())


def flag_of(field: str) -> str:
    """The flag of a field of `Layout`. For v as the lesson names it: torchrun takes --v for one of its own."""
    return "--chunks" if field == "v" else f"--{field}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say a layout. Left out: not decided, or as in `Layout` where that is what is asked."""
    flag = parser.add_argument_group("layout").add_argument
    for name, what in (("tp", "tensor parallel ranks"), ("cp", "context parallel ranks, of one sequence"),
                       ("ep", "ranks over which a layer's experts are dealt out"),
                       ("etp", "tensor parallel ranks of an expert"), ("pp", "pipeline stages' ranks"),
                       ("ulysses", "of the cp ranks, how many cut the heads; the rest is a ring"),
                       ("dp", "data parallel ranks"), ("v", "stages a rank of the pipeline holds"),
                       ("microbatch", "samples in a microbatch"),
                       ("microbatches", "microbatches of a pipeline in a step")):  # fmt: skip
        flag(flag_of(name), dest=name, type=int, help=what)
    flag("--sp", action=argparse.BooleanOptionalAction, help="sequence parallelism beside tp")
    flag("--zero", type=int, choices=range(4), help="stage of ZeRO; 0: data parallelism")
    for name, choices in (("placement", PLACEMENTS), ("schedule", tuple(SCHEDULES)), ("recompute", KINDS)):
        flag(f"--{name}", choices=choices)


def given(args: argparse.Namespace) -> dict[str, object]:
    """What the flags decide."""
    named = {field.name: getattr(args, field.name, None) for field in fields(Layout)}
    return {name: value for name, value in named.items() if value is not None}
