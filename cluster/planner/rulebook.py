"""The rules of a layout. Lecture 03. `cluster.rules` applies and explains them.

What a lesson refuses too is refused by the same rule: of several topics (`core/proof/rulebook.py`), or of one.
`tests/cluster/test_rules.py` compares them. A rule that is advice never refuses: without it a layout runs, but slowly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from cluster.planner.hardware import Machine
from cluster.planner.layout import FOLDED, Layout
from core.model.config import ModelConfig
from core.proof import rules
from core.proof.rulebook import (
    AXES,
    BATCH,
    DROPOUT,
    EP_EXPERTS,
    ETP_FEATURES,
    EXPERT_RANKS,
    HEADS,
    ONE_EXPERT,
    RANKS,
    SP_SEQUENCE,
    TOP_K,
    TP_FEED_FORWARD,
    TP_HEADS,
    TP_KV_HEADS,
    axis,
)
from core.proof.rules import Rule, at_least
from pipeline.evidence.rules import CHUNKS, DUALPIPE
from pipeline.split import PP_LAYERS, SPLIT, sizes_of
from sequence_parallel.evidence.rules import CP_ATTENTION, CP_HEADS, CP_SEQUENCE, CP_ULYSSES, SP_RANKS


@dataclass(frozen=True)
class Case:
    """A layout of a model on so many ranks of a machine. None: not decided, and then no rule is broken by it."""

    layout: Layout
    model: ModelConfig
    machine: Machine | None = None
    world: int | None = None
    batch: int | None = None

    @property
    def sizes(self) -> SimpleNamespace:
        """What a rule may look at: the fields of `Layout` and `ModelConfig`, and what follows from them."""
        layout, model = self.layout, self.model
        return SimpleNamespace(
            **vars(model) | vars(layout) | sizes_of(layout.split, map(layout.stages_of, range(layout.pp))),
            chunks=layout.v,
            query_groups=model.query_groups,
            expert_size=model.expert_size,
            ranks=layout.ranks,
            stages=layout.stages,
            inside=layout.inside,
            twice=2 * layout.pp,
            samples=layout.batch,
            sequence_multiple=layout.sequence_multiple,
            stages_of_schedule=2 if layout.schedule in FOLDED else 1,
            world=layout.ranks if self.world is None else self.world,
            batch=layout.batch if self.batch is None else self.batch,
            node=self.machine.node if self.machine else 0,
        )


def where(has: Callable[[Any], bool], rule: Rule, flags: str) -> Rule:
    """A lesson's rule, for the layouts that have what the lesson is about."""
    return replace(rule, flags=flags, holds=lambda x: not has(x) or rule.holds(x), use=None)


POSITIVE = (
    *AXES,
    axis("ulysses"),
    CHUNKS,
    Rule(
        "microbatches",
        "--microbatches {microbatches} --microbatch {microbatch}",
        lambda x: x.microbatches >= 1 and x.microbatch >= 1,
        "must be at least 1",
        source="lecture 07",
    ),
    replace(at_least("loss-chunk", 0, 0), source="core/model/loss.py"),
    replace(at_least("recompute-every", 1, 1), source="sequence_parallel/engine/recompute.py"),
)  # without these the others mean nothing

BATCHES = (
    BATCH,
    Rule(
        "batch: microbatch",
        "--batch {batch}",
        lambda x: x.batch == x.samples,
        "--dp {dp} x --microbatches {microbatches} x --microbatch {microbatch} = {samples} samples",
        source="lecture 07",
        peer="Megatron-LM, num_microbatches_calculator.py: not divisible by micro batch size times data parallel size",
    ),
)

TENSOR = (
    TP_HEADS,
    TP_KV_HEADS,
    TP_FEED_FORWARD,
    Rule(
        "tp: fast links",
        "--tp {tp}",
        lambda x: x.node % x.tp == 0,
        "a layer waits for its all-reduces over tp, which belong on the fast links of {node} ranks",
        source="2104.04473, takeaway 1",
        advice=True,
    ),
    where(lambda x: x.sp, SP_RANKS, "--sp --tp {tp}"),
    SP_SEQUENCE,
)

CONTEXT = (
    where(lambda x: x.cp > 1, CP_ATTENTION, "--cp {cp} --attention {attention}"),
    CP_ULYSSES,
    replace(
        CP_HEADS,
        flags="--ulysses {ulysses} --tp {tp} --heads {heads}",
        holds=lambda x: x.heads % (x.tp * x.ulysses) == 0,
        use=None,
    ),
    replace(CP_SEQUENCE, flags="--cp {cp} --sequence {sequence}"),
)

PIPELINE = (
    PP_LAYERS,
    Rule(
        "pp: several stages",
        "--chunks {v} --pp {pp}",
        lambda x: x.v == 1 or x.pp > 1,
        "several stages a rank shrink a pipeline's bubble, and one rank has none",
        source="2104.04473, section 2.2.2",
        peer="Megatron-LM, validate_args: when interleaved pipeline-model-parallel size should be greater than 1",
    ),
    Rule(
        "pp: schedule",
        "--schedule {schedule} --chunks {v}",
        lambda x: x.v == x.stages_of_schedule or x.schedule == "interleaved",
        "zb-v and dualpipev hold two stages a rank, interleaved what --chunks says, the others one",
        source="lecture 08",
        peer="torchtitan, pipeline_parallel.py: exactly 1 stage per rank; torch: ZBV requires exactly 2",
    ),
    *SPLIT,
    Rule(
        "pp: microbatches",
        "--microbatches {microbatches} --pp {pp}",
        lambda x: x.microbatches >= x.pp,
        "with fewer microbatches than ranks a pipeline never fills",
        source="lecture 07",
        advice=True,
    ),
    *(replace(rule, flags="--schedule {schedule} --pp {pp} --microbatches {microbatches}") for rule in DUALPIPE),
)

ZERO = (
    Rule(
        "zero: reduce",
        "--zero {zero} --reduce {reduce}",
        lambda x: x.zero >= 2 or x.reduce == "microbatch",
        "below stage 2 gradients are added up over the step anyway",
        lambda x: "--zero 2, or no --reduce",
        source="lecture 01",
        peer="cannot be: there is no shard that a micro-batch's gradients could be reduced into",
    ),
    Rule(
        "zero: reshard",
        "--zero {zero} --reshard {reshard}",
        lambda x: x.zero == 3 or x.reshard == "forward",
        "below stage 3 every rank has all weights",
        lambda x: "--zero 3, or no --reshard",
        source="lecture 01",
        peer="cannot be: no weight has been gathered that could be freed",
    ),
)

RECOMPUTE = (
    Rule(
        "recompute: every",
        "--recompute {recompute} --recompute-every {recompute_every}",
        lambda x: x.recompute != "none" or x.recompute_every == 1,
        "no layer is recomputed",
        lambda x: "--recompute full, or no --recompute-every",
        source="torchtitan, activation_checkpoint.py",
        peer="cannot be: of no recomputation there is no every second one",
    ),
    Rule(
        "recompute: layers",
        "--recompute-every {recompute_every} --layers {layers}",
        lambda x: x.recompute_every <= x.layers,
        "of fewer layers none is recomputed",
        lambda x: f"--recompute-every {x.layers}, or less",
        source="torchtitan, activation_checkpoint.py",
        peer="cannot be: the layer to recompute is not there",
    ),
)

EXPERTS = (
    EXPERT_RANKS,
    ETP_FEATURES,
    EP_EXPERTS,
    ONE_EXPERT,
    TOP_K,
)

MEANINGFUL = (
    RANKS,
    *BATCHES,
    HEADS,
    DROPOUT,
    *TENSOR,
    *CONTEXT,
    *PIPELINE,
    *ZERO,
    *RECOMPUTE,
    *EXPERTS,
)  # where sizes are positive
RULES = (*POSITIVE, *MEANINGFUL)
REFUSING = tuple(rule for rule in MEANINGFUL if not rule.advice)


def keeps_all(case: Case, rules: Sequence[Rule] = REFUSING) -> bool:
    """Whether a layout of positive sizes breaks none of these rules. A search asks for every one: it stops at the
    first."""
    sizes = case.sizes
    return all(rule.holds(sizes) for rule in rules)


def broken(case: Case, advice: bool = False) -> list[Rule]:
    """The rules that do not hold, with those that are advice or without."""
    sizes = case.sizes
    return list(rules.broken(sizes, POSITIVE)) or list(rules.broken(sizes, MEANINGFUL if advice else REFUSING))
