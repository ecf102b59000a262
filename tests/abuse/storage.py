"""Files and folders that are full, read-only, gone, shared, truncated or altered: nothing lost, nothing silently wrong.

Real runs of `cluster/train.py` on two ranks for what happens to a folder, about 3 s each, and readers in this process
for every byte of a file: two minutes in all. A disk is a tmpfs of 200 kB, for which one must be root.
"""

import contextlib
import json
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from safetensors.torch import save_file

from cluster.evidence.topology import check_file as check_topology
from cluster.planner import hardware
from cluster.planner.hardware import measured
from cluster.run.arguments import full_model
from cluster.run.hf import Folder
from cluster.run.load import check_init
from core.model.gpt import GPTConfig
from core.model.published import from_config
from core.model.text import Text
from core.model.tokens import Tokens
from core.proof.checkpoint import check_file, fingerprint, read_content
from pipeline.compare import own_schedule
from pipeline.schedules import build, to_csv
from tests.pool import ROOT, Outcome, Pool

QUICK = ("--steps", "2", "--hidden", "16", "--heads", "4", "--batch", "8", "--sequence", "16", "--sample", "0",
         "--layers", "2", "--tp", "2", "--timeout", "20", "--no-verify", "--device", "cpu")  # fmt: skip
TRAIN = "cluster/train.py"
SMALL = 200  # kB of a disk; a checkpoint of QUICK is about 300
Report = tuple[int, list[str]]  # how much was tried, and what failed


def run(pool: Pool, *flags: str) -> Outcome:
    return pool.script(2, TRAIN, *QUICK, *flags)


def clear(outcome: Outcome, code: int, *words: str) -> list[str]:
    """What is wrong with how a run has ended: its codes, a traceback, words that are missing in what it says."""
    wrong = [f"exit codes {outcome.codes}, not {code}"] * (outcome.codes != [code, code])
    wrong += ["a traceback"] * ("Traceback" in outcome.err)
    wrong += [f"does not say {word!r}" for word in words if word not in outcome.err + outcome.out]
    return [f"{'; '.join(wrong)}\n{outcome.err[-1500:]}"] if wrong else []


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int = SMALL) -> Iterator[Path]:
    """A file system of its own in a folder. Raises CalledProcessError where one may not make it."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def full(pool: Pool, folder: Path) -> Report:
    """Every flag that writes, on a disk that is full before it does."""
    failed: list[str] = []
    flags = {"save": "run", "export": "w.safetensors", "report": "r.json", "page": "p.html", "plot": "p.svg"}
    for flag, name in flags.items():
        with disk(folder / flag, SMALL if flag == "save" else 24) as there:
            if flag != "export":
                (there / "fills").write_bytes(b"0" * (SMALL * 400 if flag == "save" else 24 * 1024))
            outcome = run(pool, f"--{flag}", str(there / name))
            left = sorted(path.name for path in there.rglob("*") if path.name not in ("fills", "run", ".running"))
            failed += [f"--{flag} on a full disk: {each}" for each in clear(outcome, 1, str(there / name), "free")]
            failed += [f"--{flag} on a full disk leaves {left}"] * bool(left)
    return len(flags), failed


def fills_later(pool: Pool, folder: Path) -> Report:
    """A disk that holds one checkpoint and not two: the first is there at the end, and can be gone on from."""
    with disk(folder / "later", 1200) as there:
        flags = ("--save", str(there / "run"), "--save-every", "1", "--keep", "9")
        outcome = run(pool, *flags, "--steps", "30")
        failed = clear(outcome, 1, "--save", "free")
        steps = sorted(path.name for path in (there / "run").glob("step-*"))
        if not steps:
            return 1, [*failed, f"no checkpoint is left\n{outcome.err}"]
        for step in steps[:-1]:
            shutil.rmtree(there / "run" / step)
        done = int(steps[-1].removeprefix("step-"))
        again = run(pool, *flags, "--steps", str(done))  # there is no room for another
        return 1, failed + clear(again, 0, f"goes on from {there / 'run' / steps[-1]}")


def read_only(pool: Pool, folder: Path) -> Report:
    """Every flag that writes, in a folder that nobody can write to."""
    failed: list[str] = []
    flags = {"save": "run", "export": "w.safetensors", "report": "r.json", "page": "p.html", "plot": "p.svg"}
    with disk(folder / "read") as there:
        subprocess.run(["mount", "-o", "remount,ro", there], check=True)
        for flag, name in flags.items():
            failed += clear(run(pool, f"--{flag}", str(there / name)), 2, f"--{flag}", "; use ")
        failed += clear(run(pool, "--export", str(there / "folder")), 2, "--export", "; use ")
    return len(flags) + 1, failed


def turns(pool: Pool, folder: Path) -> Report:
    """A folder of checkpoints that vanishes while a run writes there, and is made again; or a file takes its name."""
    failed: list[str] = []

    def vanish(there: Path) -> None:
        shutil.rmtree(there / "run", ignore_errors=True)

    def replace(there: Path) -> None:
        while (there / "run").is_dir():  # a run may be writing there
            vanish(there)
        (there / "run").write_text("a file")

    for name, what, steps in (("vanishes", vanish, 60), ("becomes a file", replace, 4000)):
        with disk(folder / "turns", 20_000) as there:
            flags = ("--save", str(there / "run"), "--save-every", "1", "--steps", str(steps))
            running = pool.start(2, TRAIN, *QUICK, *flags)
            until = time.monotonic() + 60
            while not list((there / "run").glob("step-*")) and time.monotonic() < until:
                time.sleep(0.02)
            what(there)
            outcome = running.end()
            failed += [
                f"a folder that {name}: {each}"
                for each in clear(outcome, int(what is replace), *[str(there / "run")] * (what is replace))
            ]
            if what is vanish and not (there / "run" / f"step-{steps:08d}" / "checkpoint.json").exists():
                failed.append(f"a folder that {name}: the last checkpoint is not there")
    return 2, failed


def pairs(pool: Pool, folder: Path, seed: int, count: int = 8) -> Report:
    """Two runs that write to one place, begun at nearly the same time: one is refused, or they follow each other."""
    chance, failed = Random(seed), []
    for i in range(count):
        flag = chance.choice(("--save", "--save", "--export"))
        place = folder / f"pair{i}"
        flags = (
            *QUICK,
            flag,
            str(place),
            "--steps",
            "6",
            *(("--save-every", "1") if flag == "--save" else ("--model", "llama")),
        )
        first = pool.start(2, TRAIN, *flags, "--seed", "1")
        time.sleep(chance.random() * 2)
        both = [running.end() for running in (first, pool.start(2, TRAIN, *flags, "--seed", "2"))]
        codes = [outcome.codes for outcome in both]
        if any("Traceback" in outcome.err for outcome in both) or [0, 0] not in codes:
            failed.append(f"two runs with {flag}: {codes}\n{both[0].err[-800:]}\n{both[1].err[-800:]}")
        for outcome in both:
            if outcome.codes != [0, 0] and ("process " not in outcome.err or "writes there" not in outcome.err):
                failed.append(f"two runs with {flag}: the second is not told who writes there: {outcome.err[-800:]}")
        if flag == "--save":
            failed += clear(run(pool, flag, str(place), "--steps", "6"), 0, "goes on from")
        left = [path.name for path in folder.iterdir() if path.name.startswith(f".pair{i}")]
        failed += [f"two runs with {flag} leave {left}"] * bool(left)
    return count, failed


def jump(_: int) -> None:
    """The clock of the wall goes hours forth and back, from call to call."""
    right, chance = time.time, Random(0)
    time.time = lambda: right() + chance.uniform(-1e5, 1e5)


def clock(pool: Pool, folder: Path) -> Report:
    """A run on such a clock: nothing waits by it, and no duration is measured by it."""
    report = folder / "clock.json"
    outcome = pool.start(2, TRAIN, *QUICK, "--report", str(report), "--save", str(folder / "clock"), before=jump).end()
    failed = clear(outcome, 0)
    if report.exists() and not 0 < json.loads(report.read_text())["seconds"] < outcome.seconds:
        failed.append("a duration is wrong")
    return 1, failed


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def checkpoints(pool: Pool, folder: Path, seed: int) -> Report:
    """A checkpoint cut at each byte of its index, with each bit of it turned, and random bits of its data."""
    run(pool, "--save", str(folder / "run"))
    (step,) = (folder / "run").glob("step-*")
    right, index, failed, tried = read_content(step), (step / "checkpoint.json").read_bytes(), [], 0
    spoilt = [(f"cut at byte {i}", index[:i]) for i in range(len(index))]
    spoilt += [(f"bit {bit} of byte {i} turned", turned(index, i, bit)) for i in range(len(index)) for bit in range(8)]
    for what, content in spoilt:
        (step / "checkpoint.json").write_bytes(content)
        tried += 1
        with contextlib.suppress(ValueError):
            if read_content(step) != right:
                failed.append(f"checkpoint.json {what} is read, as another")
    (step / "checkpoint.json").write_bytes(index)
    chance = Random(seed)
    for name, expected in right["files"].items():
        data = (step / name).read_bytes()
        assert fingerprint(step / name) == expected
        cuts = range(len(data)) if name == ".metadata" else sorted(chance.sample(range(len(data)), 200))
        spoilt = [(f"cut at byte {i}", data[:i]) for i in cuts]
        spoilt += [("a bit turned", turned(data, chance.randrange(len(data)), chance.randrange(8))) for _ in range(300)]
        for what, content in spoilt:
            (step / name).write_bytes(content)
            tried += 1
            with contextlib.suppress(ValueError):
                check_file(step / name, expected)
                failed.append(f"{name} {what} is taken as it was")
        (step / name).write_bytes(data)
    # As a user meets it.
    for spoil in (index[: len(index) // 2], b""):
        (step / "checkpoint.json").write_bytes(spoil)
        failed += clear(run(pool, "--save", str(folder / "run")), 1, "is truncated or altered", "; use ")
    return tried + 2, failed


def turned(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


CONFIG = GPTConfig(vocabulary=32, sequence=8, hidden=8, layers=1, heads=2)
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip


def readers(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """A file that is right for every flag that reads one, and what reads it."""
    model = full_model(CONFIG, None)
    save_file({name: np_zeros(p) for name, p in model.named_parameters()}, folder / "w.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "text.txt").write_text("A text, 句子, of some words. " * 9)
    np.save(folder / "ids.npy", np.arange(200, dtype=np.uint16) % 32)
    (folder / "ids.bin").write_bytes((np.arange(200, dtype=np.uint16) % 32).tobytes())
    with (folder / "own.csv").open("w", newline="") as file:
        to_csv(build("1f1b", 2, 4), file)
    shutil.copy(ROOT / "tests/cluster/topologies/consumer_2gpu.txt", folder / "topology.txt")
    machine = {
        "domains": [[0, 1]], "alpha": [[0, 1e-6], [1e-6, 0]], "beta": [[0, 1e-9], [1e-9, 0]], "device": "cpu",
        "memory": 1e9, "flops": 1e12, "memory_bandwidth": 1e10,
    }  # fmt: skip
    (folder / "machine.json").write_text(json.dumps(machine))
    csv = Namespace(chunks=2, microbatches=4, batch=8)
    return {
        "--data": (folder / "text.txt", lambda path: Text(str(path), 4).split(0.1)),
        "--tokens npy": (folder / "ids.npy", lambda path: Tokens(str(path), 4, 32).scan()),
        "--tokens bin": (folder / "ids.bin", lambda path: Tokens(str(path), 4, 32, "uint16").scan()),
        "--init": (folder / "w.safetensors", lambda path: check_init(str(path), model)),
        "--config": (folder / "config.json", lambda path: from_config(path, 8, f"--config {path}")),
        "--hf": (folder / "config.json", lambda path: Folder(str(path.parent), 8)),
        "--file": (folder / "topology.txt", lambda path: check_topology(str(path))),
        "--csv": (folder / "own.csv", lambda path: own_schedule(Namespace(**vars(csv), csv=str(path)), 2)),
        "--machine": (folder / "machine.json", lambda path: measured(str(path))),
    }  # fmt: skip


def np_zeros(p: object) -> object:
    return p.new_zeros(p.shape, device="cpu")


def files(folder: Path, seed: int, most: int = 1500) -> Report:
    """Every file that a flag reads, cut at each byte and with bits turned: read, or refused with the flag's name."""
    with patch.object(hardware, "_flops", lambda: 1e9), patch.object(hardware, "_bandwidth", lambda: 1e9):
        return _files(folder, seed, most)  # of this machine, where a file does not say it: measured for seconds


def _files(folder: Path, seed: int, most: int) -> Report:
    tried, failed, chance = 0, {}, Random(seed)
    for flag, (path, read) in readers(folder).items():
        data = path.read_bytes()
        read(path)  # it is right
        cuts = range(len(data)) if len(data) <= most else sorted(chance.sample(range(len(data)), most))
        spoilt = [data[:i] for i in cuts]
        spoilt += [turned(data, chance.randrange(len(data)), chance.randrange(8)) for _ in range(most)]
        for content in spoilt:
            path.write_bytes(content)
            tried += 1
            try:
                read(path)
            except ValueError as error:
                said = str(error)
                if not {flag.split()[0], "--sequence"} & {*said.replace(":", " ").split()} or "; " not in said:
                    failed.setdefault((flag, "unclear"), f"{flag}, cut or altered, is refused with: {error}")
            except Exception as error:
                failed.setdefault((flag, type(error)), f"{flag}, cut or altered: {error!r}: {content[-80:]!r}")
        path.write_bytes(data)
    return tried, [*failed.values()]


def all_of(seed: int = 0, only: str = "") -> Iterator[tuple[str, int, list[str], float]]:
    """What was done, how often, what failed, seconds."""
    pool = Pool()
    with TemporaryDirectory() as name:
        folder = Path(name)
        for what in (
            partial(files, folder, seed), partial(checkpoints, pool, folder, seed), partial(clock, pool, folder),
            partial(full, pool, folder), partial(fills_later, pool, folder), partial(read_only, pool, folder),
            partial(turns, pool, folder), partial(pairs, pool, folder, seed),
        ):  # fmt: skip
            if only in ("", what.func.__name__):
                began = time.monotonic()
                try:
                    tried, failed = what()
                except (subprocess.CalledProcessError, AssertionError) as error:
                    tried, failed = 0, [f"could not be tried: {error}"]
                yield what.func.__name__.replace("_", " "), tried, failed, time.monotonic() - began
    pool.close()
