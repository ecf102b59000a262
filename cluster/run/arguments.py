"""What a combined run is told: the model, the layout, and how to train. Lecture 02: Megatron-LM's arguments.py."""

import argparse
import errno
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from cluster import dry_run, rules
from cluster.planner import hardware
from cluster.planner.layout import Layout, add_flags, given, layout_from
from cluster.planner.options import machine_of
from cluster.planner.plans import plans
from cluster.planner.software import NAMED
from cluster.run.data import add_data_flags, check_data
from cluster.run.export import check_export
from cluster.run.hf import Folder, bytes_of, is_file
from cluster.run.load import check_init
from cluster.run.recipe import RECIPE, add_recipe_flags
from core.model.config import ModelConfig
from core.model.gpt import GPT
from core.proof.arguments import Told, add_model_flags, check_model, configuration
from core.proof.files import FolderLock
from core.proof.lesson import Lesson
from core.proof.rulebook import ONE_EXPERT, TOP_K
from core.proof.rules import Rule, at_least
from core.proof.rules import check as check_rules
from expert_parallel.engine.moe import to_moe
from expert_parallel.engine.routing import MoEConfig, Routing


def add_all_flags(lesson: Lesson) -> None:
    add_model_flags(lesson, layers=4, feed_forward=240)  # 4h / t would be h on 4 ranks
    flag = lesson.parser.add_argument_group("experts").add_argument
    flag("--experts", type=int, default=0, action=Told, help="of each layer; 0: dense (default %(default)s)")
    flag("--top-k", type=int, default=2, action=Told, help="experts for each token (default %(default)s)")
    flag("--aux", type=float, default=0.01, help="of the load-balancing loss (default %(default)s)")
    flag("--z", type=float, default=0.0, help="of the router z-loss (default %(default)s)")
    flag("--bias-rate", type=float, default=0.0, help="of balancing by a bias (default %(default)s)")
    flag("--capacity", type=float, default=0.0, help="capacity factor; 0: drop nothing (default %(default)s)")
    flag("--shared", type=int, default=0, action=Told, help="feed-forward of a shared expert; 0: none (default 0)")
    add_flags(lesson.parser)
    add_data_flags(lesson)
    add_recipe_flags(lesson)
    flag = lesson.parser.add_argument_group("training").add_argument
    flag("--auto", action="store_true", help="the layout that the planner finds fastest on --machine")
    flag("--machine", metavar="NAME|FILE.json", help="for --auto; of cluster/topology.py, or known (default: this one)")
    flag("--verify", action=argparse.BooleanOptionalAction, default=True, help="beside one process (default)")
    flag("--evaluate", type=int, default=0, metavar="STEPS", help="between validations; 0: at the ends only")
    flag("--sample", type=int, default=120, help="tokens of text to write at the end (default %(default)s)")
    flag("--bucket", type=int, default=2**18, help="elements that ZeRO sends at once, about (default %(default)s)")
    flag("--save", metavar="FOLDER", help="write checkpoints there, and go on from the last one that is there")
    flag("--hf", metavar="FOLDER", help="train the model of a Hugging Face folder: its config.json, its weights")
    flag("--export", metavar="FOLDER", help="write config.json and weights there at the end; or FILE.safetensors, "
         "one file of our own names")  # fmt: skip
    flag("--shard-size", default="5GB", metavar="SIZE", help="of a file of --export, at most (default %(default)s)")
    flag("--init", metavar="FILE.safetensors", help="start with the weights of such a file; with --hf also: random")
    flag("--save-every", type=int, default=10, metavar="STEPS", help="default %(default)s")
    flag("--keep", type=int, default=2, help="checkpoints to keep (default %(default)s)")
    flag("--dry-run", action="store_true", help="one rank of --world, without the others: what it sends and holds")
    flag("--world", type=int, default=0, metavar="RANKS", help="for --dry-run, whose ranks are not running")
    flag("--rank", type=int, default=0, help="for --dry-run: which of them (default %(default)s)")


RULES = (
    at_least("experts", 0, 0),
    at_least("shared", 0, 0),
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
        peer="cannot be: ranks that run are counted",
    ),
)


def folder_of(args: argparse.Namespace) -> Folder | None:
    """The published model of `--hf`. Raises ValueError where it is of a kind that is not built."""
    return None if args.hf is None else Folder(args.hf, args.sequence)


def configured(args: argparse.Namespace) -> ModelConfig:
    """The model of the flags, or of `--hf`, where the folder says all of it: a flag that contradicts it is refused.

    Of a sample's tokens `--sequence` decides, of the dropout and the way of attention their flags: they are no property
    of the weights. Where the folder has a dropout, its flag must be given.

    Raises:
        ValueError: the flags do not fit each other, or the folder.
    """
    folder = folder_of(args)
    if folder is None:
        return configuration(args)
    config = folder.config
    for name, size in {"kv_heads": "query_groups", "shared": "shared_feed_forward"}.items() | {
        (name, name) for name in ("layers", "hidden", "heads", "feed_forward", "experts", "top_k")
    }:
        if name in args.told and getattr(args, name) != getattr(config, size):
            flag = f"--{name.replace('_', '-')}"
            has = f"--hf {args.hf} has {getattr(config, size)}"
            raise ValueError(f"{flag} {getattr(args, name)}: {has}, and says what the model is; leave {flag} out")
    if "model" in args.told or (args.untied and config.tied):
        flag = "--untied" if args.untied else "--model"
        raise ValueError(f"{flag}: --hf {args.hf} says what the model is; leave {flag} out")
    if folder.dropouts and "dropout" not in args.told:
        name, share = next(iter(folder.dropouts.items()))
        use = f"use --dropout 0, or --dropout {share} --attention softmax"
        raise ValueError(f"--hf {args.hf}: has {name} {share}, and in a training that is for you to say; {use}")
    return replace(config, dropout=args.dropout, attention=args.attention)


def moe_of(args: argparse.Namespace) -> MoEConfig | None:
    """Raises ValueError where the flags do not fit each other."""
    if args.hf is not None:
        config = configured(args)
        if args.bias_rate and config.experts and config.score != "sigmoid":
            why = f"the router of --hf {args.hf} has no bias"
            raise ValueError(f"--bias-rate {args.bias_rate}: {why}; use --bias-rate 0, or a model with sigmoid scores")
        training = {name: getattr(args, name) for name in ("capacity", "aux", "z", "bias_rate")}
        return MoEConfig.of(config, **training) if config.experts else None
    if not args.experts:
        return None
    check_rules(args, (ONE_EXPERT, TOP_K))  # `Routing` would advise a score, which has no flag here
    score = "topk-softmax" if args.top_k != 1 else "softmax-topk"
    routing = Routing(
        args.experts, args.top_k, score, capacity=args.capacity, aux=args.aux, z=args.z, bias_rate=args.bias_rate
    )
    return MoEConfig(routing, shared=args.shared)


def full_model(config: ModelConfig, moe: MoEConfig | None) -> GPT:
    """That of one process, on the meta device."""
    return to_moe(GPT(config), moe) if moe else GPT(config)


def model_of(config: ModelConfig, moe: MoEConfig | None) -> ModelConfig:
    """The model with its experts."""
    if moe is None:
        return config
    return moe.described(config)


def layout_of(args: argparse.Namespace, world: int) -> Layout:
    """The layout that the flags describe on so many ranks; what they leave open is chosen, or planned with `--auto`.

    Raises:
        ValueError: it breaks a rule, or the planner finds none.
    """
    config, moe = configured(args), moe_of(args)
    decided, model = given(args), model_of(config, moe)
    if args.auto:
        return planned(args, world, model, decided)
    free = not {"tp", "cp", "pp", "dp", "ep", "split"} & set(decided)
    if free and world % 4 == 0 and config.layers % 2 == 0 and config.heads % 2 == 0:
        args = argparse.Namespace(**vars(args) | {"tp": 2, "pp": 2})  # nothing given: a little of each
    layout = layout_from(args, world, args.batch, experts=moe is not None)
    rules.check(layout, model, world=world, batch=args.batch)
    return layout


def planned(args: argparse.Namespace, world: int, model: ModelConfig, decided: dict[str, Any]) -> Layout:
    """The planner's first choice."""
    machine = machine_of(args) if args.machine else hardware.here(world)
    fixed = {name: [value] for name, value in decided.items()}
    found, _ = plans(model, machine, world, args.batch, NAMED["here"], fixed)
    if not found:
        layout_of(argparse.Namespace(**vars(args) | {"auto": False, "tp": args.tp or 1}), world)  # says which rule
        size = f"{machine.memory / 1e9:.3g} GB each"
        raise ValueError(f"--auto: no layout of {world} ranks fits {size}; use --hidden {args.hidden // 2}")
    return found[0].layout


def check(args: argparse.Namespace, world: int) -> None:
    """Raises ValueError when the arguments cannot make a run."""
    for name in ("hf", "init", "tokenizer", "tokens", "export"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} '': has no name; use --{name} PATH, or leave it out")
    check_model(args if args.hf is None else argparse.Namespace(**vars(args) | {"kv_heads": 0}))  # see `configured`
    check_rules(args, (*RULES, *RECIPE))
    folder = folder_of(args)
    check_data(args, folder and folder.config)
    if args.save is not None:
        check_folder(args.save)
    layout = layout_of(args, args.world or world)
    config, moe = configured(args), moe_of(args)
    if args.dry_run:
        dry_run.refuse(layout, args.rank)
    check_weights(args, config, moe)


def check_weights(args: argparse.Namespace, config: ModelConfig, moe: MoEConfig | None) -> None:
    """Raises ValueError where the weights that are read are not those of the model, or they cannot be written."""
    bytes_of(args.shard_size)
    folder, model = folder_of(args), full_model(config, moe)
    if folder and not args.init and not args.dry_run:
        folder.tensors(model)
    if args.init and not (folder and args.init == "random"):
        check_init(args.init, model)
    if args.export:
        if not is_file(args.export):
            check_export(args.export, model.config, model, args.hf)
            for name in ("save", "init", "tokenizer"):
                path = getattr(args, name)
                if path and Path(path).resolve().is_relative_to(Path(args.export).resolve()):
                    raise ValueError(f"--export {args.export}: is replaced, and --{name} is in it; use another folder")
        FolderLock("--export", args.export, probe=True, beside=True)


def check_folder(folder: str) -> None:
    """Make the folder of checkpoints. Raises ValueError where nothing can be written there, or a run already does."""
    try:
        if not folder:
            raise FileNotFoundError(errno.ENOENT, "it has no name")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--save {folder}: nothing can be written there: {error.strerror}; use --save run") from None
    FolderLock("--save", folder, probe=True)
