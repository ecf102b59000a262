"""How a combined run learns: the optimizer, which weights decay, and each step's learning rate. Lecture 02."""

import argparse
import math
from functools import partial
from typing import Any

import torch
from torch import nn

from core.model.gpt import GPT
from core.proof.lesson import Lesson
from core.proof.rules import Rule, at_least, at_most, positive
from zero.engine.muon import Muon
from zero.engine.optimizer import MakeOptimizer
from zero.evidence.muon import RULES as MUON_RULES
from zero.evidence.muon import add_muon_flags, settings_of
from zero.newton_schulz import MuonSettings

DECAYS = ("cosine", "linear", "constant", "wsd")


def add_recipe_flags(lesson: Lesson) -> None:
    flag = lesson.parser.add_argument_group("learning").add_argument
    flag("--warmup", type=int, default=2, help="steps in which the learning rate rises (default %(default)s)")
    flag("--decay", choices=DECAYS, default="cosine",
         help="how it falls then; wsd: constant, and linear in the --cooldown (default %(default)s)")  # fmt: skip
    flag("--min-lr", type=float, metavar="LR", help="to which it falls (default: a tenth of --lr)")
    flag("--cooldown", type=int, default=0, metavar="STEPS", help="the last ones, for wsd; 0: a tenth of them")
    flag(
        "--schedule-steps",
        type=int,
        default=0,
        metavar="STEPS",
        help="in which the learning rate falls; 0: --steps. The same in runs that go on from each other",
    )
    flag("--optimizer", choices=("adamw", "muon"), default="adamw",
         help="muon: for the layers' matrices, AdamW for the rest (default %(default)s)")  # fmt: skip
    flag("--weight-decay", type=float, default=0.01, help="of matrices (default %(default)s)")
    flag("--beta1", type=float, default=0.9, help="of AdamW's first moment (default %(default)s)")
    flag("--beta2", type=float, default=0.999, help="of its second moment (default %(default)s)")
    flag("--eps", type=float, default=1e-8, help="of AdamW (default %(default)s)")
    add_muon_flags(lesson.parser)


def _below_one(flag: str, usual: float) -> Rule:
    return Rule(
        flag,
        f"--{flag} {{{flag}}}",
        lambda case: 0 <= getattr(case, flag) < 1,
        "must be at least 0 and below 1",
        lambda case: f"--{flag} {usual}",
    )


RECIPE = (
    at_least("warmup", 0, 2),
    at_least("cooldown", 0, 0),
    at_least("schedule-steps", 0, 0),
    at_least("weight-decay", 0, 0.01),
    at_most("weight-decay", 1000),
    positive("eps", 1e-8),
    _below_one("beta1", 0.9),
    _below_one("beta2", 0.999),
    Rule(
        "min-lr",
        "--min-lr {min_lr} --lr {lr}",
        lambda case: case.min_lr is None or 0 <= case.min_lr <= case.lr,
        "must be at least 0 and at most --lr, from which it falls",
        lambda case: f"--min-lr {case.lr / 10:g}",
    ),
    *MUON_RULES,
)


def adamw_of(args: argparse.Namespace) -> MakeOptimizer:
    """AdamW with the flags' numbers; what decays is said by `groups_of`."""
    return partial(torch.optim.AdamW, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)


def optimizer_of(args: argparse.Namespace) -> tuple[MakeOptimizer, MuonSettings | None]:
    """What makes `--optimizer` of parameter groups, and what Muon has besides AdamW's numbers."""
    adamw = adamw_of(args)
    if args.optimizer == "adamw":
        return adamw, None
    return partial(Muon, momentum=args.momentum, **adamw.keywords), settings_of(args)


def decays(name: str) -> bool:
    """Whether a parameter's weights decay, by its name in the full model: those of matrices do.

    Norms, biases and embeddings do not, a head that is the token embedding among them. By the name, and not by the
    dimensions: ZeRO's shards have one, and a layer's experts have their biases in a matrix.
    """
    *modules, kind = name.split(".")
    return kind == "weight" and "embed" not in modules and not any(module.endswith("norm") for module in modules)


def groups_of(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of this rank's part of the model: what decays, and what does not."""
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, p in model.named_parameters():
        found[decays(model.full_name(name))].append(p)
    return [{"params": p, "weight_decay": d} for p, d in zip(found, (0.0, weight_decay), strict=True)]


def groups_by_module(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The same of a full model, by the kinds of its modules: for the one process, which does not trust the names."""
    without = {
        p
        for module in model.modules()
        for kind, p in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__ or kind != "weight"
    }
    decayed = [p for p in model.parameters() if p not in without]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": [*without], "weight_decay": 0.0}]


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Rises over `--warmup` steps to `--lr`, then goes as `--decay` says to `--min-lr`, where `--schedule-steps` end.

    It follows from the step alone, so a run that goes on in another layout goes on with it.
    """
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    lowest = args.lr / 10 if args.min_lr is None else args.min_lr
    first, last = args.warmup, args.schedule_steps or args.steps
    if args.decay == "wsd":  # 2404.06395, section 4
        first = max(first, last - (args.cooldown or max(1, last // 10)))
    done = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}.get(args.decay, 1 - done)
    return lowest + (args.lr - lowest) * left
