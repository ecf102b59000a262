"""Train a model with mixtures of experts in several versions over the ranks, beside one process."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.gradients import clip_and_total, sum_gradients
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, materialize, token_loss, use_masks
from core.model.precision import MasterOptimizer
from core.model.seeded import SampleMasks
from core.proof.arguments import configuration
from core.proof.comparison import Comparison
from core.proof.comparison import claim_equal as claim_compared
from core.proof.lesson import Run
from core.proof.oracle import TOLERANCE, Oracle, relative_difference
from core.proof.trainable import Replica
from core.proof.training import train
from expert_parallel.engine.choices import Choices, follow
from expert_parallel.engine.layers import counted_once, parallelize, sum_expert_gradients
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.router import Choice, Spread, end_step
from expert_parallel.engine.routing import MoEConfig

ENOUGH = 16  # steps after which a way of balancing must have had its effect, beside none


def routers(model: GPT) -> list[nn.Module]:
    """Of a plain model, or of one of the engine."""
    return [block.mlp.router for block in model.blocks.values() if hasattr(block.mlp, "router")]


class Record:
    """What the routers of a model did, by step and layer."""

    def __init__(self, model: GPT):
        self.choices: list[list[Choice]] = []
        self.losses: list[list[float]] = []
        for router in routers(model):
            router.register_forward_hook(self._note)

    def next_step(self) -> None:
        self.choices.append([])
        self.losses.append([])

    def load(self, experts: int) -> Tensor:
        """Choices of each expert, (steps, L, E)."""
        steps = [[c.experts.flatten().bincount(minlength=experts) for c in layers] for layers in self.choices]
        return torch.stack([torch.stack(layers) for layers in steps]).cpu()

    def _note(self, router: nn.Module, _: object, choice: Choice) -> None:
        self.choices[-1].append(choice.detach())
        self.losses[-1].append(float(torch.as_tensor(router.loss).detach()))


class MoEOracle(Oracle):
    """One process, and what its routers did."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.record = Record(self.model)

    def forward_backward(self, inputs: Tensor, targets: Tensor, step: int) -> None:
        self.record.next_step()
        super().forward_backward(inputs, targets, step)

    def update(self, gradients: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().update(gradients)
        end_step(self.model)


class Version(Replica):
    """One way in which this rank trains the mixture: here the engine's.

    Args:
        model: this rank's shards of the model, on the meta device.
    """

    def __init__(self, run: Run, model: GPT, mesh: Mesh):
        self.run, self.mesh, self.oracle = run, mesh, None
        self.model = materialize(model, run.args.seed, run.job.device, run.precision)
        adamw = partial(torch.optim.AdamW, lr=run.args.lr)
        self.optimizer = MasterOptimizer(self.model.parameters(), adamw, run.precision.master)
        self.masks = use_masks(self.model, SampleMasks(run.args.seed))
        self.record, self.choices = Record(self.model), Choices(self.model, self.rows)
        self.forward = Ledger()  # what was sent in the forward passes
        self.experts = [p for name, p in self.model.named_parameters() if ".experts." in name]
        experts = set(self.experts)
        self.rest = [p for p in self.model.parameters() if p not in experts]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.record.next_step()
        self.choices.forget()

    def forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        dp = self.mesh["dp"]
        x, y = (t.chunk(dp.size)[dp.index] for t in (inputs, targets))
        self.masks.seek(step, dp.index * len(x))
        with dp.ledger.recording_to(self.forward):
            loss = token_loss(self.model(x), y, targets.numel())
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        sum_gradients(self.rest, self.mesh["dp"])
        sum_expert_gradients(self.model, self.mesh["edp"], self.mesh["etp"])

    def rows(self) -> Tensor:
        """(b/N, S): the tokens of this rank."""
        args, dp = self.run.args, self.mesh["dp"]
        return torch.arange(args.batch * args.sequence).view(args.batch, -1).chunk(dp.size)[dp.index]

    def guide(self, run: Run, oracle: Oracle | None) -> None:
        everyone = run.job.gather(self.choices.found)
        if oracle:
            follow(oracle.model, everyone)

    def clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        dp = self.mesh["dp"]
        once = counted_once(self.model, self.mesh["edp"], self.mesh["etp"])
        once += [p.grad for p in self.rest if p.grad is not None and dp.index == 0]
        return clip_and_total(self.model.parameters(), once, [dp], largest, share)

    def step(self) -> None:
        self.optimizer.step()
        end_step(self.model)


class Plain(Version):
    """A plain model: the routers' losses are added to its own, and each router ends its step."""

    def backward(self, loss: Tensor) -> None:
        (loss + sum(router.loss for router in routers(self.model))).backward()
        sum_gradients(self.rest, self.mesh["dp"])
        sum_gradients(self.experts, self.mesh["edp"])

    def clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        dp, edp = self.mesh["dp"], self.mesh["edp"]
        once = [p.grad for p in self.rest if p.grad is not None and dp.index == 0]
        once += [p.grad for p in self.experts if p.grad is not None and edp.index == 0]
        return clip_and_total(self.model.parameters(), once, [dp], largest, share)

    def step(self) -> None:
        self.optimizer.step()
        for router in routers(self.model):
            router.end_step()


def mesh_of(run: Run, ep: int, etp: int = 1) -> Mesh:
    """All ranks have samples of their own; folded again for the experts. With a ledger of its own."""
    return Mesh(run.job.device.type, Ledger(), run.job.timeout, dp=run.job.world_size, ep=ep, etp=etp)


def engine(run: Run, moe: MoEConfig, mesh: Mesh, dispatch: str = "all-to-all") -> Version:
    """The engine's version."""
    model = to_moe(GPT(configuration(run.args)), moe)
    return Version(run, parallelize(model, mesh["ep"], mesh["etp"], Spread((mesh["dp"],)), dispatch), mesh)


@dataclass
class Trained:
    """What came of a training; on rank 0, but the versions."""

    versions: dict[str, Version]
    compared: dict[str, Comparison]
    losses: list[float]
    loads: dict[str, Tensor]  # by version: choices of each expert, (steps, L, E), of all ranks
    elsewhere: float = 0.0  # choices of another expert than one process made
    of_routers: float | None = None  # the largest relative difference of the routers' losses, where there are any


def train_versions(
    run: Run, moe: MoEConfig, versions: Mapping[str, Version], start: Callable[[GPT], None] = lambda model: None
) -> Trained:
    """Train all versions beside one process, whose model is the engine's without any parallelism.

    Args:
        start: gives the one process its weights, where they are not those that are drawn.
    """
    args, job = run.args, run.job
    run.losses.clear()  # of an earlier training: the report has the last one's
    run.reference_losses.clear()
    run.mesh = {name: list(versions.values())[-1].mesh[name].size for name in ("dp", "ep", "etp", "edp")}
    oracle = None
    if job.rank == 0:
        optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
        make = partial(_one_process, moe)
        oracle = MoEOracle(configuration(args), args.seed, job.device, optimizer_of, args.clip, make)
        start(oracle.model)
    for version in versions.values():
        version.oracle = oracle
    trained = Trained(dict(versions), train(run, versions, oracle), list(run.losses), {})
    run.formula = held_by_formula(run, moe, list(versions.values())[-1].mesh)
    for i, (name, version) in enumerate(versions.items()):
        experts = moe.routing.experts
        everyone = job.gather((version.record.load(experts), torch.tensor(version.record.losses, dtype=torch.float64)))
        if not oracle:
            continue
        loads, losses = (sum(each) for each in zip(*everyone, strict=True))
        trained.loads[name] = loads
        # In float64 one process trains once; otherwise once for each version, in turn.
        first, every = (0, 1) if run.dtype == torch.float64 else (i, len(versions))
        trained.elsewhere += (loads - oracle.record.load(experts)[first::every]).abs().sum().item() / 2
        if moe.routing.aux or moe.routing.z:
            expected = itertools.chain(*oracle.record.losses[first::every])
            differences = map(relative_difference, losses.flatten().tolist(), expected)
            trained.of_routers = max(trained.of_routers or 0.0, *differences)
    return trained


def held_by_formula(run: Run, moe: MoEConfig, mesh: Mesh) -> tuple[str, list[float]]:
    """Bytes of weights, gradients and Adam: of the experts' matrices 1/(ep etp) on a rank, all of the rest."""
    model, each = to_moe(GPT(configuration(run.args)), moe), run.precision.bytes
    shards = parallelize(model, replace(mesh["ep"], index=0), mesh["etp"], Spread((mesh["dp"],)), "all-to-all")
    experts = sum(p.numel() for name, p in shards.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in shards.parameters()) - experts
    formula = f"{each} bytes x (rest {rest:,} + experts / (ep x etp) {experts:,})"
    return formula, [each * (rest + experts)] * run.job.world_size


def _one_process(moe: MoEConfig, config: Any) -> GPT:
    return to_moe(GPT(config), moe)


def claim_equal(run: Run, *trainings: Trained) -> None:
    """That all of them were the training of one process, in every version."""
    if run.job.rank:
        return
    claim_compared(run, {name: _worst([each.compared[name] for each in trainings]) for name in trainings[0].compared})
    claim = partial(run.evidence.claim, correctness=True)
    if run.dtype == torch.float64:  # otherwise the one process followed
        elsewhere = sum(each.elsewhere for each in trainings)
        claim("tokens of each expert, all layers and steps", "one process's: 0 elsewhere", 0, elsewhere)
    if of_routers := [each.of_routers for each in trainings if each.of_routers is not None]:
        what = "the routers' losses, the ranks' shares summed"
        formula = "one process's, of the global batch: difference 0"
        claim(what, formula, 0, max(of_routers), TOLERANCE[run.precision.name].loss)


def _worst(comparisons: list[Comparison]) -> Comparison:
    worst = Comparison()
    for name in ("loss", "gradient", "norm", "parameter"):
        setattr(worst, name, max(getattr(each, name) for each in comparisons))
    return worst


def balance(load: Tensor) -> tuple[float, float]:
    """Entropy of the load (E), at most ln E, and MaxVio, (max - mean) / mean (2408.15664); of (L, E) the means."""
    share = load.double() / load.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
    return entropy.mean().item(), (share.amax(-1) / share.mean(-1) - 1).mean().item()
