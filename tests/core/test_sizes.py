"""The default sizes of the lessons are different, so that a shape on the screen says which dimension is which."""

import runpy
from argparse import Namespace
from itertools import combinations

import pytest

from core.model.text import VOCABULARY
from core.proof.lesson import Lesson
from tests.core.test_reading import ROOT, lessons

WITHOUT_A_MODEL = {"cluster/ranks.py", "cluster/topology.py", "cluster/accuracy.py", "cluster/dry_run.py",
                   "cluster/hang.py"}  # fmt: skip
TENSOR = {"megatron_tp/principle.py", "megatron_tp/tensor_parallel.py", "megatron_tp/train.py",
          "sequence_parallel/megatron_sp.py", "sequence_parallel/activations.py"}  # fmt: skip
COURSE = "the course's own model"
EXCEPTIONS = {  # lesson, ranks, what is equal, why
    ("megatron_tp/principle.py", 4, "h", "f / n", "the lecture's MLP is h x 4h, and 4h / 4 is h"),
    ("sequence_parallel/activations.py", 4, "h", "f / n", "the paper's formulas are of an MLP of 4h, and 4h / 4 is h"),
    ("megatron_tp/train.py", 4, "f / n", "V / n", COURSE),
    ("megatron_tp/train.py", 4, "b", "heads / n", COURSE),
    ("megatron_tp/train.py", 8, "f / n", "V / n", COURSE),
    ("megatron_tp/train.py", 8, "d", "h / n", COURSE),
}


class _Made(Exception):
    """Instead of running the lesson: here are its defaults."""


def defaults(script: str, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    def main(self: Lesson, *_: object) -> None:
        raise _Made(self.parser.parse_args([]))

    monkeypatch.setattr(Lesson, "main", main)
    with pytest.raises(_Made) as made:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return made.value.args[0]


def sizes(script: str, args: Namespace, n: int) -> dict[str, int]:
    """What a shape shows in the lesson on n ranks."""
    b, s, h, a = args.batch, args.sequence, args.hidden, args.heads
    f, vocabulary = args.feed_forward or 4 * h, getattr(args, "vocabulary", 0) or VOCABULARY
    found = {"s": s, "h": h, "d": h // a}
    tensor = {"b": b, "h / n": h // n, "f / n": f // n, "V / n": vocabulary // n, "heads / n": a // n}
    whole = {"f": f, "V": vocabulary, "heads": a}
    topic = script.split("/")[0]
    if script in TENSOR:
        return found | tensor | ({} if topic == "megatron_tp" else {"s / n": s // n})
    if topic == "cluster":  # any axis
        return found | tensor | {"s / n": s // n, "f": f, "V": vocabulary}
    if topic == "sequence_parallel":
        return found | whole | {"b": b, "s / n": s // n, "heads / n": a // n}
    if topic == "expert_parallel":
        return found | whole | {"b / n": b // n, "tokens of a rank": b * s // n, "experts": args.experts}
    return found | whole | {"b": b // args.microbatches // (n if topic == "zero" else 1)}


@pytest.mark.parametrize("script", [script for script in lessons() if script not in WITHOUT_A_MODEL])
def test_default_sizes_are_different(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = defaults(script, monkeypatch)
    equal = set()
    for n in (4, 8):
        pairs = combinations(sorted(sizes(script, args, n).items()), 2)
        equal |= {(n, *sorted((one, other))) for (one, x), (other, y) in pairs if x == y}
    assert equal == {(n, *sorted(names)) for lesson, n, *names, _ in EXCEPTIONS if lesson == script}
