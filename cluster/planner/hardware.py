"""Where it is trained: the devices, the links between them, and what software gets out of both. Lecture 03.

A preset by name, or this machine as `cluster/topology.py` has measured it: a JSON file with

    {"domains": [[ranks]], "alpha": [[seconds]], "beta": [[seconds a byte]]}

the fast domains, and for every pair of ranks what a message costs: alpha + beta x bytes. It may also say "flops",
"memory" and "memory_bandwidth" of a rank; what it does not say of processors is measured here. A file without "domains"
describes a machine by the figures of its data sheet: `machine_file.py`.
"""

import json
import os
import time
from math import inf
from pathlib import Path
from statistics import median

import torch

from cluster.planner.machine_file import FIELDS, described
from cluster.planner.machines import GB, PRESETS, Link, Machine
from core.proof.files import check_readable

OWN = ("memory", "flops", "memory_bandwidth")  # of a device: bytes, FLOP/s, bytes/s
LOCAL = Link(7e-5, 1 / (6 * GB))  # processes of one machine over gloo; cluster/topology.py measures this one's


def of_gpu(device: torch.device) -> Machine | None:
    """The machine that is known for the name of this GPU."""
    name = torch.cuda.get_device_name(device)
    known = {"A100": "dgx-a100", "H100": "dgx-h100", "H200": "dgx-h200", "B200": "dgx-b200", "L40S": "l40s-pcie",
             "4090": "4090-pcie"}  # fmt: skip
    return next((PRESETS[preset] for part, preset in known.items() if part in name), None)


def figures(device: torch.device) -> dict[str, float]:
    """Of a GPU, what a planner needs and does not measure: OWN, as far as it is known."""
    if device.type != "cuda":
        return {}
    known = of_gpu(device)
    more = {"flops": known.peak, "memory_bandwidth": known.bandwidth} if known else {}
    return {"memory": float(torch.cuda.get_device_properties(device).total_memory)} | more


def here(ranks: int) -> Machine:
    """This machine, where so many ranks share it: a known one by its GPUs, or its processors as measured now.

    Raises:
        ValueError: its GPUs are not known.
    """
    if torch.cuda.is_available():
        if found := of_gpu(torch.device("cuda", 0)):
            return found
        raise ValueError(f"--auto: {torch.cuda.get_device_name(0)} is not known; use --machine {next(iter(PRESETS))}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return Machine("here", ranks, memory, _flops(), _bandwidth(), LOCAL, LOCAL, resource="")


def measured(path: str) -> Machine:
    """The machine that a file describes: a topology that was measured, or the figures of a data sheet.

    Raises:
        ValueError: the file cannot be read, or lacks what a planner needs.
    """
    use = "use the --json of cluster/topology.py, or figures as cluster/planner/machine_file.py has them"
    check_readable(f"--machine {path}", path, f"{use}, or one of {', '.join(PRESETS)}")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(found, dict) and "domains" not in found and set(found) & set(FIELDS):
            return of_description(found, path)
        domains, alpha, beta = found["domains"], found["alpha"], found["beta"]
        domain = {rank: i for i, ranks in enumerate(domains) for rank in ranks}
        pairs = [(a, b) for a in domain for b in domain if a != b]
        near = [(float(alpha[a][b]), float(beta[a][b])) for a, b in pairs if domain[a] == domain[b]]
        far = [(float(alpha[a][b]), float(beta[a][b])) for a, b in pairs if domain[a] != domain[b]]
        if sum(map(len, domains)) != len(domain):
            raise ValueError("a rank is in two domains")
        if not all(0 <= a < inf and 0 < b < inf for a, b in near + far):
            raise ValueError("a time of alpha or beta is not positive")
        own = {name: found.get(name) for name in OWN}
        for name, value in own.items():
            if value is not None and not (isinstance(value, int | float) and 0 < value < inf):
                raise ValueError(f"{name} is {value!r}, and must be positive")
            if value is None and found.get("device") == "cuda":
                raise ValueError(f"it is of GPUs, and lacks the {name} of one")
    except NoMachine:
        raise
    except KeyError as error:
        raise ValueError(f"--machine {path}: no topology, it has no {error}; {use} with two ranks or more") from None
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"--machine {path}: no topology, {error}; {use}") from None
    node = min(map(len, domains), default=0)
    if not pairs or node < 1:
        raise ValueError(f"--machine {path}: has fewer than two ranks; {use} on two or more")
    inside, outside = (
        Link(*(median(each) for each in zip(*links, strict=True))) for links in (near or far, far or near)
    )
    return Machine(
        Path(path).stem,
        node,
        own["memory"] or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(domain),
        own["flops"] or _flops(),
        own["memory_bandwidth"] or _bandwidth(),
        inside,
        outside,
        resource="nvidia.com/gpu" if found.get("device") == "cuda" else "",
    )


class NoMachine(ValueError):
    """Says which field of a description is wrong."""


def of_description(found: dict, path: str) -> Machine:
    try:
        return described(found, Path(path).stem)
    except ValueError as error:
        raise NoMachine(f"--machine {path}: {error}") from None


def _flops() -> float:
    """FLOP/s of one thread here in a matrix product in float32, the best of a few."""
    x = torch.ones(512, 512)
    return 2 * 512**3 / _fastest(lambda: x @ x)


def _bandwidth() -> float:
    """Bytes/s of one thread here: a copy reads and writes."""
    x = torch.ones(2**24)
    y = torch.empty_like(x)
    return 2 * 4 * 2**24 / _fastest(lambda: y.copy_(x))


def _fastest(work: object) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return min(taken)
