"""All layouts that can be run, and the one next to a layout that cannot. Lecture 03."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from math import isqrt, log2
from types import SimpleNamespace

from cluster.planner.hardware import Machine
from cluster.planner.layout import FOLDED, Layout
from cluster.planner.rulebook import MEANINGFUL, REFUSING, Case, broken, keeps_all
from core.model.config import ModelConfig
from pipeline.split import PP_LAYERS, nearly_equal, notation

Choices = Mapping[str, Sequence]


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def legal(
    model: ModelConfig, machine: Machine | None, world: int, batch: int, choices: Choices,
    worth: Callable[[Layout], bool] = lambda layout: True,
) -> Iterator[Layout]:  # fmt: skip
    """Every layout of `world` ranks and `batch` samples a step that breaks no rule; with a machine, not even advice.

    Args:
        choices: values to try, by field of `Layout`. Left out: all that there are of a size, but 1 of etp; and the
            usual one of sp, ulysses, placement, cp_kind, schedule, zero, reduce, reshard, recompute, recompute_every
            and split; but a split is written out where stages would otherwise have no layer.
        worth: whether a layout is wanted at all; asked before the rules, which take longer. First without a
            schedule, ZeRO and microbatches, then without microbatches: what is not wanted then is not with them.
    """
    usual, rules = Layout(), MEANINGFUL if machine else REFUSING

    def of(name: str, every: Sequence | None = None) -> Sequence:
        return choices.get(name) or every or (getattr(usual, name),)

    (placement,), (cp_kind,), (loss_chunk,), (split,) = map(of, ("placement", "cp_kind", "loss_chunk", "split"))
    for tp, cp, pp in product(of("tp", divisors(world)), of("cp", divisors(world)), of("pp", divisors(world))):
        dp = world // (tp * cp * pp)
        if tp * cp * pp * dp != world or model.heads % tp or batch % dp or dp not in of("dp", [dp]):
            continue
        # First what the ranks do, then, of what can be, how a pipeline of them works.
        folds = product(of("ep", divisors(world // pp) if model.experts else [1]), of("etp"), of("sp"), of("ulysses"))
        pipe = {"microbatches": pp, "split": few_layers(model, pp)}
        inside = [(fold, Layout(tp, cp, *fold[:2], pp, dp, 1, *fold[2:], **pipe)) for fold in folds]
        folds = [fold for fold, layout in inside if worth(layout) and keeps_all(Case(layout, model, machine))]
        samples = batch // dp  # of a pipeline
        sizes = [(b, samples // b) for b in of("microbatch", divisors(samples)) if samples % b == 0]
        sizes = [(b, m) for b, m in sizes if m in of("microbatches", [m])]
        pipelines = [(s, v) for s in of("schedule") for v in _stages(s, pp, model, choices.get("v"))]
        exchanges = [(zero, reduce, reshard) for zero in of("zero") for reduce in of("reduce")
                     for reshard in of("reshard")]  # fmt: skip
        again = recomputations(of("recompute"), of("recompute_every"))
        for fold, (schedule, v), (zero, reduce, reshard) in product(folds, pipelines, exchanges):
            of_fold = tp, cp, *fold[:2], pp, dp, v, *fold[2:], placement, schedule, zero
            if not worth(Layout(*of_fold)):
                continue
            more = {"reduce": reduce, "reshard": reshard, "loss_chunk": loss_chunk, "cp_kind": cp_kind,
                    "split": split or few_layers(model, pp * v)}  # fmt: skip
            for (b, m), (recompute, every) in product(sizes, again):
                layout = Layout(*of_fold, b, m, recompute, recompute_every=every, **more)
                if worth(layout) and keeps_all(Case(layout, model, machine, world, batch), rules):
                    yield layout


def recomputations(kinds: Sequence[str], every: Sequence[int]) -> list[tuple[str, int]]:
    """What is recomputed, and of how many layers one."""
    again = [(kind, k) for kind in kinds for k in every if k == 1 or kind != "none"]
    if len(kinds) > 1:  # fewer layers are for what costs most
        again = [(kind, k) for kind, k in again if k == 1 or kind == "full"]
    return again


@cache
def few_layers(model: ModelConfig, stages: int) -> str:
    """A split, where without one there is none, because stages of one layer at least would be too many."""
    if stages < 1 or PP_LAYERS.holds(SimpleNamespace(layers=model.layers, stages=stages, split="")):
        return ""
    return notation(nearly_equal(model.layers, stages)) if model.layers + 2 >= stages else ""


def _stages(schedule: str, pp: int, model: ModelConfig, wanted: Sequence | None) -> Sequence[int]:
    if schedule == "interleaved":
        every = wanted or range(2, model.layers // pp + 2)
        equal = model.layers % pp == 0  # where stages can be equal, others are not better
        return [v for v in every if v > 1 and not (equal and model.layers % (v * pp))]
    return (2 if schedule in FOLDED else 1,)


def nearest(case: Case) -> Layout | None:
    """The layout that breaks no rule and differs least from the case's: in the factors between sizes, and in choices.

    On as many ranks, with as many samples if that can be, and following advice if that can be.
    """
    given, world = case.layout, case.world or max(1, case.layout.ranks)
    if not broken(case, advice=True):
        return given
    if given.split:  # as near as can be without, and then written out
        found = nearest(replace(case, layout=replace(given, split="")))
        even = found and notation(nearly_equal(case.model.layers, found.stages))
        return found and replace(found, split=even)
    batch = case.batch or max(1, given.dp) * max(1, given.microbatch) * max(1, given.microbatches)
    choices = {
        "placement": [given.placement],
        "cp_kind": [given.cp_kind],
        "ulysses": [max(1, given.ulysses), 1],
        "recompute": [given.recompute],
        "recompute_every": [max(1, given.recompute_every), 1],
        "loss_chunk": [max(0, given.loss_chunk)],
        "sp": [False, True],
        "zero": [given.zero, min(given.zero, 1)],
        "reduce": list(dict.fromkeys((given.reduce, "microbatch"))),
        "reshard": list(dict.fromkeys((given.reshard, "forward"))),
        "schedule": list(dict.fromkeys((given.schedule, "1f1b", "interleaved"))),
        "v": [max(2, given.v), 2],
        "etp": [max(1, given.etp), 1],
    }
    more = [batch] if case.batch else []
    more += [batch * k for k in (1, 2, 4)] + [world * k for k in (1, 2, 4, max(1, round(batch / world)))]
    for machine in dict.fromkeys((case.machine, None)):
        for samples in dict.fromkeys(more):
            found = legal(case.model, machine, world, samples, choices)
            if best := min(found, key=lambda layout: _distance(given, layout), default=None):
                return best
    return None


# How much a factor of two between sizes counts.
WEIGHTS = {"tp": 1.0, "cp": 1.0, "ep": 1.0, "etp": 1.0, "pp": 1.0, "dp": 0.5, "ulysses": 0.5, "v": 0.5,
           "microbatch": 0.3, "microbatches": 0.2}  # fmt: skip


def _distance(a: Layout, b: Layout) -> float:
    apart = sum(weight * abs(log2(max(1, getattr(a, n)) / getattr(b, n))) for n, weight in WEIGHTS.items())
    chosen = ("sp", "schedule", "zero", "reduce", "reshard", "recompute", "recompute_every")
    return apart + sum(getattr(a, n) != getattr(b, n) for n in chosen)
