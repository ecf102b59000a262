"""What the runtime knows of a step, of each micro-batch in it, and of a step that is measured. Lecture 09.

M micro-batches, B samples in a micro-batch, S sequence
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge

from core.proof.clock import VirtualClock
from core.proof.memory import SavedActivations
from pipeline.engine.actions import UNIT_COSTS


@dataclass
class Kept:
    """What a stage keeps of one micro-batch between its forward and its backward.

    Not the output: once it is sent, only the place in the graph where its gradient enters is needed. (Megatron-LM
    gets the same by shrinking the output's storage, `deallocate_output_tensor`.)
    """

    input: Tensor
    exit: GradientEdge | None  # None where nothing on this stage or before it is trained


@dataclass
class Trace:
    """The measurements of traced steps."""

    clock: VirtualClock
    saved: SavedActivations
    by_stage: dict[int, int] = field(default_factory=dict)  # bytes that autograd saved for one micro-batch
    costs: Mapping[str, float] = field(default_factory=lambda: UNIT_COSTS)  # of actions on 1/p of the model
    deferred_layers: int = 0  # layers whose weight gradients a W has computed


@dataclass
class Step:
    """What is worked on now."""

    inputs: Tensor  # (M, B, S)
    targets: Tensor  # (M, B, S)
    loss: Tensor  # of the micro-batches so far, a scalar
    trace: Trace | None = None
    saved: SavedActivations | None = None  # counts what is kept for backward
