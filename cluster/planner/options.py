"""The command line of `cluster.rules` and `cluster.plan`: which model, on which machine, and what is decided."""

import argparse
from dataclasses import replace

from cluster.planner import hardware, models
from cluster.planner.hardware import Machine
from cluster.planner.layout import add_flags, layout_from
from cluster.planner.rulebook import Case
from core.model.config import ModelConfig
from core.model.published import from_config
from core.proof.language import LANGUAGES
from core.proof.rulebook import KV_HEADS, ONE_EXPERT, TOP_K
from core.proof.rules import at_least, at_most, check

LARGEST = 10**7  # of any size
SIZES = ("layers", "hidden", "heads", "kv_heads", "feed_forward", "vocabulary", "sequence", "experts", "top_k")


def flag_of(size: str) -> str:
    return size.replace("_", "-")


LEAST = {"experts": 0, "top_k": 0}  # of the others 1
BOUNDS = {
    size: (at_least(flag_of(size), LEAST.get(size, 1), 8), at_most(flag_of(size), LARGEST))
    for size in (*SIZES, "world", "batch")
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message.removeprefix('argument ')}; --help shows what works")


def add_case_flags(made: argparse.ArgumentParser) -> None:
    """The flags that say which model, and in which layout."""
    flag = made.add_argument
    flag("--model", choices=tuple(models.PRESETS), default="gpt3-175b", help="default %(default)s")
    flag("--config", metavar="config.json", help="a Hugging Face model instead")
    for size in SIZES:
        flag(f"--{flag_of(size)}", type=int, help="of the model, if not the preset's")
    flag("--world", type=int, help="ranks (default: as the layout has; for a plan, one node)")
    flag("--batch", type=int, help="samples in a step (default: as the layout has; for a plan, 512)")
    add_flags(made)


def parser(name: str, what: str) -> argparse.ArgumentParser:
    made = _Parser(prog=f"python -m cluster.{name}", description=f"Lecture 03 (大模型并行与 GPU 集群配置). {what}")
    add_case_flags(made)
    where = f"one of {', '.join(hardware.PRESETS)}, or what cluster/topology.py measured (default %(default)s)"
    made.add_argument("--lang", choices=LANGUAGES, help="of what is printed (default: what LANG says)")
    made.add_argument("--machine", default="dgx-a100", metavar="NAME|FILE.json", help=where)
    return made


def model_of(args: argparse.Namespace) -> ModelConfig:
    """Raises ValueError: a size that makes no sense, or a file that is no model."""
    for name, rules in BOUNDS.items():
        if getattr(args, name) is not None:
            check(args, rules)
    model = from_config(args.config, args.sequence) if args.config else models.PRESETS[args.model]
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if not sizes:
        check(model, (KV_HEADS, TOP_K))
        return model
    if "heads" in sizes or "hidden" in sizes:  # then a head's size follows
        sizes["head_size"] = None
    if "hidden" in sizes and "feed_forward" not in sizes and model.feed_forward == 4 * model.hidden:
        sizes["feed_forward"] = 0
    if sizes.get("experts") and "top_k" not in sizes and not model.top_k:
        sizes["top_k"] = 2
    model = replace(model, name="custom", **sizes)
    check(model, (KV_HEADS, ONE_EXPERT, *[TOP_K] * (model.experts > 0)))
    return model


def machine_of(args: argparse.Namespace) -> Machine:
    """Raises ValueError: there is no such machine."""
    return hardware.PRESETS.get(args.machine) or hardware.measured(args.machine)


def case_of(args: argparse.Namespace) -> Case:
    """The layout that the flags describe, of which model and on which machine.

    A microbatch has one sample where no flag says otherwise: at scale more do not fit.

    Raises:
        ValueError: see `model_of` and `machine_of`.
    """
    model = model_of(args)
    layout = layout_from(args, args.world, args.batch, model.experts > 0, microbatch=1)
    return Case(layout, model, machine_of(args), args.world, args.batch)
