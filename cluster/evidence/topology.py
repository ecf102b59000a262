"""Lecture 03, topology: what is shown and claimed of the machine and of its links, and refused."""

import os
from pathlib import Path

import numpy as np
from tabulate import tabulate

from cluster.links.links import APART, Links, same_domain
from cluster.links.machine import LINKS, Processors, Topology, parse, slowness
from core.proof.figures import grid
from core.proof.files import check_readable
from core.proof.lesson import Run
from core.proof.plot import picture
from core.proof.rules import Rule

MOST_RANKS = 256  # which are 32,640 pairs, measured one after another
WITHIN = 0.5  # how far the line may be from a time that it was not fitted to: it is for planning


# ---- What the machine says -------------------------------------------------------------------------------------------


def show_gpus(run: Run, topology: Topology) -> None:
    gpus = topology.gpus
    rows = [(a, *(topology.links.get((a, b), "X") for b in gpus)) for a in gpus]
    run.say(tabulate(rows, ("", *gpus)) + "\n")
    for link in sorted(topology.between(gpus), key=slowness):
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
    unknown = len(mine - set(found.cpus))
    run.evidence.claim("CPUs of this process that /sys does not have", f"0 of {len(mine)}", 0, unknown)
    if found.nodes:
        once = [cpu for cpus in found.nodes.values() for cpu in cpus]
        missed = len(set(found.cpus) ^ set(once)) + len(once) - len(set(once))
        run.evidence.claim("CPUs that are not in just one NUMA node", "0", 0, missed)


# ---- What is measured ------------------------------------------------------------------------------------------------


def show_links(run: Run, links: Links, found: list[list[int]]) -> None:
    n = len(links.alpha)
    latency, bandwidth = links.alpha * 1e6, 1e-9 / np.where(links.beta > 0, links.beta, np.inf)
    if n <= 16:
        for what, matrix in (("latency in us", latency), ("GB/s", bandwidth)):
            rows = [(a, *("." if a == b else f"{matrix[a, b]:.3g}" for b in range(n))) for a in range(n)]
            run.say(f"\n{what}, from rank to rank\n{tabulate(rows, ('', *range(n)), disable_numparse=True)}")
    same, off = same_domain(found), ~np.eye(n, dtype=bool)
    rows = []
    for what, pairs in (("inside a domain", same & off), ("between domains", ~same)):
        if pairs.any():
            alpha, beta = (np.median(x[pairs]) for x in links)
            rows.append((what, f"{alpha * 1e6:.3g}", f"{1e-9 / beta:.3g}" if beta else "?"))
    run.say("\n" + tabulate(rows, ("median", "latency in us", "GB/s"), disable_numparse=True))
    run.say(f"\nfast domains as measured, in ranks: {_text(found)}\n")


def claim_links(run: Run, links: Links, found: list[list[int]], size: int, seconds: np.ndarray) -> None:
    """Both claims by times of a size that neither the lines nor the domains have seen."""
    pairs = np.triu_indices(len(seconds), 1)
    seconds, predicted, same = seconds[pairs], links.predict(size)[pairs], same_domain(found)[pairs]
    error = float(np.median(np.abs(predicted / seconds - 1)))
    formula = f"alpha + beta x {size:,}, within {WITHIN:.0%}"
    run.evidence.claim("error of the line at a size not fitted, median", formula, 0, error, WITHIN)
    inside = np.exp(np.log(predicted[same]).mean())
    between = inside * APART**2 if same.all() else np.exp(np.log(predicted[~same]).mean())
    border = np.sqrt(inside * between)
    wrong = int(((seconds > border) == same).sum())
    noisy = max(1, len(seconds) // 5) if len(seconds) > 1 else 0  # a domain that is not seen puts more pairs wrong
    formula = f"of {len(seconds)}, {noisy} at most: inside below {border * 1e6:.3g} us, between above"
    run.evidence.claim("pairs that the domains do not explain", formula, 0, wrong, noisy)


def draw_links(run: Run, links: Links, found: list[list[int]]) -> None:
    """Latency and bandwidth of every pair, and the domains, for the page."""
    n = len(links.alpha)
    latency, bandwidth = links.alpha * 1e6, 1e-9 / np.where(links.beta > 0, links.beta, np.inf)
    domain = {rank: str(i % 8) for i, ranks in enumerate(found) for rank in ranks}
    for title, matrix in (
        (("Bandwidth between ranks, GB/s, as measured", "各 rank 之间实测的带宽，GB/s"), bandwidth),
        (("Latency between ranks, us, as measured", "各 rank 之间实测的时延，微秒"), latency),
    ):
        most = float(matrix.max()) or 1.0
        rows = [
            (f"{a}", [("", None) if a == b else (f"{matrix[a, b]:.3g}", float(matrix[a, b]) / most) for b in range(n)])
            for a in range(n)
        ]
        run.draw(grid(title, "rank", [str(b) for b in range(n)], rows))
    title = "Fast domains: ranks of one colour", "高速域：同色的 rank"
    run.draw(grid(title, "rank", [str(b) for b in range(n)], [(("domain", "域"), [("", domain[r]) for r in range(n)])]))


def draw(path: str, links: Links, size: int) -> None:
    with picture(path, 5, 4) as axes:
        seconds = links.predict(size)
        np.fill_diagonal(seconds, np.nan)
        shown = axes.imshow(seconds * 1e6)
        axes.figure.colorbar(shown, ax=axes, label="us")
        axes.set(title=f"A message of {size:,} bytes", xlabel="rank", ylabel="rank")


def _text(groups: list[list[int]]) -> str:
    return " ".join(f"[{','.join(map(str, group))}]" for group in groups)


# ---- What is refused -------------------------------------------------------------------------------------------------

RULES = (  # of a case: the flags; ranks; pairs of them
    Rule("largest", "--largest {largest}", lambda case: case.largest is None or 2**10 <= case.largest <= 2**31,
         "must be in [1024, 2147483648]", lambda case: "--largest 1048576"),
    Rule("pairs", "--nproc_per_node", lambda case: case.ranks <= MOST_RANKS,
         "{ranks} ranks are {pairs:,} pairs, measured one after another",
         lambda case: f"at most {MOST_RANKS} ranks, a few nodes show the links"),
    Rule("plot", "--plot {plot}", lambda case: not case.plot or case.ranks > 1,
         "draws what is measured, so needs 2 ranks", lambda case: "torchrun --nproc_per_node=2"),
)  # fmt: skip


def check_file(path: str) -> None:
    """Raises ValueError unless the file holds what `nvidia-smi topo -m` prints."""
    use = "use what nvidia-smi topo -m printed"
    check_readable(f"--file {path}", path, use)
    try:
        parse(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"--file {path}: is not text; {use}") from None
    except ValueError as error:
        raise ValueError(f"--file {path}: {error}") from None
