"""Lecture 03, the machine: what the lesson shows, writes for a planner, and refuses."""

import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import topology
from cluster.evidence.topology import show_processors
from cluster.links.machine import nvidia_smi_topology, processors
from core.model.precision import POLICIES
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from tests.pool import Pool

SCRIPT = "cluster/topology.py"
LAYOUTS = Path(__file__).parent / "topologies"


def test_measured(pool: Pool, tmp_path: Path) -> None:
    """Four ranks: test_links.py."""
    report, machine, plot = (tmp_path / name for name in ("report.json", "machine.json", "plot.svg"))
    files = ("--report", str(report), "--json", str(machine), "--plot", str(plot))
    outcome = pool.script(2, SCRIPT, "--steps=2", "--largest=262144", *files)
    assert outcome.codes in ([0, 0], [1, 1]), outcome.out + outcome.err
    made = json.loads(report.read_text())["claims"]
    assert all(claim["holds"] for claim in made[:-2]), "all but those on time, for which a busy machine is no place"
    claims = [claim["claim"] for claim in made]
    assert claims[-2:] == ["error of the line at a size not fitted, median", "pairs that the domains do not explain"]
    assert claims[0] == "CPUs of this process that /sys does not have"
    found = json.loads(machine.read_text())
    assert (found["ranks"], found["device"], found["domains"], found["nodes"]) == (2, "cpu", [[0, 1]], [[0, 1]])
    assert found["sizes"] == [8, 2**14, 2**16, 2**18]
    assert 1e-6 < found["alpha"][0][1] < found["seconds"][-1][0][1] < 0.1
    assert found["machine"]["cpu"]["cpus"]
    assert "fast domains as measured, in ranks: [0,1]" in outcome.out
    assert plot.read_text().startswith("<?xml")


def test_alone_it_shows_the_machine(pool: Pool, tmp_path: Path) -> None:
    outcome = pool.script(1, SCRIPT, "--json", str(tmp_path / "machine.json"), torchrun=False)
    assert outcome.codes == [0], outcome.err
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["domains"] == [[0]]
    assert "alpha" not in found
    assert "大模型并行与 GPU 集群配置" in outcome.out


def test_a_saved_matrix(pool: Pool, tmp_path: Path) -> None:
    files = ("--file", str(LAYOUTS / "nvlink_pairs_4gpu.txt"), "--json", str(tmp_path / "machine.json"))
    outcome = pool.script(1, SCRIPT, *files, torchrun=False)
    assert outcome.codes == [0], outcome.err
    assert "NV12, NVLink, so many bonded, or faster: [0,1] [2,3]" in outcome.out
    assert "SYS, the link between NUMA nodes, or faster: [0,1,2,3]" in outcome.out
    found = json.loads((tmp_path / "machine.json").read_text())
    assert (found["ranks"], found["device"], found["domains"]) == (4, "cuda", [[0, 1], [2, 3]])
    assert found["machine"]["gpu"]["links"][0] == ["X", "NV12", "SYS", "SYS"]


def test_a_matrix_of_one_direction_fails_the_claim(pool: Pool, tmp_path: Path) -> None:
    text = (LAYOUTS / "consumer_2gpu.txt").read_text()
    (tmp_path / "topo.txt").write_text(text.replace("PHB", "PIX", 1))
    outcome = pool.script(1, SCRIPT, "--file", str(tmp_path / "topo.txt"), torchrun=False)
    assert outcome.codes == [1]
    assert "0 of 1 claims held" in outcome.out


def arguments(*flags: str) -> Namespace:
    frame = Lesson(SCRIPT, "03", "", "", "")
    topology.add_flags(frame)
    return frame.parser.parse_args(flags)


REFUSED = {
    "no file": (1, ("--file=/no/topo.txt",), "--file /no/topo.txt: No such file or directory; use what nvidia-smi"),
    "no matrix": (1, (f"--file={__file__}",), f"--file {__file__}: there is no line with GPU0 over columns of links"),
    "too small": (2, ("--largest=8",), "--largest 8: must be in [1024, 2147483648]; use --largest 1048576"),
    "too many": (300, (), "300 ranks are 44,850 pairs, measured one after another; use at most 256 ranks"),
    "no drawing": (1, ("--plot=a.svg",), "--plot a.svg: draws what is measured, so needs 2 ranks"),
    "nowhere": (1, ("--json=/no/a.json",), "--json /no/a.json: there is no folder /no; make it, or use --json a.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str) -> None:
    ranks, flags, hint = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        topology.check(arguments(*flags), ranks)
    assert hint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_sys_says_is_checked() -> None:
    run = Run(arguments(), Job(0, 1, torch.device("cpu"), "gloo", 30.0), POLICIES["float64"])
    right = processors()
    show_processors(run, right)
    assert [claim.holds for claim in run.evidence.claims] == [True] * len(run.evidence.claims)
    for wrong in (
        replace(right, cpus=[], nodes={}),
        replace(right, nodes={0: right.cpus, 1: right.cpus[:1]}),
        replace(right, nodes={0: right.cpus[1:]}),
    ):
        run.evidence.claims.clear()
        show_processors(run, wrong)
        assert not all(claim.holds for claim in run.evidence.claims), wrong


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text; use what nvidia-smi topo -m printed"):
        topology.check(arguments(f"--file={tmp_path / 'topo.txt'}"), 1)


def a_machine_with(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put an nvidia-smi of our own first in the path."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_machine_with(monkeypatch, tmp_path, f'[ "$*" = "topo -m" ] && cat {LAYOUTS / "hgx_a100_4gpu.txt"}')
    found = nvidia_smi_topology(10.0)
    assert found is not None
    assert found.domains() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "sleep 30"])
def test_an_nvidia_smi_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    a_machine_with(monkeypatch, tmp_path, script)
    assert nvidia_smi_topology(0.5) is None
