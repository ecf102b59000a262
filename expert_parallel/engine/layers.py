"""CODE 04: experts over the ranks (专家并行大规模训练). GShard (2006.16668), section 3; folding: 2504.14960, 3.2.

What the plain layer (`dispatch.py`) computes, and besides: the shared expert runs while the rows are in flight, forward
and backward; experts are grouped products (`experts.py`); etp ranks share the features of an expert; an all-gather in
place of the all-to-all, where a token goes to most ranks anyway.

The ranks are folded twice (Megatron-LM): dense layers see tp x cp x dp, experts see etp x ep x edp. The ep ranks have
different experts, the etp ranks different features of the same experts, the edp ranks replicas.

B samples, S tokens of a sample, T tokens of this rank = B S, H hidden, F feed-forward, E experts, k for each token,
R rows: routed tokens
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from core import comm
from core.gradients import sum_gradients
from core.mesh import Axis
from core.model.gpt import GPT
from core.proof.rules import Rule, check
from core.shards import shard
from expert_parallel.engine.experts import Experts
from expert_parallel.engine.moe import MoE, order_of, permute, unpermute
from expert_parallel.engine.router import Choice, Spread
from expert_parallel.engine.routing import one_of
from expert_parallel.engine.shares import TOKENS, join, share_of

DISPATCHERS = ("all-to-all", "all-gather")
ALL_GATHER = Rule(
    "experts: all-gather", "--dispatch {dispatch}", lambda c: c.dispatch != "all-gather" or c.etp <= 1,
    "is not for --etp {etp}", lambda c: "--etp 1, or --dispatch all-to-all", "CODE 04",
)  # fmt: skip


# ---- Rows in flight, under autograd ----------------------------------------------------------------------------------


class Flight:
    """What is told of rows in flight, and may compute something else `meanwhile`. This one does nothing."""

    def begun(self, pending: comm.Pending) -> None:
        """An all-to-all has been posted."""

    def meanwhile(self) -> None:
        """It is waited for next."""


class Exchange:
    """One all-to-all of rows, begun and ended apart: what is computed between runs while the rows are in flight.

        ticket = exchange.begin(rows)       # posts the all-to-all
        ...                                 # anything that does not need the result
        received = exchange.end(ticket)     # waits for it

    In backward `end` posts the all-to-all of the gradient, and `begin` waits for it. That it is in this order follows
    from the graph alone: the ticket, a tensor without elements, is all that autograd sees between the two, so `begin`
    has no gradient before `end` has made one. Each of them is used once.

    Args:
        send, receive: rows to and from each rank of the axis.
        flight: told before rows are waited for, forward and backward.
    """

    def __init__(self, axis: Axis, send: list[int], receive: list[int], flight: "Flight"):
        self.axis, self.send, self.receive, self.flight = axis, send, receive, flight
        self._pending: comm.Pending | None = None

    def begin(self, rows: Tensor) -> Tensor:
        """Rows (R, H) to the ticket."""
        return comm.conjugate(rows, lambda r: self._post(r, self.send, self.receive), self._wait)

    def end(self, ticket: Tensor) -> Tensor:
        """The ticket to the rows received."""
        return comm.conjugate(ticket, self._wait, lambda g: self._post(g, self.receive, self.send))

    def _post(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self._pending = comm.all_to_all_async(rows.detach(), self.axis, send, receive)
        self.flight.begun(self._pending)
        return rows.new_empty(0)

    def _wait(self, _: Tensor) -> Tensor:
        """Keeps nothing: the graph has this object until the backward, which does not read the buffers."""
        pending, self._pending = self._pending, None
        self.flight.meanwhile()
        return pending.wait()


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
    experts = len(counts[0])
    blocks = rows.split([n for source in counts for n in source])
    return torch.cat([block for expert in range(experts) for block in blocks[expert::experts]])


def by_source(rows: Tensor, counts: list[list[int]]) -> Tensor:
    """And back."""
    return by_expert(rows, [*map(list, zip(*counts, strict=True))])


def columns(counts: list[list[int]]) -> list[int]:
    """The sums over the sources: the rows of each expert."""
    return [*map(sum, zip(*counts, strict=True))]


class Numbers:
    """How many rows there are, on the host, which must know: a dry run, whose tensors have no numbers, says others."""

    def sent(self, counts: Tensor) -> list[list[int]]:
        """(ep, E/ep): this rank's, by rank and expert there."""
        return counts.tolist()

    def received(self, counts: Tensor) -> list[list[int]]:
        """(ep, E/ep): by source and expert here."""
        return counts.tolist()

    def of_everyone(self, counts: Tensor) -> list[list[int]]:
        """(etp ep, E/ep): what each rank of etp has received."""
        return counts.tolist()


# ---- The layer -------------------------------------------------------------------------------------------------------


class ExpertParallelMoE(nn.Module):
    """This rank's (B, S, H) to (B, S, H), with its E/ep experts, of each F/etp features.

    Args:
        moe: the layer of one process, on the meta device.
        spread: how the global batch's tokens are spread.
        dispatch: one of `DISPATCHERS`. The all-gather gives all tokens of the ep ranks to each of them.

    Raises:
        ValueError: experts or features cannot be sharded equally, or the dispatch does not know etp.
    """

    def __init__(self, moe: MoE, ep: Axis, etp: Axis, spread: Spread, dispatch: str = "all-to-all"):
        super().__init__()
        count, features = moe.experts.up.weight.shape[:2]
        for what, size, ranks in (("experts", count, ep.size), ("features of an expert", features, etp.size)):
            if size % ranks:
                raise ValueError(f"{size} {what} cannot be sharded equally over {ranks}; use a multiple of {ranks}")
        check(SimpleNamespace(dispatch=dispatch, etp=etp.size), (one_of("dispatch", DISPATCHERS), ALL_GATHER))
        assert dispatch == "all-to-all" or not spread.alike, "shares may be uneven, which an all-gather does not know"
        self.ep, self.etp, self.dispatch = ep, etp, dispatch
        self.router, self.shared, self.experts = moe.router, moe.shared, shard_experts(moe.experts, ep, etp)
        self.router.spread = spread
        self.numbers = Numbers()
        self.flight = Flight()

    def forward(self, x: Tensor) -> Tensor:
        alike, given = self.router.spread.alike, x.shape[TOKENS]
        if alike:
            x = share_of(x, alike)
        tokens, choice = x.flatten(0, 1), self.router(x, given if alike else None)
        by = self._by_all_to_all if self.dispatch == "all-to-all" else self._by_all_gather
        y = by(tokens, choice).view_as(x)
        return join(y, alike, given) if alike else y

    def _by_all_to_all(self, tokens: Tensor, choice: Choice) -> Tensor:
        ep, equal = self.ep, [1] * self.ep.size
        order, counts = order_of(choice, self.router.routing.experts)
        counts = counts.view(ep.size, -1)
        pending = comm.all_to_all_async(counts, ep.labelled("counts"), equal, equal)
        rows = permute(tokens, order, self.router.routing.top_k)
        send = self.numbers.sent(counts)  # (ep, E/ep): by rank and expert there
        receive = self.numbers.received(pending.wait())  # (ep, E/ep): by source and expert here

        dispatch = Exchange(ep, [*map(sum, send)], [*map(sum, receive)], self.flight)
        ticket = dispatch.begin(rows)
        shared = 0.0 if self.shared is None else self.shared(tokens)
        rows = self._compute(dispatch.end(ticket), receive)

        combine = Exchange(ep, dispatch.receive, dispatch.send, self.flight)
        rows = combine.end(combine.begin(rows))
        return unpermute(rows, order, choice.weights) + shared

    def _compute(self, rows: Tensor, received: list[list[int]]) -> Tensor:
        """The experts here on rows in the order (source, expert), of which there are `received`."""
        if self.etp.size == 1:
            return by_source(self.experts(by_expert(rows, received), columns(received)), received)
        # Each rank of etp has some features of the same experts: it needs the rows of the others, too.
        here = torch.tensor(received, device=rows.device)
        counts = self.numbers.of_everyone(comm.all_gather(here, self.etp))
        ep = len(received)
        of_ranks = [sum(map(sum, counts[i : i + ep])) for i in range(0, len(counts), ep)]
        rows = by_expert(gather_rows(rows, self.etp, of_ranks), counts)
        y = self.experts(rows, columns(counts), last_bias=False)  # partial: the bias once, after the sum
        y = scatter_rows(by_source(y, counts), self.etp, of_ranks)
        if self.experts.down.bias is None:
            return y
        bias = self.experts.down.bias.repeat(ep, 1)
        return y + bias.repeat_interleave(here.flatten(), 0, output_size=len(y))

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


def shard_experts(experts: Experts, ep: Axis, etp: Axis) -> Experts:
    """This rank's experts, and of each its features: rows of the first weights, columns of the second."""
    for linear in experts.children():
        for name, p in list(linear.named_parameters()):
            of_ep = shard(p, 0, ep)
            if linear is not experts.down:
                setattr(linear, name, shard(of_ep, 1, etp))
            else:  # its bias is replicated over etp: added once, after the partial sums
                setattr(linear, name, shard(of_ep, 2, etp) if name == "weight" else of_ep)
    return experts


# ---- The model -------------------------------------------------------------------------------------------------------


def parallelize(model: GPT, ep: Axis, etp: Axis, spread: Spread, dispatch: str = "all-to-all") -> GPT:
    """Shard the experts of a model of `to_moe`, or of a pipeline stage of it, over the ranks.

    What is not an expert is left alone: shard it before, with sequence parallelism for example. After backward its
    gradients are to be summed over the dense world, as always, and those of the experts by `sum_expert_gradients`.

    Raises:
        ValueError: experts or features cannot be sharded equally.
    """
    for block in model.blocks.values():
        if isinstance(block.mlp, MoE):
            block.mlp = ExpertParallelMoE(block.mlp, ep, etp, spread, dispatch)
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]


def parameters_of_shares(model: nn.Module) -> list[nn.Parameter]:
    """Where ranks route shares of what they are given alike: the routers and shared experts, which all have in full.

    Each has the gradients of its own tokens: they are to be summed over `Spread.alike`.
    """
    mixtures = [m for m in model.modules() if isinstance(m, ExpertParallelMoE) and m.router.spread.alike]
    routed = [p for mixture in mixtures for p in mixture.router.parameters() if p.requires_grad]
    return routed + [p for mixture in mixtures if mixture.shared is not None for p in mixture.shared.parameters()]


def second_biases(model: nn.Module) -> list[nn.Parameter]:
    """Those parameters of experts that every rank of etp holds in full."""
    biases = (module.down.bias for module in model.modules() if isinstance(module, Experts))
    return [bias for bias in biases if bias is not None]


def sum_expert_gradients(model: nn.Module, edp: Axis, etp: Axis) -> None:
    """Add up the gradients of the experts over their replicas.

    Not divided by anything: each rank's loss is its share of the global batch's. (Where each rank's loss is the mean
    over its own tokens, divide by *all* data-parallel ranks, not by those of edp: an expert sees the tokens of all.)
    """
    sum_gradients(second_biases(model), etp)
    sum_gradients(expert_parameters(model), edp)


def counted_once(model: nn.Module, edp: Axis, etp: Axis) -> list[Tensor]:
    """The gradients of experts that this rank adds to the global norm."""
    replicated = set(second_biases(model))
    counted = [p for p in expert_parameters(model) if edp.index == 0 and (p not in replicated or etp.index == 0)]
    return [p.grad for p in counted if p.grad is not None]
