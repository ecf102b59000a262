"""Ranks that fail, fall silent or never come: the others stop, and say who."""

import os
import signal
import textwrap
from pathlib import Path

from core.proof import launch
from core.proof.watch import came
from tests.pool import Pool


def script(folder: Path, body: str, name: str = "script") -> str:
    """A script that is a rank of a job and then does `body`, with a timeout of 10 s."""
    head = """
        import os, signal, sys, time
        import torch, torch.distributed as dist
        from core import comm
        from core.proof.launch import Stop, launch
        from core.ledger import Ledger
        from core.mesh import Mesh

        with launch(torch.device("cpu"), 10.0) as job:
    """
    path = folder / f"{name}.py"
    path.write_text(
        textwrap.dedent(head).strip() + "\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"
    )
    return str(path)


def test_one_process_needs_no_torchrun(pool: Pool, tmp_path: Path) -> None:
    path = script(tmp_path, "print(job.gather('a'), job.share('b'), job.world_size, job.backend)")
    outcome = pool.script(1, path, torchrun=False)
    assert (outcome.codes, outcome.out, outcome.err) == ([0], "['a'] b 1 gloo\n", "")


def test_an_orderly_end_is_silent(pool: Pool, tmp_path: Path) -> None:
    path = script(
        tmp_path, "time.sleep(job.rank)\nprint(job.gather(job.rank), job.share(7 if job.rank == 0 else None))"
    )
    outcome = pool.script(3, path)
    assert (outcome.codes, outcome.err) == ([0, 0, 0], "")
    assert outcome.out == "[0, 1, 2] 7\n[] 7\n[] 7\n"


def test_a_rank_with_a_bug_shows_it_and_is_named(pool: Pool, tmp_path: Path) -> None:
    body = """
        axis = Mesh("cpu", Ledger(), job.timeout, dp=3)["dp"]
        if job.rank == 1:
            raise KeyError("a bug")
        comm.all_reduce(torch.ones(3), axis)
    """
    outcome = pool.script(3, script(tmp_path, body))
    assert outcome.codes == [1, 1, 1]
    assert outcome.err.count("Traceback") == outcome.err.count("\nKeyError: 'a bug'") == 1
    assert outcome.err.count("what is wrong: rank 1 failed: KeyError: 'a bug'; ranks 0 and 2 wait for it in") == 1
    for rank in (0, 2):
        assert f"rank {rank}: lost rank 1 (all-reduce over dp failed: " in outcome.err


def test_a_rank_that_dies_before_it_has_its_groups_is_named(pool: Pool, tmp_path: Path) -> None:
    """Bug: what ranks tell each other while groups are made fails with a traceback of the rank that lives."""
    body = """
        if job.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        Mesh("cpu", Ledger(), job.timeout, dp=3)
    """
    outcome = pool.script(3, script(tmp_path, body))
    assert (outcome.codes[0], outcome.codes[2]) == (1, 1)
    assert "Traceback" not in outcome.err
    for rank in (0, 2):
        assert f"rank {rank}: lost rank 1 (" in outcome.err


def test_stop_is_said_once(pool: Pool, tmp_path: Path) -> None:
    outcome = pool.script(3, script(tmp_path, "raise Stop('enough')"))
    assert (outcome.codes, outcome.err) == ([1, 1, 1], "stopped: enough\n")


def test_ranks_that_are_silent_and_ranks_that_never_come(pool: Pool, tmp_path: Path) -> None:
    """Three jobs at once: each waits for as long as it may."""
    body = """
        axis = Mesh("cpu", Ledger(), job.timeout, tp=2, dp=2)["tp"]  # not the job's own group
        if job.rank == 1:
            time.sleep(25)
        comm.all_reduce(torch.ones(3), axis)
    """
    silent = pool.start(4, script(tmp_path, body, "silent"), timeout=40)
    incomplete = [pool.start(3, script(tmp_path, "pass", "empty"), started=n, timeout=40) for n in (1, 2)]
    outcome = silent.end()
    assert outcome.codes == [1] * 4
    assert outcome.seconds < 35
    assert "rank 0: all-reduce over tp failed: " in outcome.err
    assert "timed out" in outcome.err.lower()
    assert "every other rank is alive" in outcome.err
    for outcome in (job.end() for job in incomplete):
        assert outcome.codes == [1] * len(outcome.codes)
        assert "rank 0: could not meet the other ranks within 10 s" in outcome.err
        assert "Traceback" not in outcome.err


def test_who_holds_the_store_is_named_when_it_is_stopped_and_who_died_before_the_meeting(
    pool: Pool, tmp_path: Path
) -> None:
    """Two jobs at once: in both a wait on the store itself would never end."""
    body = """
        axis = Mesh("cpu", Ledger(), job.timeout, dp=3)["dp"]
        if job.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        comm.all_reduce(torch.ones(3), axis)
    """
    holder = pool.start(3, script(tmp_path, body, "holder"), timeout=30)
    early = pool.start(3, script(tmp_path, "pass", "early"), timeout=30, before=dies_before_the_meeting)
    for process in holder.processes[1:]:
        process.join(25)
    os.kill(holder.processes[0].pid, signal.SIGKILL)
    outcome = holder.end()
    assert outcome.codes[1:] == [1, 1]
    for rank in (1, 2):
        assert f"rank {rank}: lost rank 0, which held the job's store, and has not answered for 8 s" in outcome.err
    assert outcome.err.count("who waits for what:") == 1
    assert "rank 0 is stopped" in outcome.err
    outcome = early.end()
    for rank in (0, 1):
        assert f"rank {rank}: could not meet the other ranks within 10 s: rank 2 died" in outcome.err


def test_who_comes_late_does_not_tell_again_what_a_listener_has_told(pool: Pool, tmp_path: Path) -> None:
    """Rank 0 dies with the store; rank 1 tells it and leaves while rank 2 stands still: to rank 2 both are dead."""
    body = """
        axis = Mesh("cpu", Ledger(), job.timeout, dp=3)["dp"]
        if job.rank == 0:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if job.rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        comm.all_reduce(torch.ones(3), axis)
    """
    job = pool.start(3, script(tmp_path, body, "late"), timeout=30)
    for process in job.processes[:2]:
        process.join(25)
    os.kill(job.processes[2].pid, signal.SIGCONT)
    outcome = job.end()
    assert outcome.codes[1:] == [1, 1]
    assert "rank 2: lost rank 0" in outcome.err
    assert outcome.err.count("who waits for what:") == 1
    assert "rank 0 died" in outcome.err


def test_who_should_hold_the_store_and_died_is_named(pool: Pool, tmp_path: Path) -> None:
    """Bug: the others name an address, and not the rank."""
    job = pool.start(2, script(tmp_path, "pass"), timeout=60, before=first_dies_before_the_meeting)
    apart = "rank 1: could not meet the other ranks within 10 s: rank 0, which holds the job's store, did not answer"
    assert apart in job.end().err


def first_dies_before_the_meeting(rank: int) -> None:
    if rank == 0:
        os._exit(1)


def dies_before_the_meeting(rank: int) -> None:
    """Rank 2 has come, and is killed before all have met."""
    if rank == 2:
        launch.came = lambda store, rank: (came(store, rank), os._exit(9))
