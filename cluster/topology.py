"""Lecture 03: what this machine is, and how fast its ranks reach each other (大模型并行与 GPU 集群配置).

    python cluster/topology.py
    python cluster/topology.py --file topo.txt
    torchrun --nproc_per_node=8 cluster/topology.py --json machine.json

What the machine says of itself (`machine.py`): CPU cores, caches and NUMA nodes by /sys, GPUs and links by
`nvidia-smi topo -m`, or by a file that holds what another machine printed. And with torchrun, on one machine or
several, what is measured (`links.py`): the time of a message between every pair of ranks, by ping-pong, as a line
alpha + beta x bytes; and the fast domains, which that shows. Tensor parallelism belongs inside one.

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
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from cluster.links.links import APART, Lines, domains, fit, in_one, measure
from cluster.links.machine import LINKS, Processors, Topology, ask_nvidia_smi, parse, processors, slowness
from cluster.planner.hardware import figures
from core.ledger import Ledger
from core.mesh import Mesh
from core.proof.files import check_writable, write_file
from core.proof.launch import process_info
from core.proof.lesson import Lesson, Run
from core.proof.plot import picture

MOST_RANKS = 256  # which are 32,640 pairs, measured one after another
LARGEST = {"cpu": 2**20, "cuda": 2**26}  # bytes of the largest message, by device
WITHIN = 0.5  # how far the line may be from a time that it was not fitted to: it is for planning


# ---- What the machine says -------------------------------------------------------------------------------------------


def show_gpus(run: Run, topology: Topology) -> None:
    gpus = topology.gpus
    rows = [(a, *(topology.links.get((a, b), "X") for b in gpus)) for a in gpus]
    run.say(tabulate(rows, ("", *gpus)) + "\n")
    found = sorted(topology.between(gpus), key=slowness)
    for link in found:
        groups = topology.connected(slowness(link))
        run.say(f"{link}, {LINKS['NV' if link.startswith('NV') else link]}, or faster: {_text(groups)}")
    rows = []
    for gpu in gpus:
        nics, link = topology.nearest_nics(gpu) if topology.nics else ([], "")
        rows.append((gpu, topology.numa.get(gpu, "?"), topology.cpus.get(gpu, "?"), " ".join(nics), link))
    run.say("\n" + tabulate(rows, ("", "NUMA node", "CPUs", "nearest network adapters", "link")))
    run.say(f"\nfast domains by the links, in GPUs: {_text(topology.domains())}\n")
    run.evidence.claim("pairs of devices whose two entries differ", "0: a link has two ends", 0, topology.differing())


def show_processors(run: Run, found: Processors) -> None:
    run.say(f"{len(found.cpus)} CPUs, {len(found.cores)} cores, sockets {_text(found.sockets)}")
    rows = [(c.name, c.size, len(c.shared), max(map(len, c.shared))) for c in found.caches]
    if rows:
        run.say("\n" + tabulate(rows, ("cache", "each", "of them", "CPUs share one")))
    rows = [(n, _text([cpus]), f"{found.memory.get(n, 0) / 2**30:.1f}", *found.distances.get(n, ()))
            for n, cpus in found.nodes.items()]  # fmt: skip
    if rows:
        run.say("\n" + tabulate(rows, ("NUMA node", "CPUs", "GiB", *(f"to {n}" for n in found.nodes))))
    run.say()
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    run.evidence.claim(
        "CPUs of this process that /sys does not have", f"0 of {len(mine)}", 0, len(mine - set(found.cpus))
    )
    if found.nodes:
        once = [cpu for cpus in found.nodes.values() for cpu in cpus]
        missed = len(set(found.cpus) ^ set(once)) + len(once) - len(set(once))
        run.evidence.claim("CPUs that are not in just one NUMA node", "0", 0, missed)


def describe(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Show this machine, or that of `--file`. As JSON: its domains, and all else."""
    machine: dict[str, Any] = {}
    if run.args.file:
        topology = parse(Path(run.args.file).read_text())
    else:
        found, topology = processors(), ask_nvidia_smi(run.args.timeout)
        show_processors(run, found)
        machine["cpu"] = found.as_json()
    if topology is None:
        return {"ranks": 1, "device": "cpu", "domains": [[0]]}, machine
    show_gpus(run, topology)
    machine["gpu"] = topology.as_json()
    return {"ranks": len(topology.gpus), "device": "cuda", "domains": topology.domains()}, machine


# ---- What is measured ------------------------------------------------------------------------------------------------


def show_links(run: Run, lines: Lines, found: list[list[int]]) -> None:
    n = len(lines.alpha)
    if n <= 16:
        for what, matrix in (
            ("latency in us", lines.alpha * 1e6),
            ("GB/s", 1e-9 / np.where(lines.beta > 0, lines.beta, np.inf)),
        ):
            rows = [(a, *("." if a == b else f"{matrix[a, b]:.3g}" for b in range(n))) for a in range(n)]
            run.say(f"\n{what}, from rank to rank\n{tabulate(rows, ('', *range(n)), disable_numparse=True)}")
    same, off = in_one(found), ~np.eye(n, dtype=bool)
    rows = []
    for what, pairs in (("inside a domain", same & off), ("between domains", ~same)):
        if pairs.any():
            alpha, beta = (np.median(x[pairs]) for x in lines)
            rows.append((what, f"{alpha * 1e6:.3g}", f"{1e-9 / beta:.3g}" if beta else "?"))
    run.say("\n" + tabulate(rows, ("median", "latency in us", "GB/s"), disable_numparse=True))
    run.say(f"\nfast domains as measured, in ranks: {_text(found)}\n")


def claim_links(run: Run, lines: Lines, found: list[list[int]], size: int, seconds: np.ndarray) -> None:
    """Both claims by times of a size that neither the lines nor the domains have seen."""
    pairs = np.triu_indices(len(seconds), 1)
    seconds, predicted, same = seconds[pairs], lines.predict(size)[pairs], in_one(found)[pairs]
    run.evidence.claim(
        "error of the line at a size not fitted, median",
        f"alpha + beta x {size:,}, within {WITHIN:.0%}",
        0,
        float(np.median(np.abs(predicted / seconds - 1))),
        WITHIN,
    )
    inside = np.exp(np.log(predicted[same]).mean())
    between = inside * APART**2 if same.all() else np.exp(np.log(predicted[~same]).mean())
    border = np.sqrt(inside * between)
    noisy = max(1, len(seconds) // 5) if len(seconds) > 1 else 0  # a domain that is not seen puts more pairs wrong
    run.evidence.claim(
        "pairs that the domains do not explain",
        f"of {len(seconds)}, {noisy} at most: inside below {border * 1e6:.3g} us, between above",
        0,
        int(((seconds > border) == same).sum()),
        noisy,
    )


def draw(path: str, lines: Lines, size: int) -> None:
    with picture(path, 5, 4) as axes:
        seconds = lines.predict(size)
        np.fill_diagonal(seconds, np.nan)
        shown = axes.imshow(seconds * 1e6)
        axes.figure.colorbar(shown, ax=axes, label="us")
        axes.set(title=f"A message of {size:,} bytes", xlabel="rank", ylabel="rank")


def lesson(run: Run) -> None:
    result, machine = describe(run) if run.job.rank == 0 else ({}, {})
    if run.job.world_size > 1:
        result = measured(run)
    if run.job.rank == 0 and run.args.json:
        write_file(run.args.json, json.dumps(result | figures(run.job.device) | {"machine": machine}))


def measured(run: Run) -> dict[str, Any]:
    """Measure, show and claim; on rank 0 the JSON of it."""
    run.mesh = {"dp": run.job.world_size}
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, dp=run.job.world_size)["dp"]
    largest = run.args.largest or LARGEST[run.job.device.type]
    sizes, apart = [8, largest // 16, largest // 4, largest], largest // 2
    times = measure(run, axis, [*sizes, apart])
    node_of = run.job.gather(process_info().node)
    if not times:
        return {}
    unseen = times.pop(apart)
    lines = fit(times)
    found = domains(lines.predict(largest))
    show_links(run, lines, found)
    claim_links(run, lines, found, apart, unseen)
    if run.args.plot:
        draw(run.args.plot, lines, largest)
    nodes = [[rank for rank, node in enumerate(node_of) if node == this] for this in dict.fromkeys(node_of)]
    return {
        "ranks": axis.size,
        "device": run.job.device.type,
        "domains": found,
        "nodes": nodes,
        "alpha": lines.alpha.tolist(),
        "beta": lines.beta.tolist(),
        "sizes": sizes,
        "seconds": [times[size].tolist() for size in sizes],
    }


def _text(groups: list[list[int]]) -> str:
    return " ".join(f"[{','.join(map(str, group))}]" for group in groups)


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError unless the file holds a matrix, the sizes are different, and the pairs are not too many."""
    if args.file:
        try:
            parse(Path(args.file).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not text"
            raise ValueError(f"--file {args.file}: {reason}; use what nvidia-smi topo -m printed") from None
        except ValueError as error:
            raise ValueError(f"--file {args.file}: {error}") from None
    if args.largest is not None and not 2**10 <= args.largest <= 2**31:
        raise ValueError(f"--largest {args.largest}: must be in [1024, 2147483648]; use --largest 1048576")
    if ranks > MOST_RANKS:
        raise ValueError(
            f"--nproc_per_node: {ranks} ranks are {ranks * (ranks - 1) // 2:,} pairs, measured one after another; "
            f"use at most {MOST_RANKS} ranks, a few nodes show the links"
        )
    if args.json:
        check_writable("--json", args.json)
    if args.plot and ranks == 1:
        raise ValueError(
            f"--plot {args.plot}: draws what is measured, so needs 2 ranks; use torchrun --nproc_per_node=2"
        )


def add_flags(frame: Lesson) -> None:
    flag = frame.parser.add_argument
    flag(
        "--file", metavar="topo.txt", help="what nvidia-smi topo -m printed on another machine (default: ask this one)"
    )
    flag(
        "--largest",
        type=int,
        help=f"bytes of the largest message (default {LARGEST['cpu']}, on GPUs {LARGEST['cuda']})",
    )
    flag("--json", metavar="FILE.json", help="write what a planner needs")
    frame.parser.set_defaults(steps=5)  # rounds


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
