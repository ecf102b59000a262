"""Muon beside one process that has torch.optim.Muon itself; what it sends, holds and computes. Lecture 01.

Ψm parameters in matrices, N ranks
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.ledger import Ledger
from core.mesh import Axis
from core.model.gpt import GPT
from core.proof.comparison import claim_equal
from core.proof.figures import bars
from core.proof.lesson import Lesson, Run
from core.proof.oracle import Oracle
from core.proof.rules import Rule, at_least, at_most
from core.proof.rules import check as check_rules
from core.proof.training import train
from core.shards import shard_of
from zero.engine.buckets import Bucket
from zero.engine.engine import Engine, data_parallel, zero1, zero2, zero3
from zero.engine.muon import Muon, options_of
from zero.evidence import training
from zero.evidence.pictures import draw_owned
from zero.evidence.training import Fast, Plain, Technique, claim_elements, claim_gradient_types, sent_in_a_step
from zero.newton_schulz import EPS, SCALES, MuonSettings, deal, flops, is_matrix

ENGINES = (data_parallel, zero1, zero2, zero3)  # by --zero
USUAL = MuonSettings()
RULES = (
    Rule(
        "momentum",
        "--momentum {momentum}",
        lambda case: 0 <= case.momentum < 1,
        "is the share of the momentum that a step keeps: at least 0, less than 1",
        lambda case: f"--momentum {USUAL.momentum}",
    ),
    at_least("ns-steps", 1, USUAL.steps),
    at_most("ns-steps", 99),  # torch.optim.Muon refuses more, too
    Rule(
        "ns-coefficients",
        "--ns-coefficients {ns_coefficients}",
        lambda case: all(abs(x) < float("inf") for x in case.ns_coefficients),
        "must be finite",
        lambda case: f"--ns-coefficients {' '.join(map(str, USUAL.coefficients))}",
    ),
)


# ---- Flags -----------------------------------------------------------------------------------------------------------


def add_muon_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("Muon").add_argument
    flag("--momentum", type=float, default=USUAL.momentum, help="of Muon (default %(default)s)")
    flag("--ns-steps", type=int, default=USUAL.steps, help="of Newton-Schulz (default %(default)s)")
    flag("--ns-coefficients", type=float, nargs=3, metavar=("A", "B", "C"), default=USUAL.coefficients,
         help="of its polynomial aX + b(XX^T)X + c(XX^T)^2X (default %(default)s)")  # fmt: skip
    flag("--muon-scale", choices=SCALES, default=USUAL.scale,
         help="of a direction, as torch.optim.Muon's adjust_lr_fn: 0.2 sqrt(max(O, I)) or sqrt(max(1, O/I)) "
         "(default %(default)s)")  # fmt: skip


def check_muon(args: argparse.Namespace) -> None:
    """Raises ValueError, naming the flag."""
    check_rules(SimpleNamespace(**vars(args)), RULES)


def settings_of(args: argparse.Namespace) -> MuonSettings:
    return MuonSettings(args.momentum, args.ns_steps, tuple(args.ns_coefficients), args.muon_scale)


def add_flags(lesson: Lesson) -> None:
    training.add_flags(lesson)
    lesson.parser.add_argument(
        "--zero", type=int, choices=range(4), default=1, help="stage of the engine (default %(default)s)"
    )
    add_muon_flags(lesson.parser)


def check(args: argparse.Namespace, ranks: int) -> None:
    training.check(args, ranks)
    check_muon(args)


# ---- One process -----------------------------------------------------------------------------------------------------


class OneProcess(torch.optim.Optimizer):
    """torch.optim.Muon for matrices and torch.optim.AdamW for the rest, over full parameters.

    torch's Newton-Schulz rounds to bfloat16 first. Here it keeps the type that it is given, everything else is torch's.
    Each head's queries, keys and values are gathered into three matrices, each expert is one.

    Args:
        named: names and parameters of the model of one process, or groups that have them, as torch.optim takes both.
        head_size: of its attention.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]], head_size: int,
        settings: MuonSettings, **adamw: Any,
    ):  # fmt: skip
        groups = list(named)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        named = [each for group in groups for each in group["params"]]
        self.split = {p: partial(_split, name, head_size=head_size) for name, p in named if is_matrix(name, p)}
        self.join = {p: partial(_join, name, head_size=head_size) for name, p in named if is_matrix(name, p)}
        self.parts = {p: [nn.Parameter(x.clone()) for x in split(p.detach())] for p, split in self.split.items()}
        self.adamw = torch.optim.AdamW(
            [group | {"params": [p for _, p in group["params"] if p not in self.split]} for group in groups], **adamw
        )
        of_matrices = [
            {"params": [x for _, p in group["params"] for x in self.parts.get(p, ())],
             "weight_decay": like["weight_decay"]}
            for group, like in zip(groups, self.adamw.param_groups, strict=True)
        ]  # fmt: skip
        lr = self.adamw.param_groups[0]["lr"]
        self.muon = torch.optim.Muon(
            of_matrices, lr=lr, momentum=settings.momentum, ns_coefficients=settings.coefficients,
            ns_steps=settings.steps, eps=EPS, adjust_lr_fn=settings.scale,
        )  # fmt: skip
        super().__init__([p for _, p in named], {"lr": lr})
        self.adamw.state = self.state  # by parameter, the matrices' momentum too

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in (*self.muon.param_groups, *self.adamw.param_groups):
            group["lr"] = self.param_groups[0]["lr"]
        self.muon.state.clear()
        for p, parts in self.parts.items():
            momentum = self.state[p].get("momentum_buffer") if p in self.state else None
            of_parts = self.split[p](torch.zeros_like(p) if momentum is None else momentum)
            gradients = [None] * len(parts) if p.grad is None else self.split[p](p.grad)
            for x, value, gradient, m in zip(parts, self.split[p](p), gradients, of_parts, strict=True):
                x.data.copy_(value)
                x.grad = gradient
                self.muon.state[x]["momentum_buffer"] = m.clone()
        with patch.object(torch.Tensor, "bfloat16", lambda x: x.clone()):
            self.muon.step()
        self.adamw.step()
        for p, parts in self.parts.items():
            if p.grad is not None:
                p.copy_(self.join[p](parts))
                momentum = [self.muon.state[x]["momentum_buffer"] for x in parts]
                self.state[p]["momentum_buffer"] = self.join[p](momentum)


def _split(name: str, full: Tensor, head_size: int) -> list[Tensor]:
    """The matrices of a weight: (O, I), or (E, O, I) of experts, or (A 3 D, I) of fused queries, keys and values."""
    if name.endswith("qkv.weight"):
        return [*rearrange(full, "(a three d) i -> three (a d) i", three=3, d=head_size)]
    return [*full] if full.dim() == 3 else [full]


def _join(name: str, parts: list[Tensor], head_size: int) -> Tensor:
    if name.endswith("qkv.weight"):
        return rearrange(torch.stack([*parts]), "three (a d) i -> (a three d) i", d=head_size)
    return torch.stack([*parts]) if ".experts." in name else parts[0]


def named_groups(groups: Callable[[GPT], list[dict[str, Any]]], model: GPT) -> list[dict[str, Any]]:
    """These groups of a model's parameters, with the names, for `OneProcess`."""
    names = {p: name for name, p in model.named_parameters()}
    return [group | {"params": [(names[p], p) for p in group["params"]]} for group in groups(model)]


def one_process(make: Callable[[], GPT], settings: MuonSettings, **adamw: Any) -> Callable[..., OneProcess]:
    """Makes the optimizer of the one process, of the parameters of a model like the one that `make` makes."""
    model = make()
    names = [name for name, _ in model.named_parameters()]

    def of(parameters: Iterable[nn.Parameter]) -> OneProcess:
        return OneProcess(zip(names, parameters, strict=True), model.config.head_dim, settings, **adamw)

    return of


# ---- The lesson ------------------------------------------------------------------------------------------------------


def teach(run: Run, technique: Callable[..., Technique]) -> None:
    """Train the plain version and the engine beside one process; claim equality, and what Muon sends and holds."""
    axis, args, settings = training.data_axis(run), run.args, settings_of(run.args)
    run.mesh = {"dp": axis.size}

    def engine(model: GPT, axis: Axis, adamw: Callable, **options: Any) -> Engine:
        muon = partial(Muon, momentum=settings.momentum, **adamw.keywords)
        return ENGINES[args.zero](model, axis, muon, **options_of(model, settings, axis), **options)

    trained = {
        "plain": Plain(run, replace(axis, ledger=Ledger()), partial(technique, settings=settings)),
        "engine": Fast(run, replace(axis, ledger=Ledger()), engine),
    }
    flops_of = {name: count_flops(each) for name, each in trained.items()}
    config = training.configuration(args)
    make = one_process(partial(GPT, config), settings, **training.optimizer_of(run).keywords)
    oracle = None if run.job.rank else Oracle(config, args.seed, run.job.device, make, args.clip)
    compared = train(run, trained, oracle)

    sent = {name: run.job.gather(sent_in_a_step(run, each.axis)) for name, each in trained.items()}
    by_rank = {name: run.job.gather(measured(run, each, flops_of[name])) for name, each in trained.items()}
    types = {name: run.job.gather(each.gradient_types) for name, each in trained.items()}
    run.sent = {name: each.axis.ledger for name, each in trained.items()}
    if run.page:
        draw_owned(run, trained)
    if run.job.rank:
        return
    stages, m = {"plain": 1, "engine": args.zero}, args.microbatches
    for name, each in trained.items():
        units = (2, 2, m + 1, 3 * m)[stages[name]]
        claim_elements(
            run, f" by ZeRO-{stages[name]}, {name}", each.buckets, units, [sum(r.values()) for r in sent[name]]
        )
    for name, each in trained.items():
        claim_muon(run, name, each, stages[name], settings, by_rank[name])
    series = {name: [*ranks[0].values(), by_rank[name][0][0]] for name, ranks in sent.items()}
    labels = [*sent["plain"][0], "all-to-all of Muon"]
    title = f"Sent by each of {axis.size} ranks in a step", f"{axis.size} 个 rank 中每个一步的发送量"
    run.draw(bars(title, ("elements", "元素"), labels, series), chart=True)
    claim_equal(run, compared)
    claim_gradient_types(run, types)


def count_flops(trained: Plain | Fast) -> list[int]:
    """Of the matrix products in each of its steps from now on."""
    found, step = [], trained.step

    def counted() -> None:
        with FlopCounterMode(display=False) as counter:
            step()
        found.append(counter.get_total_flops())

    trained.step = counted
    return found


def measured(run: Run, trained: Plain | Fast, counted: list[int]) -> tuple[float, float, int]:
    """(elements of Muon sent, FLOPs in matrix products of the update) a step, and bytes of optimizer, on this rank."""
    traffic = trained.axis.ledger.traffic.items()
    elements = sum(each.elements for (_, name), each in traffic if name.endswith("muon"))
    return elements / run.args.steps, sum(counted) / run.args.steps, trained.memory_bytes()["optimizer"]


def account(
    buckets: Sequence[Bucket], sharded: bool, n: int, inner: int, head_size: int, settings: MuonSettings
) -> tuple[list[int], list[int]]:
    """Elements that each of the n ranks of a group sends, and FLOPs of Newton-Schulz that it does, in a step.

    Args:
        sharded, inner: see `zero.engine.muon.Matrices`.
    """
    found: list[tuple[int, range, Bucket, int]] = []  # cost, where in the bucket, how many inner ranks hold the same
    for bucket in buckets:
        for member in bucket.members:
            if is_matrix(member.name, member.parameter):
                *_, rows, columns = member.parameter.shape
                mark, shape = shard_of(member.parameter) if inner > 1 else None, [rows, columns]
                if mark is not None:
                    shape[mark.dim - member.parameter.dim()] *= mark.count
                copies = inner if mark is None else inner // mark.count  # neighbours
                cost = flops(shape, head_size if "qkv" in member.name else 0, settings.steps)
                for start in range(member.start, member.stop, rows * columns):
                    found.append((cost, range(start, start + rows * columns), bucket, copies))
    elements, work = [0] * n, [0] * n
    for (cost, here, bucket, copies), owner in zip(found, deal([cost for cost, *_ in found], n), strict=True):
        work[owner] += cost
        for rank in {*range(n)} - {owner}:
            shard = bucket.shard(rank // inner if sharded else 0)
            size = max(0, min(here.stop, shard.stop) - max(here.start, shard.start))
            elements[owner] += size  # the direction
            copy = (not sharded and rank // inner != owner // inner) or rank % copies != owner % copies
            elements[rank] += 0 if copy else size  # the update, of which copies are not sent
    return elements, work


def claim_muon(
    run: Run, name: str, trained: Plain | Fast, stage: int, settings: MuonSettings,
    by_rank: list[tuple[float, float, int]],
) -> None:  # fmt: skip
    """What the two all-to-alls send, how the work is dealt, and one moment in place of two. On rank 0."""
    n, size = len(by_rank), run.precision.master.itemsize
    elements, work = account(trained.buckets, stage > 0, n, 1, training.configuration(run.args).head_dim, settings)
    matrices = [m for bucket in trained.buckets for m in bucket.members if is_matrix(m.name, m.parameter)]
    plain, memory = isinstance(trained, Plain), [0] * n
    for rank in range(n):
        for bucket in trained.buckets:
            segments = [*bucket.segments(rank if stage else 0)]
            padding = bucket.length - sum(s.end - s.first for s in segments) if plain else 0
            moments = padding * (1 if bucket.members[0] in matrices else 2)
            moments += sum((s.end - s.first) * (1 if s.member in matrices else 2) for s in segments)
            copy = bucket.length if plain or run.precision.master != run.dtype else 0
            memory[rank] += (moments + copy) * size
    of_matrices = sum(member.parameter.numel() for member in matrices)

    def row(what: str, formula: str, expected: list[int], values: Iterable[float]) -> None:
        pairs = zip(expected, values, strict=True)
        run.evidence.each(
            what, formula, [(f"{what}, rank {r}", a, b) for r, (a, b) in enumerate(pairs)], 1e-9 * max(expected)
        )

    formula = f"2Ψm/N - what stays, Ψm = {of_matrices:,}: {sum(elements) / n:,.0f} on average; counted"
    row(f"elements sent a step to owners and back, {name}", formula, elements, [each[0] for each in by_rank])
    formula = (
        f"each of {len(matrices)} weights on one rank, {max(work) / (sum(work) / n):.2f} of the mean at most; counted"
    )
    row(f"FLOPs of Newton-Schulz a step, {name}", formula, work, [each[1] for each in by_rank])
    formula = f"{size} bytes a moment, one for Ψm, two for the rest; {max(memory):,} at most"
    row(f"bytes of optimizer state, {name}", formula, memory, [each[2] for each in by_rank])
