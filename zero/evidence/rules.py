"""What the lessons of lecture 01 refuse."""

from core.proof.rulebook import BATCH
from core.proof.rules import Rule, at_least

RULES = (
    at_least("microbatches", 1, 2),
    at_least("bucket", 1, 2**16),
    BATCH,
)

NODES = (
    Rule(
        "ranks per node",
        "--ranks-per-node {ranks_per_node}",
        lambda case: case.ranks_per_node == 0 or case.ranks_per_node in divisors(case.ranks),
        "the {ranks} ranks must divide evenly into nodes",
        lambda case: f"--ranks-per-node one of {', '.join(map(str, divisors(case.ranks)))}",
    ),
)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
