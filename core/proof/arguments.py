"""The flags of every lesson that trains, the model that they describe, and what of it can be sharded."""

import argparse
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from core.model.gpt import GPTConfig
from core.model.text import VOCABULARY, Text
from core.proof.lesson import Lesson
from core.proof.rulebook import (
    DECODER,
    EQUAL,
    HEADS,
    SP_SEQUENCE,
    TP_FEED_FORWARD,
    TP_HEADS,
    TP_KV_HEADS,
    fits_kv_heads,
    usable_kv_heads,
)
from core.proof.rules import Rule, at_least, broken, check, nearest_multiple, positive

KV_HEADS_OF_LLAMA = Rule(
    "key and value heads: model",
    "--model {model} --kv-heads {kv_heads}",
    lambda case: case.model == "llama" or not case.kv_heads,
    "GPT-2's kind has as many as heads",
    lambda case: "--kv-heads 0, or --model llama",
    peer="transformers, GPT2Config: has no num_key_value_heads",
)
TRAINING = (
    at_least("batch", 1, 8), positive("lr", 1e-3), positive("clip", 1.0), at_least("kv-heads", 0, 0), KV_HEADS_OF_LLAMA,
)  # fmt: skip


def add_model_flags(lesson: Lesson, **defaults: Any) -> None:
    """The flags of every lesson that trains. `defaults` replace the usual ones, by name."""
    flag = partial(_flag, lesson, defaults)
    flag("model", "gpt", "GPT-2's kind, or a small Llama", choices=("gpt", "llama"))
    flag("batch", 16, "samples in a step")
    flag("layers", 8, "layers of the whole model")
    flag("hidden", 80)
    flag("heads", 16)
    flag("kv-heads", 0, "of keys and values, for --model llama; 0: a quarter of the heads, if that is a whole number")
    flag("feed-forward", 0, "0: four times hidden")
    flag("sequence", 48, "tokens in a sample")
    flag("attention", "sdpa", choices=("sdpa", "softmax"))
    flag("dropout", 0.0, "needs --attention softmax")
    lesson.parser.add_argument("--untied", action="store_true", help="give the head a weight of its own, as llama has")
    lesson.parser.set_defaults(told=())
    flag("lr", 1e-3, "learning rate of AdamW")
    flag("clip", 1.0, "largest global gradient norm")


class Told(argparse.Action):
    """Stores a flag's value, and in `told` that it was given: a default must not contradict anything."""

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, value)
        namespace.told = (*namespace.told, self.dest)


def _flag(
    lesson: Lesson, defaults: dict[str, object], name: str, usual: object, what: str = "", **more: object
) -> None:
    default = defaults.get(name.replace("-", "_"), usual)
    lesson.parser.add_argument(
        f"--{name}",
        type=type(usual),
        default=default,
        action=Told,
        help=f"{what} (default %(default)s)".strip(),
        **more,
    )


def configuration(args: argparse.Namespace) -> GPTConfig:
    """Of GPT-2's kind, or of Llama's: RMSNorm, rotary positions, grouped keys and values, SwiGLU, a head of its own.

    Rotary positions rotate pairs: where hidden / heads is odd, a Llama's head has one feature more.
    """
    config = GPTConfig(
        vocabulary=getattr(args, "vocabulary", 0) or VOCABULARY,  # not a flag of every lesson
        sequence=args.sequence,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        feed_forward=args.feed_forward,
        dropout=args.dropout,
        attention=args.attention,
        tied=not args.untied,
    )
    if args.model == "gpt":
        return config
    return replace(
        config,
        name="llama",
        kv_heads=kv_heads(args),
        head_size=config.head_dim + 1 if config.head_dim % 2 else None,
        gated=True,
        biases=False,
        learned_positions=False,
        tied=False,
        norm="rms",
        rope_theta=500_000.0,
    )


def kv_heads(args: argparse.Namespace) -> int:
    """What `--kv-heads` says, or means where it is not given."""
    if getattr(args, "model", "gpt") == "gpt":
        return args.heads
    return args.kv_heads or (args.heads // 4 if args.heads % 4 == 0 else args.heads)


def check_model(args: argparse.Namespace) -> GPTConfig:
    """The model's sizes; raises ValueError when the arguments of `add_model_flags` cannot make a training run."""
    check(args, TRAINING)
    config = configuration(args)
    check(config, DECODER)
    if not getattr(args, "tokens", None):
        Text(args.data, args.sequence)
    return config


def check_cuts(args: argparse.Namespace, ranks: int, sequence: bool = False) -> None:
    """Raises ValueError unless heads, feed-forward and (with `sequence`) a sample have equal shards on `ranks` ranks.

    Fewer heads of keys and values than ranks may be on several each. Says what would do for all of them together. Sizes
    below 1 are left to `ModelConfig`.
    """
    heads, hidden, feed_forward = args.heads, args.hidden, args.feed_forward
    if min(heads, hidden, kv_heads(args)) < 1 or feed_forward < 0:
        return
    more = {"tp": ranks, "cp": 1, "sp": sequence, "head_size": None, "latent": None, "query_groups": kv_heads(args)}
    case = SimpleNamespace(**vars(args) | more)
    rules = [HEADS, TP_HEADS, SP_SEQUENCE] + [TP_FEED_FORWARD] * (feed_forward > 0)  # 0, four times hidden, fits
    rules += [TP_KV_HEADS] * (kv_heads(args) != heads)
    failing = list(broken(case, rules))
    if not failing:
        return
    use: dict[str, int] = {}
    if HEADS in failing or TP_HEADS in failing:
        usable = [a for a in range(ranks, hidden + 1, ranks) if hidden % a == 0]
        use["heads"] = min(usable, key=lambda a: abs(a - heads), default=nearest_multiple(heads, ranks))
        if hidden % use["heads"]:
            use["hidden"] = nearest_multiple(hidden, use["heads"])
    case.heads = use.get("heads", heads)
    case.query_groups = kv_heads(SimpleNamespace(**vars(args) | {"heads": case.heads}))
    if case.heads % case.query_groups or not TP_KV_HEADS.holds(case):
        use["kv-heads"] = usable_kv_heads(case)
    if TP_FEED_FORWARD in failing:
        use["feed-forward"] = nearest_multiple(feed_forward, ranks)
    if SP_SEQUENCE in failing:
        use["sequence"] = nearest_multiple(args.sequence, ranks)
    sizes = [heads, feed_forward or heads, args.sequence if sequence else heads]
    fits = partial(fits_kv_heads, kv_heads(args))
    fewer = [] if hidden % heads else [t for t in range(2, heads + 1) if fits(t) and not any(n % t for n in sizes)][-8:]
    given = vars(args) | {"kv_heads": kv_heads(args)}
    now = " ".join(f"--{name} {given[name.replace('-', '_')]}" for name in use)
    reasons = ["heads must divide --hidden"] * ("heads" in use) + [EQUAL.format(tp=ranks)] * bool({*use} - {"kv-heads"})
    if "kv-heads" in use:
        reasons.append(f"heads of keys and values {TP_KV_HEADS.reason.format(tp=ranks)}")
    raise ValueError(
        f"{now}: {', and '.join(reasons)}; "
        f"use {' '.join(f'--{name} {value}' for name, value in use.items())}"
        + (f", or --nproc_per_node one of {', '.join(map(str, fewer))}" if fewer else "")
    )
