"""`--stages`: the notation, what is refused, and training in both runtimes of a pipeline with unequal stages."""

import re
from itertools import accumulate
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.model.gpt import GPT, GPTConfig
from core.proof.rules import broken, check
from pipeline.schedules import build
from pipeline.split import (
    PP_LAYERS,
    SPLIT,
    expanded,
    layers_by_stage,
    nearly_equal,
    notation,
    parse,
    sizes_of,
    stages_of,
)
from pipeline.stages import each_stage, layers_in, partition
from tests.pipeline.test_runtime import check_against_one_process
from tests.pool import Pool

# ---- The notation

WRITTEN = {
    "E t*3|t*4|t*4|t*2 L": (3, 4, 4, 2),
    "Et*3|(tt|)*29,t|L": (3, *[2] * 29, 1, 0),  # Megatron-Core's own example, with a t for its m
    "E|(t|t*2|)*2 L": (0, 1, 2, 1, 2, 0),
    "E,t|*3,t,L": (1, 0, 0, 1),  # | may be repeated too
    "E((t*2|)*2 t|)*2 L": (2, 2, 1 + 0, 2, 2, 1, 0),
    "EtttL": (3,),
    "E t*0|t L": (0, 1),
    " E , ( t * 2 | ) * 2 , L ": (2, 2, 0),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_written_is_read(written: str) -> None:
    assert parse(written) == WRITTEN[written]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_what_is_printed_is_read_again(layers: list[int]) -> None:
    written = notation(layers)
    assert parse(written) == tuple(layers)
    assert not set(written) & set(" '\"")
    assert layers_by_stage(sum(layers), len(layers), written) == tuple(layers) or not sum(layers)


def repeated(each: tuple[list[tuple[str, str]], int]) -> tuple[str, str]:
    """What is written in parentheses, so many times; and what it means."""
    found, n = each
    return f"({' '.join(written for written, _ in found)})*{n}", "".join(means for _, means in found) * n


letters = st.sampled_from([("t", "t"), ("|", "|"), ("t*3", "ttt"), ("| * 2", "||"), ("t*0", "")])
nested = st.recursive(letters, lambda x: st.tuples(st.lists(x, max_size=4), st.integers(0, 3)).map(repeated))


@given(st.lists(nested, max_size=5), st.sampled_from(["", " ", ",", " , "]))
@settings(max_examples=100, deadline=None)
def test_repetitions_may_be_nested(found: list[tuple[str, str]], between: str) -> None:
    assert expanded(between.join(written for written, _ in found)) == "".join(means for _, means in found)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "it has 0 E"),
        ("t*4 L", "it has 0 E"),
        ("E t*4", "it has 0 L"),
        ("EE t*4 L", "it has 2 E"),
        ("E t*2|L t*2 L", "it has 2 L"),
        ("|E t*4 L", "its E is not first"),
        ("t E t*3 L", "its E is not first"),
        ("E t*4 L|", "its L is not last"),
        ("E t*2|m|t*2 L", "'m' at 6 is none of these"),
        ("E x L", "'x' at 2 is none of these"),
        ("*3 E", "the * at 0 has nothing to repeat"),
        ("E t*2*2 L", "the * at 5 has nothing to repeat"),
        ("E(*2 L", "the * at 2 has nothing to repeat"),
        ("E t* L", "'*' at 3 is none of these"),
        ("E t*-1 L", "'*' at 3 is none of these"),
        ("E t*2 9 L", "'9' at 6 is none of these"),
        ("E (t|L", "a ( has no )"),
        ("E t)|L", "the ) at 3 has no ("),
        ("E t*9999999999999999999999 L", "makes more than 100,000 items"),
        ("E ((((((t)*99)*99)*99)*99)*99)*99 L", "makes more than 100,000 items"),
    ],
)
def test_what_is_no_layout_is_refused_with_its_position(written: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse(written)


# ---- What fits


def case(layers: int, ranks: int, written: str, schedule: str = "1f1b", v: int = 1) -> SimpleNamespace:
    of_ranks = [stages_of(schedule, ranks, v, rank) for rank in range(ranks)]
    return SimpleNamespace(layers=layers, stages=ranks * v, pp=ranks, **sizes_of(written, of_ranks))


REFUSED = {
    "pp: stages": case(8, 4, "E t*3|m*2|t*2|t L"),
    "pp: layers of stages": case(8, 4, "E t*3|t*2|t*2|t*2 L"),
    "pp: number of stages": case(8, 4, "E t*3|t*5 L"),
    "pp: idle ranks": case(8, 3, "E t*3||t*5 L"),
    "pp: layers": case(3, 4, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_one_rule_and_what_is_suggested_works(name: str) -> None:
    refused = REFUSED[name]
    assert [rule.name for rule in broken(refused, (PP_LAYERS, *SPLIT))] == [name]
    with pytest.raises(ValueError, match="; use ") as refusal:
        check(refused, (PP_LAYERS, *SPLIT))
    written = str(refusal.value).rpartition("--stages ")[2].strip("'")
    assert not [*broken(case(refused.layers, refused.pp, written), (PP_LAYERS, *SPLIT))], written


def test_a_rank_may_have_an_empty_stage_but_not_only_empty_ones() -> None:
    assert case(3, 3, "E||t|t|t|L", "interleaved", 2).split_idle is None  # rank 1 has stages 1 and 4
    assert case(3, 3, "E||t|t||t L", "interleaved", 2).split_idle == 1
    assert case(3, 3, "E||t|t|t|L", "zb-v", 2).split_idle is None  # the same ones
    assert case(3, 3, "E|t||| t t L", "zb-v", 2).split_stages == 5
    assert case(3, 3, "E|t|||t|t L", "dualpipev", 2).split_idle == 2
    assert case(2, 4, "E t|||t L", "dualpipe").split_idle == 1


def test_without_a_split_stages_are_as_they_were() -> None:
    """The embedding counts as a layer, and the head: 2407.21783, section 3.3.2."""
    assert layers_by_stage(126, 16) == (7, *[8] * 14, 7)
    assert layers_by_stage(8, 4) == (2,) * 4
    assert layers_by_stage(7, 4) == (1, 2, 2, 2)
    assert nearly_equal(61, 32) == (0, *[2] * 30, 1)
    with pytest.raises(ValueError, match="--layers 61: must be a multiple of the 32 stages.*or --stages 'E|"):
        layers_by_stage(61, 32)


# ---- The model


def test_every_layer_is_on_one_stage_and_the_ends_where_they_belong() -> None:
    config = GPTConfig(sequence=8, hidden=8, layers=7, heads=2, vocabulary=11)
    for layers in ((0, 3, 4, 0), (1, 0, 2, 4), (7, 0), (0, 7), (2, 2, 2, 1)):
        written = notation(layers)
        ends = [0, *accumulate(layers)]
        every = each_stage(GPT(config), range(len(layers)), len(layers), written)
        for stage, model in every.items():
            assert [int(name) for name in model.blocks] == [*range(ends[stage], ends[stage + 1])]
            assert list(layers_in(7, len(layers), stage, written)) == [*range(ends[stage], ends[stage + 1])]
            assert (model.embed is not None) == (stage == 0)
            assert (model.head is not None) == (model.norm is not None) == (stage == len(layers) - 1)
    both = partition(GPT(config), [0, 3], 4, "E,t|t*2|t*3|t,L")
    assert list(both.blocks) == ["0", "6"]


# ---- Training

TIED = GPTConfig(sequence=8, hidden=16, layers=5, heads=2, vocabulary=257, dropout=0.1, attention="softmax")
LLAMA = GPTConfig(sequence=8, hidden=16, layers=5, heads=4, kv_heads=2, vocabulary=257, gated=True, biases=False,
                  learned_positions=False, tied=False, norm="rms", feed_forward=20)  # fmt: skip
TRAINED = {  # on 2 ranks or 4: model, schedule, micro-batches, stages a rank, split
    2: [
        (TIED, "1f1b", 4, 1, "E,t|t*4,L"),
        (LLAMA, "1f1b", 1, 1, "E|t*5,L"),
        (TIED, "gpipe", 2, 1, "E,t*5|L"),
        (LLAMA, "interleaved", 3, 2, "E,t*2||t|t*2,L"),
        (TIED, "zb-v", 4, 2, "E|t*3|t*2|L"),
        (LLAMA, "zb-h1", 4, 1, "E,t*2|t*3,L"),
        (TIED, "dualpipe", 4, 1, "E,t*4|t,L"),
        (TIED, "dualpipev", 4, 2, "E||t*5|L"),
    ],
    4: [
        (TIED, "1f1b", 1, 1, "E|t|t*4|L"),
        (LLAMA, "dualpipe", 8, 1, "E,t|t*3|t|L"),
        (TIED, "zb-v", 4, 2, "E|t|t|t||t||t,L"),
    ],
}


@pytest.mark.parametrize("ranks", TRAINED)
def test_both_runtimes_equal_one_process(pool: Pool, ranks: int) -> None:
    """Losses, norms, every gradient and parameter; the tied embedding on any ranks, also on one."""
    cases = [(config, build(name, ranks, m, v), written) for config, name, m, v, written in TRAINED[ranks]]
    for config, name, _, v, written in TRAINED[ranks]:
        check(case(config.layers, ranks, written, name, v), SPLIT)
    check_against_one_process(pool, ranks, cases)
