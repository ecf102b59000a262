"""The flags of the lessons of CODE 04, and the rules by which they are refused."""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from core.proof import rules
from core.proof.arguments import add_model_flags, check_model
from core.proof.lesson import Lesson
from core.proof.rulebook import EP_EXPERTS, ETP_FEATURES
from core.proof.rules import Rule, at_least, nearest_multiple
from expert_parallel.engine.layers import ALL_GATHER, DISPATCHERS
from expert_parallel.engine.routing import DROPS, SCORES, MoEConfig, Routing


def add_flags(lesson: Lesson, routing: bool = True, **defaults: object) -> None:
    """The flags of a lesson of CODE 04; `routing`: also those that say how tokens find experts."""
    add_model_flags(lesson, **{"layers": 4, "hidden": 60, "heads": 5, "feed_forward": 112, "sequence": 24, **defaults})
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
    flag("--ep", type=int, default=0, help="ranks over which the experts are sharded; 0: as many as do (default 0)")
    flag("--etp", type=int, default=1, help="ranks that share the features of an expert (default %(default)s)")
    flag("--dispatch", choices=DISPATCHERS, default=DISPATCHERS[0], help="default %(default)s")


def moe_of(args: argparse.Namespace) -> MoEConfig:
    """Raises ValueError where the flags do not fit each other."""
    names = ("experts", "top_k", "score", "groups", "top_groups", "capacity", "drop", "aux", "z", "bias_rate")
    return MoEConfig(Routing(**{name: getattr(args, name) for name in names}), shared=max(0, args.shared))


def ep_of(args: argparse.Namespace, ranks: int) -> int:
    return args.ep or math.gcd(args.experts, ranks // args.etp)


# ---- Rules. A case: the flags, `inside` (the ranks of a pipeline stage, tp x cp x dp), `expert_size` -----------------

BATCH = Rule(
    "batch: ranks", "--batch {batch}", lambda c: c.batch % c.inside == 0,
    "must be a multiple of the {inside} ranks, so that all get as many samples",
    lambda c: f"--batch {nearest_multiple(c.batch, c.inside)}", "lecture 01",
)  # fmt: skip
EP = replace(EP_EXPERTS, holds=lambda c: c.ep == 0 or EP_EXPERTS.holds(c))  # 0: as many as do
RULES = (at_least("shared", 0, 0), BATCH, ALL_GATHER, ETP_FEATURES, EP)  # in this order


def check(
    args: argparse.Namespace,
    ranks: int,
    ways: Callable[[argparse.Namespace], object] = moe_of,
    more: Iterable[Rule] = (),
) -> None:
    """Refuse a lesson's flags.

    Args:
        ways: makes the mixtures that the lesson trains.

    Raises:
        ValueError: the model, the routing or the layout is not possible.
    """
    config = check_model(args)
    usual = {"ep": 0, "etp": 1, "dispatch": DISPATCHERS[0], "shared": 0}
    case = argparse.Namespace(**(usual | vars(args)), inside=ranks, expert_size=config.feed_forward)
    ways(case)
    rules.check(case, (*RULES, *more))
