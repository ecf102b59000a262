"""The published runs of `ptdp.py` as models and layouts, and the throughput that the planner expects of them."""

from dataclasses import dataclass, replace

from cluster.planner.counting import step_flops
from cluster.planner.hardware import PRESETS as MACHINES
from cluster.planner.layout import Layout
from cluster.planner.models import PRESETS
from cluster.planner.ptdp import Published
from cluster.planner.software import Software
from cluster.planner.steptime import step
from core.model.config import ModelConfig

A100 = MACHINES["dgx-a100"]


@dataclass(frozen=True)
class Measurement:
    """A run: the model, how it was laid out, and the TFLOP/s per GPU that were published."""

    model: ModelConfig
    layout: Layout
    tflops: float

    def predicted(self, software: Software) -> float:
        """TFLOP/s per GPU, counted as the paper does: what is computed again counts."""
        seconds = step(self.model, self.layout, A100, software).seconds
        return step_flops(self.model, self.layout.batch, forwards=2) / seconds / self.layout.ranks / 1e12


def measurement(
    name: str, tp: int, pp: int, gpus: int, batch: int, microbatch: int, v: int, tflops: float
) -> Measurement:
    dp = gpus // (tp * pp)
    layout = Layout(
        tp=tp,
        pp=pp,
        dp=dp,
        v=v,
        schedule="interleaved" if v > 1 else "1f1b",
        microbatch=microbatch,
        microbatches=batch // (dp * microbatch),
        recompute="full",
        loss_chunk=2**40,  # Megatron-LM makes all logits at once
    )
    # The kernels of that time keep the scores of attention, and every dropout its mask.
    return Measurement(replace(PRESETS[name], attention="softmax", dropout=0.1), layout, tflops)


def of_row(row: Published, v: int | None = None) -> Measurement:
    """A run of table 1; `v`: stages a rank, where not the row's."""
    return measurement(row.name, row.tp, row.pp, row.gpus, row.batch, row.microbatch, v or row.v, row.tflops)


def of_second_table(size: float, gpus: int, batch: int, tflops: float) -> Measurement:
    """A run of table 2."""
    name, pp = ("gpt3-175b", 12) if size < 200 else ("ptdp-529.6b", 35)
    return measurement(name, 8, pp, gpus, batch, 1, 1, tflops)
