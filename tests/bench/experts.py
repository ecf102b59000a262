"""The expert layer against torch's parts put together, and against plain loops over the experts.

The same router, tokens and experts, forward and backward.

    torch         all_to_all_single_autograd and F.grouped_mm; rows in order by index_select, back by index_add
    loop spread  the experts spread as ours, one after another: each with its own exchange
    loop whole   all experts in every process, as where there is no expert parallelism, and their gradients summed
"""

from collections.abc import Collection

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from core.gradients import sum_gradients
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize
from core.proof.launch import Job
from expert_parallel.engine.layers import parallelize
from expert_parallel.engine.moe import MoE, to_moe
from expert_parallel.engine.router import Router, Spread
from expert_parallel.engine.routing import MoEConfig, Routing
from tests.bench.harness import Row, Step, Topic, alternate, row, silent

DTYPE = torch.float32
CONFIG = GPTConfig(layers=1, hidden=256, heads=4, sequence=128, feed_forward=512)
MOE = MoEConfig(Routing(32, 2))
BATCH = 8
# Of each row: the peer, and the bar.
ROWS = {
    "experts / grouped_mm": ("torch", 0.80),
    "experts / loop spread": ("loop spread", None),
    "experts / loop whole": ("loop whole", None),
}


class Torchs(nn.Module):
    """The layer from torch's own parts."""

    def __init__(self, router: Router, experts: nn.Module, axis: Axis):
        super().__init__()
        self.router, self.experts, self.axis = router, experts, axis

    def forward(self, x: Tensor) -> Tensor:
        tokens, choice, n = x.flatten(0, 1), self.router(x), self.axis.size
        k, flat = choice.experts.shape[1], choice.experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.router.routing.experts)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self.axis.group)
        send, receive = (c.view(n, -1).sum(1).tolist() for c in (counts, coming))
        rows = all_to_all_single_autograd(tokens.index_select(0, order // k), receive, send, self.axis.group)
        here = counts.numel() // n
        labels = torch.arange(here).repeat(n).repeat_interleave(coming)
        by_expert = labels.argsort(stable=True)
        per_expert = coming.view(n, here).sum(0)
        ends = per_expert.cumsum(0).to(torch.int32)
        up, down = self.experts.up, self.experts.down
        y = F.grouped_mm(rows.index_select(0, by_expert), up.weight.transpose(1, 2), offs=ends)
        y = F.gelu(y + up.bias.repeat_interleave(per_expert, 0))
        y = F.grouped_mm(y, down.weight.transpose(1, 2), offs=ends) + down.bias.repeat_interleave(per_expert, 0)
        y = torch.empty_like(y).index_copy(0, by_expert, y)
        y = all_to_all_single_autograd(y, send, receive, self.axis.group) * choice.weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, order // k, y).view_as(x)


class LoopSpread(Torchs):
    """One expert after another, each at its rank."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, choice, n = x.flatten(0, 1), self.router(x), self.axis.size
        here, y = self.router.routing.experts // n, torch.zeros_like(tokens)
        for e in range(self.router.routing.experts):
            token, k = (choice.experts == e).nonzero(as_tuple=True)
            send = [0] * n
            send[e // here] = len(token)
            counts = torch.tensor(send)
            coming = torch.empty_like(counts)
            dist.all_to_all_single(coming, counts, group=self.axis.group)
            receive = coming.tolist()
            rows = all_to_all_single_autograd(tokens[token], receive, send, self.axis.group)
            if e // here == self.axis.index:
                rows = mlp(rows, self.experts, e % here)
            back = all_to_all_single_autograd(rows, send, receive, self.axis.group)
            y = y.index_add(0, token, back * choice.weights[token, k].unsqueeze(1))
        return y.view_as(x)


class LoopWhole(Torchs):
    """All experts here."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, choice = x.flatten(0, 1), self.router(x)
        y = torch.zeros_like(tokens)
        for e in range(self.router.routing.experts):
            token, k = (choice.experts == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, mlp(tokens[token], self.experts, e) * choice.weights[token, k].unsqueeze(1))
        return y.view_as(x)


def mlp(rows: Tensor, experts: nn.Module, e: int) -> Tensor:
    up, down = experts.up, experts.down
    return F.linear(F.gelu(F.linear(rows, up.weight[e], up.bias[e])), down.weight[e], down.bias[e])


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    mesh = Mesh(job.device.type, Ledger(), job.timeout, dp=job.world_size, ep=job.world_size)
    ep, alone = mesh["ep"], mesh["etp"]
    generator = torch.Generator().manual_seed(job.rank)
    x = torch.randn(BATCH, CONFIG.sequence, CONFIG.hidden, generator=generator, dtype=DTYPE).to(job.device)
    x.requires_grad_()

    def layer(spread: bool) -> MoE:
        model = to_moe(GPT(CONFIG), MOE)
        model = parallelize(model, ep, alone, Spread((mesh["dp"],))) if spread else model
        return materialize(model, 0, job.device, DTYPE).blocks["0"].mlp

    runs: dict[str, nn.Module] = {"ours": layer(True)}
    for name, kind in (("torch", Torchs), ("loop spread", LoopSpread), ("loop whole", LoopWhole)):
        if name in (ROWS[each][0] for each in wanted):
            made = layer(kind is not LoopWhole)
            runs[name] = kind(made.router, made.experts, ep)
    results: dict[str, list[Tensor]] = {}

    def step_of(name: str, run: nn.Module) -> Step:
        def step() -> None:
            run.zero_grad()
            x.grad = None
            y = run(x)
            y.backward(y.detach())
            if name == "loop whole":
                sum_gradients([*run.experts.parameters()], ep)
            up = run.experts.up.weight.grad
            mine = up if len(up) < MOE.routing.experts else own(up, ep)
            results[name] = [y.detach(), x.grad, run.router.weight.grad, mine]

        return step

    steps = {name: step_of(name, run) for name, run in runs.items()}
    times = alternate(job, steps | {"floor": silent(step_of("floor", layer(True)))}, rounds)
    results.pop("floor")
    worst = max((a - b).abs().max().item() / b.abs().max().item()
                for each in results.values() for a, b in zip(each, results["ours"], strict=True))  # fmt: skip
    everyone = job.gather(worst)
    assert max(everyone, default=0.0) < 1e-4, f"they do not compute the same: {everyone}"
    return [row(times, name, "ours", ROWS[name][0], "floor", bar=ROWS[name][1]) for name in wanted]


def own(gradient: Tensor, ep: Axis) -> Tensor:
    return gradient.chunk(ep.size)[ep.index]


TOPIC = Topic(4, tuple(ROWS), bench)
