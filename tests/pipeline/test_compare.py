"""What compare.py tells: its table for known cases, and which schedule it chooses."""

from argparse import Namespace

import pytest

from pipeline.compare import Row, rows_for, which


def rows(p: int, m: int, costs: tuple[float, float, float] = (1, 1, 1), message: float = 0.0) -> dict[str, Row]:
    args = Namespace(costs=costs, message=message, chunks=2, csv=None)
    return {row.name: row for row in rows_for(p, m, args, None)[0]}


def test_the_table() -> None:
    table = {name: (row.verdict.makespan, row.activations, row.parameters, row.messages)
             for name, row in rows(4, 8).items()}  # fmt: skip
    assert table == {
        "naive": (96, 1, 1, 16),
        "gpipe": (33, 8, 1, 16),
        "1f1b": (33, 4, 1, 16),
        "interleaved": (28.5, 5.5, 1, 32),
        "zb-h1": (27, 4, 1, 16),
        "zb-h2": (27, 7, 1, 16),
        "zb-v": (25.5, 4, 1, 32),
        "dualpipe": (25, 5, 2, 16),
        "dualpipev": (25.5, 4.5, 1, 32),
    }


def test_costs_and_messages_count() -> None:
    assert rows(4, 8, (1, 2, 1))["1f1b"].verdict.makespan == 4 * 11
    assert rows(4, 8, message=0.5)["gpipe"].verdict.makespan == 33 + 6 * 0.5


@pytest.mark.parametrize(
    ("memory", "chosen"), [(None, "dualpipe"), (5, "dualpipe"), (4.5, "zb-v"), (4, "zb-v"), (3, "naive")]
)
def test_the_shortest_that_fits_is_chosen(memory: float | None, chosen: str) -> None:
    assert which([*rows(4, 8).values()], memory).startswith(f"choose {chosen}")


def test_nothing_may_fit() -> None:
    assert which([*rows(4, 8).values()], 0.5) == "none of them fits --memory 0.5: the least is 1"
