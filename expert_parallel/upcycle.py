"""CODE 04: convert weights (专家并行大规模训练): an MLP to experts, experts to more experts, a layout to any other.

    torchrun --nproc_per_node=8 expert_parallel/upcycle.py

    read: upcycle.py:33-63; moe.py:31-85; then core/proof/chunks.py

Sparse upcycling, Komatsuzaki et al. 2022 (2212.05055): a trained dense model becomes a mixture whose experts are copies
of its MLP, and trains on. Where the weights of a token's experts sum to 1, equal experts are the MLP they were copied
from, so the mixture starts as good as the dense model. More experts from fewer: each n times over, of which each token
takes n k: a router that cannot tell copies apart takes all copies of an expert, or none.

A trained checkpoint fits any other layout of the experts: `core/proof/chunks.py` reads each rank's shards out of it.

E experts, k of them for each token, H hidden, F feed-forward
"""

import argparse
import sys
from collections.abc import Mapping

from torch import Tensor

from core.model.gpt import GPT, GPTConfig, initial_value
from core.proof.lesson import Lesson, Run
from core.proof.rules import Rule
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.routing import MoEConfig
from expert_parallel.evidence.flags import add_flags, check
from expert_parallel.evidence.upcycle import compare_layouts

Weights = dict[str, Tensor]  # full parameters by name


def upcycle(dense: Mapping[str, Tensor], config: GPTConfig, moe: MoEConfig, seed: int) -> Weights:
    """The weights of the dense GPT as those of one with mixtures: copies of its MLPs, and new routers.

    Raises:
        ValueError: an expert would not have the size of the MLP, or there would be a shared one besides.
    """
    if moe.shared or (moe.feed_forward or config.feed_forward) != config.feed_forward:
        raise ValueError(
            "an expert is a copy of the MLP, and nothing is added to it; use the same feed-forward, shared 0"
        )
    made: Weights = {}
    for name, p in to_moe(GPT(config), moe).named_parameters():
        if ".experts." in name:  # (F, H) to (E, F, H)
            mlp = dense[name.replace("mlp.experts.", "mlp.")]
            made[name] = mlp.expand(p.shape).clone()
        elif name in dense:  # attention, norms, embeddings: as they are
            made[name] = dense[name]
        elif name.endswith("router.bias"):
            made[name] = p.detach().clone()
        else:  # a new router (E, H)
            made[name] = initial_value(name, p.shape, config, seed).to(next(iter(dense.values())).dtype)
    return made


def more_experts(weights: Mapping[str, Tensor], times: int) -> Weights:
    """Each expert, and its row of the router, `times` over; for `times` as many experts a token."""
    return {
        name: value.repeat_interleave(times, 0) if ".experts." in name or ".router." in name else value
        for name, value in weights.items()
    }


def lesson(run: Run) -> None:
    compare_layouts(run, upcycle, more_experts)


NOT_SHARED = Rule("shared: none", "--shared {shared}", lambda c: c.shared == 0,
                  "an expert is a copy of the MLP, and nothing is added", lambda c: "--shared 0")  # fmt: skip


def refuse(args: argparse.Namespace, ranks: int) -> None:
    args.ep, args.etp, args.dispatch = 0, 1, "all-to-all"
    check(args, ranks, more=[NOT_SHARED])


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: converting weights",
        "专家并行大规模训练",
        "A dense model becomes a mixture, a mixture gets more experts, and a checkpoint fits any layout, bit by bit.",
    )
    add_flags(frame, layers=1)
    sys.exit(frame.main(refuse, lesson))
