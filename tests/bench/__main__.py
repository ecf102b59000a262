"""The benchmark of record: every row of every topic in `tests/bench`, in one table, and in a file with the machine.

    python -m tests.bench                                       all rows; 4 ranks or 8, forked, gloo
    python -m tests.bench --rows zero,experts --quick           rows and topics with one of these in their name
    torchrun --nproc_per_node=4 -m tests.bench --device cuda    the topics of so many ranks, on GPUs over NCCL

float32, one thread a rank. Ours, the peer and the floor alternate in the same processes; the medians of the ratios
taken round by round, with their quartiles. The floor is the computation alone, without messages. Not a test: the
ratios depend on the machine, which should do nothing else.

Peers that are not in torch are measured where they are. Elsewhere DeepSpeed's rows are blank, picotron's left out:

    DS_BUILD_OPS=0 pip install 'deepspeed==0.19.*'
    git clone https://github.com/huggingface/picotron ../picotron; export PICOTRON=../picotron    (of 59714b1)
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from tabulate import tabulate

import tests.bench
from core.proof.launch import choose_device, launch, process_info
from tests.bench.harness import TIMEOUT, Row, Topic, work
from tests.pool import Pool, WorkerError

PEERS = ("torch", "deepspeed", "numpy")
QUICK = 3  # rounds


def topics() -> dict[str, Topic]:
    """By name of the module."""
    names = sorted(module.name for module in pkgutil.iter_modules(tests.bench.__path__))
    modules = {n: importlib.import_module(f"tests.bench.{n}") for n in names if not n.startswith("_")}
    return {name: module.TOPIC for name, module in modules.items() if hasattr(module, "TOPIC")}


def chosen(found: Mapping[str, Topic], parts: Collection[str]) -> dict[str, list[str]]:
    """The rows of each topic in whose name, or the topic's, one of `parts` is.

    Raises:
        ValueError: one of them is in none.
    """
    rows = {topic: [r for r in each.rows if not parts or any(p.lower() in f"{topic} {r}".lower() for p in parts)]
            for topic, each in found.items()}  # fmt: skip
    if lacking := [p for p in parts if not any(p.lower() in f"{t} {r}".lower() for t in rows for r in rows[t])]:
        known = "\n  ".join(f"{topic}: {row}" for topic, each in found.items() for row in each.rows)
        raise ValueError(f"--rows {lacking[0]}: in no row's name; use a part of one of\n  {known}")
    return {topic: names for topic, names in rows.items() if names}


def measurable(found: Mapping[str, Topic], rows: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    """The rows whose topic lacks nothing here; and of the others, a sentence each: which are left out, and why."""
    lacking = {topic: reason for topic in rows if (reason := found[topic].lacking())}
    said = [f"{', '.join(rows[topic])}: left out, {reason}" for topic, reason in lacking.items()]
    return {topic: names for topic, names in rows.items() if topic not in lacking}, said


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "")
    root = Path(__file__).parents[2]
    command = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{model or platform.processor()}, {len(os.sched_getaffinity(0))} cores",
        "load when begun": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {installed[name]}" for name in PEERS if name in installed),
        "commit": said.stdout.strip(),
    } | {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


def table(rows: list[Row]) -> str:
    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    lines = []
    for r in rows:
        digits = 0 if r.unit == "tokens/s" else 1
        spread = f"{r.quartiles[0]:.3f} to {r.quartiles[1]:.3f}" if r.quartiles else ""
        ratio = "not installed" if r.ratio is None and r.against else number(r.ratio, 3)
        bars = " ".join(
            f"{name}{sign}{bar:.2f}" for name, sign, bar in
            (("", "≥" if r.more_is_better else "≤", r.bar), ("floor ≥", "", r.floor_bar)) if bar is not None
        )  # fmt: skip
        sizes = [number(x, digits) for x in (r.ours, r.peer, r.floor)]
        held = {True: "yes", False: "no", None: ""}[r.holds]
        lines.append(
            (r.name, r.against, *sizes, r.unit, ratio, spread, number(r.busy, 3), number(r.of_floor, 3), bars, held)
        )
    head = ("row", "peer", "ours", "peer", "floor", "", "ours / peer", "quartiles", "of CPU time", "floor / ours",
            "bar", "held")  # fmt: skip
    return tabulate(lines, head, tablefmt="github", disable_numparse=True, colalign=("left", "left", *["right"] * 3))


def write(path: Path, where: dict[str, object], rows: list[Row]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps({"machine": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    else:
        path.write_text("\n".join(f"- {key}: {value}" for key, value in where.items()) + f"\n\n{table(rows)}\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="parts of names of rows or topics, with commas between")
    parser.add_argument("--rounds", type=int, help="of every topic, in place of its own")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds")
    parser.add_argument("--out", type=Path, default=Path("bench.md"), help="file for the table: .md, or .json with all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="under torchrun")
    args = parser.parse_args(arguments)
    found = topics()
    try:
        rows, left_out = measurable(found, chosen(found, [p.strip() for p in args.rows.split(",") if p.strip()]))
        if args.rounds is not None and args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds}: at least one is measured; use --rounds {QUICK}")
        device = choose_device(args.device, process_info())[0]
        if args.device == "cuda" and not process_info().by_torchrun:
            raise ValueError("--device cuda: ranks are forked here; use torchrun --nproc_per_node=4 -m tests.bench")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if left_out and process_info().rank == 0:
        print("\n".join(left_out), file=sys.stderr)
    if not rows:
        return 2
    where, made, failed = machine(), [], []
    if left_out:
        where["not measured"] = "; ".join(left_out)

    def rounds(topic: str) -> int:
        return args.rounds or (QUICK if args.quick else found[topic].rounds)

    if process_info().by_torchrun:
        torch.set_num_threads(1)
        with launch(device, TIMEOUT) as job:
            for topic, wanted in rows.items():
                if found[topic].ranks == job.world_size:
                    made += found[topic].bench(job, rounds(topic), wanted) or []
        if process_info().rank:
            return 0
    else:
        for topic, wanted in rows.items():
            began = time.monotonic()
            pool = Pool([f"tests.bench.{name}" for name in found])
            try:
                arguments = (found[topic].bench, rounds(topic), wanted)
                made += pool.run(found[topic].ranks, work, *arguments, timeout=TIMEOUT)[0]
            except WorkerError as error:  # the other topics' figures are not lost for it
                print(error, file=sys.stderr)
                failed.append(topic)
            finally:
                pool.close()
            print(f"{topic}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if failed:
        where["failed"] = ", ".join(failed)
    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    print(f"\n{table(made)}")
    write(args.out, where, made)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
