"""The search behind `cluster.plan`: every layout that keeps the rules and fits the memory, and the time of its step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from cluster.planner.counting import model_parameters
from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout
from cluster.planner.memory import RankMemory, rank_memory
from cluster.planner.search import Choices, divisors, legal
from cluster.planner.software import Software
from cluster.planner.stages import distinct_ranks
from cluster.planner.steptime import Step, step
from core.model.config import ModelConfig

USABLE = 0.92  # of a device's memory: the rest is the runtime's, and lost between allocations
MOST_RANKS = 10**6  # of a machine that may be suggested
SHORTEST = 2048  # tokens of a sequence that a rank of cp has at least: with fewer its messages are not hidden


@dataclass(frozen=True)
class Plan:
    """A layout, and what it is expected to need."""

    layout: Layout
    memory: RankMemory  # on the rank of the pipeline that holds most
    step: Step


def choices(model: ModelConfig, machine: Machine, world: int, batch: int, fixed: Choices) -> Choices:
    """The values that a search tries: those that can be best."""
    largest = max(1, model.sequence // SHORTEST)
    usual = {
        "tp": [t for t in divisors(machine.node) if world % t == 0],
        "cp": [c for c in divisors(world) if c <= largest],
        "ulysses": [u for u in (1, 2, 4, 8) if u <= largest],
        "sp": [False, True],
        "zero": [0, 1, 2, 3],
        "schedule": ["1f1b", "interleaved", "zb-h1", "zb-v"],
        "recompute": ["none", "selective", "full"],
        "microbatch": [b for b in (1, 2, 4, 8, 16) if b <= batch],
        "v": [2, 3, 4, 5, 6, 8],
    }
    return usual | fixed


def with_equal_nodes(machine: Machine, world: int) -> Machine:
    """With equally many ranks on each node, as `cluster.plan.commands` starts them, and as many as can be."""
    return replace(machine, node=max(d for d in divisors(world) if d <= machine.node))


def fitting(
    model: ModelConfig, machine: Machine, world: int, batch: int, fixed: Choices
) -> Iterator[tuple[Layout, RankMemory | None]]:
    """Every layout that keeps the rules, and what it holds; None where it does not fit, or is never better."""
    machine = with_equal_nodes(machine, world)
    for layout in legal(model, machine, world, batch, choices(model, machine, world, batch, fixed)):
        yield layout, None if never_better(layout, fixed) else fits(model, layout, machine)


def plans(
    model: ModelConfig, machine: Machine, world: int, batch: int, software: Software, fixed: Choices
) -> tuple[list[Plan], int]:
    """All layouts that fit, the fastest first, and how many keep the rules.

    Args:
        fixed: the values that may be tried, by field of `Layout`, where not all.
    """
    machine = with_equal_nodes(machine, world)
    found = list(fitting(model, machine, world, batch, fixed))
    fit = [Plan(x, need, step(model, x, machine, software)) for x, need in found if need is not None]
    return sorted(fit, key=lambda plan: plan.step.seconds), len(found)


def something_that_fits(model: ModelConfig, machine: Machine, world: int, batch: int, fixed: Choices) -> str | None:
    """Flags with which there is a plan: another batch, or more ranks, or nothing decided of the layout."""
    node = machine.node
    least = node * ceil(16 * model_parameters(model) / (USABLE * machine.memory * node))  # for weights and their states
    if least > MOST_RANKS:
        return None
    worlds = [world, node * ceil(world / node), *(k * least for k in (1, 2, 4, 8) if k * least > world)]
    for decided in (fixed, {}):
        for ranks in dict.fromkeys(worlds):
            for samples in dict.fromkeys((batch, ceil(batch / ranks) * ranks, max(1, batch // ranks) * ranks)):
                if any(need for _, need in fitting(model, machine, ranks, samples, decided)):
                    free = " and no flag of the layout" if fixed and not decided else ""
                    return f"--world {ranks} --batch {samples}{free}"
    return None


def never_better(layout: Layout, fixed: Choices) -> bool:
    """Whether another layout does the same for less, unless a flag says this one."""
    return (
        (layout.tp > 1 and not layout.sp and "sp" not in fixed)
        or (layout.pp == 1 and layout.schedule != "1f1b" and "schedule" not in fixed)
        or (layout.cp > 1 and layout.microbatch > 1 and not {"cp", "microbatch"} & fixed.keys())  # fewer full samples
    )


def fits(model: ModelConfig, layout: Layout, machine: Machine) -> RankMemory | None:
    """What the rank holds that holds most; None where that is more than there is."""
    most = None
    for rank in distinct_ranks(model, layout):
        need = rank_memory(model, layout, rank)
        if need.total > USABLE * machine.memory:
            return None
        most = need if most is None or need.total > most.total else most
    return most
