"""Two hosts made of network namespaces, with a slow link between them: torchrun over both, measured, and a lesson.

Needs the right to make namespaces (root), `ip` and `tc` with its token bucket filter; skipped where one is missing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEGABITS, LINK = 400, "link0"  # a second, of the link between the hosts, and its name on each
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces, connected."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"two hosts need {tool} of iproute2, which is not installed")

    def do(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            pytest.skip(f"two hosts are not permitted here: {' '.join(command)}: {done.stderr.strip()}")

    names = [f"lessons{os.getpid()}{end}" for end in "ab"]
    with ExitStack() as stack:
        for name in names:
            do("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False, timeout=20)
        do("ip", "-n", names[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                do("ip", "-n", name, "link", "set", device, "up")
            bucket = ("rate", f"{MEGABITS}mbit", "burst", "2kb", "latency", "200ms")
            do("tc", "-n", name, "qdisc", "add", "dev", LINK, "root", "tbf", *bucket)
        yield names


ENVIRONMENT = os.environ | {"GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def end(processes: list[subprocess.Popen]) -> None:
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def started(host: str, *command: str, **environment: str) -> subprocess.Popen:
    """A Python command on a host."""
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *command],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(hosts: list[str], script: str, *flags: str) -> None:
    """Run a lesson with two ranks on each host."""
    where = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
             f"--rdzv_endpoint={ADDRESSES[0]}:29400")  # fmt: skip
    end(
        [
            started(host, *where, f"--rdzv_conf=is_host={int(address == ADDRESSES[0])}", f"--local_addr={address}",
                    str(ROOT / script), *flags)
            for host, address in zip(hosts, ADDRESSES, strict=True)
        ]
    )  # fmt: skip


def one_rank_each(hosts: list[str], script: str, *flags: str) -> None:
    """Run a lesson with one rank on each host, without torchrun, whose start takes as long as the lesson."""
    job = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0],
           "MASTER_PORT": "29500"}  # fmt: skip
    end([started(host, str(ROOT / script), *flags, RANK=str(i), GROUP_RANK=str(i), **job)
         for i, host in enumerate(hosts)])  # fmt: skip


def test_the_slow_link_is_found(hosts: list[str], tmp_path: Path) -> None:
    torchrun(hosts, "cluster/topology.py", "--steps=2", "--largest=262144", f"--json={tmp_path / 'machine.json'}")
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["nodes"] == [[0, 1], [2, 3]], "as torchrun started them"
    assert found["domains"] == found["nodes"], "as measured"
    for a in (0, 1):
        for b in (2, 3):
            assert found["beta"][a][b] == pytest.approx(8 / (MEGABITS * 1e6), rel=0.25)
            assert found["beta"][a][b] > 5 * found["beta"][0][1]


def test_a_lesson_trains_over_both(hosts: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    small = ("--steps=2", "--layers=4", "--hidden=16", "--heads=4", "--sequence=8", "--batch=8", "--microbatches=8")
    one_rank_each(hosts, "pipeline/1f1b.py", *small, f"--report={report}")
    written = json.loads(report.read_text())
    assert written["mesh"] == {"pp": 2}
    assert all(claim["holds"] for claim in written["claims"])
    assert written["losses"] == pytest.approx(written["reference_losses"], rel=1e-10)
