"""Who waits for what, from made-up records: each fault is named, with its rank and its reason."""

from dataclasses import replace

import pytest

from core.proof.diagnosis import Call, Finding, Record, diagnose, named, table

FORWARD = "forward of micro-batch 3"


def call(operation: str, number: int, ranks: tuple[int, ...], axis: str = "tp", waited: float = 10.0, **more) -> Call:
    more = {"lane": f"{axis} {ranks}", "shape": (4, 8), "dtype": "float32", "where": FORWARD} | more
    return Call(operation, axis, ranks, number, **{"age": waited, "waited": waited} | more)


def message(direction: str, number: int, sender: int, receiver: int, waited: float = 10.0) -> Call:
    peer = receiver if direction == "send" else sender
    return call("F", number, (sender, receiver), "pp", waited, lane=f"{sender}>{receiver}", peer=peer,
                direction=direction)  # fmt: skip


def waiting(*calls: Call, before: tuple[Call, ...] = ()) -> Record:
    """A rank that waits in the first of these, and has started them all."""
    lanes: dict[str, list[Call]] = {}
    for each in (*before, *calls):
        lanes.setdefault(each.lane, []).append(each)
    return Record(where=FORWARD, moved=10.0, waits=[*calls], lanes=lanes)


def computing(*before: Call, where: str = FORWARD, moved: float = 30.0, state: str = "running") -> Record:
    record = waiting(before=before)
    return replace(record, where=where, moved=moved, state=state)


def found(records: dict[int, Record], lost: dict[int, str] | None = None) -> Finding:
    return diagnose(records, lost or {})


ALL = (0, 1, 2, 3)


def test_another_operation() -> None:
    records = {r: waiting(call("all-gather" if r == 3 else "all-reduce", 41, ALL)) for r in ALL}
    text = "rank 3 is in all-gather 41 over tp while its three peers are in all-reduce 41 over tp"
    assert found(records) == ("mismatch", (3,), f"{text} ({FORWARD})")


def test_of_two_ranks_neither_is_to_blame_more() -> None:
    records = {r: waiting(call(("all-gather", "all-reduce")[r], 1, (0, 1))) for r in (0, 1)}
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("mismatch", (0, 1))
    assert "rank 1 is in all-reduce 1 over tp while rank 0 is in all-gather 1 over tp" in text


def test_two_that_differ_each_in_another_way() -> None:
    """One of them has ended: it is not to blame alone."""
    ranks = (0, 1, 2, 3, 4)
    operations = {1: "barrier", 2: "all-gather"}
    records = {r: waiting(call(operations.get(r, "all-reduce"), 12, ranks)) for r in ranks}
    records[1] = replace(records[1], state="ended")
    text = "rank 1 is in barrier 12 over tp, rank 2 is in all-gather 12 over tp while ranks 0, 3 and 4 are in"
    assert found(records)[:2] == ("mismatch", (1, 2))
    assert found(records).text == f"{text} all-reduce 12 over tp ({FORWARD})"
    operations = ("barrier", "all-reduce", "all-gather")  # no majority: what the ended one does is not the measure
    records = {r: waiting(call(operations[r], 12, (0, 1, 2))) for r in (0, 1, 2)}
    records[0] = replace(records[0], state="ended")
    assert found(records).kind == "mismatch"
    assert "while rank 1 is in all-reduce 12 over tp" in found(records).text


def test_the_first_difference_counts() -> None:
    """What ranks wait for after they have gone different ways means nothing."""
    early = {r: call("all-gather" if r == 1 else "all-reduce", 7, ALL, waited=0.0, age=20.0) for r in ALL}
    records = {r: waiting(call("all-reduce", 8, ALL), before=(early[r],)) for r in ALL}
    records[2] = waiting(call("reduce-scatter", 8, ALL), before=(early[2],))
    assert found(records)[:2] == ("mismatch", (1,))


def test_two_groups_of_one_axis_are_not_compared() -> None:
    """Ranks 0 and 1 are one group of tp, 2 and 3 another: the same number is another call."""
    records = {r: waiting(call("all-gather", 5, (0, 1))) for r in (0, 1)}
    records |= {r: waiting(call("all-reduce", 5, (2, 3))) for r in (2, 3)}
    assert found(records).kind == "unclear"


def test_another_shape_and_another_type() -> None:
    records = {r: waiting(call("all-reduce", 4, ALL, shape=(4, 9 if r == 1 else 8))) for r in ALL}
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("shape", (1,))
    assert "rank 1 is in all-reduce 4 over tp with (4, 9) float32 while its three peers are in" in text
    records = {r: waiting(call("all-reduce", 4, ALL, dtype="bfloat16" if r == 0 else "float32")) for r in ALL}
    assert found(records)[:2] == ("shape", (0,))


def test_rows_of_an_all_to_all_may_differ() -> None:
    records = {r: waiting(call("all-to-all", 4, ALL, shape=(r, 8), uneven=True)) for r in ALL}
    assert found(records).kind == "unclear"
    records[2] = waiting(call("all-to-all", 4, ALL, shape=(2, 9), uneven=True))
    assert found(records)[:2] == ("shape", (2,))


def test_a_shape_is_named_although_a_rank_died_of_it() -> None:
    records = {r: waiting(call("all-reduce", 4, ALL, shape=(4, 9 if r == 1 else 8))) for r in ALL}
    kind, ranks, text = found(records, {2: "died"})
    assert (kind, ranks) == ("shape", (1,))
    assert text.endswith("; rank 2 died")


def test_not_reached() -> None:
    records = {r: waiting(call("all-reduce", 12, (4, 5, 6), "dp")) for r in (4, 6)}
    records[5] = computing(call("all-reduce", 11, (4, 5, 6), "dp", 31.0))
    text = "rank 5 has not reached all-reduce 12 over dp: it is in forward of micro-batch 3 (for 30.0 s)"
    assert found(records) == ("not reached", (5,), text)


def test_a_chain_of_waits_is_followed_to_its_end() -> None:
    """0 waits for 1 over dp, 1 for 2 over pp, and 2 computes: it is 2 that has not come."""
    records = {
        0: waiting(call("all-reduce", 3, (0, 1), "dp")),
        1: waiting(message("receive", 9, sender=2, receiver=1)),
        2: computing(where="backward of micro-batch 1"),
    }
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("message", (2,))
    assert "rank 2 has not sent it: it is in backward of micro-batch 1" in text


def test_who_does_not_wait_explains_more() -> None:
    """0 waits for 1 and 2, and 1 for 2: of the two that have not come, 2 is named, not 1."""
    records = {
        0: waiting(call("all-reduce", 3, (0, 1, 2), "dp", 20.0)),
        1: waiting(message("receive", 9, sender=2, receiver=1)),
        2: computing(),
    }
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("not reached", (2,))
    assert text.startswith("rank 2 has not reached all-reduce 3 over dp: it is in forward")


def test_the_longest_wait_is_explained() -> None:
    records = {r: waiting(call("all-reduce", 3, (0, 1), waited=9.0)) for r in (0,)} | {1: computing()}
    records |= {2: waiting(call("all-reduce", 3, (2, 3))), 3: computing()}
    assert found(records)[:2] == ("not reached", (3,))


def test_who_has_not_come_may_itself_wait_for_what_all_have_started() -> None:
    """What it has waited in longest is told; and that all have come there does not depend on what they kept before."""
    before = call("all-reduce", 6, (5, 7), "tp", 30.0)
    tp = [call("all-reduce", n, (5, 7), "tp", waited) for n, waited in ((7, 12.0), (8, 11.0))]
    records = {r: waiting(call("all-reduce", 12, (4, 5), "dp", 10.0)) for r in (4,)}
    records |= {r: waiting(*tp, before=(before,)) for r in (5, 7)}
    records[5].moved = 0.3  # who waits is not slow, however lately it came there
    text = "rank 5 has not reached all-reduce 12 over dp: it waits in all-reduce 7 over tp"
    assert found(records) == ("not reached", (5,), text)


def test_of_a_rank_never_heard_of_nothing_is_known() -> None:
    records = {r: waiting(call("all-reduce", 12, (0, 1, 2), "dp", 0.4 if r == 1 else 10.0)) for r in (0, 1)}
    assert found(records)[:2] == ("slow", (1,))


def test_two_wait_for_each_other() -> None:
    records = {
        2: waiting(message("receive", 5, sender=6, receiver=2)),
        6: waiting(message("receive", 5, sender=2, receiver=6)),
    }
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("cycle", (2, 6))
    assert text == (
        "ranks 2 and 6 wait for each other: rank 2 in receive (F) 5 from rank 6, rank 6 in receive (F) 5 from rank 2"
    )


def test_three_wait_in_a_circle() -> None:
    records = {r: waiting(message("receive", 0, sender=(r + 1) % 3, receiver=r)) for r in range(3)}
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("cycle", (0, 1, 2))
    assert "ranks 0-2 wait for one another in a circle" in text


def test_who_waits_for_a_circle_is_not_in_it() -> None:
    records = {
        0: waiting(call("all-reduce", 3, (0, 1), "dp", 20.0)),
        1: waiting(message("receive", 5, sender=2, receiver=1)),
        2: waiting(message("receive", 5, sender=1, receiver=2)),
    }
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("cycle", (1, 2))
    assert text.startswith("ranks 1 and 2 wait for each other: ")


def test_one_is_in_a_gather_alone() -> None:
    records = {r: waiting(call("all-reduce", 5, ALL, "dp")) for r in (1, 2, 3)}
    records[0] = waiting(call("gather", 1, ALL, "the job"), before=(call("all-reduce", 4, ALL, "dp", 12.0),))
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("cycle", (0,))
    assert text == ("ranks 0-3 wait for each other: rank 0 in gather 1 over the job, ranks 1-3 in all-reduce 5 over dp")


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_message_without_its_other_side(direction: str) -> None:
    me, peer = (1, 2) if direction == "send" else (2, 1)
    records = {me: waiting(message(direction, 4, sender=1, receiver=2)), peer: computing()}
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("message", (peer,))
    way, lacks = ("to", "posted its receive") if direction == "send" else ("from", "sent it")
    begins = f"rank {me} waits in {direction} (F) 4 {way} rank {peer}, but rank {peer} has not {lacks}: it is in "
    assert text.startswith(begins)


def test_a_message_without_its_other_side_in_a_circle() -> None:
    """Rank 2 sends before a collective in which rank 0 waits for it: what is too much is the message."""
    records = {r: waiting(call("all-reduce", 4, (0, 1, 2), "dp")) for r in (0, 1)}
    records[2] = waiting(message("send", 0, sender=2, receiver=0))
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("message", (2,))
    has = "rank 2 waits in send (F) 0 to rank 0, which has not posted its receive"
    assert text == f"{has}: it waits in all-reduce 4 over dp, for rank 2"
    records[0], records[1] = waiting(call("all-reduce", 9, (0, 1), "dp")), waiting(call("all-reduce", 4, (1, 2)))
    assert found(records).text == f"{has}: it waits in all-reduce 9 over dp, for rank 1"


def test_two_messages_without_their_other_sides() -> None:
    """Each would explain the circle: all four are told, and none is blamed alone."""
    ends = {1: (1, 2), 3: (0, 3)}
    records = {r: waiting(call("all-reduce", 4, ranks, "dp")) for r, ranks in ends.items()}
    records |= {s: waiting(message("send", 0, sender=s, receiver=s + 1)) for s in (0, 2)}
    assert found(records)[:2] == ("cycle", (0, 1, 2, 3))


def test_a_message_that_was_sent_is_not_missing() -> None:
    records = {1: computing(message("send", 4, 1, 2)), 2: waiting(message("receive", 4, 1, 2))}
    assert found(records).kind == "unclear"
    records[1] = computing(message("send", 4, 1, 2, 0.4))  # and nobody is called slow for it
    text = "receive (F) 4 from rank 1 has not come to its end, and all who take part have started it"
    assert found(records) == ("unclear", (), text)


def test_a_rank_that_has_ended() -> None:
    records = {r: waiting(call("all-reduce", 12, ALL, "dp")) for r in (0, 1, 3)}
    records[2] = computing(call("all-reduce", 11, ALL, "dp", 12.0), state="ended")
    records |= {r: waiting(call("all-reduce", 12, (4, 5), "dp", 1.0)) for r in (4, 5)}  # another group of dp
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("ended", (2,))
    assert text == "rank 2 has ended and never reaches all-reduce 12 over dp: ranks 0, 1 and 3 wait for it"
    records[3] = waiting(call("all-reduce", 11, ALL, "dp", 1.0))  # which all have started
    assert found(records).text.endswith(": ranks 0 and 1 wait for it")


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 1)])
def test_a_rank_at_the_barrier_of_the_end(size: int, rank: int) -> None:
    """Where the axis is the job's own group both have one number."""
    ranks = (*range(size),)
    records = {r: waiting(call("all-reduce", 12, ranks, "dp", lane="0")) for r in ranks}
    barrier = call("barrier", 12, ranks, "the job", lane="0", shape=(), dtype="")
    records[rank] = replace(waiting(barrier), state="ended")
    kind, found_ranks, text = found(records)
    assert (kind, found_ranks) == ("ended", (rank,))
    assert text.startswith(f"rank {rank} has ended while ")


def test_a_dead_rank_and_who_waits_for_it() -> None:
    records = {r: waiting(call("all-reduce", 12, ALL, "dp")) for r in ALL}
    kind, ranks, text = found(records, {3: "died", 1: "is stopped"})
    assert (kind, ranks) == ("dead", (3,))
    assert "rank 3 died; it was last in all-reduce 12 over dp, forward of micro-batch 3; ranks 0-2 wait for it" in text
    del records[3]  # never heard of
    others = (5, 6, 7, 8, 9)
    records |= {r: waiting(call("all-reduce", 12, others, "dp")) for r in others}  # do not wait for it
    records[4] = waiting(call("all-gather", 2, (3, 4)))  # fewer do so there
    assert found(records, {3: "died"}).text == "rank 3 died; ranks 0-2 wait for it in all-reduce 12 over dp"


def test_an_error_is_more_than_a_death() -> None:
    records = {r: waiting(call("all-reduce", 12, ALL, "dp")) for r in ALL}
    records[1] = computing(state="failed: KeyError: 'a bug'")
    assert found(records, {1: "died"})[:2] == ("failed", (1,))


def test_slow_is_who_still_moves() -> None:
    records = {r: waiting(call("all-reduce", 12, (0, 1, 2), "dp")) for r in (0, 2)}
    records[1] = computing(call("all-reduce", 11, (0, 1, 2), "dp", 12.0), moved=0.3)
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("slow", (1,))
    assert "rank 1 is slow: it has not reached all-reduce 12 over dp, but moves on: it is in forward" in text
    for moved, kind in ((4.9, "slow"), (5.1, "not reached")):  # within half of the wait, or not
        records[1].moved = moved
        assert found(records)[:2] == (kind, (1,))


def test_slow_is_who_came_last() -> None:
    where = {1: "optimizer"}
    for waited, expected in ((0.4, ("slow", (1,))), (4.9, ("slow", (1,))), (5.1, ("unclear", ()))):
        calls = {r: call("all-reduce", 12, (0, 1, 2), "dp", waited if r == 1 else 10.0, where=where.get(r, FORWARD))
                 for r in (0, 1, 2)}  # fmt: skip
        kind, ranks, text = found({r: waiting(each) for r, each in calls.items()})
        assert (kind, ranks) == expected
        late = f"rank 1 is slow: it came to all-reduce 12 over dp {10 - waited:.1f} s after the first, in optimizer"
        assert kind == "unclear" or text == late


def test_all_there_and_none_late() -> None:
    records = {r: waiting(call("all-reduce", 12, (0, 1), "dp")) for r in (0, 1)}
    kind, ranks, text = found(records)
    assert (kind, ranks) == ("unclear", ())
    assert "all who take part have started all-reduce 12 over dp" in text
    assert found({0: computing(), 1: computing()}).text == "no rank waits for another"


def test_the_table_names_every_rank() -> None:
    earlier = [call("all-reduce", n, ALL, "dp", 32.0 - n) for n in (10, 11)]
    records = {0: waiting(call("all-reduce", 12, ALL, "dp", age=14.0)), 3: computing(state="ended"),
               1: computing(call("all-gather", 5, ALL, waited=21.5), *earlier)}  # fmt: skip
    records[0].moved = 15.0
    shown = table(records, {3: "died"}, 4, 200)
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["0", "1", "2", "3"]
    zero, one, two, three = shown.splitlines()[2:]
    assert "waits in" in zero
    assert "all-reduce 12 over dp" in zero
    assert "(4, 8) float32" in zero
    assert "10.0 s" in zero
    assert "computes" in one
    assert "after all-reduce 11 over dp" in one
    assert FORWARD in one
    assert "30.0 s" in one
    assert "unknown" in two
    assert "died" in three
    records[1].where = "backward of micro-batch 11, stage 3, layer 17, step 1234"
    narrow = table(records, {}, 4, 90)
    assert max(map(len, narrow.splitlines())) <= 90
    assert len(narrow.splitlines()) > len(shown.splitlines())


def test_ranks_in_words() -> None:
    assert [named(r) for r in ([3], [2, 6], [0, 1, 2, 3, 6, 7])] == ["rank 3", "ranks 2 and 6", "ranks 0-3, 6 and 7"]
