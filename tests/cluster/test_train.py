"""The combined run as a user starts it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

from cluster.planner import hardware, models
from cluster.planner.command import commands
from cluster.planner.layout import Layout
from cluster.planner.plans import plans
from cluster.planner.software import NAMED
from cluster.run.arguments import add_all_flags, layout_of
from cluster.run.data import HELD_OUT
from cluster.run.recipe import learning_rate
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.lesson import Lesson
from core.proof.oracle import Oracle
from tests.pool import ROOT, Pool

QUICK = ("--steps", "2", "--batch", "8", "--sequence", "16", "--hidden", "16", "--sample", "20")


def parsed(*flags: str) -> Namespace:
    frame = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(frame)
    return frame.parser.parse_args(list(flags))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (8, ()),
        (8, ("--tp", "2", "--cp", "2", "--pp", "2", "--experts", "4", "--ep", "4", "--schedule", "zb-h1")),
        (8, ("--model", "llama", "--tp", "2", "--pp", "2", "--dp", "2", "--heads", "8")),
        (4, ("--model", "llama", "--tp", "2", "--pp", "2", "--sp", "--schedule", "zb-h1", "--kv-heads", "1")),
        (4, ("--model", "llama", "--tp", "4", "--sp", "--kv-heads", "2", "--heads", "8", "--dtype", "bfloat16")),
        (4, ("--model", "llama", "--pp", "2", "--dp", "2", "--zero", "3", "--kv-heads", "2", "--schedule", "zb-h1")),
        (4, ("--model", "llama", "--tp", "4", "--kv-heads", "2", "--optimizer", "muon", "--weight-decay", "0.3")),
        (4, ("--model", "llama", "--pp", "2", "--zero", "3", "--optimizer", "muon", "--dtype", "bfloat16")),
        (4, ("--dp", "2", "--tp", "2", "--zero", "3", "--dtype", "bfloat16", "--untied")),
        (4, ("--layers", "7", "--pp", "4", "--zero", "1")),
        (4, ("--layers", "7", "--stages", "E|t*4|t*3|L", "--zero", "3", "--experts", "2", "--schedule", "zb-h1")),
        (4, ("--dp", "2", "--pp", "2", "--microbatches", "2", "--attention", "softmax", "--dropout", "0.2")),
        (4, ("--tp", "2", "--microbatch", "2", "--zero", "2", "--attention", "softmax", "--dropout", "0.2")),
        (4, ("--experts", "4", "--shared", "8", "--ep", "2", "--etp", "2")),
        (2, ("--layers", "7", "--pp", "2", "--schedule", "zb-v", "--experts", "2")),
        (2, ("--auto", "--evaluate", "1", "--no-verify")),
        (4, ("--tp", "2", "--pp", "2", "--eos", "101", "--pack", "--loss-chunk", "20", "--vocabulary", "300")),
        (4, ("--cp", "4", "--ulysses", "2", "--eos", "101", "--pack", "--heads", "8", "--model", "llama")),
        (4, ("--cp", "4", "--cp-kind", "all-gather", "--eos", "101", "--pack", "--model", "llama", "--kv-heads", "1")),
        (4, ("--tp", "2", "--no-sp", "--cp", "2", "--experts", "4", "--ep", "4", "--capacity", "0.8", "--zero", "1")),
        (1, ()),
    ],
)
def test_every_claim_holds(pool: Pool, tmp_path: Path, ranks: int, flags: tuple[str, ...]) -> None:
    report = tmp_path / "report.json"
    outcome = pool.script(ranks, "cluster/train.py", *QUICK, *flags, "--report", str(report))
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    written = json.loads(report.read_text())
    assert len(written["losses"]) == 2
    assert len(written["reference_losses"]) == 2 * ("--no-verify" not in flags)
    assert re.search("it writes: ['\"]The ", outcome.out)


REFUSED = {
    "tp": (("--tp", "3"), "--tp"),
    "key heads": (("--model", "llama", "--kv-heads", "3", "--tp", "2", "--heads", "6", "--hidden", "48"), "--tp"),
    "key heads of no group": (("--model", "llama", "--kv-heads", "3"), "--kv-heads 3: must divide --heads 16"),
    "batch": (("--batch", "9", "--dp", "8"), "--batch"),
    "schedule": (("--pp", "2", "--schedule", "interleaved", "--chunks", "3"), "--layers"),
    "stages": (("--stages", "E t*2|m|t*2 L"), "--stages 'E t*2|m|t*2 L': must be E, a t for each layer, and L"),
    "stages without all layers": (("--stages", "E t|t*2 L", "--pp", "2"), "t for each of the 4 layers: it has 3; use "),
    "stages for other ranks": (("--stages", "E t|t*3 L", "--pp", "4"), "all ranks of the pipeline hold, 4: it has 2"),
    "stages of an idle rank": (("--stages", "E t|(|)*2 t*3 L", "--pp", "4"), "rank 1 of the pipeline would have noth"),
    "experts": (("--experts", "6", "--ep", "4"), "--ep"),
    "warm-up": (("--warmup", "-1"), "--warmup"),
    "keep": (("--keep", "0"), "--keep"),
    "save": (("--save", "/proc/none"), "--save /proc/none: nothing can be written there: No such file"),
    "save in a file": (("--save", __file__), "--save"),
    "text": (("--sequence", "100000"), "--sequence"),
    "machine": (("--auto", "--machine", "nowhere.json"), "--machine"),
    "auto": (("--auto", "--ep", "3", "--experts", "4"), "--ep 3"),
    "loss chunk": (("--loss-chunk", "-1"), "--loss-chunk -1: must not be negative"),
    "vocabulary": (
        ("--vocabulary", "200"),
        "--vocabulary 200: text in bytes has 256 different tokens; use --vocabulary 256",
    ),
    "eos": (("--eos", "256"), "--eos 256: is none of 256 tokens; use --eos 255"),
    "pack": (("--pack",), "--pack: needs the token that ends a document; use --eos ID"),
    "tokens": (("--tokens", "none.npy", "--vocabulary", "9"), "--tokens none.npy: No such file"),
    "tokens without a vocabulary": (("--tokens", "none.npy"), "does not say how many tokens there are; use --voc"),
    "tokens and data": (("--tokens", "a.npy", "--data", "b"), "--tokens a.npy --data b: one of them is trained on"),
    "token type": (("--token-type", "uint16"), "--token-type uint16: is of a file of --tokens"),
    "tokenizer": (("--tokenizer", "none.json"), "--tokenizer none.json: No such file"),
    "init": (("--init", "/nowhere"), "--init /nowhere: No such file"),
    "export": (("--export", "/nowhere/file"), "--export /nowhere/file: there is no folder"),
}


@pytest.mark.parametrize(("flags", "named"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, flags: tuple[str, ...], named: str) -> None:
    outcome = pool.script(8, "cluster/train.py", *flags, started=1)
    assert outcome.codes == [2], outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert named in outcome.err
    assert "use " in outcome.err


@pytest.mark.parametrize(
    ("world", "flags", "layout"),
    [
        (8, "", Layout(tp=2, pp=2, dp=2, microbatch=2, microbatches=4)),
        (6, "--pp 3 --layers 6 --batch 12", Layout(dp=2, pp=3, microbatch=1, microbatches=6)),
        (8, "--tp 2 --experts 4", Layout(tp=2, dp=4, sp=True, microbatch=4)),
        (8, "--pp 2 --schedule zb-v", Layout(pp=2, v=2, dp=4, schedule="zb-v", microbatch=1, microbatches=4)),
        (8, "--pp 8 --layers 8 --microbatches 16", Layout(pp=8, microbatch=1, microbatches=16)),
        (8, "--stages E,t|t*3,L", Layout(pp=2, dp=4, split="E,t|t*3,L", microbatch=1, microbatches=4)),
        (
            4,
            "--stages E,t|t|t|t,L --pp 2 --schedule interleaved",
            Layout(pp=2, dp=2, v=2, schedule="interleaved", split="E,t|t|t|t,L", microbatch=2, microbatches=4),
        ),
        (4, "--dp 4 --microbatch 1", Layout(dp=4, microbatch=1, microbatches=4)),
    ],
)
def test_what_is_left_open_is_chosen(world: int, flags: str, layout: Layout) -> None:
    assert layout_of(parsed(*flags.split()), world) == layout


@pytest.mark.parametrize(("name", "schedule"), [("gpt3-175b", "interleaved"), ("mixtral-8x7b", "1f1b")])
def test_the_planners_command_is_taken(name: str, schedule: str) -> None:
    model, machine = models.PRESETS[name], hardware.PRESETS["dgx-h100"]
    fixed = {"tp": [8], "pp": [8], "cp": [1], "microbatch": [1], "recompute": ["full"], "schedule": [schedule]}
    found, _ = plans(model, machine, 128, 256, NAMED["here"], fixed)
    line, sbatch = commands(found[0].layout, machine, model)
    assert line in sbatch
    torchruns = get_args_parser().parse_args(shlex.split(line)[1:])
    assert torchruns.training_script == "cluster/train.py"
    assert layout_of(parsed(*torchruns.training_script_args), 128) == found[0].layout


def test_token_ids_are_trained_on_and_an_unknown_one_is_refused(pool: Pool, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 90, 3000).astype(np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    flags = (*QUICK, "--tokens", str(tmp_path / "ids.bin"), "--token-type", "uint16", "--vocabulary", "90")
    for more in (("--eos", "7", "--pack", "--dp", "2"), ("--no-verify", "--dp", "2", "--zero", "2")):
        outcome = pool.script(2, "cluster/train.py", *flags, *more)
        assert outcome.codes == [0, 0], outcome.out + outcome.err
        assert re.search(r"it writes: \[\d+, \d+", outcome.out)
    ids[2345] = 90
    ids.tofile(tmp_path / "ids.bin")
    refused = pool.script(2, "cluster/train.py", *flags, started=1)
    assert refused.codes == [2]
    assert "id 90 at position 2345 is outside the vocabulary of 90; use --vocabulary 91" in refused.err


def test_a_tokenizer_decides_the_vocabulary_and_writes(pool: Pool, tmp_path: Path) -> None:
    fast = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "The", "object", "is", "of", "a"])}
    made = fast.Tokenizer(fast.models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = fast.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    flags = (*QUICK, "--tokenizer", str(tmp_path / "tokenizer.json"))
    outcome = pool.script(2, "cluster/train.py", *flags, "--tp", "2")
    assert outcome.codes == [0, 0], outcome.out + outcome.err
    assert re.search(r"it writes: 'The (\S+ ){19}\S+'", outcome.out)
    assert set(re.search("it writes: '(.*)'", outcome.out).group(1).split()) <= words.keys()
    refused = pool.script(2, "cluster/train.py", *flags, "--vocabulary", "5", started=1)
    assert "tokenizer.json has 6 different tokens; use --vocabulary 6" in refused.err


def before_and_after(said: str) -> tuple[float, ...]:
    return tuple(map(float, re.search(r"validation loss (\S+) before, (\S+) after", said).groups()))


def test_weights_go_out_and_in_and_the_text_is_of_the_trained_model(pool: Pool, tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    out = pool.script(2, "cluster/train.py", *QUICK, "--tp", "2", "--lr", "0.1", "--export", path)
    assert out.codes == [0, 0], out.err
    into = pool.script(4, "cluster/train.py", *QUICK, "--pp", "2", "--dp", "2", "--lr", "1e-9", "--init", path)
    assert into.codes == [0] * 4, into.err
    assert before_and_after(into.out)[0] == before_and_after(out.out)[1]
    config = configuration(parsed(*QUICK))
    model = Oracle(config, 0, torch.device("cpu"), torch.optim.SGD, 1.0).model
    inputs, targets = Text(None, 16).split(HELD_OUT)[1].batch(0, 0, 8)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    assert before_and_after(out.out)[0] == pytest.approx(loss, abs=1e-4)
    texts = [re.search("it writes: .*", each.out).group() for each in (out, into)]
    untrained = pool.script(1, "cluster/train.py", *QUICK, "--lr", "1e-9")
    assert texts[0] == texts[1] != re.search("it writes: .*", untrained.out).group()
    refused = pool.script(2, "cluster/train.py", *QUICK, "--layers", "2", "--init", path)
    assert refused.codes == [2, 2]
    assert "which this model has not" in refused.err


def test_a_finished_run_that_is_started_again_is_finished(pool: Pool, tmp_path: Path) -> None:
    flags = (*QUICK, "--zero", "3", "--dp", "2", "--save", str(tmp_path), "--save-every", "1", "--keep", "1")
    (tmp_path / ".step-notes").mkdir()
    assert pool.script(2, "cluster/train.py", *flags).codes == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".running", ".step-notes", "step-00000002"]
    for steps in ("2", "1"):
        again = pool.script(2, "cluster/train.py", *flags, "--steps", steps)
        assert again.codes == [0, 0], again.out + again.err
        assert f"all {steps} steps are done" in again.out
    more = pool.script(2, "cluster/train.py", *flags, "--steps", "4", "--evaluate", "3")
    assert more.codes == [0, 0], more.out + more.err
    assert "step 3: validation loss" in more.out
    assert "step 4: validation loss" not in more.out


def test_the_learning_rate_rises_and_falls() -> None:
    args = parsed("--steps", "10", "--warmup", "2", "--lr", "1")
    rates = [learning_rate(args, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(args, 10) == pytest.approx(0.1)


def test_a_killed_rank_is_started_again_and_goes_on(pool: Pool, tmp_path: Path) -> None:
    """torchrun starts all ranks again, and the training is the one that nothing has happened to, bit by bit."""
    steps, folder, reports = 60, tmp_path / "run", [tmp_path / "never.json", tmp_path / "killed.json"]
    flags = [*QUICK, "--steps", str(steps), "--no-verify", "--zero", "1", "--dp", "2", "--sample", "0", "--layers", "1"]
    never_killed = pool.start(2, "cluster/train.py", *flags, "--report", str(reports[0]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--standalone"]
    saving = ["--save", str(folder), "--save-every", "5", "--report", str(reports[1])]
    running = subprocess.Popen(
        [*torchrun, str(ROOT / "cluster/train.py"), *flags, *saving],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(folder.glob("step-*")):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        said, _ = running.communicate(timeout=80)
    finally:
        running.kill()
    assert running.returncode == 0, said
    assert "goes on from" in said
    outcome = never_killed.end()
    assert outcome.codes == [0, 0], outcome.err
    one, other = (json.loads(report.read_text())["losses"] for report in reports)
    assert len(one) == steps
    assert one == other


def test_a_checkpoint_of_another_model_stops_it(pool: Pool, tmp_path: Path) -> None:
    save = ("--save", str(tmp_path), "--no-verify")
    assert pool.script(2, "cluster/train.py", *QUICK, *save).codes == [0, 0]
    outcome = pool.script(4, "cluster/train.py", *QUICK, *save, "--steps", "3", "--tp", "2")
    assert outcome.codes == [0] * 4, outcome.err
    assert "goes on from" in outcome.out
    outcome = pool.script(2, "cluster/train.py", *QUICK, *save, "--layers", "6")
    assert outcome.codes == [1, 1]
    assert "its model has layers 4, this run's 6" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_one_process_follows_where_a_rounding_decides_on_an_expert(pool: Pool) -> None:
    """Left to itself it sends some tokens elsewhere, and the biases of selection go apart from there on."""
    flags = ("--dtype", "bfloat16", "--experts", "8", "--ep", "2", "--dp", "2", "--bias-rate", "0.1", "--batch", "16")
    run = pool.script(2, "cluster/train.py", *flags, "--steps", "2", "--sample", "0")
    assert run.codes == [0, 0], run.out + run.err
