"""What a machine says of itself: GPUs and their links by `nvidia-smi topo -m`, cores and memory by /sys. Lecture 03."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

# What a message between two devices passes, in nvidia-smi's words, from the fastest to the slowest.
LINKS = {
    "NV": "NVLink, so many bonded",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the PCIe host bridge, so the CPU",
    "NODE": "host bridges of one NUMA node",
    "SYS": "the link between NUMA nodes",
    "SOC": "the same, as drivers until 2017 called it",
}
_LINK = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SOC|SYS")
_P2P = {"X", "OK", "CNS", "GNS", "TNS", "NS", "DR", "U"}  # the words of nvidia-smi topo -p2p
_COLUMNS = re.compile(r"CPU Affinity|NUMA Affinity|GPU NUMA ID")


def slowness(link: str) -> int:
    """The position of a link in LINKS; a smaller one is faster."""
    return list(LINKS).index("NV" if link.startswith("NV") else link)


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    """The devices of one machine, and what is between them."""

    gpus: list[str]
    nics: list[str]  # network adapters, by the names of the matrix
    links: dict[tuple[str, str], str]  # both ways
    cpus: dict[str, str]  # nearest to a GPU, as in 0-47,96-143; missing where the machine does not say
    numa: dict[str, str]  # nodes nearest to a GPU
    adapters: dict[str, str]  # a NIC's name in the system, where the legend has it

    def between(self, group: list[str]) -> set[str]:
        return {self.links[pair] for pair in combinations(group, 2)}

    def connected(self, slowest: int) -> list[list[int]]:
        """The GPUs, by number, in groups that are connected by links no slower than this position in LINKS."""
        groups = [[gpu] for gpu in self.gpus]
        for a, b in combinations(self.gpus, 2):
            if slowness(self.links[a, b]) <= slowest:
                first, second = (next(group for group in groups if gpu in group) for gpu in (a, b))
                if first is not second:
                    first += second
                    groups.remove(second)
        return sorted(sorted(self.gpus.index(gpu) for gpu in group) for group in groups)

    def domains(self) -> list[list[int]]:
        """The fast domains: GPUs connected by the fastest kind of link that the machine has."""
        return self.connected(min(map(slowness, self.between(self.gpus)), default=0))

    def nearest_nics(self, gpu: str) -> tuple[list[str], str]:
        """The network adapters fewest hops away, and the link to them."""
        best = min((self.links[gpu, nic] for nic in self.nics), key=slowness, default="")
        return [self.adapters.get(nic, nic) for nic in self.nics if self.links[gpu, nic] == best], best

    def differing(self) -> int:
        """Pairs of devices that the matrix gives two different links, one in each direction."""
        return sum(self.links[a, b] != self.links[b, a] for a, b in combinations(self.gpus + self.nics, 2))

    def as_json(self) -> dict[str, Any]:
        links = [[self.links.get((a, b), "X") for b in self.gpus] for a in self.gpus]
        nics = {self.adapters.get(nic, nic): [self.links[nic, gpu] for gpu in self.gpus] for nic in self.nics}
        return {"gpus": self.gpus, "links": links, "nics": nics, "cpus": self.cpus, "numa": self.numa}


def parse(text: str) -> Topology:
    """Read what `nvidia-smi topo -m` printed, also with lines before and after it, as the matrix of `topo -p2p r`.

    Raises:
        ValueError: there is no matrix in it, or several, or one with a row missing, cut off, or with a link of no known
            kind.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]  # its header is underlined
    start, *more = [i for i, line in enumerate(lines) if _is_header(line.split())] or [None]
    if start is None:
        raise ValueError("there is no line with GPU0 over columns of links; save the output of nvidia-smi topo -m")
    if nodes := [i for i in more if not _P2P.issuperset(" ".join(lines[i + 1 : i + 2]).split()[1:])]:
        raise ValueError(f"there are the matrices of {1 + len(nodes)} machines; save each in a file of its own")
    columns = _COLUMNS.findall(" ".join(lines[start].split()))
    devices = _COLUMNS.sub("", " ".join(lines[start].split())).split()
    links: dict[tuple[str, str], str] = {}
    beside: dict[str, dict[str, str]] = {name: {} for name in ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")}
    rows: set[str] = set()
    for line in lines[start + 1 :]:
        name, *cells = line.split() or [""]
        if name not in devices or not cells:
            continue
        if rows == set(devices):  # what follows is of something else
            break
        rows.add(name)
        row, rest = cells[: len(devices)], cells[len(devices) :]
        wrong = [link for other, link in zip(devices, row, strict=False)
                 if not _LINK.fullmatch(link) or (link == "X") != (other == name)]  # fmt: skip
        if wrong or len(row) < len(devices):
            what = f"{wrong[0]} is no link" if wrong else f"{len(row)} links, not {len(devices)}"
            raise ValueError(f"the row of {name} is wrong: {what}; save the whole output of nvidia-smi topo -m")
        links |= {(name, other): link for other, link in zip(devices, row, strict=True) if other != name}
        for column, value in zip(reversed(columns), reversed(rest), strict=False):
            beside[column][name] = value  # from the right: where the system does not say the CPUs, nothing is printed
    if missing := [name for name in devices if name not in rows]:
        raise ValueError(f"the row of {missing[0]} is missing; save the whole output of nvidia-smi topo -m")
    gpus = [name for name in devices if name.startswith("GPU")]
    return Topology(
        gpus,
        [name for name in devices if name not in gpus],
        links,
        {name: cpus for name, cpus in beside["CPU Affinity"].items() if cpus != "N/A"},
        {name: node for name, node in beside["NUMA Affinity"].items() if node != "N/A"},
        dict(re.findall(r"^\s*(NIC\d+): (\S+)\s*$", text, re.MULTILINE)),
    )


def _is_header(words: list[str]) -> bool:
    return bool(words) and words[0] == "GPU0" and not any(_LINK.fullmatch(word) for word in words)


def nvidia_smi_topology(timeout: float) -> Topology | None:
    """What `nvidia-smi topo -m` prints here; None where there is none, or it shows no GPUs."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=timeout, check=False
        )
        return parse(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


# ---- CPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """One kind of cache, of which the machine has several."""

    name: str  # as in L1 Data
    size: str  # of each, as in 32K
    shared: list[list[int]]  # the CPUs that share each


@dataclass(frozen=True)
class Processors:
    """The CPUs that the system runs on. A core may be several CPUs (threads)."""

    cpus: list[int]
    cores: list[list[int]]  # the CPUs of each
    sockets: list[list[int]]
    caches: list[Cache]
    nodes: dict[int, list[int]]  # NUMA: memory that is nearest to these CPUs
    memory: dict[int, int]  # bytes of each node
    distances: dict[int, list[int]]  # to all nodes; 10 is its own


def numbers(text: str) -> list[int]:
    """The kernel's way to write a set: 0-3,8 is 0, 1, 2, 3 and 8."""
    ends = [interval.split("-") for interval in text.strip().split(",") if interval]
    return [n for first, *last in ends for n in range(int(first), int(last[0] if last else first) + 1)]


def processors(root: Path = Path("/sys")) -> Processors:
    """Read /sys/devices/system. What a system does not say, as in some containers, is empty."""
    system = root / "devices" / "system"

    def read(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    cpus = numbers(read(system / "cpu" / "online")) or list(range(os.cpu_count() or 1))
    here = {cpu: system / "cpu" / f"cpu{cpu}" for cpu in cpus}

    def groups(name: str, otherwise: list[list[int]]) -> list[list[int]]:
        found = {tuple(numbers(read(path / "topology" / name))) for path in here.values()}
        return otherwise if () in found else [list(group) for group in sorted(found)]

    caches: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for path in here.values():
        for index in sorted((path / "cache").glob("index*")):
            kind = read(index / "type").replace("Unified", "")
            name = f"L{read(index / 'level')} {kind}".strip()
            caches.setdefault((name, read(index / "size")), set()).add((*numbers(read(index / "shared_cpu_list")),))
    nodes = dict(sorted((int(path.name[4:]), path) for path in (system / "node").glob("node[0-9]*")))
    memory = {n: re.search(r"MemTotal:\s+(\d+) kB", read(path / "meminfo")) for n, path in nodes.items()}
    return Processors(
        cpus,
        groups("thread_siblings_list", [[cpu] for cpu in cpus]),
        groups("core_siblings_list", [cpus]),
        [Cache(*key, [list(group) for group in sorted(shared)]) for key, shared in sorted(caches.items())],
        {n: numbers(read(path / "cpulist")) for n, path in nodes.items()},
        {n: 1024 * int(found[1]) for n, found in memory.items() if found},
        {n: [int(d) for d in read(path / "distance").split()] for n, path in nodes.items()},
    )
