"""What the lessons, and every layout with tensor parallelism, refuse."""

import argparse
import math
from typing import Any

from core.model.text import VOCABULARY, Text
from core.proof.arguments import check_model
from core.proof.rules import Rule, at_least, check, nearest_multiple

# A case has the sizes of the model and the ranks tp. Sizes below 1 are refused elsewhere, so they keep these rules.


def _equal_heads(case: Any) -> bool:
    return min(case.heads, case.hidden) < 1 or not (case.heads % case.tp or case.hidden % case.heads)


def _equal_feed_forward(case: Any) -> bool:
    return case.feed_forward < 0 or case.feed_forward % case.tp == 0  # 0, four times hidden, fits where heads do


def _fitting(case: Any) -> str:
    """The flags that keep both rules, and the numbers of ranks that do without them."""
    tp, heads, hidden = case.tp, case.heads, case.hidden
    use = []
    if not _equal_heads(case):
        divisors = [n for n in range(tp, hidden + 1, tp) if hidden % n == 0]
        heads = min(divisors, key=lambda n: abs(n - heads), default=nearest_multiple(heads, tp))
        use.append(f"--heads {heads}")
        if hidden % heads:
            use.append(f"--hidden {nearest_multiple(hidden, heads)}")
    if not _equal_feed_forward(case):
        use.append(f"--feed-forward {nearest_multiple(case.feed_forward, tp)}")
    text = " ".join(use)
    if hidden % case.heads == 0:
        sizes = case.heads, case.feed_forward or case.heads
        ranks = [str(t) for t in range(2, case.heads + 1) if not any(size % t for size in sizes)][-8:]
        text += f", or --nproc_per_node one of {', '.join(ranks)}" if ranks else ""
    return text


SHOEYBI = "1909.08053, section 3"
RULES = (
    Rule(
        "tp: heads",
        "--heads {heads} --hidden {hidden}",
        _equal_heads,
        "heads must divide --hidden, and must be a multiple of the {tp} ranks, so that each gets as much",
        _fitting,
        SHOEYBI,
    ),
    Rule(
        "tp: feed-forward",
        "--feed-forward {feed_forward}",
        _equal_feed_forward,
        "must be a multiple of the {tp} ranks, so that each gets as much",
        _fitting,
        SHOEYBI,
    ),
)

COURSE_RULES = (
    Rule(
        "text: vocabulary",
        "--vocabulary {vocabulary}",
        lambda case: case.vocabulary >= VOCABULARY,
        f"the text is bytes, {VOCABULARY} different ones",
        lambda case: "--vocabulary 1024",
    ),
    Rule(
        "positions",
        "--positions {positions}",
        lambda case: case.positions >= case.sequence,
        "a sample has --sequence {sequence} tokens, each at a position of its own",
        lambda case: f"--positions {case.sequence}",
    ),
)

LEARNING_RATE = Rule(
    "learning rate",
    "--lr {lr}",
    lambda case: 0 < case.lr < math.inf,
    "must be positive and finite",
    lambda case: "--lr 0.1",
)
PRINCIPLE_RULES = (
    at_least("batch", 1, 8), at_least("sequence", 1, 32), at_least("hidden", 1, 64), at_least("heads", 1, 8),
    LEARNING_RATE, *RULES,
)  # fmt: skip


def check_principle(args: argparse.Namespace, ranks: int) -> None:
    """Lecture 04. Raises ValueError, as the others do too."""
    check(argparse.Namespace(**vars(args), tp=ranks), PRINCIPLE_RULES)
    Text(args.data, args.sequence)


def check_tensor_parallel(args: argparse.Namespace, ranks: int) -> None:
    """Lecture 05."""
    check(argparse.Namespace(**vars(args), tp=ranks), RULES)
    check_model(args)


def check_course(args: argparse.Namespace, ranks: int) -> None:
    """CODE 02."""
    check_tensor_parallel(args, ranks)
    check(args, COURSE_RULES)
