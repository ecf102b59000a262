"""What lecture 06 refuses. A case has tp, cp, ulysses, placement and the flags of a model as attributes."""

import argparse
from dataclasses import replace
from math import lcm
from types import SimpleNamespace
from typing import Any

from core.proof.arguments import check_cuts, check_model
from core.proof.rulebook import TP_FEED_FORWARD
from core.proof.rules import Rule, broken, check
from sequence_parallel.context import NEEDS_SDPA


def sequence_multiple(case: Any) -> int:
    """What a sample must be a multiple of: equal shards on all ranks, and two chunks a member of a zigzag ring."""
    ring = case.cp // case.ulysses
    return lcm(case.cp, 2 * ring) if case.placement == "zigzag" and ring > 1 else case.cp


def degrees(case: Any) -> str:
    """The degrees of Ulysses that divide the ranks, and the heads where these are known."""
    heads = max(getattr(case, "heads", 0), 0)
    return ", ".join(str(u) for u in range(1, case.cp + 1) if case.cp % u == 0 == heads % u)


def several_ranks(case: Any) -> str:
    """The fewest ranks that have equal shards, or else sizes that two ranks can shard."""
    sizes = (case.heads, case.sequence, case.feed_forward)
    usable = (t for t in range(2, max(case.heads, 2) + 1) if not any(size % t for size in sizes))
    return f"--nproc_per_node {next(usable, '2 --heads 8 --sequence 64')}"


SP_RANKS = Rule(
    "sp: tp",
    "--nproc_per_node {tp}",
    lambda case: case.tp > 1,
    "sequence parallelism shards what tensor parallelism replicates, and needs its ranks",
    several_ranks,
    "2205.05198, 4.2.2",
    peer="Megatron-LM, ModelParallelConfig: cannot use sequence parallelism without tensor parallelism",
)
CP_ATTENTION = Rule(
    "cp: attention",
    "--attention {attention}",
    lambda case: case.attention == "sdpa",
    NEEDS_SDPA,
    lambda case: "--attention sdpa --dropout 0",
    "lecture 06",
    peer="Megatron-LM, DotProductAttention: context parallelism is only supported by TEDotProductAttention",
)
CP_ULYSSES = Rule(
    "cp: ulysses",
    "--ulysses {ulysses}",
    lambda case: case.ulysses >= 1 and case.cp % case.ulysses == 0,
    "the {cp} ranks are a ring of groups of so many",
    lambda case: f"--ulysses one of {degrees(case)}",
    "2309.14509; 2310.01889",
    peer="Megatron-LM, validate_args: context_parallel_size == prod(hierarchical_context_parallel_sizes)",
)
CP_HEADS = Rule(
    "cp: heads",
    "--heads {heads}",
    lambda case: min(case.heads, case.hidden) >= 1 and case.heads % case.ulysses == 0 and case.hidden % case.heads == 0,
    "heads must divide --hidden and be a multiple of the {ulysses} ranks over which they are sharded",
    source="2309.14509, section 3.1",
    peer="DeepSpeed, UlyssesSPAttentionHF: attention head count is not divisible by SP size",
)
CP_SEQUENCE = Rule(
    "cp: sequence",
    "--sequence {sequence}",
    lambda case: case.sequence >= 1 and case.sequence % sequence_multiple(case) == 0,
    "the sequence is sharded and must be a multiple of {sequence_multiple}",
    source="2310.01889; 2407.21783, 3.3.2",
    peer="Megatron-LM, validate_args: seq_length % (context_parallel_size * 2)",
)
SP_FEED_FORWARD = replace(
    TP_FEED_FORWARD,
    flags="--feed-forward {feed_forward}",
    reason="Megatron SP shards it over {tp} ranks",
    use=lambda case: "--feed-forward 0",  # fits wherever heads do
)
PAPER_FEED_FORWARD = Rule(
    "activations: feed-forward",
    "--feed-forward {feed_forward}",
    lambda case: case.model == "llama" or case.feed_forward in (0, 4 * case.hidden),
    "the paper's formulas are those of 4 times --hidden",
    lambda case: "--feed-forward 0",
    "2205.05198, section 4.1",
)
PAPER_DROPOUT = Rule(
    "activations: dropout",
    "--attention {attention} --dropout {dropout}",
    lambda case: case.attention == "softmax" and case.dropout > 0,
    "the paper's formulas count every intermediate of attention, and three dropout masks",
    lambda case: "--attention softmax --dropout 0.1",
    "2205.05198, section 4.1",
)


def check_sequence_parallel(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError unless heads, feed-forward and samples have equal shards on `ranks` ranks, two or more."""
    check(SimpleNamespace(**vars(args) | {"tp": ranks}), (SP_RANKS,))
    check_cuts(args, ranks, sequence=True)


def check_context(args: argparse.Namespace, cp: int, ulysses: int = 1, placement: str = "contiguous") -> None:
    """Raises ValueError unless heads have equal shards on `ulysses` of the `cp` ranks, and samples on all of them.

    Says what would do for heads and samples together, sizes below 1 included.
    """
    case = SimpleNamespace(**vars(args) | {"cp": cp, "ulysses": ulysses, "placement": placement})
    check(case, (CP_ULYSSES, CP_ATTENTION))
    case.sequence_multiple = sequence_multiple(case)
    failing = list(broken(case, (CP_HEADS, CP_SEQUENCE)))
    use: dict[str, int] = {}
    if CP_HEADS in failing:
        usable = [a for a in range(ulysses, case.hidden + 1, ulysses) if case.hidden % a == 0]
        use["heads"] = min(usable, key=lambda a: abs(a - case.heads), default=ulysses)
        if case.hidden < 1 or case.hidden % use["heads"]:
            use["hidden"] = max(1, round(case.hidden / use["heads"])) * use["heads"]
    if CP_SEQUENCE in failing:
        use["sequence"] = max(1, case.sequence // case.sequence_multiple) * case.sequence_multiple
    if use:
        now = " ".join(f"--{name} {getattr(case, name)}" for name in use)
        reasons = " and ".join(rule.reason.format_map(vars(case)) for rule in failing)
        values = " ".join(f"--{name} {value}" for name, value in use.items())
        raise ValueError(f"{now}: {reasons}, so that each rank gets as much; use {values}")


# ---- What each lesson refuses ----------------------------------------------------------------------------------------


def megatron_sp(args: argparse.Namespace, ranks: int) -> None:
    check_sequence_parallel(args, ranks)
    check_model(args)


def activations(args: argparse.Namespace, ranks: int) -> None:
    check(args, (PAPER_FEED_FORWARD,))
    megatron_sp(args, ranks)
    check(args, (PAPER_DROPOUT,))


def ulysses(args: argparse.Namespace, ranks: int) -> None:
    check_context(args, ranks, ranks)
    check_model(args)


def ring_attention(args: argparse.Namespace, ranks: int) -> None:
    check_context(args, ranks, placement="zigzag")  # both placements are shown
    check_model(args)


def hybrid_degree(args: argparse.Namespace, ranks: int) -> int:
    """c1: `--ulysses`, or the largest that heads and ranks allow and that leaves a ring, where there is one."""
    usable = [u for u in range(1, ranks // 2 + 1) if ranks % u == 0 and args.heads % u == 0]
    return args.ulysses or max(usable, default=1)


def hybrid(args: argparse.Namespace, ranks: int) -> None:
    check_context(args, ranks, hybrid_degree(args, ranks), args.placement)
    check_model(args)


def long_context(args: argparse.Namespace, ranks: int) -> None:
    check_context(args, ranks, placement="zigzag")  # the most that any way needs
    check_model(args)
    for c in range(2, ranks + 1):
        if ranks % c == 0 == args.heads % c:
            check(SimpleNamespace(tp=c, feed_forward=args.feed_forward), (SP_FEED_FORWARD,))
