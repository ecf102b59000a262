"""What the benchmark of record leaves out, and that it says so. The benchmark itself is not a test."""

from pathlib import Path

import pytest

from tests.bench import __main__ as record
from tests.bench import picotron
from tests.bench.harness import Row, Topic


@pytest.fixture(autouse=True)
def _not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PICOTRON", raising=False)


def test_without_a_clone_the_row_is_left_out_and_all_others_stay() -> None:
    found = record.topics()
    everything = record.chosen(found, [])
    rows, left_out = record.measurable(found, everything)
    assert rows == {topic: names for topic, names in everything.items() if topic != "picotron"}
    assert left_out == [f"{picotron.ROW}: left out, PICOTRON is not set; --help says how"]
    assert "export PICOTRON=" in record.__doc__


def test_a_folder_that_is_no_clone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"picotron": picotron.TOPIC}
    monkeypatch.setenv("PICOTRON", str(tmp_path))
    rows, (said,) = record.measurable(found, record.chosen(found, []))
    assert not rows
    assert f"PICOTRON={tmp_path}" in said
    (tmp_path / "picotron").mkdir()
    (tmp_path / "picotron" / "model.py").touch()
    assert record.measurable(found, record.chosen(found, [])) == ({"picotron": [picotron.ROW]}, [])


def test_alone_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main(["--rows", "picotron", "--out", str(tmp_path / "bench.md")]) == 2
    assert f"{picotron.ROW}: left out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_record_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pool:
        """The row "other", without workers."""

        def __init__(self, _: object):
            pass

        def run(self, ranks: int, *_: object, **__: object) -> list[list[Row]]:
            assert ranks == 1, "picotron's ranks were started"
            return [[Row("other", "", 1.0)]]

        def close(self) -> None:
            pass

    other = Topic(1, ("other",), lambda *_: [])
    monkeypatch.setattr(record, "topics", lambda: {"other": other, "picotron": picotron.TOPIC})
    monkeypatch.setattr(record, "Pool", Pool)
    assert record.main(["--out", str(tmp_path / "bench.md")]) == 0
    said, file = capsys.readouterr(), (tmp_path / "bench.md").read_text()
    for text in (said.err, said.out, file):
        assert f"{picotron.ROW}: left out, PICOTRON is not set" in text
    assert "| other" in file
    assert f"| {picotron.ROW}" not in file
