"""What the lessons refuse. What tensor parallelism shards: `core/proof/rulebook.py`."""

import argparse

from core.model.text import VOCABULARY, Text
from core.proof.arguments import check_cuts, check_model
from core.proof.rules import Rule, at_least, check, positive

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

PRINCIPLE_RULES = (
    at_least("batch", 1, 8), at_least("sequence", 1, 32), at_least("hidden", 1, 64), at_least("heads", 1, 8),
    positive("lr", 0.1),
)  # fmt: skip


def check_principle(args: argparse.Namespace, ranks: int) -> None:
    """Lecture 04. Raises ValueError, as the others do too."""
    check(args, PRINCIPLE_RULES)
    check_cuts(args, ranks)
    Text(args.data, args.sequence)


def check_tensor_parallel(args: argparse.Namespace, ranks: int) -> None:
    """Lecture 05."""
    check_cuts(args, ranks)
    check_model(args)


def check_course(args: argparse.Namespace, ranks: int) -> None:
    """CODE 02."""
    check_tensor_parallel(args, ranks)
    check(args, COURSE_RULES)
