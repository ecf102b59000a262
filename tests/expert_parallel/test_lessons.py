"""The lessons of CODE 04 as a reader starts them: claims, options, refusals."""

import json
import re
from pathlib import Path

import pytest
import torch

from core.model.gpt import GPT, GPTConfig, materialize
from core.proof.lesson import Lesson
from core.shards import LocalTensor, Shard
from expert_parallel import router, train, upcycle
from expert_parallel.checkpoint import convert, read, write
from expert_parallel.moe import MoEConfig, to_moe
from expert_parallel.training import add_flags, add_parallel_flags, check
from tests.pool import Pool

QUICK = ("--steps", "2", "--batch", "8", "--sequence", "16", "--hidden", "16", "--layers", "2", "--feed-forward", "16")
LESSONS = ("router", "moe", "dispatch", "upcycle", "train")


@pytest.mark.parametrize(("lesson", "ranks"), [*((lesson, 8) for lesson in LESSONS), ("dispatch", 1), ("upcycle", 2)])
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int) -> None:
    report = tmp_path / "report.json"
    outcome = pool.script(ranks, f"expert_parallel/{lesson}.py", *QUICK, "--report", str(report))
    assert outcome.codes == [0] * ranks, outcome.err
    written = json.loads(report.read_text())
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert all(claim["holds"] for claim in written["claims"])
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("CODE 04") == 1, "only rank 0 speaks"


@pytest.mark.parametrize(
    ("lesson", "flags"),
    [("dispatch", flags) for flags in [
        ("--dtype", "float32"), ("--dtype", "bfloat16", "--capacity", "1"), ("--ep", "2", "--etp", "2"),
        ("--dispatch", "all-gather", "--score", "sigmoid", "--bias-rate", "0.01"), ("--ep", "1"), ("--shared", "0"),
        ("--experts", "16", "--groups", "4", "--top-groups", "2", "--top-k", "4", "--drop", "probability",
         "--capacity", "0.5"), ("--dropout", "0.2", "--attention", "softmax")]]
    + [("upcycle", ("--score", "softmax-topk")), ("upcycle", ("--dtype", "bfloat16")), ("train", ("--ep", "2"))]
    + [("upcycle", ("--score", "sigmoid", "--top-k", "1")), ("moe", ("--dtype", "bfloat16", "--feed-forward", "6")),
       ("router", ("--experts", "1", "--top-k", "1"))],
)  # fmt: skip
def test_options(pool: Pool, lesson: str, flags: tuple[str, ...]) -> None:
    outcome = pool.script(4, f"expert_parallel/{lesson}.py", *QUICK, *flags)
    assert outcome.codes == [0] * 4, outcome.out + outcome.err


@pytest.mark.parametrize("lesson", ["router", "dispatch", "train"])
def test_plot(pool: Pool, tmp_path: Path, lesson: str) -> None:
    plot = tmp_path / "plot.svg"
    outcome = pool.script(2, f"expert_parallel/{lesson}.py", *QUICK, "--plot", str(plot))
    assert outcome.codes == [0, 0], outcome.err
    assert "<svg" in plot.read_text()


def test_what_travels_by_all_gather_is_shown(pool: Pool) -> None:
    """Forward 2Th and 2k numbers a token, of which the weights have a gradient: T 64, h 16, k 2, two layers."""
    outcome = pool.script(2, "expert_parallel/train.py", *QUICK, "--dispatch", "all-gather")
    sent = 2 * 64 * (2 * (2 * 16) + 2 * 2 + 2)
    assert re.findall(r"^ +\d(?: +[\d,]+){5} +([\d,]+)$", outcome.out, re.MULTILINE) == [f"{sent:,}"] * 2


REFUSED = {
    "experts over ep": ("dispatch", ("--experts", "6", "--ep", "4")),
    "ep over ranks": ("dispatch", ("--ep", "3", "--experts", "9")),
    "ep": ("dispatch", ("--ep", "-1")),
    "etp": ("dispatch", ("--etp", "3")),
    "etp beside ep": ("dispatch", ("--etp", "3", "--ep", "8")),
    "etp beside all-gather": ("dispatch", ("--dispatch", "all-gather", "--etp", "3")),
    "no experts": ("dispatch", ("--experts", "0")),
    "one expert": ("dispatch", ("--experts", "1")),
    "groups and top-groups": ("dispatch", ("--groups", "3", "--top-groups", "3")),
    "top-k of groups": ("dispatch", ("--top-k", "9", "--groups", "4", "--top-groups", "2")),
    "no etp": ("dispatch", ("--etp", "0")),
    "features": ("dispatch", ("--etp", "4", "--feed-forward", "30")),
    "all-gather": ("dispatch", ("--dispatch", "all-gather", "--etp", "2")),
    "top-k": ("dispatch", ("--top-k", "9")),
    "no top-k": ("dispatch", ("--top-k", "0")),
    "capacity": ("dispatch", ("--capacity", "-1")),
    "groups": ("dispatch", ("--groups", "3")),
    "batch": ("moe", ("--batch", "12")),
    "shared": ("upcycle", ("--shared", "8")),
    "shared size": ("dispatch", ("--shared", "-8")),
    "balance": ("train", ("--aux", "0")),
    "balance by loss": ("router", ("--aux", "0")),
    "balance by bias": ("router", ("--bias-rate", "0")),
}


@pytest.mark.parametrize(("lesson", "flags"), REFUSED.values(), ids=REFUSED)
def test_refusals(pool: Pool, lesson: str, flags: tuple[str, ...]) -> None:
    """One message, and what it suggests is taken."""
    script = f"expert_parallel/{lesson}.py"
    outcome = pool.script(8, script, *flags, started=1)
    assert outcome.codes == [2]
    assert outcome.err.count("\n") == 1, "one message, no traceback"
    assert flags[0] in outcome.err
    (suggested,) = re.findall(r"; use ((?:--[\w-]+ [\w.-]+ ?)+)", outcome.err.replace(",", ""))
    frame = Lesson(script, "CODE 04", "", "", "")
    add_flags(frame)
    add_parallel_flags(frame)
    frame.parser.set_defaults(bias_rate=0.01)
    refuse = {"upcycle": upcycle.refuse, "train": train.refuse, "router": router.refuse}.get(lesson, check)
    refuse(frame.parser.parse_args([*flags, *suggested.split()]), 8)  # takes it


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks a part of anything"):
        read(tmp_path)
    write(tmp_path, 0, [LocalTensor("a", torch.zeros(2), None), LocalTensor("b", torch.zeros(2), Shard(0, 0, 2, 4))])
    with pytest.raises(ValueError, match="lacks a part of b"):
        read(tmp_path)
    write(tmp_path, 1, [LocalTensor("b", torch.ones(2), Shard(0, 1, 2, 4))])
    assert read(tmp_path)["b"].tolist() == [0, 0, 1, 1]


def test_a_checkpoint_is_not_converted_into_another(tmp_path: Path) -> None:
    """What 8 ranks wrote before must not be read among the files of 4."""
    config, moe = GPTConfig(layers=1, hidden=8, heads=2), MoEConfig()
    for seed in (1, 2):
        (tmp_path / f"{seed}").mkdir()
        model = materialize(to_moe(GPT(config), moe), seed, torch.device("cpu"), torch.float64)
        write(tmp_path / f"{seed}", 0, [LocalTensor(name, p, None) for name, p in model.named_parameters()])
    convert(tmp_path / "1", tmp_path / "to", config, moe, 8, 8)
    with pytest.raises(ValueError, match="use a new folder"):
        convert(tmp_path / "2", tmp_path / "to", config, moe, 4, 4)
