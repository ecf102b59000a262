"""What the benchmark of record leaves out, and that it says so. The benchmark itself is not a test."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from core import comm
from core.ledger import Ledger
from core.mesh import Mesh
from core.p2p import PointToPoint
from tests.bench import __main__ as record
from tests.bench import picotron
from tests.bench.harness import Row, Topic, silent
from tests.pool import Pool, WorkerError


@pytest.fixture(autouse=True)
def _not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PICOTRON", raising=False)


def without_workers(run: Callable[[int], Row]) -> Callable[[object], SimpleNamespace]:
    """In place of a pool: `run` gives the row of a topic of so many ranks."""
    return lambda _: SimpleNamespace(run=lambda ranks, *_, **__: [[run(ranks)]], close=lambda: None)


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
    def run(ranks: int) -> Row:
        assert ranks == 1, "picotron's ranks were started"
        return Row("other", "", 1.0)

    other = Topic(1, ("other",), lambda *_: [])
    monkeypatch.setattr(record, "topics", lambda: {"other": other, "picotron": picotron.TOPIC})
    monkeypatch.setattr(record, "Pool", without_workers(run))
    assert record.main(["--out", str(tmp_path / "bench.md")]) == 0
    said, file = capsys.readouterr(), (tmp_path / "bench.md").read_text()
    for text in (said.err, said.out, file):
        assert f"{picotron.ROW}: left out, PICOTRON is not set" in text
    assert "| other" in file
    assert f"| {picotron.ROW}" not in file


def test_the_record_says_how_the_allocator_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert record.machine()["MALLOC_TRIM_THRESHOLD_"] == "1000"
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert "MALLOC_TRIM_THRESHOLD_" not in record.machine()


def test_a_topic_that_fails_is_named_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(ranks: int) -> Row:
        if ranks == 1:
            raise WorkerError("rank 0 of 1: no such thing")
        return Row("second", "", 1.0)

    made = {"a": Topic(1, ("first",), lambda *_: []), "b": Topic(2, ("second",), lambda *_: [])}
    monkeypatch.setattr(record, "topics", lambda: made)
    monkeypatch.setattr(record, "Pool", without_workers(run))
    assert record.main(["--out", str(tmp_path / "bench.md")]) == 1
    said, file = capsys.readouterr(), (tmp_path / "bench.md").read_text()
    assert "no such thing" in said.err
    assert "failed: a" in file
    assert "| second" in file


def every_message_while_the_other_ranks_do_nothing() -> bool:
    axis = Mesh("cpu", Ledger(), 20.0, dp=3)["dp"]
    messages = PointToPoint(axis, [(0, 1, "F"), (1, 0, "B")], torch.device("cpu"))
    rows, kept = torch.ones(6, 3), comm.empty(12, torch.float32, torch.device("cpu"), axis)

    def step() -> None:
        for size in (4, 2**18):  # in one turn or two, copied or lent
            comm.all_reduce(torch.ones(size), axis)
        for x in (rows, rows.double(), kept):
            comm.reduce_scatter(x, axis)
            comm.all_gather(x, axis)
        comm.all_gather_in_place_async(rows.clone(), axis).wait()
        assert comm.all_to_all(torch.tensor([2, 7, 1]), axis, [1] * 3, [1] * 3).tolist() == [2, 7, 1], "numbers of rows"
        comm.all_to_all(rows, axis, [1, 3, 2], [1, 3, 2])
        for size in (4, 2**18):
            messages.send(torch.ones(size), 1, "F", size)
            messages.receive(torch.ones(size), 1, "B", size)()
        messages.flush()

    if axis.index == 0:
        silent(step)()
    dist.barrier()
    return True


def test_the_floor_sends_nothing(pool: Pool) -> None:
    assert all(pool.run(3, every_message_while_the_other_ranks_do_nothing, timeout=40.0))
