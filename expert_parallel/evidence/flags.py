"""The flags of the lessons of CODE 04, and the rules by which they are refused."""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

from core.proof import rules
from core.proof.arguments import add_model_flags, check_model
from core.proof.lesson import Lesson
from core.proof.rules import Rule, at_least, nearest_multiple
from expert_parallel.engine.layers import DISPATCHERS
from expert_parallel.engine.routing import DROPS, SCORES, TOP_K, MoEConfig, Routing


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


# ---- Rules. A case: the flags, `inside` (the ranks of a pipeline stage, tp x cp x dp), `expert_feed_forward` ---------


def _ep_fits(case: Any) -> bool:
    ep = ep_of(case, case.inside)
    return ep == 1 or (ep > 1 and case.inside // case.etp % ep == 0 and case.experts % ep == 0)


def _etp_fits(case: Any) -> bool:
    return case.etp == 1 or (case.etp > 1 and case.inside % case.etp == 0 and case.expert_feed_forward % case.etp == 0)


def _fitting_etp(case: Any) -> str:
    """The largest smaller one that fits, beside --ep where it is given."""
    both = math.gcd(case.inside, case.expert_feed_forward)
    fitting = [e for e in range(1, case.etp) if both % e == 0 and case.inside // e % max(1, case.ep) == 0]
    return f"--etp {max(fitting, default=1)}"


BATCH = Rule(
    "batch: ranks", "--batch {batch}", lambda c: c.batch % c.inside == 0,
    "must be a multiple of the {inside} ranks, so that all get as many samples",
    lambda c: f"--batch {nearest_multiple(c.batch, c.inside)}", "lecture 01",
)  # fmt: skip
ALL_GATHER = Rule(
    "experts: all-gather", "--dispatch {dispatch}", lambda c: c.dispatch != "all-gather" or c.etp <= 1,
    "is not for --etp {etp}", lambda c: "--etp 1, or --dispatch all-to-all", "CODE 04",
)  # fmt: skip
ETP = Rule(
    "experts: etp", "--etp {etp}", _etp_fits,
    "must divide the {inside} ranks and the {expert_feed_forward} features of an expert", _fitting_etp, "CODE 04",
)  # fmt: skip
EP = Rule(
    "experts: ep", "--ep {ep}", _ep_fits,
    "must divide the {inside} ranks / --etp {etp} and the --experts {experts}, so that each rank has as many",
    lambda c: f"--ep {math.gcd(c.experts, c.inside // c.etp)}", "2006.16668, section 3",
)  # fmt: skip
RULES = (at_least("shared", 0, 0), BATCH, ALL_GATHER, ETP, EP)  # in this order
LAYOUT = (TOP_K, ETP, EP)  # those that are about layouts, for `cluster` too


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
    case = argparse.Namespace(**(usual | vars(args)), inside=ranks, expert_feed_forward=config.feed_forward)
    ways(case)
    rules.check(case, (*RULES, *more))
