"""CODE 04: expert parallelism (专家并行大规模训练): experts over the ranks. GShard (2006.16668), section 3.

    torchrun --nproc_per_node=8 expert_parallel/dispatch.py

    read: dispatch.py:33-102; moe.py:31-55; then router.py, train.py and engine/layers.py

Data parallelism for all but the experts: each rank has its own samples. The experts are sharded over ep ranks, so in
each of their layers the routed tokens are dispatched to the ranks of their experts, and combined where they came from.
How many go where is only known now, so the counts are exchanged first.

B samples of this rank, S tokens of a sample, T = B S tokens of this rank, H hidden, F feed-forward, E experts, k of
them for each token, R <= T k rows that this rank dispatches, one for each token and expert, R' that it receives
"""

import sys

import torch
from torch import Tensor, nn

from core import comm
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.shards import shard
from expert_parallel.engine.routing import MoEConfig, replace_mlps
from expert_parallel.evidence.dispatch import claim_memory, claim_traffic, compare_dispatchers, show_dispatch
from expert_parallel.evidence.flags import add_flags, add_parallel_flags, check, ep_of, moe_of
from expert_parallel.evidence.training import Plain, claim_equal, engine, mesh_of, train_versions
from expert_parallel.moe import MoE


def all_to_all(rows: Tensor, ep: Axis, send: list[int], receive: list[int]) -> Tensor:
    """Give `send[i]` rows to rank i and get `receive[i]` from it; in backward their gradients go the way back."""
    return comm.conjugate(
        rows,
        lambda x: comm.all_to_all(x, ep, send, receive),  # (R, H) to (R', H)
        lambda gradient: comm.all_to_all(gradient, ep, receive, send),  # (R', H) to (R, H)
    )


class ExpertParallelMoE(nn.Module):
    """The mixture on one of ep ranks: its own tokens (B, S, H) through all E experts, of which E/ep are here."""

    def __init__(self, moe: MoE, ep: Axis):
        super().__init__()
        self.router, self.shared, self.experts, self.ep = moe.router, moe.shared, moe.experts, ep
        for linear in self.experts.children():  # gate and up (E, F, H), down (E, H, F) and biases: E/ep of each
            for name, p in list(linear.named_parameters()):
                setattr(linear, name, shard(p, 0, ep))

    def forward(self, x: Tensor) -> Tensor:
        ep, E = self.ep, self.router.routing.experts
        here = E // ep.size  # experts of a rank
        tokens = x.flatten(0, 1)  # (T, H)
        experts, weights, kept = self.router(x)  # (T, k) each
        k = experts.shape[1]

        # Permute: the routed tokens by expert, so by rank. What is beyond an expert's capacity is dropped: not sent.
        expert = experts.masked_fill(~kept, E).flatten()  # (T k), E where dropped
        counts = expert.bincount(minlength=E + 1)[:E]  # (E)
        order = expert.argsort(stable=True)[: counts.sum()]  # (R): row i is the choice order[i] of T k
        token = order // k  # (R): and the token token[i] of T
        rows = tokens[token]  # (R, H)

        # All-to-all of counts: how many rows does each rank have for each expert here?
        one = [1] * ep.size  # row to and from each rank
        send = counts.view(ep.size, here)  # (ep, E/ep): to rank, for its expert
        receive = comm.all_to_all(send, ep.labelled("counts"), one, one)  # (ep, E/ep): from rank, for the expert here

        # Dispatch: all-to-all of rows. They arrive in the order (rank, expert).
        to, of = send.sum(1).tolist(), receive.sum(1).tolist()  # rows to and from each rank
        rows = all_to_all(rows, ep, to, of)  # (R', H)

        # Each expert here on its rows.
        expert = torch.arange(here, device=x.device).repeat(ep.size).repeat_interleave(receive.flatten())  # (R')
        y = torch.zeros_like(rows)
        for e in range(here):
            mine = (expert == e).nonzero().squeeze(1)
            y = y.index_add(0, mine, self.experts(rows[mine], e))

        # Combine: all-to-all back, in the order in which they were sent.
        y = all_to_all(y, ep, of, to)  # (R, H)

        # Unpermute: of each token the sum of its rows, weighted by the router.
        y = y * weights.flatten()[order].unsqueeze(1)
        y = torch.zeros_like(tokens).index_add(0, token, y)  # (T, H)

        if self.shared is not None:  # all tokens go through it, on their own rank
            y = y + self.shared(tokens)
        return y.view_as(x)


def parallelize(model: GPT, moe: MoEConfig, mesh: Mesh) -> GPT:
    """The model with mixtures in place of its MLPs, their experts sharded over ep."""

    def over_ranks(config: GPTConfig, moe: MoEConfig) -> ExpertParallelMoE:
        return ExpertParallelMoE(MoE(config, moe, mesh["dp"]), mesh["ep"])

    return replace_mlps(model, moe, over_ranks)


def lesson(run: Run) -> None:
    args, moe, ep = run.args, moe_of(run.args), ep_of(run.args, run.job.world_size)
    mesh = mesh_of(run, ep)
    plain = Plain(run, parallelize(GPT(configuration(args)), moe, mesh), mesh)
    fast = engine(run, moe, mesh_of(run, ep, args.etp), args.dispatch)
    trained = train_versions(run, moe, {"plain": plain, "engine": fast})
    show_dispatch(run, trained)
    claim_traffic(run, trained)
    claim_memory(run, trained, moe)
    compare_dispatchers(run, moe, ep)
    claim_equal(run, trained)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert parallelism at scale: the layer across ranks",
        "专家并行大规模训练",
        "Tokens go to the ranks of their experts and back: permute, all-to-all, experts, all-to-all, weighted sum.",
    )
    add_flags(frame, layers=2)
    add_parallel_flags(frame)
    frame.parser.set_defaults(shared=32)
    sys.exit(frame.main(check, lesson))
