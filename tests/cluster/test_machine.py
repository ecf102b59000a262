"""What a machine says of itself: real matrices of nvidia-smi, and trees of /sys."""

import re
from pathlib import Path

import pytest

from cluster.links.machine import Processors, Topology, numbers, parse, processors

LAYOUTS = Path(__file__).parent / "topologies"
# GPUs, adapters, kinds of link between GPUs, fast domains, CPUs and NUMA node of the last GPU
EXPECTED = {
    "dgx_a100": (8, 10, {"NV12"}, [[*range(8)]], "80-95,208-223", "5"),
    "dgx_h200": (8, 12, {"NV18"}, [[*range(8)]], "56-111,168-223", "1"),
    "hgx_a100_4gpu": (4, 4, {"NV4"}, [[0, 1, 2, 3]], "0-15", "0"),
    "gb200_4gpu": (4, 0, {"NV18"}, [[0, 1, 2, 3]], "72-143", "1"),
    "dgx1_v100": (8, 1, {"NV1", "NV2", "SYS"}, [[*range(8)]], "12-23,36-47", None),
    "nvlink_pairs_4gpu": (4, 0, {"NV12", "SYS"}, [[0, 1], [2, 3]], "72-95", "3"),
    "pcie_8gpu_two_sockets": (8, 2, {"SYS"}, [[*range(8)]], "56-111,168-223", "1"),
    "pcie_5gpu_two_sockets": (5, 0, {"PHB", "NODE", "SYS"}, [[0], [1, 2], [3, 4]], "0-7,16-23", "0"),
    "consumer_2gpu": (2, 0, {"PHB"}, [[0, 1]], "0-31", "0"),
    "single_gpu": (1, 0, set(), [[0]], "0-11", "0"),
}


def layout(name: str) -> Topology:
    return parse((LAYOUTS / f"{name}.txt").read_text())


def test_every_layout_is_expected() -> None:
    assert {path.stem for path in LAYOUTS.glob("*.txt")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_layout(name: str) -> None:
    gpus, nics, between, domains, cpus, node = EXPECTED[name]
    found = layout(name)
    assert found.gpus == [f"GPU{i}" for i in range(gpus)]
    assert len(found.nics) == nics
    assert found.between(found.gpus) == between
    assert found.domains() == domains
    assert found.cpus[found.gpus[-1]] == cpus
    assert found.numa.get(found.gpus[-1]) == node
    assert found.differing() == 0
    assert len(found.links) == (gpus + nics) * (gpus + nics - 1)


def test_groups_grow_with_slower_links() -> None:
    found = layout("pcie_5gpu_two_sockets")
    assert [found.connected(slowest) for slowest in range(6)] == [
        [[0], [1], [2], [3], [4]], [[0], [1], [2], [3], [4]], [[0], [1], [2], [3], [4]],
        [[0], [1, 2], [3, 4]], [[0], [1, 2, 3, 4]], [[0, 1, 2, 3, 4]],
    ]  # fmt: skip


def test_the_adapters_of_the_dgx_h100_are_those_of_its_user_guide() -> None:
    """Table 6, network modules: the default RDMA name of each GPU's adapter."""
    guide = {7: "mlx5_11", 4: "mlx5_6", 6: "mlx5_10", 5: "mlx5_9", 2: "mlx5_4", 1: "mlx5_3", 3: "mlx5_5", 0: "mlx5_0"}
    found = layout("dgx_h200")
    assert {gpu: found.nearest_nics(f"GPU{gpu}") for gpu in guide} == {n: ([name], "PXB") for n, name in guide.items()}


def test_nearest_adapters() -> None:
    assert layout("dgx_a100").nearest_nics("GPU5") == (["mlx5_4", "mlx5_5"], "PXB")
    assert layout("dgx1_v100").nearest_nics("GPU2") == (["mlx5_0"], "PIX")
    assert layout("dgx1_v100").nearest_nics("GPU7") == (["mlx5_0"], "SYS")
    assert layout("consumer_2gpu").nearest_nics("GPU0") == ([], "")


def test_as_json() -> None:
    found = layout("nvlink_pairs_4gpu").as_json()
    assert found["links"][1] == ["NV12", "X", "SYS", "SYS"]
    assert layout("dgx_a100").as_json()["nics"]["mlx5_9"] == ["SYS"] * 8


def test_a_terminal_underlines_the_header() -> None:
    text = (LAYOUTS / "consumer_2gpu.txt").read_text()
    seen = text.replace("\tGPU0", "\x1b[4m\tGPU0", 1).replace("GPU NUMA ID", "GPU NUMA ID\x1b[0m")
    assert seen != text
    assert parse(seen) == parse(text)


def test_cpus_that_the_system_does_not_tell() -> None:
    """In some containers the column is there, and empty."""
    text = re.sub(r"0-31\t", "\t", (LAYOUTS / "consumer_2gpu.txt").read_text())
    found = parse(text)
    assert found.cpus == {}
    assert found.numa == {"GPU0": "0", "GPU1": "0"}


def test_a_gpu_that_fell_off_nvlink_is_a_domain_of_its_own() -> None:
    rows = (LAYOUTS / "gb200_4gpu.txt").read_text().splitlines()
    for i, row in enumerate(rows):
        if row.startswith("GPU2"):
            rows[i] = row.replace("NV18", "NODE")
        elif row.startswith("GPU"):
            cells = row.split()
            cells[3] = "NODE"
            rows[i] = "\t".join(cells)
    found = parse("\n".join(rows))
    assert found.domains() == [[0, 1, 3], [2]]
    assert found.differing() == 0


def test_entries_that_differ_are_counted() -> None:
    text = (LAYOUTS / "consumer_2gpu.txt").read_text()
    assert parse(text.replace("PHB", "PIX", 1)).differing() == 1


BROKEN = {
    "nothing": (lambda text: "command not found", "there is no line with GPU0 over columns"),
    "no rows": (lambda text: text.split("GPU0     X")[0], "the row of GPU0 is missing"),
    "no last row": (lambda text: text.split("\nmlx5_3")[0], "the row of mlx5_3 is missing"),
    "cut off": (
        lambda text: text.replace("NODE    NODE    0-15    0", "", 1),
        "the row of GPU0 is wrong: 6 links, not 8",
    ),
    "itself": (lambda text: text.replace("NV4", "X", 1), "the row of GPU0 is wrong: X is no link"),
    "unknown": (lambda text: text.replace("NV4", "FOO", 1), "the row of GPU0 is wrong: FOO is no link"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_matrix_is_refused(case: str) -> None:
    change, why = BROKEN[case]
    with pytest.raises(ValueError, match=why):
        parse(change((LAYOUTS / "hgx_a100_4gpu.txt").read_text()))


P2P = """\
        GPU0    GPU1    GPU2    GPU3
 GPU0   X       OK      OK      CNS
 GPU1   OK      X       OK      OK
 GPU2   OK      OK      X       OK
 GPU3   CNS     OK      OK      X

Legend:
  X    = Self
  OK   = Status Ok
"""


def test_what_follows_the_matrix_is_not_read() -> None:
    text = (LAYOUTS / "hgx_a100_4gpu.txt").read_text()
    assert parse(text + P2P) == parse(text)


def test_two_machines_in_one_file_are_refused() -> None:
    text = (LAYOUTS / "hgx_a100_4gpu.txt").read_text()
    with pytest.raises(ValueError, match="the matrices of 3 machines; save each in a file of its own"):
        parse(text + P2P + (LAYOUTS / "consumer_2gpu.txt").read_text() + text)


def test_links_between_sockets_as_in_2017() -> None:
    found = parse(re.sub(r"\bSYS\b", "SOC", (LAYOUTS / "nvlink_pairs_4gpu.txt").read_text()))
    assert found.links["GPU0", "GPU3"] == "SOC"
    assert found.domains() == layout("nvlink_pairs_4gpu").domains()


# ---- /sys


def test_sets_of_the_kernel() -> None:
    assert numbers("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert numbers("5") == [5]
    assert numbers("") == []


def two_sockets(root: Path) -> None:
    """Two sockets of two cores of two threads, a NUMA node each; CPUs numbered as Linux does, threads at the end."""

    def write(path: str, text: str) -> None:
        file = root / "devices" / "system" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    write("cpu/online", "0-7")
    for cpu in range(8):
        core, socket = cpu % 4, cpu % 4 // 2
        write(f"cpu/cpu{cpu}/topology/thread_siblings_list", f"{core},{core + 4}")
        write(
            f"cpu/cpu{cpu}/topology/core_siblings_list",
            f"{2 * socket}-{2 * socket + 1},{2 * socket + 4}-{2 * socket + 5}",
        )
        for index, (level, kind, size, shared) in enumerate(
            [
                ("1", "Data", "48K", f"{core},{core + 4}"),
                ("3", "Unified", "30720K", f"{2 * socket}-{2 * socket + 1},{2 * socket + 4}-{2 * socket + 5}"),
            ]
        ):
            for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                write(f"cpu/cpu{cpu}/cache/index{index}/{name}", value)
    for node in range(2):
        write(f"node/node{node}/cpulist", f"{2 * node}-{2 * node + 1},{2 * node + 4}-{2 * node + 5}")
        write(f"node/node{node}/meminfo", f"Node {node} MemTotal:       65536000 kB\nNode {node} MemFree: 1 kB")
        write(f"node/node{node}/distance", "10 21" if node == 0 else "21 10")


def test_two_sockets(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    found = processors(tmp_path)
    assert found.cpus == list(range(8))
    assert found.cores == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found.sockets == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [(c.name, c.size, c.shared) for c in found.caches] == [
        ("L1 Data", "48K", found.cores),
        ("L3", "30720K", found.sockets),
    ]
    assert found.nodes == {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}
    assert found.memory == {0: 65536000 * 1024, 1: 65536000 * 1024}
    assert found.distances == {0: [10, 21], 1: [21, 10]}


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    found = processors(tmp_path)
    assert found == Processors(found.cpus, [[cpu] for cpu in found.cpus], [found.cpus], [], {}, {}, {})
    assert found.cpus
