"""How a training is laid out over the ranks: every choice that the topics leave open, in one value. Lecture 03.

tp tensor, cp context, dp data, pp pipeline parallel ranks; ep and etp fold the experts over the ranks of tp x cp x dp
"""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, wraps
from math import lcm
from operator import attrgetter
from typing import Any

from core.model.config import ModelConfig
from core.model.loss import chunk_of
from pipeline.schedules import SCHEDULES
from pipeline.split import FOLDED, parse, stages_of
from sequence_parallel.engine.recompute import KINDS
from sequence_parallel.engine.ring import PLACEMENTS
from sequence_parallel.engine.ulysses import CP_KINDS

TWO_DIRECTIONS = ("dualpipe", "dualpipev")  # an F&B is a forward of one and a backward of the other
REDUCE, RESHARD = ("microbatch", "step"), ("forward", "step")


@dataclass(frozen=True)
class Layout:
    """One layout. `cluster.rules.check` says whether it can be run."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    dp: int = 1
    v: int = 1  # stages of a rank: 2 or more of interleaved, 2 of zb-v and dualpipev
    sp: bool = False  # sequence parallelism beside tp
    ulysses: int = 1  # of the cp ranks of a sequence, how many shard its heads; the rest is a ring, or gathers
    placement: str = "zigzag"  # of a sequence's tokens on that ring
    schedule: str = "1f1b"
    zero: int = 0  # stage of ZeRO over dp x cp; 0: data parallelism
    microbatch: int = 1  # samples
    microbatches: int = 1  # of a pipeline in a step
    recompute: str = "none"
    reduce: str = "microbatch"  # of ZeRO-2 and 3: when gradients are reduced and freed
    reshard: str = "forward"  # of ZeRO-3: after what weights are freed
    loss_chunk: int = 0  # tokens whose logits are made at a time; 0: of many logits a part
    cp_kind: str = "ring"  # or all-gather: how ranks of cp with the same heads get each other's keys and values
    recompute_every: int = 1  # of how many layers one is recomputed
    split: str = ""  # of the layers over the stages, in the notation of `pipeline/split.py`; "": nearly equal

    @property
    def ranks(self) -> int:
        return self.inside * self.pp

    @property
    def by_turns(self) -> bool:
        """Whether the two of an F&B compute by turns, while rows of experts of the other are in flight."""
        return self.schedule in TWO_DIRECTIONS and self.pp > 1 and self.ep > 1

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
        """Data parallel ranks of the experts, which replicate the same ones."""
        return self.inside // (self.ep * self.etp)

    @property
    def inside(self) -> int:
        """Ranks with the same index in the pipeline, over which the experts are folded."""
        return self.tp * self.cp * self.dp

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pp * self.v

    @property
    def sequence_multiple(self) -> int:
        """What a sequence must be a multiple of, for cp."""
        ring = max(1, self.cp // max(1, self.ulysses))
        return lcm(self.cp, 2 * ring) if self.placement == "zigzag" and ring > 1 else self.cp

    @property
    def sequence_shards(self) -> int:
        """Shards of a sample's tokens between the layers' matrix products."""
        return self.cp * self.sp_ranks

    @property
    def sp_ranks(self) -> int:
        """Ranks of tp that shard the tokens between the matrix products: all with sequence parallelism, else one."""
        return self.tp if self.sp else 1

    def tokens(self, sequence: int) -> float:
        """Tokens of a microbatch on a rank, before sequence parallelism shards them."""
        return self.microbatch * sequence / self.cp

    def chunk_of_loss(self, model: ModelConfig) -> int:
        """Tokens whose logits a rank makes at a time; 0: all those of a microbatch."""
        return chunk_of(self.tokens(model.sequence), -(-model.vocabulary // self.tp), self.loss_chunk)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of rank `rank` of the pipeline."""
        return stages_of(self.schedule, self.pp, self.v, rank)

    def flags(self, after: "Layout | None" = None) -> list[str]:
        """Those of `cluster/train.py` that say this layout, without the ones at their defaults.

        Args:
            after: what the flags before these say, which these then take back.
        """
        found = []
        for field in fields(self):
            value, name = getattr(self, field.name), flag_of(field.name)
            changed = after is not None and value != getattr(after, field.name)
            if field.type is bool:
                found += [name] * value + [name.replace("--", "--no-")] * (changed and not value)
            elif changed or value != field.default or field.name in ("tp", "pp", "dp"):
                found += [name, str(value)]
        return found

    def __str__(self) -> str:
        return shlex.join(self.flags())


def alike_in(*names: str) -> Callable[[Callable], Callable]:
    """Makes a function of a model, a layout and more that is computed once for all layouts with the same of these
    fields. It sees no other: they have their defaults."""
    of = attrgetter(*names)

    def made(function: Callable) -> Callable:
        @cache
        def once(model: ModelConfig, values: tuple, *more: Any) -> Any:
            return function(model, Layout(**dict(zip(names, values, strict=True))), *more)

        @wraps(function)
        def called(model: ModelConfig, layout: Layout, *more: Any) -> Any:
            return once(model, of(layout), *more)

        called.cache_clear = once.cache_clear
        return called

    return made


def flag_of(field: str) -> str:
    """The flag of a field of `Layout`. For v as the lesson names it: torchrun takes --v for one of its own."""
    return {"v": "--chunks", "split": "--stages"}.get(field, f"--{field.replace('_', '-')}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say a layout. Left out: not decided."""
    flag = parser.add_argument_group("layout").add_argument
    for name, what in (("tp", "tensor parallel ranks"), ("cp", "context parallel ranks, of one sequence"),
                       ("ep", "ranks over which a layer's experts are sharded"),
                       ("etp", "tensor parallel ranks of an expert"), ("pp", "pipeline stages' ranks"),
                       ("ulysses", "of the cp ranks, how many shard the heads; the rest is a ring"),
                       ("dp", "data parallel ranks"), ("v", "stages of a rank of the pipeline"),
                       ("microbatch", "samples in a microbatch"),
                       ("microbatches", "microbatches of a pipeline in a step"),
                       ("recompute_every", "of how many layers one is recomputed; the others keep all"),
                       ("loss_chunk", "tokens whose logits are made at a time; 0: of many logits a part")):  # fmt: skip
        flag(flag_of(name), dest=name, type=int, help=what)
    flag(flag_of("split"), dest="split", metavar="E,t*3|t*4|t*2,L", help="layers of each stage (pipeline/split.py)")
    flag("--sp", action=argparse.BooleanOptionalAction, help="sequence parallelism beside tp")
    flag("--zero", type=int, choices=range(4), help="stage of ZeRO; 0: data parallelism")
    flag(
        "--reduce", choices=REDUCE, help="ZeRO-2 and 3: gradients reduced and freed after each microbatch, or added up"
    )
    flag("--cp-kind", choices=CP_KINDS, help="keys and values go round a ring, or are gathered as in Llama 3")
    flag("--reshard", choices=RESHARD, help="ZeRO-3: weights freed after each forward and backward, or after the step")
    flag("--recompute", choices=KINDS, help="what a layer computes again in backward, see sequence_parallel/engine")
    for name, choices in (("placement", PLACEMENTS), ("schedule", tuple(SCHEDULES))):
        flag(f"--{name}", choices=choices)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Layout` that the flags decide."""
    named = {field.name: getattr(args, field.name, None) for field in fields(Layout)}
    return {name: value for name, value in named.items() if value is not None}


def layout_from(
    args: argparse.Namespace, world: int | None, batch: int | None, experts: bool = False, microbatch: int | None = None
) -> Layout:
    """The layout of the flags of `add_flags`; what they leave open follows from the rest. It may break a rule.

    dp takes the ranks that are left, the microbatches the samples that are left.

    Args:
        world: ranks; None: as many as the flags say.
        batch: samples in a step; None: as many as the flags say.
        experts: whether the model has experts: beside tp, then, is sp, with which least is sent.
        microbatch: samples of a microbatch where no flag says it. None: so many that a pipeline has two microbatches
            a rank, and all samples where there is no pipeline.
    """
    decided = given(args)
    layout = Layout(**decided)
    if "sp" not in decided and experts and layout.tp > 1:
        layout = replace(layout, sp=True)
    layout = replace(layout, **follows_from_split(layout, decided))
    usual = (*FOLDED, "interleaved") if not layout.split else FOLDED  # stages that are written out are counted
    if "v" not in decided and layout.v == 1 and layout.pp > 1 and layout.schedule in usual:
        layout = replace(layout, v=2)
    ranks_but_dp = layout.tp * layout.cp * layout.pp
    if "dp" not in decided and world and ranks_but_dp > 0:
        layout = replace(layout, dp=max(1, world // ranks_but_dp))
    if not batch:
        return layout
    samples = batch // max(1, layout.dp)  # of a pipeline
    if "microbatches" not in decided:
        microbatch = decided.get("microbatch", microbatch)
        layout = replace(layout, microbatches=microbatches_of(samples, layout.pp, microbatch))
    if "microbatch" not in decided and layout.microbatches > 0:
        layout = replace(layout, microbatch=max(1, samples // layout.microbatches))
    return layout


def follows_from_split(layout: Layout, decided: dict[str, Any]) -> dict[str, int]:
    """Ranks of the pipeline, and stages a rank of interleaved, where no flag says them and `--stages` does."""
    try:
        stages = len(parse(layout.split)) if layout.split else 0
    except ValueError:
        return {}  # a rule refuses it
    v = decided.get("v", 2 if layout.schedule in FOLDED else 1)
    if stages and "pp" not in decided and v > 0 and stages % v == 0 and layout.schedule != "interleaved":
        return {"pp": stages // v}
    if stages and "v" not in decided and layout.schedule == "interleaved" and stages % max(1, layout.pp) == 0:
        return {"v": stages // max(1, layout.pp)}
    return {}


def microbatches_of(samples: int, pp: int, microbatch: int | None) -> int:
    """How many microbatches the samples of a pipeline are: of `microbatch` samples, or about two a rank."""
    if microbatch is not None:
        return max(1, samples // max(1, microbatch))
    if pp == 1:
        return 1
    return max(m for m in range(1, max(1, min(2 * pp, samples)) + 1) if m == 1 or samples % m == 0)
