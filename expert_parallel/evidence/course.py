"""CODE 04: what the course's practice prints, and what is right."""

import math

import torch

from core.proof.lesson import Run
from expert_parallel.evidence.training import balance

USAGE = (32, 28, 22, 26, 24, 20, 20, 28)  # choices of each expert
ENTROPY = "2.0672"
TRAINING = "loss 30.88 to 27.54, accuracy 11.3 to 22.6 %"
PARAMETERS, OF_THE_CODE = "6,973", "4,160"


def show_course(run: Run) -> None:
    """The course's figures; beside them the load of its experts by this lesson's measures, and this training's loss."""
    entropy, excess = balance(torch.tensor(USAGE))
    most = math.log(len(USAGE))
    rows = [
        ("parameters", PARAMETERS, OF_THE_CODE, "So many has the model of the code that is printed with the figure."),
        (
            "training",
            TRAINING,
            f"of text, here: loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}",
            "The labels are random: they can only be memorised. One process has all experts, so there is no "
            "all-to-all.",
        ),
        (
            "expert usage",
            f"{' '.join(map(str, USAGE))}, entropy {ENTROPY} of {most:.4f}",
            f"entropy {entropy:.4f}, MaxVio {excess:.2f}",
            f"Nothing balances the load. Entropy hardly shows it, {100 * entropy / most:.1f} % of ln {len(USAGE)}: the "
            f"busiest expert has {100 * excess:.0f} % more than the mean, and all ranks wait for its rank.",
        ),
    ]
    run.say_course(rows)
