"""Random command lines of any lesson, out of its own flags: a few of them set, some to what no run can be."""

import argparse
import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

from core.proof.launch import ProcessInfo
from core.proof.lesson import Lesson
from tests.pool import FOLDERS, ROOT

TRAIN = "cluster/train.py"
FILES = {"data", "report", "plot", "page", "save", "hf", "export", "init", "tokens", "tokenizer", "token_type", "trace",
         "machine", "csv", "file", "config", "shard_size", "auto", "dry_run", "world", "rank", "timeout", "device",
         "help"}  # fmt: skip
# Of the combined run: small enough to be trained at once, and beyond. The first four are what a run can be.
TRAINED = {
    "tp": (1, 2, 2, 4, 3, 8, 0, -1), "cp": (1, 1, 2, 4, 3, 0), "pp": (1, 2, 2, 4, 3, 8, -2), "dp": (1, 2, 2, 4, 3, 0),
    "ep": (1, 2, 2, 4, 3, 0, 16), "etp": (1, 1, 2, 2, 4, 0), "v": (1, 2, 2, 3, 0, 5), "ulysses": (1, 2, 2, 4, 3, 0),
    "batch": (8, 16, 24, 4, 1, 6, 7, 0, -8), "microbatch": (1, 1, 2, 3, 0, 64), "microbatches": (1, 2, 4, 3, 8, 0, 99),
    "layers": (4, 2, 8, 3, 1, 5, 0), "hidden": (16, 24, 32, 48, 12, 15, 7, 1, 0),
    "heads": (4, 8, 2, 1, 6, 3, 16, 5, 0, -4), "kv_heads": (0, 1, 2, 4, 3, 5, 64, -1),
    "feed_forward": (0, 32, 48, 24, 10, 7, 1, -1), "sequence": (16, 8, 32, 24, 6, 12, 7, 1, 0, 10**9),
    "experts": (0, 4, 4, 8, 2, 3, 1, -1), "top_k": (2, 1, 1, 3, 8, 0, -1), "shared": (0, 8, 16, 7, -1),
    "vocabulary": (0, 256, 257, 300, 1, 255, -1), "recompute_every": (1, 2, 3, 0, 99), "loss_chunk": (0, 7, 16, 1, -1),
    "split": ("", "E,t*2|t*2,L", "E|t*2|t*2|L", "t*4", "E,t|t,L", "E,t*3|t,L", "nonsense", "E,t*4,L|", "E,t*99,L"),
    "bucket": (2**18, 300, 1, 0, -5), "evaluate": (0, 1, 2, -1), "sample": (0, 3, 1, -1), "keep": (2, 1, 0, -1),
    "save_every": (10, 1, 0), "steps": (2, 2, 2, 3, 1, 0, -1), "warmup": (2, 0, 1, 99, -1), "cooldown": (0, 1, 99, -1),
    "schedule_steps": (0, 2, 99, -1), "ns_steps": (5, 1, 2, 0, -1), "eos": (None, 10, 0, 255, 256, -1),
    "clip": (1.0, 1e-3, 1e6, 0.0, float("inf"), float("nan")), "dropout": (0.0, 0.1, 0.5, 1.0, -0.1, float("nan")),
    "lr": (1e-3, 1e-2, 1e-4, 0.0, -1.0, float("nan")), "min_lr": (None, 0.0, 1e-4, 1.0, -1.0, float("nan")),
    "weight_decay": (0.01, 0.0, 0.3, -0.1, float("nan"), float("inf")), "eps": (1e-8, 1e-6, 0.0, float("nan")),
    "beta1": (0.9, 0.8, 0.0, 1.0, float("nan")), "beta2": (0.999, 0.9, 0.0, 1.0, -0.1),
    "momentum": (0.95, 0.0, 0.5, 1.0, float("nan")), "capacity": (0.0, 1.0, 1.5, 0.1, -1.0, float("nan")),
    "aux": (0.01, 0.0, 0.02, -1.0, float("nan"), float("inf")), "z": (0.0, 0.01, -1.0, float("nan")),
    "bias_rate": (0.0, 0.01, 0.001, -1.0, float("nan"), float("inf")), "seed": (0, 1, 2**40, -1, 2**63),
}  # fmt: skip
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 0, -1, 7, 5)
SHARES = (0.1, 0.5, 1.0, 0.0, 2.0, -1.0, float("nan"), float("inf"))
SMALL = ("layers", "hidden", "heads", "sequence", "batch", "steps")  # always said: the usual run is larger


class Script(NamedTuple):
    """A lesson, taken as it starts."""

    name: str
    frame: Lesson
    check: Callable[[argparse.Namespace, int], None]
    teach: Callable[..., None]


class Drawn(NamedTuple):
    """A command line, and on how many ranks."""

    flags: list[str]
    ranks: int


class Refused(ValueError):
    """What the user is told."""


@cache
def scripts() -> dict[str, Script]:
    """Every lesson, by its path: what it gives to its frame, in this process."""
    found: dict[str, Script] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            if "Lesson(" not in path.read_text() or folder == "core":
                continue

            def take(frame: Lesson, check: Any, teach: Any, path: Path = path) -> int:
                found[str(path.relative_to(ROOT))] = Script(str(path.relative_to(ROOT)), frame, check, teach)
                return 0

            before = sys.path[0]
            with patch.object(Lesson, "main", take), contextlib.suppress(SystemExit):
                sys.path[0] = str(path.parent)
                runpy.run_path(str(path), run_name="__main__")
            sys.path[0] = before
    return found


def value_of(action: argparse.Action, chance: Random, gentle: bool, rich: bool) -> str | None:
    """A value of a flag; the first of a list come more often, `gentle` much more; `rich`: any but the last.

    None: the flag is left out.
    """
    of_run = TRAINED.get(action.dest)
    if action.choices is not None:
        value = chance.choice([*action.choices]) if gentle or chance.random() < 0.95 else "none-of-these"
    elif of_run or action.type in (int, float):
        values = of_run or (COUNTS if action.type is int else SHARES)
        far = 0.6 * chance.random() if rich else chance.expovariate(8.0 if gentle else 2.5)
        value = values[min(int(far * len(values)), len(values) - 1)]
    else:
        return None
    return None if value in (None, "") else str(value)


def draw(script: Script, chance: Random, rich: bool = False) -> Drawn:
    """Five flags, about, or many more; half of them what a run can be, most often, so that some are accepted.

    Args:
        rich: three times as many, of any value that a run can have.
    """
    actions = [each for each in script.frame.parser._actions if each.dest not in FILES and each.option_strings]
    wanted = {
        each.dest
        for each in chance.sample(actions, min(len(actions), int(chance.expovariate(0.07 if rich else 0.2)) + 1))
    }
    flags, gentle = [], rich or chance.random() < 0.6
    for action in actions:
        if action.dest not in wanted and not (script.name == TRAIN and action.dest in SMALL):
            continue
        names = [name for name in action.option_strings if name.startswith("--")]
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            flags.append(chance.choice(names))
        elif (value := value_of(action, chance, gentle, rich)) is not None:
            flags.append(f"{names[0]}={value}")
    return Drawn(flags, chance.choice((1, 2, 2, 4, 4, 4, 8, 8, 8, 3, 5, 6, 7)))


def parsed(script: Script, drawn: Drawn) -> argparse.Namespace:
    """The arguments, as the script would have them before any process group.

    Raises:
        Refused: with the message that the script would end with.
    """
    here = ProcessInfo(0, drawn.ranks, 0, drawn.ranks, 0, True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = script.frame.parser.parse_args(drawn.flags)
            script.frame._check_common(args, here)
            script.check(args, drawn.ranks)
    except ValueError as error:
        raise Refused(str(error)) from None
    return args
