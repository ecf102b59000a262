"""Every term of the planner's step time, calculated by hand on a small case with round numbers.

The machine moves a byte and makes a FLOP in round numbers of seconds, so each expected time is a product written out.
"""

from dataclasses import replace

import pytest

from cluster.links.messages import context
from cluster.planner.hardware import Link, Machine
from cluster.planner.layout import Layout
from cluster.planner.memory import parameters
from cluster.planner.overlap import not_hidden
from cluster.planner.software import Software
from cluster.planner.steptime import Step, bubble, head_not_hidden, layer_times, rank_times, step
from core.model.config import ModelConfig
from pipeline.engine.validator import validate
from pipeline.schedules import build

# 4 devices a node; one processor, so that no tile is filled up.
INSIDE, OUTSIDE = Link(1.0, 0.01), Link(10.0, 0.1)  # seconds of latency, and a byte
MACHINE = Machine("by hand", node=4, memory=1e12, peak=1000.0, bandwidth=500.0, inside=INSIDE, outside=OUTSIDE)
SOFTWARE = Software(gemm=0.5, passes=2.0, links=1.0, bucket=1e9)
MODEL = ModelConfig(vocabulary=12, sequence=8, hidden=4, layers=4, heads=2, feed_forward=10)
SPEED = 500.0  # FLOP a second: peak times gemm
TOKENS = 8
# FLOP of a layer's matrices forward: qkv 4 x 12, out 4 x 4, up and down 4 x 10; and attention, q k^T and times v.
MATRICES = 2 * TOKENS * (4 * 12 + 4 * 4 + 2 * 4 * 10)
ATTENTION = 2 * TOKENS * 8 * (4 + 4)


def parts(layout: Layout, model: ModelConfig = MODEL, software: Software = SOFTWARE) -> dict[str, float]:
    made: Step = step(model, layout, MACHINE, software)
    assert made.seconds == pytest.approx(sum(made.parts.values()))
    return made.parts


# ---- What a rank computes


def test_matrix_products() -> None:
    """Forward, dgrad and wgrad of 4 layers, of attention two times a forward backward; and the head three times."""
    head = 3 * 2 * TOKENS * 4 * 12
    layers = 4 * (3 * MATRICES + 3 * ATTENTION)
    assert parts(Layout(microbatches=3))["matrix products"] == pytest.approx(3 * (layers + head) / SPEED)
    full = 4 * (4 * MATRICES + 4 * ATTENTION)
    assert parts(Layout(recompute="full"))["matrix products"] == pytest.approx((full + head) / SPEED)
    selective = layers + 4 * ATTENTION
    assert parts(Layout(recompute="selective"))["matrix products"] == pytest.approx((selective + head) / SPEED)


def test_memory_is_moved_as_often_as_activations_are_saved() -> None:
    """Bytes of a token that a layer saves in 16 bits: two norms, q k v and result, and two tensors of f."""
    token = 2 * (2 * 4 * 2 + 2 * 4) + (12 + 4) * 2 + 2 * 4 + 2 * 10 * 2
    forward = 2.0 * TOKENS * token / 500.0
    assert parts(Layout())["memory"] == pytest.approx(4 * 3 * forward)  # and twice as much backward


def test_the_optimizer_moves_28_bytes_a_parameter_that_a_rank_updates() -> None:
    """Bug: all of them under ZeRO too."""
    size = sum(parameters(MODEL, Layout()))
    assert parts(Layout(dp=4))["optimizer"] == pytest.approx(28 * size / 500.0)
    for zero in (1, 2, 3):
        assert parts(Layout(dp=4, zero=zero))["optimizer"] == pytest.approx(28 * size / 4 / 500.0)


# ---- Messages


def test_tp() -> None:
    """Two all-reduces forward and two backward of a microbatch's activations; each is a gather and a scatter."""
    one = (2 - 1) * (1.0 + TOKENS * 4 / 2 * 2 * 0.01)  # a step of the ring: half of 8 x 4 elements of 2 bytes
    assert parts(Layout(tp=2))["tp"] == pytest.approx(4 * 8 * one)
    assert parts(Layout(tp=2, recompute="full"))["tp"] == pytest.approx(4 * 12 * one)


def test_cp_is_what_attention_does_not_hide() -> None:
    """Bugs: nothing hidden, one hop too many, gradients of keys as small as keys."""
    layout, keys = Layout(cp=4), 8 / 4 * (4 + 4)  # elements of a rank's keys and values
    hop = 1.0 + keys * 2 * 0.01
    for attention in (0.0, 2.0, 1000.0):
        forward = 3 * max(0.0, hop - attention / 4)
        backward = 3 * max(0.0, 2 * hop - 2 * attention / 4)
        assert context(MODEL, layout, attention, MACHINE, SOFTWARE) == pytest.approx((forward, backward))
    hidden = ATTENTION / 4 / SPEED / 4  # of each hop
    expected = 4 * (3 * (hop - hidden) + 3 * (2 * hop - 2 * hidden))
    assert parts(layout)["cp"] == pytest.approx(expected)
    # Grouped keys are half of it.
    assert context(replace(MODEL, kv_heads=1), layout, 0.0, MACHINE, SOFTWARE)[0] == pytest.approx(3 * (1 + 0.16))
    assert context(MODEL, Layout(), 1.0, MACHINE, SOFTWARE) == (0.0, 0.0)


def test_ulysses_exchanges_before_and_after_attention_and_is_not_hidden() -> None:
    """q, k, v and the result, of 2 tokens: 3 of 4 leave, in one message of latency and one of bytes."""
    elements = 2 * (4 + 4 + 8)
    switch = 1.0 + 3 / 4 * elements * 2 * 0.01
    found = context(MODEL, Layout(cp=4, ulysses=4), 1000.0, MACHINE, SOFTWARE)
    assert found == pytest.approx((switch, switch))


def test_all_gather_is_hidden_by_what_a_rank_has_to_do_with_its_own_tokens() -> None:
    """Keys and values of 2 tokens of 3 others; backward again, and then the gradients, which nothing hides."""
    layout = Layout(cp=4, cp_kind="all-gather")
    travels = 3 * (1.0 + 2 * 8 * 2 * 0.01)
    for attention in (0.0, 4.0, 1000.0):
        own = attention / 8
        expected = max(0.0, travels - own), max(0.0, travels - 2 * own) + travels
        assert context(MODEL, layout, attention, MACHINE, SOFTWARE) == pytest.approx(expected)


def test_ep_and_etp() -> None:
    """k rows a token there and back, forward and backward; over etp a gather and a scatter of all its ranks' rows."""
    model = replace(MODEL, experts=4, top_k=2)
    routed = 2 * TOKENS * 4
    there = 1.0 + 1 / 2 * routed * 2 * 0.01
    found = layer_times(model, Layout(dp=4, ep=2), True, MACHINE, SOFTWARE)
    assert [found.forward["ep"], found.dgrad["ep"]] == pytest.approx([2 * there] * 2)
    gather = 1.0 + 2 * routed / 2 * 2 * 0.01
    found = layer_times(model, Layout(dp=4, ep=2, etp=2), True, MACHINE, SOFTWARE)
    # Every second rank of the node is in the all-to-all, so both of its ranks are inside.
    assert found.forward["ep"] == pytest.approx(2 * there + 2 * gather)
    assert "ep" not in found.wgrad
    assert layer_times(model, Layout(dp=4, ep=2), False, MACHINE, SOFTWARE).forward["ep"] == 0


def test_experts_compute_k_rows_a_token_and_the_shared_one_all() -> None:
    """Bugs: the shared expert left out; all experts on each rank; rows of a token once."""
    model = replace(MODEL, experts=4, top_k=2, expert_feed_forward=6, shared_feed_forward=14, gated=True)
    mlp = 2 * TOKENS * 3 * 4 * (14 + 2 * 6)  # gate, up and down of the shared one and of two experts
    attention = 2 * TOKENS * (4 * 12 + 4 * 4)
    for layout in (Layout(dp=4), Layout(dp=4, ep=2)):  # as many rows arrive as leave
        found = layer_times(model, layout, True, MACHINE, SOFTWARE)
        assert found.forward["matrix products"] == pytest.approx((attention + mlp + ATTENTION) / SPEED)
        assert found.wgrad["matrix products"] == pytest.approx((attention + mlp) / SPEED)


def test_pp_and_its_bubble() -> None:
    """Messages fill and empty the pipeline, and are hidden between; the bubble is (p - 1) micro-batches' time."""
    layout = Layout(pp=2, microbatches=4)
    busy = 2 * (3 * MATRICES + 3 * ATTENTION) / SPEED + 2 * 3 * TOKENS * (48 + 32 + 8 + 40) * 2.0 / 500.0
    hop = 1.0 + TOKENS * 4 * 2 * 0.01
    found = parts(layout)
    assert found["bubble"] == pytest.approx(busy)
    assert found["pp"] == pytest.approx(2 * 1 * hop + 4 * max(0.0, 2 * hop - busy))
    assert parts(layout, software=replace(SOFTWARE, blocking=True))["pp"] == pytest.approx(2 * 4 * hop)
    assert bubble("1f1b", 4, 8, 1, 1.0, 2.0, 3.0) == 3 * 6.0
    assert bubble("interleaved", 4, 8, 2, 1.0, 2.0, 3.0) == 3 * 6.0 / 2
    assert bubble("zb-h1", 4, 8, 1, 3.0, 3.0, 1.0) == 3 * (3.0 + 2.0)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("width", [4, 64])  # of the experts: computing hides all, or some
def test_what_travels_behind_the_other_direction(schedule: str, width: int) -> None:
    """Bug: DualPipe waits for all-to-alls as 1F1B does. Against virtual devices; one all-to-all a layer by hand."""
    model = replace(MODEL, layers=8, experts=4, top_k=2, expert_feed_forward=width)
    layout = Layout(pp=4, dp=2, ep=2, microbatches=10, schedule=schedule, v=1 + (schedule == "dualpipev"))
    found, alone = parts(layout, model), parts(replace(layout, pp=1, v=1, schedule="1f1b"), model)
    f, i, w = (sum(each.values()) / layout.v for each in rank_times(model, layout, MACHINE, SOFTWARE))
    compute = [sum(each.get(cause, 0.0) for cause in ("matrix products", "memory")) / layout.v
               for each in rank_times(model, layout, MACHINE, SOFTWARE)]  # fmt: skip
    travel = 2 / layout.v * 2 * (1.0 + 2 * TOKENS * 4 / 2 * 2 * 0.01)  # half of the 2 x 8 rows of 4 numbers
    hidden = min(travel, compute[1] + compute[2]) + min(travel, compute[0])
    stages = layout.stages
    costs = {"F": [f] * stages, "I": [i] * stages, "W": [w] * stages, "B": [i + w] * stages}
    every = {(a, b): hidden for a in range(stages) for b in range(stages)}
    verdict = validate(build(schedule, 4, 10), costs, together=True, hidden=every)
    layers = sum(found[cause] for cause in ("matrix products", "memory", "ep", "bubble")) - head_of(layout, model)
    assert verdict.makespan == pytest.approx(layers, rel=0.02)  # the planner rounds I/F and W/F
    assert found["ep"] < alone["ep"] / 4


def head_of(layout: Layout, model: ModelConfig) -> float:
    """Seconds of the head that its rank does not have left anyway."""
    layers = sum(sum(each.values()) for each in rank_times(model, layout, MACHINE, SOFTWARE))
    return layout.microbatches * head_not_hidden(model, layout, MACHINE, SOFTWARE, layers)


@pytest.mark.parametrize(
    ("zero", "seconds"),
    [
        (0, 2 * 5.0 - 7.0),  # an all-reduce behind the last backward
        (1, 0.0 + 5.0),  # the reduce-scatter is hidden behind it; the all-gather follows the update
        (2, 3 * 0.0 + 5.0),
        (3, 3 * ((5.0 - 4.0) + (2 * 5.0 - 7.0))),  # gathered forward and backward, and reduced, of 3 micro-batches
    ],
)
def test_what_data_parallelism_does_not_hide(zero: int, seconds: float) -> None:
    """5 s to gather or to reduce, 4 s of forward, 7 s of backward. Bug: ZeRO-1's all-gather hidden as well."""

    def seen(layout: Layout, way: float) -> float:
        reduce = 2 * way if layout.zero == 0 else way  # then it is an all-reduce
        return not_hidden(layout, 0.0 if layout.zero == 0 else way, reduce, 4.0, 7.0, SOFTWARE)[0]

    assert seen(Layout(dp=2, zero=zero, microbatches=3), 5.0) == pytest.approx(seconds)
    slow = {0: 2 * 9.0 - 7.0, 1: (9.0 - 7.0) + 9.0, 2: 3 * (9.0 - 7.0) + 9.0, 3: 3 * ((9.0 - 4.0) + (18.0 - 7.0))}
    assert seen(Layout(dp=2, zero=zero, microbatches=3), 9.0) == pytest.approx(slow[zero])
    piped = Layout(dp=2, pp=2, zero=min(zero, 1), microbatches=3)
    assert seen(piped, 5.0) == 10.0, "after the pipeline"


def test_dp_gathers_and_reduces_what_a_rank_has() -> None:
    """ZeRO-1 on 4 ranks: 3 steps of a ring of a quarter of the weights; all of the all-gather, and what is left over
    of the reduce-scatter."""
    size = sum(parameters(MODEL, Layout()))
    way = 3 * (1.0 + size / 4 * 2 * 0.01)
    made = layer_times(MODEL, Layout(), False, MACHINE, SOFTWARE)
    backward = 4 * (sum(made.dgrad.values()) + sum(made.wgrad.values()))
    assert parts(Layout(dp=4, zero=1))["dp"] == pytest.approx(max(0.0, way - backward) + way)
    every_layer = 3 * (4 * 1.0 + size / 4 * 2 * 0.01)  # ZeRO-3's messages are as many as layers
    forward = 4 * sum(made.forward.values())
    expected = max(0.0, every_layer - forward) + max(0.0, 2 * every_layer - backward)
    assert parts(Layout(dp=4, zero=3))["dp"] == pytest.approx(expected)
