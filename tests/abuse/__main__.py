"""Load and abuse, by hand: what came of each part in one table, and every failure with what makes it again.

    python -m tests.abuse                            all parts, about an hour on two cores; the last runs an hour more
    python -m tests.abuse configurations --count 10000 --dry 0.1        a minute, and half a second for each dry run
    python -m tests.abuse lessons --count 300        the same of every other script: a minute
    python -m tests.abuse training --count 500       a second each
    python -m tests.abuse signals --count 100        five seconds each
    python -m tests.abuse storage                    three minutes; as root, for disks of its own
    python -m tests.abuse soak --minutes 60

Each module says what it does. `--seed` draws others; `--first` goes on where an earlier call has stopped.
"""

import argparse
import sys
import time
from collections.abc import Iterator

from tabulate import tabulate

from tests.abuse import configurations, signals, soak, storage, training
from tests.abuse.drawn import TRAIN, scripts

Row = tuple[str, int, str, float, list[str]]  # part, tried, what came of it, seconds, failures
USUAL = {"configurations": 10_000, "lessons": 300, "training": 500, "signals": 100}


def of_configurations(args: argparse.Namespace, names: list[str], count: int) -> Iterator[Row]:
    for name, met, seconds in configurations.meet(names, count, args.seed, args.dry, args.first):
        came = (
            f"{met.accepted} accepted, {met.tried - met.accepted} refused and their advice followed, {met.dry} dry runs"
        )
        came += f" with {met.claims} claims" * bool(met.dry)
        yield name, met.tried, came, seconds, met.failures


def of_training(args: argparse.Namespace, count: int) -> Iterator[Row]:
    began = time.monotonic()
    found = [*training.trained(count, args.seed, args.first, args.seconds)]
    failures = [f"{each.line}\n    " + "\n    ".join(each.failed) for each in found if each.failed]
    came = f"{sum(each.claims for each in found)} claims"
    yield "training", len(found), came, time.monotonic() - began, failures


def of_signals(args: argparse.Namespace, count: int) -> Iterator[Row]:
    began = time.monotonic()
    found = [*signals.struck([*scripts()], count, args.seed)]
    failures = [f"{each.trial}\n    " + "\n    ".join(each.failed) for each in found if each.failed]
    met = [each.seconds for each in found if each.met]
    came = f"{len(met)} hit; the others ended after {max(met, default=0):.0f} s at most"
    yield "signals", len(found), came, time.monotonic() - began, failures


def rows(args: argparse.Namespace, part: str) -> Iterator[Row]:
    count = args.count or USUAL.get(part, 0)
    if part == "configurations":
        yield from of_configurations(args, [TRAIN], count)
    elif part == "lessons":
        yield from of_configurations(args, [name for name in scripts() if name != TRAIN], count)
    elif part == "training":
        yield from of_training(args, count)
    elif part == "signals":
        yield from of_signals(args, count)
    elif part == "storage":
        for what, tried, failures, seconds in storage.all_of(args.seed):
            yield f"storage: {what}", tried, "", seconds, failures
    else:
        seen, failures = soak.soak(args.minutes)
        yield "soak", 1, "\n".join(seen), args.minutes * 60, failures


def main() -> int:
    parts = (*USUAL, "storage", "soak")
    parser = argparse.ArgumentParser("tests.abuse", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="of what is drawn; 0: the usual number")
    parser.add_argument("--first", type=int, default=0, help="number of the first that is drawn")
    parser.add_argument("--dry", type=float, default=0.1, help="share of the accepted ones that make a dry run")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which training stops")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the soak")
    args = parser.parse_args()
    found: list[Row] = []
    for part in args.parts or parts:
        for row in rows(args, part):
            found.append(row)
            for failure in row[-1]:
                print(f"FAILED {row[0]}: {failure}\n", flush=True)
            print(f"{row[0]}: {row[1]} tried, {len(row[-1])} failed, {row[3]:.0f} s", flush=True)
    header = ("", "tried", "", "seconds", "failed")
    print("\n" + tabulate([(*row[:4], len(row[4])) for row in found], header, floatfmt=".0f"))
    return int(any(row[-1] for row in found))


if __name__ == "__main__":
    sys.exit(main())
