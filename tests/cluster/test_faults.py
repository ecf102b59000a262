"""What users have met: files that are none, two runs in one folder, half a checkpoint, a full disk."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.evidence.topology import check_file
from cluster.planner.hardware import measured
from cluster.run.arguments import check_folder, full_model
from cluster.run.load import check_init
from core.model.gpt import GPTConfig
from core.model.published import read_json
from core.model.text import Text
from core.model.tokenizer import Tokenizer
from core.model.tokens import Tokens
from core.proof.files import LOCK, FolderLock
from pipeline.compare import own_schedule
from pipeline.schedules import build, to_csv
from tests.pool import ROOT, Pool

QUICK = ("--steps", "2", "--hidden", "16", "--heads", "4", "--batch", "8", "--sequence", "16", "--sample", "0")
CONFIG = GPTConfig(vocabulary=32, sequence=8, hidden=8, layers=1, heads=2)

READERS = {
    "--data": lambda path: Text(path, 4),
    "--tokens": lambda path: Tokens(path, 4, 256, "uint16"),
    "--tokenizer": Tokenizer,
    "--init": lambda path: check_init(path, full_model(CONFIG, None)),
    "--config": lambda path: read_json(Path(path), f"--config {path}"),
    "--machine": measured,
    "--file": check_file,
    "--csv": lambda path: own_schedule(Namespace(csv=path), 2),
}


@pytest.mark.parametrize("flag", READERS)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, flag: str) -> None:
    """Every rank reads the file: of a pipe the first would get all, and the others wait."""
    path = tmp_path / "pipe.bin"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{flag} .*is no regular file, which every rank could read; "):
        READERS[flag](str(path))
    with pytest.raises(ValueError, match=f"{flag} .*is a folder; "):
        READERS[flag](str(tmp_path))


def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    """Some editors begin a file with a byte-order mark."""
    schedule = build("1f1b", 2, 4)
    with (tmp_path / "own.csv").open("w", encoding="utf-8-sig", newline="") as file:
        to_csv(schedule, file)
    args = Namespace(csv=str(tmp_path / "own.csv"), chunks=2, microbatches=4, batch=8)
    assert own_schedule(args, 2) == schedule
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json", "--config") == {"model_type": "gpt2"}
    matrix = (ROOT / "tests/cluster/topologies/consumer_2gpu.txt").read_text()
    (tmp_path / "topology.txt").write_text(matrix, encoding="utf-8-sig")
    check_file(str(tmp_path / "topology.txt"))
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str()
    (tmp_path / "tokenizer.json").write_text(words, encoding="utf-8-sig")
    assert Tokenizer(str(tmp_path / "tokenizer.json")).vocabulary == 2


# ---- --save


HOLD = "import sys, time; from core.proof.files import FolderLock; lock = FolderLock('--save', sys.argv[1]); "


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_is_not_in_the_way(pool: Pool, tmp_path: Path) -> None:
    FolderLock("--save", tmp_path, probe=True)  # nobody is there
    command = [sys.executable, "-c", HOLD + "print('held', flush=True); time.sleep(60)", str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match=f"--save {tmp_path}: process {first.pid} on .* since .* writes there; use"
        ):
            check_folder(str(tmp_path))
        with pytest.raises(ValueError, match=f"process {first.pid} on"):  # both have begun at the same time
            FolderLock("--save", tmp_path)
        outcome = pool.script(2, "cluster/train.py", *QUICK, "--save", str(tmp_path))
        assert outcome.codes == [2, 2]
        assert f"process {first.pid} on" in outcome.err
    finally:
        first.kill()
        first.wait()
    check_folder(str(tmp_path))
    FolderLock("--save", tmp_path).close()
    assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_half_a_checkpoint_is_passed_over(pool: Pool, tmp_path: Path) -> None:
    flags = (*QUICK, "--save", str(tmp_path), "--no-verify")
    assert pool.script(1, "cluster/train.py", *flags).codes == [0]
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step-00000008").write_text("a file")
    (tmp_path / ".step-00000007.part").write_text("a file")
    again = pool.script(1, "cluster/train.py", *flags, "--steps", "9", "--save-every", "1")
    assert again.codes == [0], again.err
    for name in ("step-00000008", "step-00000009"):
        assert f"passes over {tmp_path}/{name}, which is no complete checkpoint" in again.out
    assert f"goes on from {tmp_path}/step-00000002" in again.out
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".running", "step-00000008", "step-00000009"], "complete ones have replaced both"


def test_a_run_that_goes_on_otherwise_says_so(pool: Pool, tmp_path: Path) -> None:
    def lines(*flags: str) -> list[str]:
        outcome = pool.script(1, "cluster/train.py", *QUICK, "--no-verify", "--save", str(tmp_path), *flags)
        assert outcome.codes == [0], outcome.err
        return [line.partition(",")[0] for line in outcome.out.splitlines() if "from here on" in line]

    assert lines("--schedule-steps", "6") == []
    assert lines("--steps", "4", "--schedule-steps", "6") == []
    assert lines("--steps", "6") == []
    assert lines("--steps", "7", "--seed", "3") == ["--seed was 0", "--schedule-steps was 6"]


# ---- Weights


def own_file(path: Path, **changed: torch.Tensor) -> str:
    weights = {name: torch.zeros(p.shape) for name, p in full_model(CONFIG, None).named_parameters()}
    save_file(weights | changed, path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64])
def test_weights_of_a_type_that_is_not_built_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    path = own_file(tmp_path / "w.safetensors", **{"norm.weight": torch.zeros(8).to(dtype)})
    with pytest.raises(ValueError, match=r"norm.weight is of type (F8_E4M3|I64); use one of F64, F32, F16, BF16"):
        check_init(path, full_model(CONFIG, None))


def test_weights_that_are_no_numbers_are_named(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    assert pool.script(1, "cluster/train.py", *QUICK, "--no-verify", "--export", str(path)).codes == [0]
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("down.weight"))
    weights[name][3, 1] = float("nan")
    save_file(weights, path)
    outcome = pool.script(2, "cluster/train.py", *QUICK, "--tp", "2", "--init", str(path))
    assert outcome.codes == [1, 1]
    assert f"--init {path}: {name} has NaN or infinity" in outcome.err


def test_an_export_that_does_not_fit_says_how_much_it_needs(pool: Pool, tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", target], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system of 64 kB cannot be made here")
    try:
        outcome = pool.script(2, "cluster/train.py", *QUICK, "--tp", "2", "--export", str(target / "w.safetensors"))
        left = list(target.iterdir())
    finally:
        subprocess.run(["umount", target], check=True)
    assert outcome.codes == [1, 1]
    assert re.search(r"does not fit: 0\.\d MB are needed, 0\.1 MB are free there; use a place", outcome.err)
    assert left == []
