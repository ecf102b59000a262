"""CODE 04: a mixture of experts spread over the ranks (专家并行大规模训练). GShard (2006.16668), section 3.

Each rank has tokens of its own, and some of the experts. A token travels to the ranks of its experts and back: the
all-to-all of "dispatch", then that of "combine". How many go where is only known now, so the numbers travel first.

The ranks are folded twice (Megatron-LM): what is not an expert sees tp x cp x dp, an expert sees etp x ep x edp. The ep
ranks have different experts, the etp ranks parts of the same experts' features, the edp ranks copies.

B samples, S tokens of a sample, T tokens of this rank = B S, H hidden, F feed-forward, E experts, K for each token,
R rows: choices, each a token on its way to one expert
"""

from typing import Any

import torch
from torch import Tensor, nn

from core import comm
from core.gradients import sum_gradients
from core.mesh import Axis
from core.model.gpt import GPT
from core.shards import shard
from expert_parallel.experts import Experts, GroupedLinear
from expert_parallel.gating import Choice, Spread
from expert_parallel.moe import MoE, order_of, permute, unpermute

DISPATCHERS = ("all-to-all", "all-gather")


# ---- Rows on their way, under autograd -------------------------------------------------------------------------------


class Exchange:
    """An all-to-all of rows in two halves, between which something else is computed; backward likewise.

    Args:
        send, receive: rows to and from each rank of the axis.
    """

    def __init__(self, axis: Axis, send: list[int], receive: list[int]):
        self.axis, self.send, self.receive = axis, send, receive
        self.pending: comm.Pending | None = None

    def start(self, rows: Tensor) -> Tensor:
        """What arrives, not to be read before `finish`."""
        return _Start.apply(rows, self)

    def finish(self, rows: Tensor) -> Tensor:
        return _Finish.apply(rows, self)

    def arrived(self) -> Tensor:
        """Wait, and keep nothing: the graph holds this object until the backward, which does not read the buffers."""
        pending, self.pending = self.pending, None
        return pending.wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.pending = comm.all_to_all_async(rows, exchange.axis, exchange.send, exchange.receive)
        return exchange.pending.buffer.view_as(exchange.pending.buffer)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.arrived(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.arrived()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Autograd goes back through what was computed between the halves before it comes to `_Start`."""
        exchange = ctx.exchange
        exchange.pending = comm.all_to_all_async(gradient, exchange.axis, exchange.receive, exchange.send)
        return gradient, None  # of this shape; what `_Start` waits for is another one


def gather_rows(rows: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    """The rows of all ranks, `counts` of them, in the order of the axis; in backward each gets the sum for its own."""
    own = counts[axis.index]
    return comm.conjugate(rows, lambda r: _to_all(r, axis, counts), lambda g: _summed(g, axis, counts, own))


def scatter_rows(rows: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    """The sum over the ranks of these rows, of which each gets its own `counts`; in backward, all of them."""
    own = counts[axis.index]
    return comm.conjugate(rows, lambda r: _summed(r, axis, counts, own), lambda g: _to_all(g, axis, counts))


def _to_all(rows: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    return comm.all_to_all(rows.repeat(axis.size, 1), axis, [len(rows)] * axis.size, counts)


def _summed(rows: Tensor, axis: Axis, counts: list[int], own: int) -> Tensor:
    return comm.all_to_all(rows, axis, counts, [own] * axis.size).view(axis.size, own, rows.shape[1]).sum(0)


def by_expert(rows: Tensor, counts: list[list[int]]) -> Tensor:
    """Rows in the order (source, expert), of which there are `counts`, to the order (expert, source)."""
    if len(counts) == 1 or not counts[0]:
        return rows
    pieces = rows.split([n for source in counts for n in source])
    return torch.cat([piece for expert in range(len(counts[0])) for piece in pieces[expert :: len(counts[0])]])


def by_source(rows: Tensor, counts: list[list[int]]) -> Tensor:
    """And back."""
    return by_expert(rows, [*map(list, zip(*counts, strict=True))])


# ---- The layer -------------------------------------------------------------------------------------------------------


class ExpertParallelMoE(nn.Module):
    """This rank's (B, S, H) to (B, S, H), with its E/ep experts, of each F/etp features.

    Args:
        moe: the layer of one process, on the meta device.
        spread: how the global batch's tokens are spread.
        dispatch: one of `DISPATCHERS`. The all-gather brings all tokens of the ep ranks to each of them.

    Raises:
        ValueError: experts or features cannot be cut into equal parts, or the dispatch does not know etp.
    """

    def __init__(self, moe: MoE, ep: Axis, etp: Axis, spread: Spread, dispatch: str = "all-to-all"):
        super().__init__()
        count, features = moe.experts.up.weight.shape[:2]
        for what, size, ranks in (("experts", count, ep.size), ("features of an expert", features, etp.size)):
            if size % ranks:
                raise ValueError(f"{size} {what} cannot be cut into {ranks} equal parts; use a multiple of {ranks}")
        if dispatch not in DISPATCHERS or (dispatch == "all-gather" and etp.size > 1):
            raise ValueError(f"--dispatch {dispatch}: with --etp {etp.size} there is only all-to-all; use it")
        self.ep, self.etp, self.dispatch = ep, etp, dispatch
        self.router, self.shared, self.experts = moe.router, moe.shared, cut(moe.experts, ep, etp)
        self.router.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        tokens, choice = x.flatten(0, 1), self.router(x)
        by = self._by_all_to_all if self.dispatch == "all-to-all" else self._by_all_gather
        return by(tokens, choice).view_as(x)

    def _by_all_to_all(self, tokens: Tensor, choice: Choice) -> Tensor:
        ep = self.ep
        order, counts = order_of(choice, self.router.routing.experts)
        counts = counts.view(ep.size, -1)  # by rank and expert there
        equal = [1] * ep.size
        announced = comm.all_to_all_async(counts, ep, equal, equal, "token counts")
        rows = permute(tokens, order, self.router.routing.top_k)
        coming = announced.wait()
        dispatch = Exchange(ep, counts.sum(1).tolist(), coming.sum(1).tolist())

        rows = dispatch.start(rows)
        shared = 0.0 if self.shared is None else self.shared(tokens)
        rows = dispatch.finish(rows)

        combine = Exchange(ep, dispatch.receive, dispatch.send)
        rows = combine.finish(combine.start(self._compute(rows, coming)))
        return unpermute(rows, order, choice.weights) + shared

    def _compute(self, rows: Tensor, coming: Tensor) -> Tensor:
        """The experts here on rows in the order (source, expert), of which there are `coming`."""
        if self.etp.size == 1:
            counts = coming.tolist()
            return by_source(self.experts(by_expert(rows, counts), coming.sum(0).tolist()), counts)
        # Each rank of etp has a part of the features of the same experts: it needs the rows of the others, too.
        every = comm.all_gather(coming, self.etp)
        counts, of_ranks = every.tolist(), every.view(self.etp.size, -1).sum(1).tolist()
        rows = by_expert(gather_rows(rows, self.etp, of_ranks), counts)
        y = self.experts(rows, every.sum(0).tolist(), last_bias=False)  # a sum of parts: the bias once, after it
        y = scatter_rows(by_source(y, counts), self.etp, of_ranks)
        return y + self.experts.down.bias.repeat(len(coming), 1).repeat_interleave(
            coming.flatten(), 0, output_size=len(y)
        )

    def _by_all_gather(self, tokens: Tensor, choice: Choice) -> Tensor:
        everyone = comm.gather_for(tokens, self.ep, 0)
        weights = comm.gather_for(choice.weights, self.ep, 0)
        here = comm.all_gather(choice.experts, self.ep) - self.ep.index * len(self.experts.up.weight)
        kept = (here >= 0) & (here < len(self.experts.up.weight))
        if choice.kept is not None:
            kept &= comm.all_gather(choice.kept.to(torch.uint8), self.ep).bool()
        order, counts = order_of(Choice(here, weights, kept), len(self.experts.up.weight))
        rows = self.experts(permute(everyone, order, self.router.routing.top_k), counts.tolist())
        y = comm.scatter_from(unpermute(rows, order, weights), self.ep, 0)
        return y if self.shared is None else y + self.shared(tokens)


def cut(experts: Experts, ep: Axis, etp: Axis) -> Experts:
    """This rank's experts, and of each its features: rows of the first weight, columns of the second."""

    def part(linear: GroupedLinear, dim: int) -> None:
        for name, where in (("weight", dim), ("bias", 1)):
            parameter = shard(getattr(linear, name), 0, ep)
            whole = name == "bias" and dim == 2  # of the second: added once, after the parts are summed
            setattr(linear, name, parameter if whole else shard(parameter, where, etp))

    part(experts.up, 1)
    part(experts.down, 2)
    return experts


# ---- The model -------------------------------------------------------------------------------------------------------


def parallelize(model: GPT, ep: Axis, etp: Axis, spread: Spread, dispatch: str = "all-to-all") -> GPT:
    """Spread the experts of a GPT of `to_moe`, or of a pipeline stage of it, over the ranks.

    What is not an expert is left alone: cut it before, with sequence parallelism for example. After backward its
    gradients are to be summed over the dense world, as always, and those of the experts by `sum_expert_gradients`.

    Raises:
        ValueError: experts or features cannot be cut into equal parts.
    """
    for block in model.blocks.values():
        if isinstance(block.mlp, MoE):
            block.mlp = ExpertParallelMoE(block.mlp, ep, etp, spread, dispatch)
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]


def sum_expert_gradients(model: nn.Module, edp: Axis, etp: Axis) -> None:
    """Add up the gradients of the experts over their copies.

    Not divided by anything: each rank's loss is its share of the global batch's. (Where each rank's loss is the mean
    over its own tokens, divide by *all* data-parallel ranks, not by those of edp: an expert sees the tokens of all.)
    """
    sum_gradients([module.down.bias for module in model.modules() if isinstance(module, Experts)], etp)
    sum_gradients(expert_parameters(model), edp)


def counted_once(model: nn.Module, edp: Axis, etp: Axis) -> list[Tensor]:
    """The gradients of experts that this rank adds to the global norm."""
    whole = {module.down.bias for module in model.modules() if isinstance(module, Experts)}
    return [
        p.grad
        for p in expert_parameters(model)
        if p.grad is not None and edp.index == 0 and (p not in whole or etp.index == 0)
    ]
