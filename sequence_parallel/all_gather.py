"""Lecture 06: context parallelism by all-gather (Megatron-LM SP 代码解析). Llama 3 (2407.21783), section 3.3.2.

    torchrun --nproc_per_node=8 sequence_parallel/all_gather.py

Each rank keeps its queries, and gathers the keys and values of all ranks: of grouped heads only these few, so it is
little beside the scores to be computed. Attention is then as always, with this rank's rows of the causal mask; there
is nothing to merge, and any mask will do, that of documents too. Backward reduce-scatters the gradients of keys and
values. A rank sends what a ring sends, in 3 messages; it waits for the first, and holds all keys and values meanwhile.

A rank's tokens are one run of neighbours, or with zigzag, as in the paper, two: chunks r and 2c-1-r of 2c. No query of
a run sees a key after it, so for each run the keys up to its end are enough.

read: all_gather.py:37-66; context.py:80-144; then engine/all_gather.py

B batch (paper: b), A heads (a), K of keys and values, S sequence (s), N = S/c tokens of a rank, D head size, c ranks
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from core import comm
from core.ledger import Ledger
from core.mesh import Mesh
from core.model import documents
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel.context import Placed
from sequence_parallel.engine.ring import PLACEMENTS
from sequence_parallel.engine.ulysses import context_parallel
from sequence_parallel.evidence import all_gather, rules
from sequence_parallel.evidence.training import compare, context_version


class AllGather(Placed):
    """For `parallelize`: rank r has the r-th S/c tokens, or with zigzag the r-th S/2c from either end."""

    def gather(self, x: Tensor) -> Tensor:
        """This rank's (B, K, N, D) to (B, K, S, D) in the order of the sequence; backward: summed, and this rank's."""
        x = comm.gather_for(x, self.axis, 2)  # in the order of the ranks
        everyone = torch.cat([self.positions_of(r, x.shape[2]) for r in range(self.ranks)])
        return x[:, :, everyone.argsort().to(x.device)]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        kv = self.gather(torch.cat([k, v], -1))  # one message, rotated already: a rank knows its tokens' positions
        k, v = kv.split([k.shape[-1], v.shape[-1]], -1)  # (B, K, S, D) each
        sequence = k.shape[2]
        if starts is None:
            starts = torch.zeros(1, sequence, dtype=torch.int64, device=q.device)  # one document
        o = []
        for run, here in zip(q.chunk(self.runs, 2), self.positions(sequence).chunk(self.runs), strict=True):
            end = int(here[-1]) + 1
            keys, values = k[:, :, :end], v[:, :, :end]
            seen = documents.visible(starts, here, torch.arange(end))  # these rows of the mask, (B or 1, 1, n, end)
            grouped = q.shape[1] != k.shape[1]
            o.append(F.scaled_dot_product_attention(run, keys, values, seen, scale=scale, enable_gqa=grouped))
        return torch.cat(o, 2)

    @property
    def runs(self) -> int:
        """Of neighbouring tokens."""
        return 2 if self.zigzag else 1


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config, args = configuration(run.args), run.args
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    plain = {name: AllGather(axis, name == "zigzag") for name in PLACEMENTS}
    engine = {name: context_parallel(axis, run.job.device, 1, name == "zigzag", "all-gather") for name in PLACEMENTS}
    all_gather.claim_placements(run, config, axis, plain, engine)
    pair = {"plain": plain[args.placement], "engine": engine[args.placement]}
    versions = {name: context_version(run, config, attention, axis) for name, attention in pair.items()}
    compare(run, config, axis, versions)
    all_gather.claim_traffic(run, config, axis.size, versions)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: all-gather of keys and values",
        "Megatron-LM SP 代码解析",
        "Attention over a sharded sequence: each rank gathers all keys and values, and computes its own rows.",
    )
    add_model_flags(frame, layers=2, batch=3)
    frame.parser.set_defaults(steps=10)
    flag = frame.parser.add_argument
    flag("--placement", choices=PLACEMENTS, default=PLACEMENTS[0], help="of tokens in training (default %(default)s)")
    sys.exit(frame.main(rules.ring_attention, lesson))
