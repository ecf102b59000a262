"""What the lessons of CODE 04 share: train a GPT with mixtures of experts over the ranks, beside one process.

b samples in a step, s tokens of a sample, E experts, K for each token
"""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.gradients import clip_and_total, sum_gradients
from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson, Run
from core.proof.oracle import TOLERANCE, Oracle, relative_difference
from core.proof.training import Comparison, Replica, train
from expert_parallel.gating import DROPS, SCORES, Choice, Routing, Spread, end_step, routers
from expert_parallel.layers import (
    DISPATCHERS,
    counted_once,
    expert_parameters,
    parallelize,
    sum_expert_gradients,
)
from expert_parallel.moe import MoEConfig, to_moe

ENOUGH = 30  # steps after which a way of balancing must have had its effect


def add_flags(lesson: Lesson, routing: bool = True, **defaults: object) -> None:
    """The flags of a lesson of CODE 04; `routing`: also those that say how tokens find experts."""
    add_model_flags(lesson, **{"layers": 4, "feed_forward": 128, **defaults})
    lesson.parser.set_defaults(steps=10)
    usual, flag = Routing(), lesson.parser.add_argument
    flag("--experts", type=int, default=usual.experts, help="experts of a layer (default %(default)s)")
    flag("--top-k", type=int, default=usual.top_k, help="experts for each token (default %(default)s)")
    if routing:
        flag("--score", choices=SCORES, default=usual.score, help="default %(default)s")
        flag("--groups", type=int, default=1, help="groups of experts (default %(default)s)")
        flag("--top-groups", type=int, default=1, help="groups that a token's experts are in (default %(default)s)")
        flag("--capacity", type=float, default=0.0, help="capacity factor; 0: drop nothing (default %(default)s)")
        flag("--drop", choices=DROPS, default=usual.drop, help="what is dropped (default %(default)s)")
        flag("--aux", type=float, default=0.01, help="of the load-balancing loss (default %(default)s)")
        flag("--z", type=float, default=0.001, help="of the router z-loss (default %(default)s)")
        flag("--bias-rate", type=float, default=0.0, help="of balancing by a bias (default %(default)s)")
        flag("--shared", type=int, default=0, help="feed-forward of a shared expert; 0: none (default %(default)s)")


def add_parallel_flags(lesson: Lesson) -> None:
    flag = lesson.parser.add_argument
    flag("--ep", type=int, default=0, help="ranks over which the experts are spread; 0: as many as do (default 0)")
    flag("--etp", type=int, default=1, help="ranks that share the features of an expert (default %(default)s)")
    flag("--dispatch", choices=DISPATCHERS, default=DISPATCHERS[0], help="default %(default)s")


def moe_of(args: argparse.Namespace) -> MoEConfig:
    """Raises ValueError where the flags do not fit each other."""
    names = ("experts", "top_k", "score", "groups", "top_groups", "capacity", "drop", "aux", "z", "bias_rate")
    routing = Routing(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    if getattr(args, "shared", 0) < 0:
        raise ValueError(f"--shared {args.shared}: must not be negative; use --shared 0")
    return MoEConfig(routing, shared=getattr(args, "shared", 0))


def ep_of(args: argparse.Namespace, ranks: int) -> int:
    return args.ep or math.gcd(args.experts, ranks // args.etp)


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError when the model, the routing or the layout is not possible."""
    config = check_model(args)
    if hasattr(args, "score"):  # a lesson without it has ways of its own, and checks those
        moe_of(args)
    if args.batch % ranks:
        raise ValueError(
            f"--batch {args.batch}: must be a multiple of the {ranks} ranks, so that all get as many samples; "
            f"use --batch {max(1, round(args.batch / ranks)) * ranks}"
        )
    if not hasattr(args, "ep"):
        return
    if args.dispatch == "all-gather" and args.etp > 1:
        raise ValueError(f"--dispatch all-gather: is not for --etp {args.etp}; use --etp 1, or --dispatch all-to-all")
    if args.etp < 1 or ranks % args.etp or config.feed_forward % args.etp:
        both = math.gcd(ranks, config.feed_forward)
        fitting = [e for e in range(1, args.etp) if both % e == 0 and ranks // e % max(1, args.ep) == 0]
        usable = max(fitting, default=1)  # beside --ep, where it is given
        raise ValueError(
            f"--etp {args.etp}: must divide the {ranks} ranks and the {config.feed_forward} features of an expert; "
            f"use --etp {usable}"
        )
    ep = ep_of(args, ranks)
    if ep < 1 or (ranks // args.etp) % ep or args.experts % ep:
        raise ValueError(
            f"--ep {args.ep}: must divide the {ranks} ranks / --etp {args.etp} and the --experts {args.experts}, so "
            f"that each rank has as many; use --ep {math.gcd(args.experts, ranks // args.etp)}"
        )


@dataclass
class Trained:
    """A rank's model after the training."""

    model: GPT
    optimizer: torch.optim.Optimizer
    mesh: Mesh
    forward: Ledger  # what was sent in the forward passes
    choices: list[list[Choice]] = field(default_factory=list)  # by step and layer, of this rank's tokens
    loads: list[Tensor] = field(default_factory=list)  # (layers, E) in each step, of all ranks
    worst: Comparison = field(default_factory=Comparison)
    tokens_elsewhere: float = 0.0  # choices of another expert than one process made, on rank 0
    of_routers: float = 0.0  # the largest relative difference of the routers' losses, on rank 0


class _Watched(Replica):
    """An ordinary optimizer, and the end of a step for the routers."""

    def __init__(self, loads: list[Tensor], model: GPT, *more: Any):
        super().__init__(model, *more)
        update = self.step

        def step() -> None:
            update()
            loads.append(end_step(model).cpu())

        self.step = step


def train_with(
    run: Run,
    moe: MoEConfig,
    ep: int,
    etp: int = 1,
    dispatch: str = DISPATCHERS[0],
    reference: Callable[[GPT, MoEConfig], GPT] = to_moe,
    watch: Callable[[GPT], None] = lambda _: None,
) -> Trained:
    """Train over all ranks, each with its part of the batch and of the experts; `claim_equal` says what came of it.

    Args:
        reference: makes the model of the one process from the GPT, where it is another way to the same numbers.
        watch: called with this rank's model before the first step.
    """
    config = configuration(run.args)
    args, job = run.args, run.job
    run.losses.clear()  # of an earlier training: the report has the last one's
    run.reference_losses.clear()
    mesh = Mesh(job.device.type, Ledger(), job.timeout, dp=job.world_size, ep=ep, etp=etp)
    run.mesh = {name: mesh[name].size for name in ("dp", "ep", "etp", "edp")}
    dp, edp, forward = mesh["dp"], mesh["edp"], Ledger()
    model = parallelize(to_moe(GPT(config), moe), mesh["ep"], mesh["etp"], Spread((dp,)), dispatch)
    materialize(model, args.seed, job.device, run.dtype)
    masks = use_masks(model, SampleMasks(args.seed))
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    optimizer = optimizer_of(model.parameters())
    of_experts = set(expert_parameters(model))
    rest = [p for p in model.parameters() if p not in of_experts]
    trained = Trained(model, optimizer, mesh, forward)
    watch(model)
    for router in routers(model):
        router.register_forward_hook(lambda _, __, made: trained.choices[-1].append(made.detach()))
    make = partial(_made, moe, reference)
    one = (
        _Reference(Oracle(config, args.seed, job.device, run.dtype, optimizer_of, args.clip, make))
        if job.rank == 0
        else None
    )
    samples, tokens = args.batch // dp.size, args.batch * args.sequence
    ours: list[list[float]] = []  # the routers' losses by step and layer

    def forward_backward(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        trained.choices.append([])
        first = dp.index * samples
        mine = slice(first, first + samples)
        masks.seek(step, first)
        with dp.ledger.recording_to(forward):
            logits = model(inputs[mine])
        loss = token_loss(logits, targets[mine], tokens)
        loss.backward()
        sum_gradients(rest, dp)
        sum_expert_gradients(model, edp, mesh["etp"])
        ours.append([float(router.loss) for router in routers(model)])
        if run.dtype != torch.float64:  # a rounding decides otherwise now and then, and that is no small difference
            everyone = job.gather(
                [(c.experts.cpu(), None if c.kept is None else c.kept.cpu()) for c in trained.choices[-1]]
            )
            if one:
                one.follow(everyone)
        return loss.detach()

    def clip(largest: float, share: Tensor) -> tuple[float, float]:
        counted = counted_once(model, edp, mesh["etp"])
        counted += [p.grad for p in rest if p.grad is not None and dp.index == 0]
        return clip_and_total(model.parameters(), counted, [dp], largest, share)

    replica = _Watched(trained.loads, model, optimizer, forward_backward, clip)
    trained.worst = train(run, {"": replica}, one and one.oracle)[""]
    everyone = job.gather(ours)
    if one:
        one.compare(trained, torch.tensor(everyone, dtype=torch.float64).sum(0).tolist())
    return trained


def _made(moe: MoEConfig, reference: Callable[[GPT, MoEConfig], GPT], config: GPTConfig) -> GPT:
    return reference(GPT(config), moe)


class _Reference:
    """The one process, and what its routers did."""

    def __init__(self, oracle: Oracle):
        self.oracle = oracle
        self.loads: list[Tensor] = []
        self.losses: list[list[float]] = []
        oracle.optimizer.register_step_post_hook(lambda *_: self._end_step())

    def _end_step(self) -> None:
        model = self.oracle.model
        self.losses.append([float(router.loss) for router in routers(model)])
        self.loads.append(end_step(model).cpu())

    def follow(self, everyone: list[list[tuple[Tensor, Tensor | None]]]) -> None:
        """Choose in the next step what the ranks chose, who have the samples in their order."""
        for layer, router in enumerate(routers(self.oracle.model)):
            parts = [rank[layer] for rank in everyone]
            experts = torch.cat([experts for experts, _ in parts])
            kept = None if parts[0][1] is None else torch.cat([kept for _, kept in parts])

            def decide(scores: Tensor, experts: Tensor = experts, kept: Tensor | None = kept):
                shape = (*scores.shape[:2], experts.shape[1])
                return experts.view(shape).to(scores.device), None if kept is None else kept.view(shape).to(
                    scores.device
                )

            router.decide = decide

    def compare(self, trained: Trained, losses: list[list[float]]) -> None:
        """Enter the differences from it; `losses` of the routers, all ranks' shares summed."""
        trained.tokens_elsewhere = sum(
            (a - b).abs().sum().item() / 2 for a, b in zip(trained.loads, self.loads, strict=True)
        )
        pairs = zip(itertools.chain(*losses), itertools.chain(*self.losses), strict=True)
        trained.of_routers = max((relative_difference(a, b) for a, b in pairs), default=0.0)


def claim_equal(run: Run, *trainings: Trained) -> None:
    """That all of them were the training of one process."""
    if run.job.rank:
        return
    worst = Comparison()
    for name in ("loss", "gradient", "norm", "parameter"):
        setattr(worst, name, max(getattr(each.worst, name) for each in trainings))
    worst.claim(run)
    if run.dtype == torch.float64:  # otherwise the one process followed
        elsewhere = sum(each.tokens_elsewhere for each in trainings)
        run.evidence.claim("tokens of each expert, all layers and steps", "one process's: 0 elsewhere", 0, elsewhere)
    if any(router.routing.aux or router.routing.z for each in trainings for router in routers(each.model)):
        run.evidence.claim(
            "the routers' losses, the ranks' shares summed", "one process's, of the whole batch: difference 0", 0,
            max(each.of_routers for each in trainings), TOLERANCE[run.dtype].loss,
        )  # fmt: skip


def balance(load: Tensor) -> tuple[float, float]:
    """Entropy of the load (E), at most ln E, and MaxVio, (max - mean) / mean (2408.15664); of (layers, E) the means."""
    share = load.double() / load.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
    return entropy.mean().item(), (share.amax(-1) / share.mean(-1) - 1).mean().item()
