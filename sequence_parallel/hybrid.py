"""Lecture 06: Ulysses inside, a ring across (Megatron-LM SP 代码解析). Fang and Zhao 2024 (2405.07719).

    torchrun --nproc_per_node=8 sequence_parallel/hybrid.py --ulysses 2

Ulysses sends least but needs a head for each rank; a ring has no such limit but more to send. So c = c1 c2 ranks: c1
neighbours, in a node with fast links, exchange heads for tokens, and then each has some heads of a c2-th of the
sequence; the ranks with the same index in all nodes are a ring for these heads. With c1 = 1 it is a ring, with c2 = 1
Ulysses.

read: hybrid.py:33-53; ulysses.py:33-83; then ring_attention.py, engine/ulysses.py

B batch (paper: b), A heads (a), S sequence (s), D head size, H hidden (h), c = c1 c2 ranks of the axis
"""

import sys
from math import lcm

from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel.context import SequenceAttention, check_length
from sequence_parallel.engine.ring import PLACEMENTS
from sequence_parallel.engine.ulysses import context_parallel
from sequence_parallel.evidence import hybrid, rules
from sequence_parallel.evidence.training import compare, context_version
from sequence_parallel.ring_attention import RingAttention
from sequence_parallel.ulysses import for_ranks, to_heads, to_tokens


class Hybrid(SequenceAttention):
    """For `parallelize`: c1 neighbours exchange heads for tokens; for some heads each, c2 groups of them are a ring."""

    def __init__(self, axis: Axis, c1: int, zigzag: bool):
        self.inner, self.outer = axis.split(c1)  # c1 neighbours; the c2 ranks with the same index in their groups
        self.ring = RingAttention(self.outer, zigzag)
        self.ranks, self.heads_over = axis.size, c1
        self.multiple = lcm(axis.size, self.ring.multiple)

    def positions(self, sequence: int) -> Tensor:
        """The ring says which S/c2 tokens the group has; its c1 ranks share them out."""
        check_length(sequence, self.multiple)
        return self.ring.positions(sequence).chunk(self.inner.size)[self.inner.index]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, starts: Tensor | None = None
    ) -> Tensor:
        k, v = (for_ranks(x, self.inner.size) for x in (k, v))
        q, k, v = (to_heads(x, self.inner) for x in (q, k, v))  # (B, A, S/c, D) to (B, A/c1, S/c2, D)
        o = self.ring(q, k, v, scale, starts)  # K and V of these heads travel past the c2 groups
        return to_tokens(o, self.inner)  # (B, A, S/c, D)


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config, zigzag = configuration(run.args), run.args.placement == "zigzag"
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, cp=run.job.world_size)["cp"]
    c1 = rules.hybrid_degree(run.args, axis.size)
    plain, engine = Hybrid(axis, c1, zigzag), context_parallel(axis, run.job.device, c1, zigzag)
    hybrid.show_ranks(run, plain.inner, plain.outer, plain.positions(run.args.sequence))
    pair = {"plain": plain, "engine": engine}
    versions = {name: context_version(run, config, attention, axis) for name, attention in pair.items()}
    compare(run, config, axis, versions)
    hybrid.claim_traffic(run, config, c1, axis.size // c1, versions)
    hybrid.claim_attention(run, config, axis, plain, engine)
    engine.close()


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Long sequences: Ulysses inside, a ring across",
        "Megatron-LM SP 代码解析",
        "c1 ranks exchange heads for tokens, and c2 such groups are a ring: degrees that neither reaches alone.",
    )
    add_model_flags(frame, layers=2, batch=3)
    frame.parser.set_defaults(steps=10)
    flag = frame.parser.add_argument
    flag("--ulysses", type=int, default=0, help="c1 (default: the largest that heads allow and that leaves a ring)")
    flag("--placement", choices=PLACEMENTS, default=PLACEMENTS[0], help="of tokens on the ring (default %(default)s)")
    sys.exit(frame.main(rules.hybrid, lesson))
