"""Lecture 03: what this machine is, and how fast its ranks reach each other (大模型并行与 GPU 集群配置).

    python cluster/topology.py
    python cluster/topology.py --file topo.txt
    torchrun --nproc_per_node=8 cluster/topology.py --json machine.json

read: topology.py:58-144; then links/links.py, links/machine.py

With torchrun, on one machine or several, the time of a message is measured between every pair of ranks, by ping-pong,
as a line alpha + beta x bytes: latency, and one over the bandwidth. It shows the fast domains (`links/links.py`);
tensor parallelism belongs inside one. And the machine describes itself (`links/machine.py`): CPU cores, caches and NUMA
nodes by /sys, GPUs and links by `nvidia-smi topo -m`, or by a file with what that printed on another machine.

`--json` writes, for a planner; indices are ranks, times are of one way, and 0 from a rank to itself:

    {"ranks": 8, "device": "cpu",
     "domains": [[0, 1, 2, 3], [4, 5, 6, 7]],            the fast domains, as measured
     "nodes": [[0, 1, 2, 3], [4, 5, 6, 7]],              the ranks of each machine, as torchrun started them
     "alpha": [[s, ...], ...], "beta": [[s/byte, ...], ...],
     "sizes": [8, ...], "seconds": [[[s, ...], ...], ...],    the fastest times, a matrix for each size in bytes
     "machine": {"cpu": {...}, "gpu": {...}}}            what the machine of rank 0 says of itself

Without torchrun nothing is measured: a rank is a GPU then, the domains are those by the links, and there are no times.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cluster.evidence import topology as evidence
from cluster.links.links import Links, domains
from cluster.links.machine import nvidia_smi_topology, parse, processors
from cluster.planner.hardware import figures
from core import comm, p2p
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.files import check_writable, write_file
from core.proof.launch import process_info
from core.proof.lesson import Lesson, Run
from core.proof.rules import check as check_rules

LARGEST = {"cpu": 2**20, "cuda": 2**26}  # bytes of the largest message, by device
BUDGET = 0.14  # seconds for the round trips of one size in a round, shared by the pairs
SHORTEST = 0.005  # seconds of that for a pair
FIRST, MOST = 3, 200  # round trips that show how many more the budget allows, and the most of them


# ---- What is measured, and how. n ranks; a time is of one way, in seconds; a matrix is (n, n) and symmetric ----------


def ping_pong(axis: Axis, pair: tuple[int, int], size: int, budget: float, device: torch.device) -> float:
    """Half the fastest round trip of a message of `size` bytes; both ranks of the pair call it, the first gets it."""
    first, second = pair
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    repeats = torch.zeros(1, dtype=torch.int64, device=device)

    def round_trips(count: int) -> float:
        fastest = np.inf
        for _ in range(count):
            began = now(device)
            if axis.index == first:
                p2p.send(message, axis, second)
                p2p.receive(message, axis, second)
            else:
                p2p.receive(message, axis, first)
                p2p.send(message, axis, first)
            fastest = min(fastest, now(device) - began)
        return fastest

    fastest = round_trips(FIRST)
    if axis.index == first:
        p2p.send(repeats.fill_(min(MOST, int(budget / fastest))), axis, second)
    else:
        p2p.receive(repeats, axis, first)
    fastest = min(fastest, round_trips(int(repeats)))
    return fastest / 2 if axis.index == first else np.inf


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def measure(run: Run, axis: Axis, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """The fastest time of a message between every pair of ranks, by its bytes; on rank 0, elsewhere nothing.

    One pair at a time, because pairs that send at once share links and cores. Noise only ever adds time, so the fastest
    of many is the best estimate; the rounds are apart, so that one busy moment does not spoil all trials of a pair.
    """
    pairs = list(combinations(range(axis.size), 2))
    budget = max(SHORTEST, BUDGET / len(pairs))
    fastest = {size: np.full((axis.size, axis.size), np.inf) for size in sizes}
    turn = torch.zeros(1, device=run.job.device)
    for _ in run.steps("ping-pong"):
        for pair in pairs:
            comm.all_reduce(turn, axis.labelled("turns"))  # nobody begins before the pair before has ended
            if axis.index in pair:
                for size in sizes:
                    took = ping_pong(axis, pair, size, budget, run.job.device)
                    fastest[size][pair] = min(fastest[size][pair], took)
    every_rank = run.job.gather(fastest)
    if not every_rank:
        return {}
    times = {}
    for size in sizes:
        upper = np.minimum.reduce([rank[size] for rank in every_rank])
        upper[np.isinf(upper)] = 0.0  # only pairs of first < second were measured
        times[size] = upper + upper.T
    return times


def fit(times: Mapping[int, np.ndarray]) -> Links:
    """Of every pair the latency alpha and beta = 1 / bandwidth, by its times for messages of several sizes."""
    sizes = sorted(times)
    alpha, beta = np.zeros_like(times[sizes[0]]), np.zeros_like(times[sizes[0]])
    for a, b in combinations(range(len(alpha)), 2):
        seconds = np.array([times[size][a, b] for size in sizes])
        alpha[a, b], beta[a, b] = alpha[b, a], beta[b, a] = fit_line(np.array(sizes), seconds)
    return Links(alpha, beta)


def fit_line(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Least squares of the relative errors: a line through times of 50 us and 50 ms must be right for both.

    Neither alpha nor beta is negative; where the best line has a negative one, the best with a 0 there is taken.
    """
    one, n = 1 / seconds, sizes / seconds  # the sum of (alpha / t + beta n / t - 1)^2 is least
    alpha, beta = np.linalg.lstsq(np.stack([one, n], axis=1), np.ones(len(seconds)), rcond=None)[0]
    if beta < 0:
        return one.sum() / (one @ one), 0.0
    if alpha < 0:
        return 0.0, n.sum() / (n @ n)
    return alpha, beta


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    result, machine = describe(run) if run.job.rank == 0 else ({}, {})
    if run.job.world_size > 1:
        result = measured(run)
    if run.job.rank == 0 and run.args.json:
        write_file(run.args.json, json.dumps(result | figures(run.job.device) | {"machine": machine}))


def describe(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Show this machine, or that of `--file`. As JSON: its domains, and all else."""
    machine: dict[str, Any] = {}
    if run.args.file:
        topology = parse(Path(run.args.file).read_text(encoding="utf-8-sig"))
    else:
        found, topology = processors(), nvidia_smi_topology(run.args.timeout)
        evidence.show_processors(run, found)
        machine["cpu"] = asdict(found)
    if topology is None:
        return {"ranks": 1, "device": "cpu", "domains": [[0]]}, machine
    evidence.show_gpus(run, topology)
    machine["gpu"] = topology.as_json()
    return {"ranks": len(topology.gpus), "device": "cuda", "domains": topology.domains()}, machine


def measured(run: Run) -> dict[str, Any]:
    """Measure, show and claim; on rank 0 the JSON of it."""
    run.mesh = {"dp": run.job.world_size}
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, dp=run.job.world_size)["dp"]
    largest = run.args.largest or LARGEST[run.job.device.type]
    sizes, unseen = [8, largest // 16, largest // 4, largest], largest // 2
    times = measure(run, axis, [*sizes, unseen])
    node_of = run.job.gather(process_info().node)
    if not times:
        return {}
    links = fit({size: times[size] for size in sizes})
    found = domains(links.predict(largest))
    evidence.show_links(run, links, found)
    evidence.claim_links(run, links, found, unseen, times[unseen])
    evidence.draw_links(run, links, found)
    if run.args.plot:
        evidence.draw(run.args.plot, links, largest)
    nodes = [[rank for rank, node in enumerate(node_of) if node == this] for this in dict.fromkeys(node_of)]
    return {
        "ranks": axis.size,
        "device": run.job.device.type,
        "domains": found,
        "nodes": nodes,
        "alpha": links.alpha.tolist(),
        "beta": links.beta.tolist(),
        "sizes": sizes,
        "seconds": [times[size].tolist() for size in sizes],
    }


def add_flags(frame: Lesson) -> None:
    flag = frame.parser.add_argument
    flag("--file", metavar="topo.txt", help="what nvidia-smi topo -m printed elsewhere (default: run it here)")
    default = f"default {LARGEST['cpu']}, on GPUs {LARGEST['cuda']}"
    flag("--largest", type=int, help=f"bytes of the largest message ({default})")
    flag("--json", metavar="FILE.json", help="write what a planner needs")
    frame.parser.set_defaults(steps=5)  # rounds


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError unless the file holds a matrix, the sizes are different, and the pairs are not too many."""
    if args.file:
        evidence.check_file(args.file)
    check_rules(SimpleNamespace(**vars(args), ranks=ranks, pairs=ranks * (ranks - 1) // 2), evidence.RULES)
    if args.json:
        check_writable("--json", args.json)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "03",
        "Parallelism and GPU cluster configuration: topology",
        "大模型并行与 GPU 集群配置",
        "GPUs, links, cores; and the time of a message between every pair of ranks, --steps rounds of ping-pong.",
    )
    add_flags(frame)
    sys.exit(frame.main(check, lesson))
