"""How the layers of a model are split into pipeline stages, as users write it: `--stages`. Lectures 07 to 09.

    E,t*3|(t*4|)*2,t*2,L        4 stages: the embedding and 3 layers; 4; 4; 2 layers, the final norm and the head

The notation is that of Megatron-Core's `--pipeline-model-parallel-layout`:

    E       the embedding, once and first
    t       a layer of the model, which has them in this order
    L       final norm, head and loss, once and last
    |       here the next stage begins; a stage may have E alone, L alone or nothing, but each rank has something
    *N      N times what is before it: a letter, a |, or what is in parentheses, which may be nested
    , and spaces separate, and mean nothing

The stages are in the order in which a micro-batch goes through them; which rank has which is the schedule's. Megatron's
m, a layer of multi-token prediction, is not there: no model here has one.
"""

import re
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

from core.proof.rules import Rule, check, nearest_multiple

FOLDED = ("zb-v", "dualpipev")  # rank r holds stages r and 2p-1-r
MOST = 100_000  # items of a layout
ITEM = re.compile(r"([EtL|()])|\*\s*(\d+)|[\s,]+")


def stages_of(schedule: str, ranks: int, v: int, rank: int) -> list[int]:
    """The stages of rank `rank` of the pipeline, of which each has `v`; with dualpipe a stage is on two ranks."""
    if schedule in FOLDED:
        return [rank, 2 * ranks - 1 - rank]
    if schedule == "dualpipe":
        return sorted({rank, ranks - 1 - rank})
    return [chunk * ranks + rank for chunk in range(v)]


# ---- The notation ----------------------------------------------------------------------------------------------------


def expanded(written: str) -> str:
    """The items E, t, L and | in their order, without repetitions.

    Raises:
        ValueError: it is not in this notation; says what is wrong, and where.
    """
    levels, last, at = [""], None, 0  # the items so far, of each parenthesis that is open; and what a *N repeats
    while at < len(written):
        found = ITEM.match(written, at)
        if found is None:
            raise ValueError(f"{written[at]!r} at {at} is none of these")
        item, times = found.groups()
        if item == "(":
            levels.append("")
            last = None
        elif item == ")":
            if len(levels) == 1:
                raise ValueError(f"the ) at {at} has no (")
            last = levels.pop()
            levels[-1] += last
        elif item:
            last = item
            levels[-1] += item
        elif times:
            if last is None:
                raise ValueError(f"the * at {at} has nothing to repeat")
            if len(last) * int(times[:9]) > MOST:
                raise ValueError(f"*{times} at {at} makes more than {MOST:,} items")
            levels[-1] = levels[-1].removesuffix(last) + last * int(times)
            last = None
        if sum(map(len, levels)) > MOST:
            raise ValueError(f"it has more than {MOST:,} items")
        at = found.end()
    if len(levels) > 1:
        raise ValueError("a ( has no )")
    return levels[0]


@cache
def parse(written: str) -> tuple[int, ...]:
    """How many layers each stage has.

    Raises:
        ValueError: it is not in this notation, or E or L are not once at their ends; says what is wrong.
    """
    items = expanded(written)
    for end, letter, which in ((0, "E", "first"), (-1, "L", "last")):
        if items.count(letter) != 1:
            raise ValueError(f"it has {items.count(letter)} {letter}")
        if items[end] != letter:
            raise ValueError(f"its {letter} is not {which}")
    return tuple(stage.count("t") for stage in items.split("|"))


def notation(layers: Iterable[int]) -> str:
    """How stages of so many layers are written, without spaces, and as Megatron too reads it."""
    stages = [f"t*{n}" if n > 1 else "t" * n for n in layers]
    stages[0] = ",".join(filter(None, ("E", stages[0])))
    stages[-1] = ",".join(filter(None, (stages[-1], "L")))
    found = ""
    for stage, alike in groupby(stages[:-1]):
        n = len([*alike])
        found += f"({stage}|)*{n}," if n > 1 else f"{stage}|"
    return found + stages[-1]


def nearly_equal(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage: equal or, where that cannot be, nearly.

    Then the embedding counts as a layer and the head as another, so that the ends of the model get fewer layers
    (2407.21783, section 3.3.2), and the first stages, which keep the most micro-batches, are the shorter ones.
    """
    each, longer = divmod(layers, stages)
    if longer == 0:
        return (each,) * stages
    each, longer = divmod(layers + 2, stages)
    sizes = [each + (stage >= stages - longer) for stage in range(stages)]
    return (max(0, sizes[0] - 1), *sizes[1:-1], max(0, sizes[-1] - 1))


# ---- Rules -----------------------------------------------------------------------------------------------------------


def sizes_of(split: str | None, of_ranks: Iterable[Iterable[int]] = ()) -> dict[str, Any]:
    """What the rules look at: of a split what is wrong, or how many layers and stages, and a rank without anything.

    Args:
        split: None where there is no such flag.
        of_ranks: the stages of each rank.
    """
    found = {"split": split, "split_error": "", "split_layers": 0, "split_stages": 0, "split_idle": None}
    if not split:
        return found
    try:
        layers = parse(split)
    except ValueError as error:
        return found | {"split_error": f": {error}"}
    something = {stage for stage, n in enumerate(layers) if n} | {0, len(layers) - 1}
    idle = (rank for rank, stages in enumerate(of_ranks) if something.isdisjoint(stages))
    return found | {"split_layers": sum(layers), "split_stages": len(layers), "split_idle": next(idle, None)}


def suggested(case: Any) -> str:
    """The nearly equal split, or another number of layers where stages would be empty."""
    if case.layers + 2 >= case.stages:
        return f"--stages '{notation(nearly_equal(case.layers, case.stages))}'"
    return f"--layers {nearest_multiple(case.layers, case.stages)}, and no --stages"


def _layers_or_split(case: Any) -> str:
    layers = f"--layers {nearest_multiple(case.layers, case.stages)}"
    return f"{layers}, or {suggested(case)}" if case.layers + 2 >= case.stages else layers


PP_LAYERS = Rule(
    "pp: layers",
    "--layers {layers}",
    lambda case: (
        bool(case.split)
        or (case.layers >= case.stages and case.layers % case.stages == 0)
        or case.layers + 2 >= 2 * case.stages
    ),
    "must be a multiple of the {stages} stages, or 2 x {stages} - 2 or more, so that each has a layer, unless --stages "
    "says how they are split",
    _layers_or_split,
    "2407.21783, section 3.3.2",
    peer="torchtitan, pipeline_parallel.py: number of stages cannot be greater than effective layers",
)
SOURCE = "Megatron-Core, pipeline_parallel_layer_layout.py"
SPLIT = (
    Rule(
        "pp: stages",
        "--stages '{split}'",
        lambda case: not case.split_error,
        "must be E, a t for each layer, and L, with | between stages; t*3 and (t|)*3 repeat{split_error}",
        suggested,
        SOURCE,
        peer="Megatron-LM, pipeline_parallel_layer_layout.py: parse_str_to_list, validate_layer_layout",
    ),
    Rule(
        "pp: layers of stages",
        "--stages '{split}' --layers {layers}",
        lambda case: not case.split or case.split_error or case.split_layers == case.layers,
        "must have a t for each of the {layers} layers: it has {split_layers}",
        suggested,
        SOURCE,
        peer="Megatron-LM, pipeline_parallel_layer_layout.py: parse_str_to_list, validate_layer_layout",
    ),
    Rule(
        "pp: number of stages",
        "--stages '{split}'",
        lambda case: not case.split or case.split_error or case.split_stages == case.stages,
        "must have as many stages as all ranks of the pipeline hold, {stages}: it has {split_stages}",
        suggested,
        SOURCE,
        peer="Megatron-LM, pipeline_parallel_layer_layout.py: parse_str_to_list, validate_layer_layout",
    ),
    Rule(
        "pp: idle ranks",
        "--stages '{split}'",
        lambda case: case.split_idle is None or case.split_stages != case.stages,
        "must leave something to every rank: rank {split_idle} of the pipeline would have nothing to compute",
        suggested,
        SOURCE,
        peer="cannot be: a rank of a pipeline without a stage has nothing to do",
    ),
)


@cache  # a search asks millions of times
def layers_by_stage(layers: int, stages: int, split: str = "") -> tuple[int, ...]:
    """How many layers each stage has.

    Raises:
        ValueError: they cannot be split like this, or without a split a stage would have none.
    """
    if layers % stages or not layers or split:
        check(SimpleNamespace(layers=layers, stages=stages, **sizes_of(split)), (PP_LAYERS, *SPLIT))
    return parse(split) if split else nearly_equal(layers, stages)
