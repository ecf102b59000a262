"""Machines that can be bought or rented, by the figures of their data sheets. Lecture 03.

FLOP/s are dense (data sheets print twice as much, for sparse ones), bandwidths are of one direction, GB are 10^9 bytes.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes alpha + beta n seconds, in one direction."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class Machine:
    """Devices in nodes. Inside a node every device reaches every other; outside each has a share of the network."""

    name: str
    node: int  # devices in a fast domain
    memory: float  # bytes of a device
    peak: float  # FLOP/s of a device in 16-bit matrix products
    bandwidth: float  # bytes/s of its memory
    inside: Link
    outside: Link
    processors: int = 1  # that work on a matrix product's tiles, all at once
    peak8: float = 0.0  # FLOP/s in 8-bit products; 0: has none
    sustained: float = 1.0  # of the peak that its power lets large products have, beside an A100
    pod: int = 0  # devices below one switch level with full bandwidth; 0: all
    beyond: Link | None = None  # between pods
    host: float = 25e9  # bytes/s between a device and the memory of its host, which offloaded states travel
    host_memory: float = 128e9  # bytes of the host for each device
    source: str = ""  # of the figures


GB, US = 1e9, 1e-6
NVLINK3, NVLINK4, NVLINK5 = (Link(3 * US, 1 / (n * GB)) for n in (300, 450, 900))


def network(gigabytes: float, alpha: float = 10 * US) -> Link:
    """Of each device's share of the cards, in GB/s."""
    return Link(alpha, 1 / (gigabytes * GB))


A100 = Machine(
    "dgx-a100", 8, 80 * GB, 312e12, 2039 * GB, NVLINK3, network(25), 108, host=25 * GB, host_memory=256 * GB,
    source="NVIDIA DGX A100 80GB data sheet: 8 x 200 Gb/s HDR",
)  # fmt: skip
H100 = Machine(
    "dgx-h100", 8, 80 * GB, 989e12, 3350 * GB, NVLINK4, network(50), 132, 1979e12, 0.8, host=50 * GB,
    host_memory=256 * GB, source="NVIDIA DGX H100 data sheet: 8 x 400 Gb/s NDR",
)  # fmt: skip
B200 = replace(
    H100, name="dgx-b200", memory=180 * GB, peak=2250e12, bandwidth=7700 * GB, inside=NVLINK5, processors=148,
    peak8=4500e12, source="NVIDIA DGX B200 data sheet: 1,440 GB, 64 TB/s and 72 PFLOP/s sparse 8-bit of 8",
)  # fmt: skip
GB200 = replace(
    B200, name="gb200-nvl72", node=72, memory=186 * GB, peak=2500e12, bandwidth=8000 * GB, peak8=5000e12,
    host=225 * GB, host_memory=240 * GB,
    source="NVIDIA GB200 NVL72 data sheet: 72 in one NVLink domain of 130 TB/s both ways, 13.4 TB",
)  # fmt: skip

ALL = (
    A100,
    replace(A100, name="a100-40gb", memory=40 * GB, bandwidth=1555 * GB, source="NVIDIA A100 40GB SXM data sheet"),
    H100,
    replace(
        H100, name="h100-500w", memory=96 * GB, bandwidth=2400 * GB, sustained=0.8 * (500 / 700) ** 0.5,
        source="torchtitan's benchmark page: 96 GB HBM2e, 500 W, 400 Gb/s a GPU; sustained as the root of the power",
    ),
    replace(H100, name="dgx-h800", inside=Link(3 * US, 1 / (200 * GB)), source="2412.19437, section 3.1: 160 of 200"),
    replace(
        H100, name="dgx-h200", memory=141 * GB, bandwidth=4800 * GB, source="NVIDIA H200 data sheet: 141 GB, 4.8 TB/s"
    ),
    B200,
    replace(B200, name="dgx-b300", memory=270 * GB, sustained=0.85, bandwidth=8000 * GB, outside=network(100),
            source="NVIDIA DGX B300 data sheet: 2.1 TB of 8, 8 x 800 Gb/s"),
    GB200,
    replace(GB200, name="gb300-nvl72", memory=279 * GB, sustained=0.95, outside=network(100),
            source="NVIDIA GB300 NVL72 data sheet: 20 TB of 72, 800 Gb/s a GPU"),
    Machine("mi300x", 8, 192 * GB, 1307e12, 5300 * GB, Link(5 * US, 1 / (448 * GB)), network(50), 304, 2614e12,
            sustained=0.75, source="AMD MI300X platform data sheet: 7 links of 64 GB/s to 7 others, 750 W"),
    # Meta's cluster for Llama 3 405B: full bandwidth among 3,072 GPUs, a seventh beyond.
    replace(H100, name="grand-teton-h100", pod=3072, beyond=network(50 / 7),
            source="2407.21783, section 3.3.1: pods of 3,072 GPUs, 1:7 beyond"),
    # Boxes on PCIe, without NVLink.
    Machine("l40s-pcie", 8, 48 * GB, 362e12, 864 * GB, Link(20 * US, 1 / (26 * GB)), network(12.5, 20 * US), 142,
            733e12, 0.8, source="NVIDIA L40S data sheet: 350 W, PCIe 4 x16; two cards of 400 Gb/s assumed for 8"),
    Machine("4090-pcie", 8, 24 * GB, 165e12, 1008 * GB, Link(20 * US, 1 / (12 * GB)), network(1.56, 50 * US), 128,
            330e12, host=20 * GB, host_memory=64 * GB,
            source="NVIDIA Ada whitepaper, float32 sums; PCIe 4 x16 through the host, no peer access; 100 Gb/s a box"),
    # One PC: two cards of 24 GB on PCIe 4, and 10-gigabit Ethernet to the next.
    Machine("pc", 2, 24 * GB, 165e12, 1008 * GB, Link(20 * US, 1 / (31 * GB)), network(1.25, 50 * US), 128, 330e12,
            host=20 * GB, host_memory=64 * GB, source="NVIDIA Ada whitepaper, PCIe 4 x16"),
    # Rented, with the network that the type has.
    replace(A100, name="aws-p4d", memory=40 * GB, bandwidth=1555 * GB, outside=network(6.25, 25 * US),
            source="AWS EC2 p4d.24xlarge: A100 40GB, 400 Gb/s EFA of 8"),
    replace(H100, name="aws-p5", outside=network(50, 25 * US), source="AWS EC2 p5.48xlarge: 3,200 Gb/s EFA of 8"),
    replace(A100, name="azure-nd-a100-v4", source="Azure ND96amsr_A100_v4: 8 x 200 Gb/s HDR"),
    replace(H100, name="azure-nd-h100-v5", source="Azure ND96isr_H100_v5: 8 x 400 Gb/s NDR"),
    replace(H100, name="gcp-a3-high", outside=network(12.5, 30 * US),
            source="Google Cloud a3-highgpu-8g: 4 x 200 Gb/s of 8"),
    replace(H100, name="gcp-a3-mega", outside=network(25, 30 * US),
            source="Google Cloud a3-megagpu-8g: 8 x 200 Gb/s"),
)  # fmt: skip
PRESETS = {machine.name: machine for machine in ALL}
