"""Ten published runs on DGX A100, to hold a model of time against. Narayanan et al. 2021 (2104.04473), table 1.

A100 of 80 GB, 8 in a node, NVSwitch inside and 8 HDR InfiniBand cards outside; vocabulary 51,200, sequence 2048; Adam
in mixed precision, all activations recomputed, no sequence parallelism, messages between stages sharded over the tensor
parallel ranks (section 4.1). The table does not have the microbatch and the stages a rank; the authors publish them
in Megatron-LM, `examples/sc21/run_table_1.sh`, whose gradients travel during backward where there is no pipeline.

Section 5.1 says that the interleaved schedule was used. The script names its stages a rank for four of the six
pipelines. The other two are marked: 2 is the only number that fits the two layers a rank of the largest, and the least
for the 39.1B.
"""

from typing import NamedTuple

VOCABULARY, SEQUENCE = 51_200, 2048


class Published(NamedTuple):
    """One row of the table."""

    billions: float  # of parameters, as printed
    heads: int
    hidden: int
    layers: int
    tp: int
    pp: int
    gpus: int
    batch: int
    tflops: float  # per GPU, achieved
    percent: int  # of the peak of 312
    pflops: float  # of all GPUs
    microbatch: int
    v: int  # stages a rank
    v_in_script: int

    @property
    def name(self) -> str:
        return f"ptdp-{self.billions:g}b"


TABLE = (
    Published(1.7, 24, 2304, 24, 1, 1, 32, 512, 137, 44, 4.4, 16, 1, 1),
    Published(3.6, 32, 3072, 30, 2, 1, 64, 512, 138, 44, 8.8, 16, 1, 1),
    Published(7.5, 32, 4096, 36, 4, 1, 128, 512, 142, 46, 18.2, 16, 1, 1),
    Published(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135, 43, 34.6, 8, 1, 1),
    Published(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138, 44, 70.8, 4, 2, 1),  # v: see above
    Published(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140, 45, 143.8, 2, 3, 3),
    Published(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148, 47, 227.1, 2, 2, 2),
    Published(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155, 50, 297.4, 1, 2, 2),
    Published(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163, 52, 410.2, 1, 3, 3),
    Published(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163, 52, 502.0, 1, 2, 1),  # v: see above
)

# Table 2, the rows of PTD parallelism: (parameters, GPUs, batch, TFLOP/s per GPU); microbatch 1, tp 8, pp 12 and 35. It
# does not say that these were interleaved. Not used to fit anything.
TABLE_2 = (
    (174.6, 384, 1536, 153),
    (174.6, 768, 1536, 149),
    (174.6, 1536, 1536, 141),
    (529.6, 560, 2240, 171),
    (529.6, 1120, 2240, 167),
    (529.6, 2240, 2240, 159),
)
