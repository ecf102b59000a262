"""The lessons as a reader starts them: claims, report, files, refusals, and a rank that dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pool import ROOT, Pool

LESSONS = ("naive", "gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe", "auto", "compare")
QUICK = ("--steps", "2", "--batch", "8", "--sequence", "16", "--hidden", "16")
LLAMA = ("--model", "llama", "--kv-heads", "1")


@pytest.mark.parametrize(
    ("lesson", "ranks", "microbatches"),
    [("naive", 2, 1), ("naive", 4, 4), ("gpipe", 2, 1), ("gpipe", 4, 2), ("gpipe", 4, 4), ("1f1b", 2, 1),
     ("1f1b", 4, 2), ("1f1b", 4, 4), ("1f1b", 8, 8)],
)  # fmt: skip
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int, microbatches: int) -> None:
    report = tmp_path / "report.json"
    flags = (*QUICK, "--microbatches", str(microbatches), "--report", str(report))
    outcome = pool.script(ranks, f"pipeline/{lesson}.py", *flags)
    assert outcome.codes == [0] * ranks, outcome.err
    written = json.loads(report.read_text())
    assert written["script"] == f"pipeline/{lesson}.py"
    assert (written["world_size"], written["backend"], written["device"]) == (ranks, "gloo", "cpu")
    assert (written["dtype"], written["mesh"]) == ("float64", {"pp": ranks})
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert len(written["losses"]) == 2
    assert written["config"]["microbatches"] == microbatches
    assert written["claims"]
    assert all(c["holds"] and abs(c["measured"] - c["expected"]) <= c["tolerance"] for c in written["claims"])
    assert written["seconds"] > 0
    assert written["tokens_per_second"] > 0
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("Lecture") == 1, "only rank 0 speaks"


SEVERAL_STAGES = {
    "interleaved": ("interleaved", ("--microbatches", "8")),
    "interleaved, three chunks": ("interleaved", ("--microbatches", "8", "--chunks", "3", "--layers", "12")),
    "interleaved, unequal groups": ("interleaved", ("--microbatches", "7", "--batch", "7")),
    "interleaved, few": ("interleaved", ("--microbatches", "2")),
    "zb-h1": ("zero_bubble", ("--schedule", "zb-h1", "--microbatches", "8")),
    "zb-h2": ("zero_bubble", ("--schedule", "zb-h2")),
    "zb-v": ("zero_bubble", ("--schedule", "zb-v")),
    "zb-v, few": ("zero_bubble", ("--schedule", "zb-v", "--microbatches", "2")),
    "dualpipe": ("dualpipe", ()),
    "dualpipev": ("dualpipe", ("--schedule", "dualpipev")),
    "auto": ("auto", ("--microbatches", "8", "--message", "0.2", "--memory", "5")),
    "gpipe of a llama": ("gpipe", LLAMA),
    "zb-h1 of a llama": ("zero_bubble", ("--schedule", "zb-h1", *LLAMA)),
    "compare": ("compare", ("--large", "8", "16", "--costs", "1", "1.2", "0.8", "--memory", "4")),
}


@pytest.mark.parametrize(
    ("case", "ranks"),
    [*((case, 4) for case in SEVERAL_STAGES), ("interleaved", 2), ("zb-v", 2), ("dualpipe", 2), ("dualpipe", 8)],
)  # fmt: skip
def test_every_claim_holds_with_several_stages(pool: Pool, tmp_path: Path, case: str, ranks: int) -> None:
    lesson, flags = SEVERAL_STAGES[case]
    report = tmp_path / "report.json"
    sizes = (*QUICK, "--batch", "16", "--layers", str(2 * ranks), "--report", str(report))
    outcome = pool.script(ranks, f"pipeline/{lesson}.py", *sizes, *flags)
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    claims = json.loads(report.read_text())["claims"]
    assert claims
    assert all(claim["holds"] for claim in claims)
    if case == "compare":  # what the course prints of naive and 1F1B, and what is computed
        assert re.search(r"8\.8 ms, bubble 0\.000, +384 F, bubble 0\.750 ", outcome.out)
        assert re.search(r"57\.2 ms, bubble 0\.094, +105 F, bubble 0\.086 ", outcome.out)


def test_a_schedule_of_ones_own(pool: Pool, tmp_path: Path) -> None:
    """On three ranks, too few for dualpipe."""
    own, plot = tmp_path / "own.csv", tmp_path / "plot.svg"
    own.write_text("0F0,0F1,0B0,0I1,0W1\n1F0,1I0,1F1,1W0,1B1\n2F0,2B0,2F1,2I1,2W1\n")
    flags = ("--csv", str(own), "--plot", str(plot), "--microbatches", "2", "--large", "2", "4", "--layers", "6")
    outcome = pool.script(3, "pipeline/compare.py", *QUICK, *flags)
    assert outcome.codes == [0, 0, 0], outcome.out + outcome.err
    assert f"your {own}: from --csv" in outcome.out
    assert "not here: 3 ranks: dualpipe pairs rank r with rank p-1-r" in outcome.out
    assert "choose " in outcome.out
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0F0,0B0\n1F0,1X0\n", "rank 1, position 1: '1X0' is no action"),
        ("0F0,0B0\n1F0,1I0\n", "rank 1: 1W0 is missing"),
        ("0F0,0B0\n1B0,1F0\n", "rank 1, position 0, 1B0: before its F"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "deadlock: rank 0, position 1, 0B0 waits for 1B0"),
        ("0F0,0B0\n", "is for 1 ranks; use --nproc_per_node 1"),
        ("0F0,0B0\n1F0,1B0\n", "has 1 microbatches; use --microbatches 1 --batch 8"),
        ("0F0,0B0\n99999999999F0,99999999999B0\n", "every rank: 1F0 is missing"),
        ("0F0,0B0\n" + "1" * 200_000, "field larger than field limit"),
        ("0F0,0B0\n0F1\n", "rank 1: 0B1 is missing"),
    ],
)
def test_a_bad_schedule_is_refused(pool: Pool, tmp_path: Path, text: str, why: str) -> None:
    own = tmp_path / "own.csv"
    own.write_text(text)
    flags = (*QUICK, "--microbatches", "2", "--csv", str(own))
    outcome = pool.script(2, "pipeline/compare.py", *flags, started=1)
    assert outcome.codes == [2], outcome.err
    assert f"--csv {own}: " in outcome.err or f"--csv '{own}': " in outcome.err
    assert why in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("lesson", "ranks", "flags", "hint"),
    [
        ("interleaved", 4, ("--layers", "4"), "--layers 8"),
        ("interleaved", 4, ("--chunks", "0"), "--chunks 2"),
        ("zero_bubble", 4, ("--layers", "4"), "--layers 8, or --nproc_per_node one of 2"),
        ("dualpipe", 3, (), "--nproc_per_node 4"),
        ("dualpipe", 4, ("--microbatches", "4"), "--microbatches 8"),
        ("dualpipe", 4, ("--microbatches", "13"), "--microbatches 14 --batch 28"),
        ("compare", 4, ("--chunks", "3"), "--layers 24"),
        ("compare", 4, ("--costs", "nan", "1", "1"), "--costs 1 1 1"),
        ("compare", 4, ("--message", "nan"), "--message 0"),
        ("compare", 4, ("--large", "1024", "4096"), "--large 64 128"),
        ("dualpipe", 4, ("--schedule", "dualpipev", "--microbatches", "4"), "--microbatches 8"),
        ("auto", 4, ("--memory", "0.5"), "--memory 4"),
        ("auto", 4, ("--message", "-1"), "--message 0.1"),
        ("auto", 4, ("--copies", "0"), "--copies 1"),
        ("compare", 4, ("--costs", "1", "0", "1"), "--costs 1 1 1"),
        ("compare", 4, ("--large", "0", "4"), "--large 64 128"),
        ("compare", 4, ("--csv", "/nowhere.csv"), "--csv /nowhere.csv: No such file"),
    ],
)
def test_other_sizes_are_refused(pool: Pool, lesson: str, ranks: int, flags: tuple[str, ...], hint: str) -> None:
    outcome = pool.script(ranks, f"pipeline/{lesson}.py", *flags, started=1)
    assert outcome.codes == [2], outcome.err
    assert hint in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float32"),
        ("--dtype", "bfloat16"),
        ("--untied", "--clip", "1e9", "--dropout", "0.2", "--attention", "softmax"),
    ],
)
def test_options(pool: Pool, flags: tuple[str, ...]) -> None:
    outcome = pool.script(3, "pipeline/1f1b.py", *QUICK, "--layers", "3", *flags)
    assert outcome.codes == [0] * 3, outcome.out


def test_own_text_and_files(pool: Pool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 20)
    plot, trace = tmp_path / "plot.svg", tmp_path / "trace.json"
    flags = ("--data", str(text), "--plot", str(plot), "--trace", str(trace))
    outcome = pool.script(2, "pipeline/1f1b.py", *QUICK, *flags)
    assert outcome.codes == [0, 0], outcome.err
    assert "<svg" in plot.read_text()
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X" and e["pid"] == 0]
    assert len(events) == 2 * 2 * 8
    assert {e["dur"] for e in events if e["name"].endswith("B0")} == {2000.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.svg", "text.txt", "trace.json"], "no temporary file"


REFUSED = {
    "layers": (("--layers", "7"), "--layers 8"),
    "fewer layers than stages": (("--layers", "2"), "--layers 4"),
    "batch": (("--batch", "9"), "--batch 8"),
    "no microbatch": (("--microbatches", "0"), "--microbatches 8"),
    "heads": (("--heads", "3"), "--heads 2"),
    "dtype": (("--dtype", "float16"), "bfloat16"),
    "device": (("--device", "tpu"), "cuda"),
    "no GPU": (("--device", "cuda"), "--device cpu"),
    "not a number": (("--steps", "many"), "--steps"),
    "no step": (("--steps", "0"), "--steps 20"),
    "unknown flag": (("--stages", "4"), "--stages"),
    "seed": (("--seed", "-1"), "--seed 0"),
    "timeout": (("--timeout", "nan"), "--timeout 60"),
    "learning rate": (("--lr", "0"), "--lr 0.001"),
    "infinite clip": (("--clip", "inf"), "--clip 1.0"),
    "dropout in sdpa": (("--dropout", "0.1"), "--attention softmax"),
    "missing text": (("--data", "/nowhere/text"), "--data /nowhere/text: No such file"),
    "text is a folder": (("--data", "/"), "--data /: is a folder"),
    "no file": (("--data", os.devnull), "--data /dev/null: is no regular file"),
    "report folder": (("--report", "/nowhere/report.json"), "there is no folder /nowhere"),
    "report is a folder": (("--report", "/"), "is a folder"),
    "plot folder": (("--plot", "/nowhere/plot.svg"), "there is no folder"),
    "empty report name": (("--report", ""), "is no file name"),
    "a device": (("--report", "/dev/null"), "not a regular file"),
    "one file for two": (("--report", "same", "--trace", "./same"), "--trace ./same: --report writes that file"),
    "trace folder": (("--trace", "/proc/trace.json"), "cannot write"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(pool: Pool, case: str) -> None:
    flags, hint = REFUSED[case]
    outcome = pool.script(4, "pipeline/1f1b.py", *flags, started=1)  # alone: a process group would wait for the others
    assert outcome.codes == [2], outcome.err
    assert hint in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.err.startswith("pipeline/1f1b.py: ")
    assert outcome.out == ""


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen:
    """The real torchrun, started from another folder."""
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_with_torchrun_from_anywhere(pool: Pool, tmp_path: Path) -> None:
    """A run that is refused, where one rank says why, meanwhile one that is not, and a refusal without torchrun."""
    script = str(ROOT / "pipeline" / "1f1b.py")
    refused, good = torchrun(tmp_path, script, "--layers", "7"), torchrun(tmp_path, script, *QUICK)
    alone = pool.script(3, "pipeline/gpipe.py", "--layers", "8")
    assert alone.codes == [2, 2, 2]
    assert alone.err.count("--layers 8: must be a multiple of the 3 stages") == 1
    assert "2, 4, 8" in alone.err
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 1, "torchrun's own, whatever the ranks return"
    assert err.count("--layers 7: must be a multiple of the 2 stages") == 1
    assert "exitcode  : 2" in err
    out, err = good.communicate(timeout=60)
    assert good.returncode == 0, err
    assert "28 of 28 claims held" in out


@pytest.mark.parametrize("lesson", LESSONS)
def test_without_torchrun(pool: Pool, lesson: str) -> None:
    outcome = pool.script(1, f"pipeline/{lesson}.py", torchrun=False)
    assert outcome.codes == [2]
    assert f"torchrun --nproc_per_node=8 pipeline/{lesson}.py" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_one_rank_is_too_few(pool: Pool) -> None:
    outcome = pool.script(1, "pipeline/1f1b.py")
    assert outcome.codes == [2]
    assert "at least 2 ranks" in outcome.err


def test_help(pool: Pool) -> None:
    outcome = pool.script(2, "pipeline/1f1b.py", "--help")
    assert outcome.codes == [0, 0]
    assert outcome.out.count("usage:") == 1
    assert "流水并行 1F1B" in outcome.out


def test_divergence_stops_all_ranks_and_says_where(pool: Pool) -> None:
    outcome = pool.script(2, "pipeline/1f1b.py", *QUICK, "--lr", "1e300")
    assert outcome.codes == [1, 1]
    assert "NaN or Inf at step 1 in the gradient of " in outcome.err
    assert "Traceback" not in outcome.err


def test_a_lost_rank_is_named_by_all_others(pool: Pool) -> None:
    """Three jobs at once, which have begun to train when they lose a rank."""
    flags = (*QUICK, "--layers", "3", "--steps", "100000", "--timeout", "10")
    jobs = [(lost, how, pool.start(3, "pipeline/1f1b.py", *flags, timeout=80))
            for lost, how in ((2, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL))]  # fmt: skip
    for lost, how, job in jobs:
        deadline = time.monotonic() + 60
        while "loss=" not in job.said("err"):  # the progress bar's
            assert time.monotonic() < deadline, job.said("err")
            time.sleep(0.1)
        os.kill(job.processes[lost].pid, how)
    killed_at = time.monotonic()
    for lost, _, job in jobs:
        others = [rank for rank in range(3) if rank != lost]
        for rank in others:
            job.join(rank)
        assert time.monotonic() - killed_at < 10, "longer than --timeout"
        job.processes[lost].kill()
        outcome = job.end()
        assert outcome.codes == [-signal.SIGKILL if rank == lost else 1 for rank in range(3)], outcome.err
        for rank in others:
            assert f"rank {rank}: lost rank {lost}" in outcome.err
