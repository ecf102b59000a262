"""What a dry run refuses. A case has `experts`, `rank` and `last`, the last of the ranks; or `name` and `missing`."""

from core.proof.rules import Rule

RULES = (
    Rule(
        "dry run: experts", "--experts", lambda case: not case.experts,
        "which rank a token is sent to depends on its numbers, and a dry run has none",
        lambda case: "python -m cluster.plan, which takes tokens to choose evenly, or leave out the flags of experts",
    ),
    Rule(
        "dry run: rank", "--rank {rank}", lambda case: 0 <= case.rank <= case.last, "the ranks are 0 to {last}",
        lambda case: f"--rank {case.last}",
    ),
)  # fmt: skip
BUILT = Rule(
    "dry run: model", "--model {name}", lambda case: not case.missing,
    "core.model.gpt, which is what is trained, has no {missing}", lambda case: "--model gpt3-175b",
)  # fmt: skip
