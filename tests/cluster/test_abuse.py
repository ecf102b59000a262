"""A little of `python -m tests.abuse`, which is run by hand, and what it has found."""

import shlex

import pytest

from cluster.planner.layout import Layout
from tests.abuse.configurations import applied, some
from tests.abuse.drawn import TRAIN, Drawn, Refused, parsed, scripts

SLOW = "cluster/dry_run.py"  # whose refusals search layouts of 1024 ranks


@pytest.mark.parametrize("name", [TRAIN, "the others"])
def test_of_random_configurations_each_is_accepted_or_its_refusal_says_what_works(name: str) -> None:
    """Bugs seen: flags that the advice did not take back, a score without a flag, "ranks are 0 to -1"."""
    of = {TRAIN: 50} if name == TRAIN else {each: 12 for each in scripts() if each not in (TRAIN, SLOW)}
    accepted = followed = 0
    for script, count in of.items():
        met = some(script, range(count), seed=0, dry=0.0)
        assert not met.failures, "\n".join(met.failures)
        accepted, followed = accepted + met.accepted, followed + met.followed
    assert accepted + followed == sum(of.values())
    assert min(accepted, followed) > sum(of.values()) / 10, "many of both"


@pytest.mark.parametrize(
    ("script", "ranks", "flags"),
    [
        (TRAIN, 2, "--microbatch=64 --batch=8"),
        (TRAIN, 4, "--zero=0 --reduce=step"),
        (TRAIN, 4, "--recompute-every=2"),
        (TRAIN, 3, "--ulysses=2 --sp"),
        (TRAIN, 4, "--tp=1 --dp=1 --experts=4 --sequence=47"),
        (TRAIN, 2, "--experts=1"),
        (SLOW, 1, "--world=8 --cp=0"),
    ],
)
def test_advice_takes_back_what_was_said(script: str, ranks: int, flags: str) -> None:
    drawn = Drawn(shlex.split(flags), ranks)
    with pytest.raises(Refused) as refusal:
        parsed(scripts()[script], drawn)
    parsed(scripts()[script], applied(str(refusal.value), drawn))


def test_flags_after_others_say_what_they_change() -> None:
    before = Layout(tp=2, sp=True, microbatch=4, split="E,t|t,L", schedule="zb-h1", zero=1)
    said = Layout(dp=2).flags(after=before)
    assert " ".join(said) == "--tp 1 --pp 1 --dp 2 --no-sp --schedule 1f1b --zero 0 --microbatch 1 --stages "
