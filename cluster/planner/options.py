"""The command line of `cluster.rules` and `cluster.plan`: which model, on which machine, and what is decided."""

import argparse
from dataclasses import replace

from cluster.planner import hardware, models
from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout, add_flags, given
from cluster.planner.models import Model
from cluster.planner.rulebook import Case

LARGEST = 10**7  # of any size
SIZES = ("layers", "hidden", "heads", "kv_heads", "feed_forward", "vocabulary", "sequence", "experts", "top_k")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message.removeprefix('argument ')}; --help shows what works")


def add_case_flags(made: argparse.ArgumentParser) -> None:
    """The flags that say which model, and in which layout."""
    flag = made.add_argument
    flag("--model", choices=tuple(models.PRESETS), default="gpt3-175b", help="default %(default)s")
    flag("--config", metavar="config.json", help="a Hugging Face model instead")
    for size in SIZES:
        flag(f"--{size.replace('_', '-')}", type=int, help="of the model, if not the preset's")
    flag("--world", type=int, help="ranks (default: as the layout has)")
    flag("--batch", type=int, help="samples in a step (default: as the layout has)")
    add_flags(made)


def parser(name: str, what: str) -> argparse.ArgumentParser:
    made = _Parser(prog=f"python -m cluster.{name}", description=f"Lecture 03 (大模型并行与 GPU 集群配置). {what}")
    add_case_flags(made)
    where = f"one of {', '.join(hardware.PRESETS)}, or what cluster/topology.py measured (default %(default)s)"
    made.add_argument("--machine", default="dgx-a100", metavar="NAME|FILE.json", help=where)
    return made


def model_of(args: argparse.Namespace) -> Model:
    """Raises ValueError: a size that is not positive, or a file that is no model."""
    for name in (*SIZES, "world", "batch"):
        value, flag = getattr(args, name), name.replace("_", "-")
        if value is not None and value < (name in ("world", "batch") or name not in ("experts", "top_k")):
            raise ValueError(f"--{flag} {value}: must be at least 1; use --{flag} 8")
        if value is not None and value > LARGEST:
            raise ValueError(f"--{flag} {value}: is more than {LARGEST}; use --{flag} {LARGEST}")
    model = models.from_config(args.config, args.sequence) if args.config else models.PRESETS[args.model]
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if not sizes:
        return model
    if "heads" in sizes or "hidden" in sizes:  # then these follow, unless said
        sizes = {"kv_heads": 0 if model.kv_heads == model.heads else model.kv_heads, "head_size": 0} | sizes
    if "hidden" in sizes and model.feed_forward == 4 * model.hidden:
        sizes = {"feed_forward": 4 * sizes["hidden"]} | sizes
    if {"hidden", "feed_forward"} & sizes.keys() and model.expert_feed_forward == model.feed_forward:
        sizes = {"expert_feed_forward": 0, "shared_feed_forward": 0} | sizes
    if sizes.get("experts") and not model.top_k:
        sizes = {"top_k": 2} | sizes
    model = replace(model, name="custom", **sizes)
    if model.experts and model.top_k < 1:
        raise ValueError(f"--top-k {model.top_k}: a token needs an expert; use --top-k 1")
    return model


def machine_of(args: argparse.Namespace) -> Machine:
    """Raises ValueError: there is no such machine."""
    return hardware.PRESETS.get(args.machine) or hardware.measured(args.machine)


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout that the flags describe; dp and the microbatches follow from the rest where they can."""
    decided = given(args)
    layout = Layout(**decided)
    inner = layout.tp * layout.cp * layout.pp
    if "dp" not in decided and args.world and inner > 0:
        layout = replace(layout, dp=max(1, args.world // inner))
    if "microbatches" not in decided and args.batch and min(layout.dp, layout.microbatch) > 0:
        layout = replace(layout, microbatches=max(1, args.batch // (layout.dp * layout.microbatch)))
    elif "microbatch" not in decided and args.batch and min(layout.dp, layout.microbatches) > 0:
        layout = replace(layout, microbatch=max(1, args.batch // (layout.dp * layout.microbatches)))
    return layout


def asked(args: argparse.Namespace) -> Case:
    """The layout that the flags describe, of which model and on which machine.

    Raises:
        ValueError: see `model_of` and `machine_of`.
    """
    return Case(layout_of(args), model_of(args), machine_of(args), args.world, args.batch)
