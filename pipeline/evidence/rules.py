"""What the pipeline lessons refuse, as rules. A case has the flags, `pp` ranks and `stages` in all.

`cluster` has the same conditions for layouts: the reasons are the same words.
"""

from dataclasses import replace
from typing import Any

from core.proof.rules import Rule, at_least, nearest_multiple
from pipeline.split import SPLIT, suggested

DUALPIPE_RANKS = "dualpipe pairs rank r with rank p-1-r, and needs an even number"
DUALPIPE_MICROBATCHES = "dualpipe needs an even number, 2p = {twice} or more"
DUALPIPEV_MICROBATCHES = "dualpipev needs 2p = {twice} or more"


def _more_layers(case: Any) -> str:
    layers, per_rank = case.layers, case.stages // case.pp
    usable = [n for n in range(2, min(layers // per_rank, 64) + 1) if layers % (n * per_rank) == 0][-8:]
    ranks = f", or --nproc_per_node one of {', '.join(map(str, usable))}" if usable else ""
    split = f", or {suggested(case)}" if case.split is not None and layers + 2 >= case.stages else ""
    return f"--layers {nearest_multiple(layers, case.stages)}{ranks}{split}"


CHUNKS = Rule(
    "stages a rank", "--chunks {chunks}", lambda case: case.chunks >= 1, "a rank holds at least one stage",
    lambda case: "--chunks 2", "lecture 08",
)  # fmt: skip
EQUAL_STAGES = Rule(
    "equal stages", "--layers {layers}",
    lambda case: bool(case.split) or (case.layers >= case.stages and case.layers % case.stages == 0),
    "must be a multiple of the {stages} stages, so that each holds as many layers", _more_layers, "lecture 07",
)  # fmt: skip
EQUAL_MICROBATCHES = Rule(
    "equal microbatches", "--batch {batch}", lambda case: case.batch % case.microbatches == 0,
    "must be a multiple of --microbatches {microbatches}, so that all are equal",
    lambda case: f"--batch {nearest_multiple(case.batch, case.microbatches)}", "lecture 07",
)  # fmt: skip
LESSON = (*SPLIT, EQUAL_STAGES, at_least("microbatches", 1, 8), EQUAL_MICROBATCHES)  # of every lesson


def _enough_microbatches(case: Any) -> str:
    even = case.microbatches + case.microbatches % 2
    m = max(2 * case.pp, even)
    return f"--microbatches {m} --batch {-(-case.batch // m) * m}"


DUALPIPE = (
    Rule(
        "dualpipe: ranks", "--nproc_per_node {pp} ranks", lambda case: case.schedule != "dualpipe" or case.pp % 2 == 0,
        DUALPIPE_RANKS, lambda case: "--nproc_per_node 4", "2412.19437, section 3.2.1",
        peer="DeepSeek's DualPipe, DualPipe.step: num_ranks % 2 == 0",
    ),
    Rule(
        "dualpipe: microbatches", "--microbatches {microbatches} microbatches",
        lambda case: case.schedule != "dualpipe" or (case.microbatches % 2 == 0 and case.microbatches >= 2 * case.pp),
        DUALPIPE_MICROBATCHES, _enough_microbatches, "2412.19437, section 3.2.1",
        peer="DeepSeek's DualPipe, DualPipe.step: num_chunks % 2 == 0 and num_chunks >= num_ranks * 2",
    ),
    Rule(
        "dualpipev: microbatches", "--microbatches {microbatches} microbatches",
        lambda case: case.schedule != "dualpipev" or case.microbatches >= 2 * case.pp,
        DUALPIPEV_MICROBATCHES, _enough_microbatches, "2412.19437, section 3.2.1",
        peer="torch, ScheduleDualPipeV: at least as many microbatches as stages",
    ),
)  # fmt: skip

AUTO = (
    Rule(
        "message", "--message {message}", lambda case: 0 <= case.message < float("inf"), "must not be negative",
        lambda case: "--message 0.1",
    ),
    Rule(
        "memory", "--memory {memory}", lambda case: case.memory is None or 1 <= case.memory < float("inf"),
        "a rank must hold at least one microbatch", lambda case: f"--memory {case.pp}",
    ),
    Rule(
        "copies", "--copies {copies}", lambda case: case.copies >= 1, "the model must be there once",
        lambda case: "--copies 1",
    ),
)  # fmt: skip

LARGEST = 100_000  # ranks x microbatches of a calculation that ends while the other ranks wait
COMPARE = (
    Rule(
        "times", "--costs and --message",
        lambda case: all(0 < cost < float("inf") for cost in case.costs) and 0 <= case.message < float("inf"),
        "times, F, I and W more than 0", lambda case: "--costs 1 1 1 --message 0",
    ),
    Rule(
        "memory", "--memory {memory}", lambda case: case.memory is None or 0 < case.memory < float("inf"),
        "must be positive", lambda case: f"--memory {case.pp}",
    ),
    Rule(
        "large", "--large {large[0]} {large[1]}",
        lambda case: min(case.large) >= 1 and case.large[0] * case.large[1] <= LARGEST,
        f"ranks and microbatches, at least 1 and at most {LARGEST:,} together", lambda case: "--large 64 128",
    ),
)  # fmt: skip
EVERY_SCHEDULE = replace(
    EQUAL_STAGES, reason="must be a multiple of {stages}, the stages of every schedule",
    use=lambda case: f"--layers {nearest_multiple(case.layers, case.stages)}",
)  # fmt: skip
OWN = (  # the schedule of --csv: `own` (stages, microbatches), for `own_ranks`
    Rule(
        "csv: ranks", "--csv {csv}", lambda case: case.own_ranks == case.pp, "is for {own_ranks} ranks",
        lambda case: f"--nproc_per_node {case.own_ranks}",
    ),
    Rule(
        "csv: microbatches", "--csv {csv}", lambda case: case.own[1] == case.microbatches, "has {own[1]} microbatches",
        lambda case: f"--microbatches {case.own[1]} --batch {-(-case.batch // case.own[1]) * case.own[1]}",
    ),
)  # fmt: skip
