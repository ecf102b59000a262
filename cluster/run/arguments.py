"""What a combined run is told: the model, the layout, and how to train. Lecture 02: Megatron-LM's arguments.py."""

import argparse
import errno
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from cluster import dry_run, rules
from cluster.planner import hardware
from cluster.planner.layout import Layout, add_flags, given, layout_from
from cluster.planner.options import machine_of
from cluster.planner.plans import plans
from core.model.config import ModelConfig
from core.model.text import Text
from core.proof.arguments import add_model_flags, check_model, configuration
from core.proof.lesson import Lesson
from core.proof.rules import Rule, at_least
from core.proof.rules import check as check_rules
from expert_parallel.engine.routing import MoEConfig, Routing
from zero.engine.muon import Muon
from zero.engine.optimizer import MakeOptimizer
from zero.evidence.muon import add_muon_flags, check_muon, settings_of
from zero.newton_schulz import MuonSettings

HELD_OUT = 0.1  # of the text, for validation


def add_all_flags(lesson: Lesson) -> None:
    add_model_flags(lesson, layers=4, feed_forward=240)  # 4h / t would be h on 4 ranks
    flag = lesson.parser.add_argument_group("experts").add_argument
    flag("--experts", type=int, default=0, help="of each layer; 0: dense (default %(default)s)")
    flag("--top-k", type=int, default=2, help="experts for each token (default %(default)s)")
    flag("--aux", type=float, default=0.01, help="of the load-balancing loss (default %(default)s)")
    flag("--z", type=float, default=0.0, help="of the router z-loss (default %(default)s)")
    flag("--bias-rate", type=float, default=0.0, help="of balancing by a bias (default %(default)s)")
    flag("--capacity", type=float, default=0.0, help="capacity factor; 0: drop nothing (default %(default)s)")
    flag("--shared", type=int, default=0, help="feed-forward of a shared expert; 0: none (default %(default)s)")
    add_flags(lesson.parser)
    flag = lesson.parser.add_argument_group("training").add_argument
    flag("--auto", action="store_true", help="the layout that the planner finds fastest on --machine")
    flag("--machine", metavar="NAME|FILE.json", help="for --auto; of cluster/topology.py, or known (default: this one)")
    flag("--verify", action=argparse.BooleanOptionalAction, default=True, help="beside one process (default)")
    flag(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the layers' matrices (default adamw)"
    )
    flag("--warmup", type=int, default=2, help="steps in which the learning rate rises (default %(default)s)")
    flag("--evaluate", type=int, default=0, metavar="STEPS", help="between validations; 0: at the ends only")
    flag("--sample", type=int, default=120, help="bytes of text to write at the end (default %(default)s)")
    flag("--bucket", type=int, default=2**18, help="elements that ZeRO sends at once, about (default %(default)s)")
    flag("--save", metavar="FOLDER", help="write checkpoints there, and go on from the last one that is there")
    flag("--export", metavar="FILE.safetensors", help="write the weights there at the end")
    flag("--init", metavar="FILE.safetensors", help="start with the weights of such a file")
    flag("--save-every", type=int, default=10, metavar="STEPS", help="default %(default)s")
    flag("--keep", type=int, default=2, help="checkpoints to keep (default %(default)s)")
    flag("--dry-run", action="store_true", help="one rank of --world, without the others: what it sends and holds")
    flag("--world", type=int, default=0, metavar="RANKS", help="for --dry-run, whose ranks are not running")
    flag("--rank", type=int, default=0, help="for --dry-run: which of them (default %(default)s)")
    add_muon_flags(lesson.parser)


RULES = (
    at_least("experts", 0, 0),
    at_least("shared", 0, 0),
    at_least("warmup", 0, 2),
    at_least("evaluate", 0, 0),
    at_least("sample", 0, 120),
    at_least("bucket", 1, 2**18),
    at_least("save-every", 1, 10),
    at_least("keep", 1, 2),
    Rule(
        "world",
        "--world {world}",
        lambda case: not case.world or case.dry_run,
        "is for --dry-run, whose ranks are not running",
        lambda case: "--world 0, or --dry-run",
    ),
    Rule(
        "init",
        "--init {init}",
        lambda case: case.init is None or Path(case.init).is_file(),
        "there is no such file",
        lambda case: "one that --export wrote",
    ),
)
CAPACITY_AND_CP = Rule(
    "capacity with cp",
    "--capacity {capacity} --cp {cp}",
    lambda case: not case.capacity or case.cp == 1,
    "which tokens are dropped is decided over the full sample, which cp shards",
    lambda case: "--capacity 0",
)


def moe_of(args: argparse.Namespace) -> MoEConfig | None:
    """Raises ValueError where the flags do not fit each other."""
    if not args.experts:
        return None
    score = "topk-softmax" if args.top_k != 1 else "softmax-topk"
    routing = Routing(
        args.experts, args.top_k, score, capacity=args.capacity, aux=args.aux, z=args.z, bias_rate=args.bias_rate
    )
    return MoEConfig(routing, shared=args.shared)


def model_of(config: ModelConfig, moe: MoEConfig | None) -> ModelConfig:
    """The model with its experts."""
    if moe is None:
        return config
    return replace(config, experts=moe.routing.experts, top_k=moe.routing.top_k, shared_feed_forward=moe.shared)


def layout_of(args: argparse.Namespace, world: int) -> Layout:
    """The layout that the flags describe on so many ranks; what they leave open is chosen, or planned with `--auto`.

    Raises:
        ValueError: it breaks a rule, or the planner finds none.
    """
    config, moe = configuration(args), moe_of(args)
    decided, model = given(args), model_of(config, moe)
    if args.auto:
        return planned(args, world, model, decided)
    free = not {"tp", "cp", "pp", "dp", "ep"} & set(decided)
    if free and world % 4 == 0 and config.layers % 2 == 0 and config.heads % 2 == 0:
        args = argparse.Namespace(**vars(args) | {"tp": 2, "pp": 2})  # nothing given: a little of each
    layout = layout_from(args, world, args.batch, experts=moe is not None)
    rules.check(layout, model, world=world, batch=args.batch)
    return layout


def planned(args: argparse.Namespace, world: int, model: ModelConfig, decided: dict[str, Any]) -> Layout:
    """The planner's first choice."""
    machine = machine_of(args) if args.machine else hardware.here(world)
    fixed = {name: [value] for name, value in decided.items()}
    found, _ = plans(model, machine, world, args.batch, hardware.Software(), fixed)
    if not found:
        layout_of(argparse.Namespace(**vars(args) | {"auto": False, "tp": args.tp or 1}), world)  # says which rule
        size = f"{machine.memory / 1e9:.3g} GB each"
        raise ValueError(f"--auto: no layout of {world} ranks fits {size}; use --hidden {args.hidden // 2}")
    return found[0].layout


def check(args: argparse.Namespace, world: int) -> None:
    """Raises ValueError when the arguments cannot make a run."""
    check_model(args)
    check_rules(args, RULES)
    check_muon(args)
    Text(args.data, args.sequence).split(HELD_OUT)
    if args.save is not None:
        check_folder(args.save)
    layout = layout_of(args, args.world or world)
    if args.dry_run:
        dry_run.refuse(args.experts > 0, layout, args.rank)
    check_rules(argparse.Namespace(capacity=args.capacity, cp=layout.cp), [CAPACITY_AND_CP])


def check_folder(folder: str) -> None:
    """Make the folder of the checkpoints. Raises ValueError where that or a file in it cannot be."""
    try:
        if not folder:
            raise FileNotFoundError(errno.ENOENT, "it has no name")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--save {folder}: nothing can be written there: {error.strerror}; use --save run") from None


def optimizer_of(args: argparse.Namespace) -> tuple[MakeOptimizer, MuonSettings | None]:
    """What makes it of parameter groups, and what Muon has besides."""
    if args.optimizer == "adamw":
        return partial(torch.optim.AdamW, lr=args.lr), None
    return partial(Muon, lr=args.lr, momentum=args.momentum), settings_of(args)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Rises over `--warmup` steps to `--lr`, then falls like a cosine to a tenth of it at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))
