"""A little of `python -m tests.abuse`, which is run by hand, and what it has found."""

import contextlib
import errno
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.planner.layout import Layout
from cluster.run.export import settle
from core.proof.files import FolderLock
from tests.abuse import storage
from tests.abuse.configurations import applied, some
from tests.abuse.drawn import TRAIN, Drawn, Refused, parsed, scripts
from tests.abuse.signals import named
from tests.pool import ROOT, Pool

SLOW = "cluster/dry_run.py"  # whose refusals search layouts of 1024 ranks


@pytest.mark.parametrize("name", [TRAIN, "the others"])
def test_of_random_configurations_each_is_accepted_or_its_refusal_says_what_works(name: str) -> None:
    """Bugs seen: flags that the advice did not take back, a score without a flag, "ranks are 0 to -1"."""
    of = {TRAIN: 50} if name == TRAIN else {each: 12 for each in scripts() if each not in (TRAIN, SLOW)}
    accepted = followed = 0
    for script, count in of.items():
        met = some(script, range(count), seed=0, dry=0.0)
        assert not met.failures, "\n".join(met.failures)
        accepted, followed = accepted + met.accepted, followed + met.followed
    assert accepted + followed == sum(of.values())
    assert min(accepted, followed) > sum(of.values()) / 10, "many of both"


@pytest.mark.parametrize(
    ("script", "ranks", "flags"),
    [
        (TRAIN, 2, "--microbatch=64 --batch=8"),
        (TRAIN, 4, "--zero=0 --reduce=step"),
        (TRAIN, 4, "--recompute-every=2"),
        (TRAIN, 3, "--ulysses=2 --sp"),
        (TRAIN, 4, "--tp=1 --dp=1 --experts=4 --sequence=47"),
        (TRAIN, 2, "--experts=1"),
        (SLOW, 1, "--world=8 --cp=0"),
    ],
)
def test_advice_takes_back_what_was_said(script: str, ranks: int, flags: str) -> None:
    drawn = Drawn(shlex.split(flags), ranks)
    with pytest.raises(Refused) as refusal:
        parsed(scripts()[script], drawn)
    parsed(scripts()[script], applied(str(refusal.value), drawn))


def test_flags_after_others_say_what_they_change() -> None:
    before = Layout(tp=2, sp=True, microbatch=4, split="E,t|t,L", schedule="zb-h1", zero=1)
    said = Layout(dp=2).flags(after=before)
    assert " ".join(said) == "--tp 1 --pp 1 --dp 2 --no-sp --schedule 1f1b --zero 0 --microbatch 1 --stages "


# ---- Storage


def no_space(_: int) -> None:
    """Every file that is written in whole, on a disk that is full."""

    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path.write_bytes = write


def test_a_report_that_cannot_be_written_is_said_by_all_ranks_together(pool: Pool, tmp_path: Path) -> None:
    flags = ("--report", str(tmp_path / "r.json"), "--page", str(tmp_path / "p.html"), "--steps", "1")
    outcome = pool.start(2, "zero/ddp.py", *flags, before=no_space).end()
    assert outcome.codes == [1, 1]
    for flag, name in (("report", "r.json"), ("page", "p.html")):
        why = r"No space left on device; 0\.\d MB are needed, \S+ are free there"
        needs = rf"--{flag} {tmp_path}/{name}: cannot be written: {why}"
        assert re.search(needs, outcome.err), outcome.err
    assert "claims held" in outcome.out
    assert "Traceback" not in outcome.err
    assert "lost rank" not in outcome.err


def test_files_cut_anywhere_or_with_a_bit_turned_are_refused_by_name(tmp_path: Path) -> None:
    """A .npy cut inside its header is a TokenError of Python's own parser."""
    tried, failed = storage.files(tmp_path, seed=0, most=60)
    assert tried > 900
    assert not failed, "\n".join(failed)


HOLD = """
import sys, time
from core.proof.files import FolderLock
lock = FolderLock(sys.argv[1], sys.argv[2], beside=sys.argv[1] == "--export")
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held(flag: str, path: Path) -> Iterator[subprocess.Popen]:
    """By another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, flag, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["w.safetensors", "folder"])
def test_a_second_run_that_exports_to_one_place_is_refused(tmp_path: Path, name: str) -> None:
    """It would write into the first one's parts."""
    path = tmp_path / name
    drawn = Drawn(["--model=llama", f"--export={path}"], 2)
    with (
        held("--export", path) as first,
        pytest.raises(Refused, match=f"--export {path}: process {first.pid} on .*; use"),
    ):
        parsed(scripts()[TRAIN], drawn)
    parsed(scripts()[TRAIN], drawn)  # a killed one is not in the way
    lock = FolderLock("--export", path, beside=True)
    lock.close()
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_was_removed_is_locked_again(tmp_path: Path) -> None:
    """Else a run that is begun there writes beside the first, which goes on."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock("--save", folder)
    lock.keep()
    shutil.rmtree(folder)
    lock.keep()
    shutil.rmtree(folder)
    folder.mkdir()
    with held("--save", folder) as second, pytest.raises(ValueError, match=f"--save {folder}: process {second.pid} on"):
        lock.keep()


def test_an_export_that_ended_between_two_renames_keeps_what_it_replaced(tmp_path: Path) -> None:
    old, target = tmp_path / ".w.replaced", tmp_path / "w"
    old.mkdir()
    (old / "model.safetensors").write_text("the only one")
    settle(target, old)
    assert (target / "model.safetensors").read_text() == "the only one"
    old.mkdir()
    settle(target, old)
    assert [*tmp_path.iterdir()] == [target]


# ---- What is said of a rank that is killed or stopped ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "ranks"),
    [
        ("rank 1: lost rank 3 (all-reduce over dp failed)\nrank 2: lost rank 3 (x)", {3}),
        ("rank 1: lost rank 0, which held the job's store", {0}),
        ("rank 1: lost rank 3 (x)\nrank 0: lost rank 2 (x)", {2, 3}),
        ("rank 0: could not meet the other ranks within 10 s: rank 2 is stopped", {2}),
        ("rank 3: could not meet the other ranks within 10 s: rank 0 did not come, rank 1 died", {0, 1}),
        ("rank 3: could not meet the other ranks within 9 s: rank 0, which holds the job's store, did not answer", {0}),
        ("rank 3: could not meet the other ranks within 10 s: the job's store did not answer", set()),
        ("what is wrong: rank 1 died; it was last outside a step", set()),
    ],
)
def test_whom_the_others_name(said: str, ranks: set[int]) -> None:
    """Bugs: who never met is not among them; a rank of the table that nobody has lost is."""
    assert named(said) == ranks
