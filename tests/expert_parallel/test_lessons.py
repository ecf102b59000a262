"""The lessons of CODE 04 as a reader starts them: claims, options, refusals."""

import json
import re
from pathlib import Path

import pytest
import torch

from core.model.gpt import GPT, GPTConfig, materialize
from core.proof.chunks import convert, load_full, write
from core.proof.lesson import Lesson
from core.shards import LocalTensor, Shard
from expert_parallel import router, train, upcycle
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.routing import MoEConfig
from expert_parallel.evidence.flags import add_flags, add_parallel_flags, check
from expert_parallel.evidence.upcycle import shards
from tests.pool import Pool

QUICK = (
    "--steps",
    "2",
    "--batch",
    "8",
    "--sequence",
    "16",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--layers",
    "1",
    "--feed-forward",
    "16",
)


RANKS = [("router", 2), ("moe", 2), ("dispatch", 8), ("upcycle", 4), ("train", 4), ("dispatch", 1)]
PLOTS = ("router", "dispatch", "train")


@pytest.mark.parametrize(("lesson", "ranks"), RANKS)
def test_every_claim_holds(pool: Pool, tmp_path: Path, lesson: str, ranks: int) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    more = ("--plot", str(plot)) if lesson in PLOTS else ()
    outcome = pool.script(ranks, f"expert_parallel/{lesson}.py", *QUICK, "--report", str(report), *more)
    assert outcome.codes == [0] * ranks, outcome.err
    written = json.loads(report.read_text())
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
    assert all(claim["holds"] for claim in written["claims"])
    if lesson != "upcycle":
        assert any(claim["claim"].endswith("(plain)") for claim in written["claims"]), "the plain version is trained"
    assert f"{len(written['claims'])} of {len(written['claims'])} claims held" in outcome.out
    assert outcome.out.count("CODE 04") == 1, "only rank 0 speaks"
    if more:
        assert "<svg" in plot.read_text()
    if lesson == "train":
        assert re.search(r"6,973 +4,160 ", outcome.out), "what the course prints, and what is right"
        assert "entropy 2.0667" in outcome.out


@pytest.mark.parametrize(
    ("lesson", "flags"),
    [("dispatch", flags) for flags in [
        ("--dtype", "float32"), ("--dtype", "bfloat16", "--capacity", "1"), ("--ep", "2", "--etp", "2"),
        ("--dispatch", "all-gather", "--score", "sigmoid", "--bias-rate", "0.01"), ("--ep", "1"), ("--shared", "0"),
        ("--experts", "16", "--groups", "4", "--top-groups", "2", "--top-k", "4", "--drop", "probability",
         "--capacity", "0.5"), ("--dropout", "0.2", "--attention", "softmax")]]
    + [("upcycle", ("--score", "softmax-topk")), ("upcycle", ("--dtype", "bfloat16")), ("train", ("--ep", "2"))]
    + [("upcycle", ("--score", "sigmoid", "--top-k", "1")), ("moe", ("--dtype", "bfloat16", "--feed-forward", "6")),
       ("router", ("--experts", "1", "--top-k", "1"))]
    + [(lesson, ("--model", "llama", *more)) for lesson, more in [
        ("moe", ("--shared", "8")), ("dispatch", ("--ep", "2", "--etp", "2")), ("router", ()), ("train", ()),
        ("upcycle", ()), ("dispatch", ("--dtype", "bfloat16", "--score", "sigmoid"))]],
)  # fmt: skip
def test_options(pool: Pool, lesson: str, flags: tuple[str, ...]) -> None:
    ranks = 4 if "--etp" in flags or "--ep" in flags else 2
    outcome = pool.script(ranks, f"expert_parallel/{lesson}.py", *QUICK, *flags)
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err


def test_what_is_sent_by_all_gather_is_shown(pool: Pool) -> None:
    """Forward 2Th and 2k numbers a token, of which the weights have a gradient: T 64, h 16, k 2, one layer."""
    outcome = pool.script(2, "expert_parallel/train.py", *QUICK, "--dispatch", "all-gather")
    sent = 64 * (2 * (2 * 16) + 2 * 2 + 2)
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


def refuse(lesson: str, flags: list[str]) -> None:
    """As the script does on 8 ranks."""
    frame = Lesson(f"expert_parallel/{lesson}.py", "CODE 04", "", "", "")
    add_flags(frame)
    add_parallel_flags(frame)
    frame.parser.set_defaults(bias_rate=0.01)
    function = {"upcycle": upcycle.refuse, "train": train.refuse, "router": router.refuse}.get(lesson, check)
    function(frame.parser.parse_args(flags), 8)


@pytest.mark.parametrize(("lesson", "flags"), REFUSED.values(), ids=REFUSED)
def test_refusals(lesson: str, flags: tuple[str, ...]) -> None:
    """The message names the flag, and what it suggests is taken."""
    if flags == ("--aux", "0") and lesson == "train":
        flags = (*flags, "--bias-rate", "0")
    with pytest.raises(ValueError, match=flags[0]) as refused:
        refuse(lesson, list(flags))
    (suggested,) = re.findall(r"; use ((?:--[\w-]+ [\w.-]+ ?)+)", str(refused.value).replace(",", ""))
    refuse(lesson, [*flags, *suggested.split()])


def test_each_script_refuses(pool: Pool) -> None:
    """One message, no traceback, exit code 2, before any process group exists."""
    cases = [REFUSED[name] for name in ("ep", "batch", "shared", "balance", "balance by loss")]
    running = [pool.start(8, f"expert_parallel/{lesson}.py", *flags, started=1) for lesson, flags in cases]
    for (_, flags), outcome in zip(cases, [each.end() for each in running], strict=True):
        assert outcome.codes == [2]
        assert outcome.err.count("\n") == 1, outcome.err
        assert flags[0] in outcome.err


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_full(tmp_path)
    ranks = [LocalTensor("b", torch.full((2,), float(rank)), Shard(0, rank, 2, 4)) for rank in (0, 1)]
    with pytest.raises(ValueError, match="key:b invalid fill"):
        write(tmp_path, [ranks[:1], []])
    write(tmp_path, [ranks[:1], ranks[1:]])
    assert load_full(tmp_path)["b"].tolist() == [0, 0, 1, 1]
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match="use the files of all ranks"):
        load_full(tmp_path)


def test_a_checkpoint_is_not_converted_into_another(tmp_path: Path) -> None:
    """What 8 ranks wrote before must not be read among the files of 4."""
    config, moe = GPTConfig(layers=1, hidden=8, heads=2), MoEConfig()
    for seed in (1, 2):
        model = materialize(to_moe(GPT(config), moe), seed, torch.device("cpu"), torch.float64)
        write(tmp_path / f"{seed}", [[LocalTensor(name, p, None) for name, p in model.named_parameters()]])
    convert(tmp_path / "1", tmp_path / "to", shards(config, moe, 8, 8))
    with pytest.raises(ValueError, match="use a new folder"):
        convert(tmp_path / "2", tmp_path / "to", shards(config, moe, 4, 4))
