"""The frame of a script: claims, report, refusals, and the device."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from core.proof.files import Unwritable, check_writable, write_file
from core.proof.launch import ProcessInfo, choose_device
from core.proof.lesson import Claim, Evidence, Lesson, Run

ROOT = Path(__file__).parents[2]
HERE = ProcessInfo(0, 4, 0, 4, 0, True)


@pytest.mark.parametrize(
    ("expected", "measured", "tolerance", "holds"),
    [(3, 3, 0, True), (3, 3.0000001, 0, False), (0, 1e-11, 1e-10, True), (0, -2e-10, 1e-10, False),
     (0, math.nan, 1, False), (0, math.inf, 1e9, False), (math.nan, math.nan, 1, False)],
)  # fmt: skip
def test_a_claim_holds_within_its_tolerance_only(
    expected: float, measured: float, tolerance: float, holds: bool
) -> None:
    assert Claim("", "", expected, measured, tolerance).holds is holds


def test_one_failing_case_fails_the_row() -> None:
    evidence = Evidence()
    evidence.claim("good", "1", 1, 1)
    evidence.each("per rank", "r", [("rank 0", 0, 0), ("rank 1", 1, 2)])
    assert [c.holds for c in evidence.claims] == [True, True, False]
    good, bad = evidence.tables().splitlines()[2:]
    assert good.split()[-1] == "yes"
    assert bad.split()[-3:] == ["0", "2", "NO"]


@pytest.mark.parametrize("measured", [16384, -1234567, 1e300, 1e-12, math.nan, math.inf, -math.inf])
def test_any_number_can_be_shown(measured: float) -> None:
    evidence = Evidence()
    evidence.claim("a claim", "0", 0, measured)
    assert evidence.tables().splitlines()[-1].endswith("NO")


def lesson_with(*claims: tuple[float, float]) -> int:
    """The exit code of a lesson that makes these claims: (expected, measured)."""

    def teach(run: Run) -> None:
        for expected, measured in claims:
            run.evidence.claim("a claim", "formula", expected, measured)
        run.losses = [math.nan]

    frame = Lesson("topic/script.py", "00", "A title", "标题", "A summary.")
    return frame.main(lambda args, ranks: None, teach)


@pytest.mark.parametrize(("claims", "code"), [([(1, 1)], 0), ([(1, 1), (1, 2)], 1), ([], 1)])
def test_exit_code_and_report(
    claims: list, code: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "r.json"
    monkeypatch.setattr("sys.argv", ["script.py", "--report", str(report), "--device", "cpu"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert lesson_with(*claims) == code
    assert "Lecture 00: A title · 标题" in capsys.readouterr().out
    written = json.loads(report.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(written) == {"script", "lecture", "world_size", "backend", "device", "dtype", "mesh", "config", "losses",
                            "reference_losses", "claims", "seconds", "tokens_per_second", "phases",
                            "slowest"}  # fmt: skip
    assert written["losses"] == [None]
    for claim, (expected, measured) in zip(written["claims"], claims, strict=True):
        assert claim == {"claim": "a claim", "formula": "formula", "expected": expected, "measured": measured,
                         "tolerance": 0.0, "holds": expected == measured}  # fmt: skip


def test_plot_needs_matplotlib(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script.py", "--plot", "x.svg"])
    with patch("core.proof.lesson.find_spec", lambda name: None):
        assert lesson_with((1, 1)) == 2
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


# ---- Files


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(str(path), "old")
    with patch.object(Path, "replace", side_effect=OSError), pytest.raises(Unwritable):
        write_file(str(path), "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    check_writable("--report", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="--report .* is a folder"):
        check_writable("--report", str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder"):
        check_writable("--report", str(tmp_path / "no" / "file"))
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="cannot write in"):
            check_writable("--report", str(tmp_path / "new"))


# ---- The device


@pytest.mark.parametrize(
    ("requested", "gpus", "device", "why"),
    [("auto", 0, "cpu", "0 GPUs for 4 ranks"), ("auto", 2, "cpu", "2 GPUs for 4 ranks"),
     ("auto", 4, "cuda:0", "4 GPUs"), ("cpu", 8, "cpu", "requested"), ("cuda", 8, "cuda:0", "8 GPUs for 4 ranks")],
)  # fmt: skip
def test_gpus_where_there_are_enough(requested: str, gpus: int, device: str, why: str) -> None:
    with _gpus(gpus):
        chosen, reason = choose_device(requested, HERE)
    assert str(chosen) == device
    assert why in reason


@pytest.mark.parametrize(
    ("gpus", "hint"), [(0, "use --device cpu$"), (2, "--share-gpu, or torchrun --nproc_per_node=2$")]
)
def test_too_few_gpus_are_refused(gpus: int, hint: str) -> None:
    with _gpus(gpus), pytest.raises(ValueError, match=f"--device cuda: 4 ranks .* it has {gpus}; .*{hint}"):
        choose_device("cuda", HERE)


@pytest.mark.parametrize(
    ("requested", "gpus", "why"),
    [("auto", 2, "--share-gpu --device auto: ranks share a GPU only .* use --device cuda --share-gpu$"),
     ("cpu", 2, "--share-gpu --device cpu: ranks share a GPU only .* use --device cuda --share-gpu$"),
     ("cuda", 0, "--share-gpu: this machine has no GPU to share; use --device cpu, without --share-gpu$"),
     ("cuda", 4, "--share-gpu: there are 4 GPUs for 4 ranks .* use --device cuda without --share-gpu$")],
)  # fmt: skip
def test_a_gpu_that_cannot_be_shared_or_need_not_be_is_refused(requested: str, gpus: int, why: str) -> None:
    with _gpus(gpus), pytest.raises(ValueError, match=f"^{why}"):
        choose_device(requested, HERE, share=True)


def test_ranks_share_the_gpus_by_turns() -> None:
    with _gpus(2):
        devices = [choose_device("cuda", replace(HERE, local_rank=rank), share=True)[0].index for rank in range(4)]
    assert devices == [0, 1, 0, 1]


def _gpus(count: int):
    return patch.multiple(
        torch.accelerator,
        current_accelerator=lambda check_available=False: torch.device("cuda") if count else None,
        device_count=lambda: count,
    )


FAILING = """
import sys
from core.proof.lesson import Lesson

def teach(run):
    run.say_course([("of what", "printed", "right", "why")])
    run.evidence.each("equal", "0", [("equal (plain)", 0, 0.5, "head.bias on rank 1"), ("equal (engine)", 0, 0, "")])
    run.evidence.on_ranks("on ranks", "1", 1, [2] * 20)

sys.exit(Lesson("topic/failing.py", "00", "A title", "标题", "A summary.").main(lambda args, ranks: None, teach))
"""


def test_failed_claims_are_the_last_thing_that_torchrun_shows(tmp_path: Path) -> None:
    """Not buried under what torchrun says of a script that exits with 1; and not told again by every rank."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    shown = [line for line in run.stderr.splitlines() if line.strip("= ")]
    assert shown[-1] == "and 11 more"
    assert shown[-11] == "FAILED: equal (plain): 0.5, not 0 within 0; the worst is head.bias on rank 1"
    assert run.stderr.count("head.bias") == 2  # once by itself
