"""What is printed fits the terminal, and nothing is lost without a word."""

import pytest
from tabulate import tabulate

from core.proof.evidence import Evidence
from core.proof.terminal import columns, fit, measure


def widest(text: str) -> int:
    return max(map(measure, text.split("\n")))


def test_eighty_columns_where_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)
    assert columns() == 80
    monkeypatch.setenv("COLUMNS", "57")
    assert columns() == 57


@pytest.mark.parametrize("text", ["", "short", "two\n\nlines", "a  b\n-  -\n1  2", "x" * 80])
def test_what_fits_stays_as_it_is(text: str) -> None:
    assert fit(text, 80) == text


def test_prose_is_wrapped() -> None:
    text = "Were the first product sharded by rows, GeLU would have to wait for g, because it is not linear. " * 2
    assert widest(fit(f"head\n{text}\ntail", 40)) <= 40
    assert fit(text, 40).split() == text.split()


def test_chinese_is_wrapped_by_what_it_takes() -> None:
    text = "Lecture 08: Pipeline parallelism: zero bubble · 流水并行 1F1B/1F1B Interleaved 原理"
    assert widest(text) > 80
    assert widest(fit(text, 80)) <= 80
    assert fit(text, 80).replace("\n", "").replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("width", [30, 47, 80])
def test_a_wide_table_goes_on_below_with_its_first_column(width: int) -> None:
    heads = ("rank", *(f"column {i}" for i in range(12)))
    rows = [(r, *(100 * r + i for i in range(12))) for r in range(3)]
    text = fit(
        "what it is, in more words than fit in a line of so few columns as some have here\n" + tabulate(rows, heads),
        width,
    )
    assert widest(text) <= width
    for i in range(12):
        assert f"column {i}" in text
    for row in rows:
        assert {*map(str, row)} <= {*text.split()}
    parts = text.split("\n\n")
    assert len(parts) > 1
    assert all("rank" in part for part in parts)


def test_a_framed_table_goes_on_below_too() -> None:
    rows = [("x", *(f"cell {10 * r + i}" for i in range(6))) for r in range(2)]
    text = fit("above\n\n" + tabulate(rows, ("", *map(str, range(6))), "simple_grid"), 40)
    assert widest(text) <= 40
    assert text.count("┌") == text.count("┐") == text.count("┘") == 2
    for row in rows:
        assert all(cell in text for cell in row)


def test_a_head_of_two_lines_stays_with_its_columns() -> None:
    text = fit(tabulate([("a", "b" * 20, "c" * 20)], ("", "one\ntwo", "three\nfour")), 30)
    first, second = text.split("\n\n")
    assert first.split()[:2] + first.split()[-2:] == ["one", "two", "a", "b" * 20]
    assert second.split()[:2] + second.split()[-2:] == ["three", "four", "a", "c" * 20]


def test_a_drawing_is_cut_and_says_so() -> None:
    text = fit("\n".join(f"rank {r}  " + "F" * 100 + "\033[42mB\033[0m" for r in range(3)), 40)
    lines = text.split("\n")
    assert widest(text) <= 40
    assert [measure(line) for line in lines[:3]] == [40] * 3
    assert " ".join(lines[3:]) == "(69 columns more on the right: COLUMNS=109 shows all)"


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_tables_of_claims_fit(width: int) -> None:
    evidence = Evidence()
    evidence.on_ranks("bytes sent per rank and step: plain, then engine", "messages x b·s·h elements", 1, [1e6] * 16)
    evidence.claim("right", "relative difference 0, at most 1e-10 (plain, engine)", 0, 1, correctness=True)
    assert widest(fit(evidence.tables(width), width)) <= width
    assert width < 80 or widest(evidence.tables(width)) <= width


def test_no_is_red_where_it_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = Evidence()
    evidence.claim("a", "b", 0, 1)
    assert "\033" not in evidence.tables()
    monkeypatch.setattr("core.proof.evidence.coloured", lambda: True)
    assert "\033[31mNO" in evidence.tables()
    assert widest(evidence.tables(80)) <= 80
