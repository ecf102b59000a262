"""Where an export goes: nothing of others is replaced, and what would fail after the training is refused before it."""

import os
from pathlib import Path

import pytest

from cluster.run.arguments import add_all_flags, check
from cluster.run.export import not_replaced
from core.proof.checkpoint import Checkpoints
from core.proof.lesson import Lesson
from tests.pool import Pool

SIZES = "--layers 2 --hidden 32 --heads 4 --sequence 16 --sample 0 --no-verify --steps 1 --batch 2"
TINY = SIZES.split()


def refused(*flags: str) -> str:
    frame = Lesson("cluster/train.py", "02", "", "", "", fewest_steps=0)
    add_all_flags(frame)
    with pytest.raises(ValueError) as error:
        check(frame.parser.parse_args([*TINY, *flags]), 1)
    return str(error.value)


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_folders_in_which_something_else_is_needed_or_kept() -> None:
    assert "--export same: is replaced, and --save is in it; use another" in refused(
        "--save", "same", "--export", "same"
    )
    Path("mine").mkdir()
    Path("mine/model-best.safetensors").touch()
    assert "holds model-best.safetensors, which an export does not replace" in refused("--export", "mine")
    Path("tok").mkdir()
    Path("tok/tokenizer.json").write_text("{}")
    assert "holds tokenizer.json, which an export does not replace" in refused("--export", "tok")
    assert not_replaced(Path("tok"), "a published folder") == []
    Path("here").mkdir()
    os.chdir("here")
    assert "the run is in that folder" in refused("--export", ".")


def test_links_and_names_that_lead_nowhere() -> None:
    os.symlink("loop", "loop")
    assert "is a link that leads to itself" in refused("--export", "loop")
    assert "File name too long" in refused("--export", "x" * 300)
    for flag in ("--export", "--init", "--tokenizer", "--hf"):
        assert refused(flag, "").startswith(f"{flag} '': has no name; use {flag} PATH")


def test_through_a_link_and_again_and_into_a_name_with_a_dot(pool: Pool) -> None:
    Path("real").mkdir()
    os.symlink("real", "link")
    os.symlink("absent", "dangling")
    for name in ("link", "dangling", "m-0.5b"):
        for _ in range(2 if name != "dangling" else 1):
            outcome = pool.script(1, "cluster/train.py", *TINY, "--export", str(Path(name).absolute()))
            assert outcome.codes == [0], outcome.err
        assert (Path(name) / "model.safetensors").is_file()
    assert Path("link").is_symlink()
    assert sorted(p.name for p in Path().iterdir()) == ["absent", "dangling", "link", "m-0.5b", "real"]


def slow_saves(_: int) -> None:
    """So that the next step is done before a checkpoint is."""
    right = Checkpoints._write

    def write(self: Checkpoints, *arguments: object) -> None:
        import time

        time.sleep(2)
        right(self, *arguments)

    Checkpoints._write = write


def test_a_checkpoint_that_is_being_written_when_a_run_stops_is_kept(pool: Pool) -> None:
    flags = [*TINY, "--steps", "9", "--save", str(Path("saved").absolute()), "--save-every", "1"]
    outcome = pool.start(1, "cluster/train.py", *flags, "--lr", "1e300", "--warmup", "0", before=slow_saves).end()
    assert outcome.codes == [1], outcome.err
    assert [p.name for p in Path("saved").iterdir() if p.name.startswith("step")] == ["step-00000001"]


def test_what_is_not_finite_is_not_exported(pool: Pool) -> None:
    flags = [*TINY, "--export", str(Path("out").absolute()), "--lr", "1e300", "--warmup", "0"]
    outcome = pool.script(1, "cluster/train.py", *flags)
    assert outcome.codes == [1], outcome.err
    assert not Path("out").exists()
