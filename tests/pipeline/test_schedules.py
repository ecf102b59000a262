"""Schedules without any process: their CSV, the rule for messages, the validator, and torch's own opinion."""

import io
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torchs

from core.proof.terminal import fit
from pipeline.engine.actions import Action, Schedule, ScheduleError, placement, size, with_communication
from pipeline.engine.validator import Verdict, validate
from pipeline.evidence import timeline
from pipeline.schedules import SCHEDULES, build, from_csv, main, to_csv
from pipeline.stages import layers_in

ONE_STAGE = ("naive", "gpipe", "1f1b")


@given(st.integers(1, 130), st.integers(1, 40))
def test_every_layer_is_in_one_stage_and_every_stage_has_as_many_or_nearly(layers: int, stages: int) -> None:
    if layers % stages and layers + 2 < 2 * stages:
        with pytest.raises(ValueError, match=f"use --layers {max(1, round(layers / stages)) * stages}(,|$)"):
            layers_in(layers, stages, 0)
        return
    each = [layers_in(layers, stages, stage) for stage in range(stages)]
    assert [layer for some in each for layer in some] == list(range(layers))
    counts = [len(some) for some in each]
    assert min(counts) >= 1
    if layers % stages == 0:
        assert set(counts) == {layers // stages}
        return
    counts[0] += 1  # the embedding
    counts[-1] += 1  # the head
    assert counts == sorted(counts)
    assert counts[-1] - counts[0] <= 1


sizes = given(st.sampled_from(ONE_STAGE), st.integers(1, 9), st.integers(1, 20))


def busy(verdict: Verdict) -> list[float]:
    """Of each rank."""
    return [sum(e.end[0] - e.start[0] for e in row) for row in verdict.events]


def parse(*rows: str) -> Schedule:
    return from_csv(rows)


def as_torch(schedule: Schedule) -> dict[int, list]:
    return {rank: [torchs._Action.from_str(str(a)) for a in row] for rank, row in enumerate(schedule)}


# ---- What a valid schedule costs


@settings(max_examples=200, deadline=None)
@sizes
def test_every_schedule_is_valid_and_its_bubble_is_the_slides(name: str, p: int, m: int) -> None:
    verdict = validate(build(name, p, m))
    if name == "naive":
        assert verdict.bubble_of_wall == pytest.approx((p - 1) / p, abs=1e-12)
        assert verdict.in_flight == [1] * p
        return
    assert verdict.bubble_of_wall == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert verdict.bubble_of_ideal == pytest.approx((p - 1) / m, abs=1e-12)
    assert verdict.makespan == 3 * (m + p - 1)
    assert busy(verdict) == [3 * m] * p
    assert verdict.in_flight == ([m] * p if name == "gpipe" else [min(m, p - r) for r in range(p)])


def test_costs_and_messages_move_the_times() -> None:
    one = parse("0F0,0B0", "1F0,1B0")
    assert validate(one, {"F": 5.0, "B": 7.0}).makespan == 2 * (5 + 7)
    assert validate(one, message=0.5).makespan == 2 * 3 + 2 * 0.5
    several_stages = parse("0F0,2F0,2B0,0B0", "1F0,1B0")  # two stages on rank 0: still a message each way
    assert validate(several_stages, message=0.5).makespan == pytest.approx(9 * 2 / 3 + 4 * 0.5)  # 2/3 of a rank each
    uneven = {"F": [1.0, 2.0], "B": [3.0, 4.0]}
    assert validate(one, uneven).makespan == 10
    assert validate(several_stages).in_flight == [2, 1]


times = st.sampled_from([0.5, 1.0, 1.25, 2.0, 3.0])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 24))
def test_interleaved(p: int, v: int, m: int) -> None:
    verdict = validate(build("interleaved", p, m, v))
    assert sum(busy(verdict)) == pytest.approx(3 * m * p)
    if m % p == 0:
        assert verdict.makespan == pytest.approx(3 * m + 3 * (p - 1) / v)
        assert verdict.bubble_of_ideal == pytest.approx((p - 1) / (v * m))
        in_flight = [min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)]
        assert verdict.in_flight == in_flight


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 24), times, times, times)
def test_zero_bubble(p: int, m: int, f: float, i: float, w: float) -> None:
    """The paper's bubbles, for the costs for which it gives them."""
    costs = {"F": f, "I": i, "W": w, "B": i + w}
    one, two = (validate(build(name, p, m), costs) for name in ("zb-h1", "zb-h2"))
    assert max(one.in_flight) == min(m, p)
    assert max(two.in_flight) == min(m, 2 * p - 1)
    if m >= p and f >= w <= i:
        assert one.own_bubble == pytest.approx((p - 1) * (f + i - w))
    if m >= 2 * p - 1 and f >= w <= i:
        assert two.own_bubble == pytest.approx((p - 1) * (f + i - 2 * w))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 24))
def test_zb_v_has_no_bubble_at_equal_costs(p: int, m: int) -> None:
    verdict = validate(build("zb-v", p, m))
    assert max(verdict.in_flight) <= min(2 * m, 2 * p)
    if m >= 2 * p - 1:
        assert verdict.own_bubble == 0
        assert verdict.in_flight == [2 * p] * p


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["dualpipe", "dualpipev"]), st.integers(1, 4), st.integers(0, 8), times, times)
def test_dualpipe(name: str, half: int, more: int, f: float, w: float) -> None:
    """The paper's formula holds where F = I >= W."""
    w, i = min(f, w), f
    p = 2 * half if name == "dualpipe" else half
    m = 2 * (p + more)
    part = p / (2 * half)  # of a rank, on one stage
    schedule, costs = build(name, p, m), {"F": f, "I": i, "W": w, "B": i + w}
    together = validate(schedule, costs, together=True)
    paper = (half - 1) * part * (f + 2 * (i + w) - 3 * w)
    assert together.makespan - m * (f + i + w) == pytest.approx(paper, abs=1e-9)
    apart = validate(schedule, costs)
    assert apart.own_bubble == pytest.approx((half - 1) * part * (f + i - w), abs=1e-9)
    assert apart.in_flight == [2 * half + 1] * p


def longest_path(schedule: Schedule, costs: dict[str, float], message: float) -> float:
    """The critical path through what each action needs, and through the order of each rank: no step can be shorter."""
    rank_of, (stages, _) = placement(schedule), size(schedule)
    before = {a: row[i - 1] if i else None for row in schedule for i, a in enumerate(row)}
    gradient = {(a.stage, a.microbatch): a for row in schedule for a in row if a.kind in "BI"}
    end: dict[Action, float] = {}

    def needs(action: Action) -> list[tuple[Action, float]]:
        stage, kind, m = action
        found = [(before[action], 0.0)] if before[action] else []
        source = None
        if kind == "F" and stage:
            source = Action(stage - 1, "F", m)
        elif kind in "BI" and stage < stages - 1:
            source = gradient[stage + 1, m]
        if source:
            found.append((source, message * (rank_of[source.stage, m] != rank_of[stage, m])))
        return found

    waiting = [a for row in schedule for a in row]
    while waiting:
        still = []
        for action in waiting:
            sources = needs(action)
            if any(source not in end for source, _ in sources):
                still.append(action)
                continue
            start = max((end[source] + delay for source, delay in sources), default=0.0)
            end[action] = start + costs[action.kind] * len(schedule) / stages
        waiting = still
    return max(end.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 3), times, times, times, st.sampled_from([0.0, 0.4, 3.0]))
def test_a_step_takes_no_longer_than_the_critical_path(
    name: str, half: int, f: float, i: float, w: float, message: float
) -> None:
    schedule, costs = build(name, 2 * half, 4 * half), {"F": f, "I": i, "W": w, "B": i + w}
    assert validate(schedule, costs, message).makespan == pytest.approx(longest_path(schedule, costs, message))


# ---- Torch's own orders


def torchs_order(name: str, p: int, m: int, v: int) -> Schedule:
    """What a schedule class of torch plans, without its idle slots, a pair that overlaps as forward and backward."""
    kind = getattr(torchs, name)
    each = max(1, m // max(1, m // p))
    sizes = {"pp_group_size": p, "_n_microbatches": m, "num_stages": p * v, "_num_stages": p * v, "n_local_stages": v,
             "microbatches_per_round": each}  # fmt: skip
    rows = []
    for rank in range(p):
        planned = kind._calculate_single_rank_operations(SimpleNamespace(rank=rank, **sizes), rank)
        rows.append(",".join(str(action) for action in planned if action))
    return from_csv(rows)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("ours", "torchs", "v"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", 2),
        ("interleaved", "ScheduleInterleaved1F1B", 3),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 1),
        ("zb-v", "ScheduleZBVZeroBubble", 2),
        ("dualpipev", "ScheduleDualPipeV", 2),
    ],
)
def test_the_order_is_torchs(ours: str, torchs: str, v: int, p: int) -> None:
    for m in range(2 * p if ours == "dualpipev" else 1, 3 * p + 2):
        if ours == "interleaved" and m % max(1, m // p):
            continue  # torch takes no groups of unequal size
        if ours == "zb-h1" and m < p:
            continue  # torch's plan has a backward before its forward there
        assert build(ours, p, m, v) == torchs_order(torchs, p, m, v), (p, m)


# ---- What the validator must refuse

ACCEPTED_BY_TORCH = {
    "a forward twice": (["0F0,0F1,0F1,0B0,0B1", "1F0,1B0,1F1,1B1"], "rank 0, position 2, 0F1: done twice"),
    "a backward twice": (["0F0,0F1,0B0,0B1,0B1", "1F0,1B0,1F1,1B1"], "rank 0, position 4, 0B1: done twice"),
    "one never runs backward, another twice": (
        ["0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B0,1B5"],
        "rank 1, position 3, 1B0: done twice",
    ),
    "ranks wait for each other": (
        ["0F0,0B0,0F1,0B1", "1F1,1B1,1F0,1B0"],
        "deadlock: rank 0, position 1, 0B0 waits for 1B0; rank 1, position 0, 1F1 waits for 0F1",
    ),
}
REFUSED = {
    "nothing": ([], "no action"),
    "an empty rank": (["0F0,0B0", ""], "rank 1 has no action"),
    "backward first": (["0B0,0F0"], "rank 0, position 0, 0B0: before its F"),
    "no backward": (["0F0,0F1,0B0"], "rank 0: 0B1 is missing"),
    "a microbatch left out": (["0F0,0B0,0F2,0B2"], "rank 0: 0F1 is missing"),
    "a stage left out": (["0F0,0B0", "2F0,2B0"], "every rank: 1F0 is missing"),
    "a microbatch on two ranks": (["0F0,0B0", "0F1,0B0"], "0B0: stage 0 of microbatch 0 is already on rank 0"),
    "a stage on three ranks": (["0F0,0B0", "0F1,0B1", "0F2,0B2"], "stage 0 is on ranks 0, 1, 2; at most two have"),
    "a weight gradient first": (["0F0,0W0,0I0"], "rank 0, position 1, 0W0: before its I"),
    "no weight gradient": (["0F0,0I0"], "rank 0: 0W0 is missing"),
    "whole and in parts": (["0F0,0B0,0I0,0W0"], "rank 0, position 2, 0I0: done twice, first as rank 0, position 1"),
    "in parts and whole": (["0F0,0I0,0W0,0B0"], "rank 0, position 3, 0B0: done twice, first as rank 0, position 1"),
    "a stage with fewer microbatches": (["0F0,0F1,0B0,0B1", "1F0,1B0"], "rank 1: 1F1 is missing"),
    "backwards in another order": (
        ["0F0,0F1,0B1,0B0,0F2,0B2", "1F0,1B0,1F1,1F2,1B2,1B1"],
        "deadlock: rank 0, position 2, 0B1 waits for 1B1",
    ),
}


@pytest.mark.parametrize("case", {**ACCEPTED_BY_TORCH, **REFUSED})
def test_a_bad_schedule_is_refused(case: str) -> None:
    rows, why = {**ACCEPTED_BY_TORCH, **REFUSED}[case]
    with pytest.raises(ScheduleError) as error:
        validate(parse(*rows))
    assert why in str(error.value)


def test_a_send_is_no_compute_action() -> None:
    with pytest.raises(ScheduleError, match="rank 0, position 0, 0SEND_F0: not F, B, I or W"):
        validate([[Action(0, "SEND_F", 0)]])


@pytest.mark.parametrize("case", [c for c in ACCEPTED_BY_TORCH if "another twice" not in c])
def test_torch_accepts_what_we_refuse(case: str) -> None:
    torchs._validate_schedule(as_torch(parse(*ACCEPTED_BY_TORCH[case][0])), 2, 2, 2)


def test_torch_accepts_a_backward_missing_and_another_done_twice() -> None:
    """torch counts: one full backward and one split backward of microbatch 0 make two, and 1 has none."""
    rows = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1I0", "1W0"]]
    torchs._validate_schedule({r: [torchs._Action.from_str(c) for c in row] for r, row in enumerate(rows)}, 2, 2, 2)
    with pytest.raises(ScheduleError, match="rank 1, position 3, 1I0: done twice"):
        validate(parse(*(",".join(row) for row in rows)))


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ScheduleError, match="rank 0, position 0, 0F-1: stages and microbatches count from 0"):
        validate([[Action(0, "F", -1), Action(0, "B", -1), Action(0, "F", 0), Action(0, "B", 0)]])


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(ONE_STAGE), st.integers(1, 5), st.integers(1, 6))
def test_no_change_of_one_action_passes(data: st.DataObject, name: str, p: int, m: int) -> None:
    """Dropping, repeating or replacing any one action makes a schedule invalid."""
    schedule = build(name, p, m)
    rank = data.draw(st.integers(0, p - 1))
    position = data.draw(st.integers(0, len(schedule[rank]) - 1))
    action = schedule[rank][position]
    other = Action(action.stage, data.draw(st.sampled_from("FB")), data.draw(st.integers(0, m)))
    if other == action:
        other = action._replace(microbatch=action.microbatch + 1)
    change = data.draw(st.sampled_from(["drop", "repeat", "replace"]))
    schedule[rank][position : position + 1] = {"drop": [], "repeat": [action, action], "replace": [other]}[change]
    with pytest.raises(ScheduleError):
        validate(schedule)


# ---- Messages


@settings(max_examples=200, deadline=None)
@sizes
def test_messages_are_asked_for_one_action_ahead_in_the_senders_order(name: str, p: int, m: int) -> None:
    schedule = build(name, p, m)
    program = with_communication(schedule)
    for rank, row in enumerate(program):
        assert [a for a in row if a.kind in "FB"] == schedule[rank], "the compute actions stay as they are"
        for receive, sender, needing in (("RECV_F", rank - 1, "F"), ("RECV_B", rank + 1, "B")):
            asked = [a.microbatch for a in row if a.kind == receive]
            if not 0 <= sender < p:
                assert asked == []
                continue
            assert Counter(asked) == Counter(range(m))
            assert asked == [a.microbatch for a in program[sender] if a.kind == receive.replace("RECV", "SEND")]
            for i in range(m):
                ask, need = row.index(Action(rank, receive, i)), row.index(Action(rank, needing, i))
                between = [a for a in row[ask:need] if a.kind in "FB"]
                assert ask < need
                assert len(between) == min(1, sum(a.kind in "FB" for a in row[:need])), "one action ahead, no more"
        for position, action in enumerate(row):
            if action.kind.startswith("SEND"):
                assert row[position - 1] == action._replace(kind=action.kind[-1]), "right after what made it"


# ---- CSV, and torch as a reader of it


@settings(deadline=None)
@sizes
def test_csv_round_trip(name: str, p: int, m: int) -> None:
    schedule, text = build(name, p, m), io.StringIO()
    to_csv(schedule, text)
    assert from_csv(io.StringIO(text.getvalue())) == schedule


def test_csv_names_the_bad_cell() -> None:
    with pytest.raises(ScheduleError, match="rank 1, position 2: '1X0' is no action"):
        parse("0F0,0B0", "1F0,,1X0")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])  # which has a stage on two ranks
def test_torch_reads_validates_and_simulates_our_csv(name: str) -> None:
    schedule, text = build(name, 4, 8), io.StringIO()
    to_csv(schedule, text)
    lines = text.getvalue().split()
    rows = {r: [torchs._Action.from_str(cell) for cell in line.split(",")] for r, line in enumerate(lines)}
    stages, rank_of = size(schedule)[0], placement(schedule)
    torchs._validate_schedule(rows, 4, stages, 8)
    with_messages = torchs._add_send_recv(rows, lambda stage: rank_of[stage, 0], stages)
    torchs._simulate_comms_compute(with_messages, lambda stage: rank_of[stage, 0], stages)


def test_the_command_prints_a_csv() -> None:
    command = [sys.executable, "-m", "pipeline.schedules", "zb-v", "--stages", "4", "--microbatches", "6", "--csv"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert from_csv(io.StringIO(printed)) == build("zb-v", 4, 6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("width", [40, 80, 120, 2000])
def test_a_drawing_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    schedule = build(name, 8, 16)
    lines = fit(timeline.show_schedule(schedule, validate(schedule).events)).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("columns more" in line for line in lines), "what is left out is said in words of its own"
    rows = [line for line in lines if line.startswith("rank ")]
    assert len(rows) == 8
    drawn = "".join(rows)
    if width == 2000:  # with micro-batches
        assert "15" in drawn
        assert "F" not in drawn
    if width == 120 and name == "1f1b":  # in full, by letters
        assert drawn.count("F") == 8 * 16
        assert drawn.count("B") == 2 * 8 * 16
        assert drawn.count(".") == 8 * 3 * 7
    if width == 40:
        assert "Only the start" in " ".join(lines)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("1f1b", "--stages", "0", "--microbatches", "4"), "--stages 0: must be at least 1"),
        (
            ("1f1b", "--stages", "4", "--microbatches", "4", "--chunks", "2"),
            "--chunks 2: 1f1b has no choice of stages a rank",
        ),
        (("dualpipe", "--stages", "3", "--microbatches", "8"), "3 ranks: dualpipe pairs"),
        (("2f2b", "--stages", "4", "--microbatches", "4"), "invalid choice: '2f2b'"),
    ],
)
def test_the_command_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: tuple[str, ...], why: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.schedules", *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def test_the_command_draws(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.schedules", "1f1b", "--stages", "2", "--microbatches", "2"])
    assert main() == 0
    drawn = capsys.readouterr().out
    assert "rank 0  0 1 . . [0 ]. [1 ]\nrank 1  . 0 [0 ]1 [1 ]. . \n" in drawn
    assert "bubble: 0.3333 of wall time, 0.5000 of ideal time; in flight per rank: 2 1" in drawn
