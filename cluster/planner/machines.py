"""Machines that can be bought or rented, by the figures of their data sheets. Lecture 03.

FLOP/s are dense (data sheets print twice as much, for sparse ones), bandwidths are of one direction, GB are 10^9 bytes
and GiB 2^30. The memory is what CUDA says there is, as PyTorch prints it where it runs out: of an H100's 80 GB 79.1 GiB
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
    peak4: float = 0.0  # in 4-bit ones
    sharp: bool = False  # whether the switch of a node sums what its devices send (NVLink SHARP)
    sustained: float = 1.0  # of the peak that its power lets large products have, beside an A100
    pod: int = 0  # devices below one switch level with full bandwidth; 0: all
    beyond: Link | None = None  # between pods
    host: float = 25e9  # bytes/s between a device and the memory of its host, which offloaded states travel
    host_memory: float = 128e9  # bytes of the host for each device
    source: str = ""  # of the figures
    resource: str = "nvidia.com/gpu"  # what Kubernetes calls its devices; "": they are processors


GB, GIB, US = 1e9, 2.0**30, 1e-6
NVLINK3, NVLINK4, NVLINK5 = (Link(3 * US, 1 / (n * GB)) for n in (300, 450, 900))


def network(gigabytes: float, alpha: float = 10 * US) -> Link:
    """Of each device's share of the cards, in GB/s."""
    return Link(alpha, 1 / (gigabytes * GB))


A100 = Machine(
    "dgx-a100", 8, 79.15 * GIB, 312e12, 2039 * GB, NVLINK3, network(25), 108, host=25 * GB, host_memory=256 * GB,
    source="NVIDIA A100 80GB SXM data sheet, DGX A100 user guide: 8 x 200 Gb/s HDR, PCIe 4, 2 TB of host memory",
)  # fmt: skip
H100 = Machine(
    "dgx-h100", 8, 79.1 * GIB, 989e12, 3350 * GB, NVLINK4, network(50), 132, 1979e12, sharp=True, sustained=0.8,
    host=50 * GB, host_memory=256 * GB,
    source="NVIDIA H100 SXM data sheet, DGX H100 user guide: 8 x 400 Gb/s NDR, PCIe 5, 2 TB of host memory",
)  # fmt: skip
H200 = replace(
    H100, name="dgx-h200", memory=139.8 * GIB, bandwidth=4800 * GB,
    source="NVIDIA H200 SXM data sheet: 141 GB, 4.8 TB/s; DGX H200 user guide",
)  # fmt: skip
B200 = replace(
    H100, name="dgx-b200", memory=178.35 * GIB, peak=2250e12, bandwidth=8000 * GB, inside=NVLINK5, processors=148,
    peak8=4500e12, peak4=9000e12,
    source="NVIDIA DGX B200 data sheet, of 8: 1,440 GB, 64 TB/s, 72 PFLOP/s sparse in 8 bits and 144 in 4",
)  # fmt: skip
GB200 = replace(
    B200, name="gb200-nvl72", node=72, memory=184.3 * GIB, peak=2500e12, peak8=5000e12, peak4=10000e12,
    host=225 * GB, host_memory=240 * GB,
    source="NVIDIA GB200 NVL72 data sheet, of 72: one NVLink domain of 130 TB/s both ways, 13.4 TB, 576 TB/s, "
           "NVLink-C2C of 900 GB/s both ways for each two",
)  # fmt: skip
B300 = replace(
    B200, name="dgx-b300", memory=267.7 * GIB, sustained=0.85, outside=network(100), peak4=13500e12,
    source="NVIDIA DGX B300 data sheet, of 8: 2.1 TB, 8 x 800 Gb/s, 108 PFLOP/s dense in 4 bits",
)  # fmt: skip
A100_40 = replace(
    A100, name="a100-40gb", memory=39.4 * GIB, bandwidth=1555 * GB, host_memory=128 * GB,
    source="NVIDIA A100 40GB SXM data sheet; DGX A100 user guide: 1 TB of host memory",
)  # fmt: skip
MI300X = Machine(
    "mi300x", 8, 191.98 * GIB, 1307e12, 5300 * GB, Link(5 * US, 1 / (448 * GB)), network(50), 304, 2615e12,
    sustained=0.75, host=50 * GB, host_memory=256 * GB,
    source="AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, 1,307 and 2,615 TFLOP/s, 7 links of 64 GB/s to 7 others "
           "(896 GB/s both ways), 750 W; 8 x 400 Gb/s as in Azure's",
    resource="amd.com/gpu",
)  # fmt: skip
EFA = 25 * US  # of a message over AWS's network, which is not InfiniBand; Google's TCPX takes about 30
GPU_NETWORK = "cloud.google.com/compute/docs/gpus/gpu-network-bandwidth"  # of Google's types
EFA_TYPES = "docs.aws.amazon.com EC2 accelerated computing, network specifications"

ALL = (
    A100,
    A100_40,
    H100,
    replace(
        H100, name="h100-500w", memory=94.5 * GIB, bandwidth=2400 * GB, sustained=0.8 * (500 / 700) ** 0.5,
        source="torchtitan's benchmark page: 96 GB HBM2e, 500 W, 400 Gb/s a GPU; sustained as the root of the power",
    ),
    replace(H100, name="dgx-h800", inside=Link(3 * US, 1 / (200 * GB)), source="2412.19437, section 3.1: 160 of 200"),
    H200,
    B200,
    B300,
    GB200,
    replace(GB200, name="gb300-nvl72", memory=276.5 * GIB, sustained=0.95, outside=network(100), peak4=15000e12,
            source="NVIDIA GB300 NVL72 data sheet, of 72: 20 TB, 800 Gb/s a GPU, 1,080 PFLOP/s dense in 4 bits"),
    MI300X,
    # Meta's cluster for Llama 3 405B: full bandwidth among 3,072 GPUs, a seventh beyond.
    replace(H100, name="grand-teton-h100", pod=3072, beyond=network(50 / 7),
            source="2407.21783, section 3.3.1: pods of 3,072 GPUs, 1:7 beyond"),
    # Boxes on PCIe, without NVLink.
    Machine("l40s-pcie", 8, 44.4 * GIB, 362e12, 864 * GB, Link(20 * US, 1 / (26 * GB)), network(12.5, 20 * US), 142,
            733e12, sustained=0.8, host=25 * GB,
            source="NVIDIA L40S data sheet: 362 and 733 TFLOP/s, 864 GB/s, 350 W, PCIe 4 x16, no NVLink; two cards of "
                   "400 Gb/s for 8 assumed"),
    Machine("4090-pcie", 8, 23.5 * GIB, 165.2e12, 1008 * GB, Link(20 * US, 1 / (12 * GB)), network(1.56, 50 * US), 128,
            330.3e12, host=20 * GB, host_memory=64 * GB,
            source="NVIDIA Ada whitepaper, sums in float32; PCIe 4 x16 through the host, no peer access; 100 Gb/s a "
                   "box assumed"),
    # One PC: two cards of 24 GB on PCIe 4, and 10-gigabit Ethernet to the next.
    Machine("pc", 2, 23.5 * GIB, 165.2e12, 1008 * GB, Link(20 * US, 1 / (12 * GB)), network(0.625, 50 * US), 128,
            330.3e12, host=20 * GB, host_memory=64 * GB,
            source="NVIDIA Ada whitepaper, two RTX 4090 on PCIe 4 through the host; 10 Gb/s Ethernet for both"),
    # Rented, with the network that the type has.
    replace(A100_40, name="aws-p4d", outside=network(6.25, EFA), host_memory=144 * GIB,
            source=f"p4d.24xlarge: A100 40GB, 400 Gb/s of 8, 1,152 GiB; {EFA_TYPES}"),
    replace(A100, name="aws-p4de", outside=network(6.25, EFA), host_memory=144 * GIB,
            source=f"p4de.24xlarge: A100 80GB, 400 Gb/s of 8, 1,152 GiB; {EFA_TYPES}"),
    replace(H100, name="aws-p5", outside=network(50, EFA), host=25 * GB,
            source=f"p5.48xlarge: 3,200 Gb/s of 8, PCIe 4, 2 TiB; {EFA_TYPES}"),
    replace(H200, name="aws-p5e", outside=network(50, EFA), host=25 * GB,
            source=f"p5e.48xlarge: p5 with H200; {EFA_TYPES}"),
    replace(H200, name="aws-p5en", outside=network(50, 15 * US),
            source=f"p5en.48xlarge: 3,200 Gb/s of EFAv3, PCIe 5; latency a third less than of p5; {EFA_TYPES}"),
    replace(B200, name="aws-p6-b200", outside=network(50, 15 * US),
            source=f"p6-b200.48xlarge: 8 x 400 Gb/s of EFAv4; {EFA_TYPES}"),
    replace(B300, name="aws-p6-b300", outside=network(100, 15 * US),
            source=f"p6-b300.48xlarge: 6,400 Gb/s of 8; {EFA_TYPES}"),
    replace(GB200, name="aws-p6e-gb200", outside=network(50, 15 * US),
            source=f"u-p6e-gb200x72: 28.8 Tb/s of 72; {EFA_TYPES}"),
    replace(A100, name="azure-nd-a100-v4", host_memory=225 * GB,
            source="Microsoft Learn, NDm A100 v4: 8 x 200 Gb/s HDR, 1,800 GB"),
    replace(H100, name="azure-nd-h100-v5", host_memory=231 * GB,
            source="Microsoft Learn, ND H100 v5: 8 x 400 Gb/s NDR, 1,850 GB"),
    replace(H200, name="azure-nd-h200-v5", host_memory=231 * GB,
            source="Microsoft Learn, ND H200 v5: 8 x 400 Gb/s NDR, 1,850 GB"),
    replace(MI300X, name="azure-nd-mi300x-v5", host_memory=231 * GIB,
            source="Microsoft Learn, ND MI300X v5: 8 x 400 Gb/s NDR, 1,850 GiB"),
    replace(GB200, name="azure-nd-gb200-v6",
            source="Microsoft Learn, ND GB200 v6: 400 Gb/s a GPU, NVL72"),
    replace(A100_40, name="gcp-a2-high", outside=network(1.56, 30 * US), host_memory=85 * GIB,
            source=f"a2-highgpu-8g: 100 Gb/s of 8, 680 GB; {GPU_NETWORK}"),
    replace(A100, name="gcp-a2-ultra", outside=network(1.56, 30 * US), host_memory=170 * GB,
            source=f"a2-ultragpu-8g: 100 Gb/s of 8, 1,360 GB; {GPU_NETWORK}"),
    replace(H100, name="gcp-a3-high", outside=network(12.5, 30 * US), host_memory=234 * GB,
            source=f"a3-highgpu-8g: 4 x 200 Gb/s of 8 for GPUs, 1,872 GB; {GPU_NETWORK}"),
    replace(H100, name="gcp-a3-mega", outside=network(25, 30 * US), host_memory=234 * GB,
            source=f"a3-megagpu-8g: 8 x 200 Gb/s for GPUs, 1,872 GB; {GPU_NETWORK}"),
    replace(H200, name="gcp-a3-ultra", outside=network(50, 12 * US),
            source=f"a3-ultragpu-8g: 8 x 400 Gb/s RoCE for GPUs; {GPU_NETWORK}"),
    replace(B200, name="gcp-a4", outside=network(50, 12 * US),
            source=f"a4-highgpu-8g: 8 x 400 Gb/s RoCE for GPUs; {GPU_NETWORK}"),
    replace(GB200, name="gcp-a4x", outside=network(50, 12 * US),
            source=f"a4x-highgpu-4g: 4 x 400 Gb/s RoCE of 4 GPUs, NVL72; {GPU_NETWORK}"),
)  # fmt: skip
PRESETS = {machine.name: machine for machine in ALL}
