"""The search behind `cluster.plan`: every layout that keeps the rules and fits the memory, and the time of its step."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from math import ceil
from operator import attrgetter

from cluster.planner.counting import model_parameters
from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout
from cluster.planner.memory import RankMemory, parameters, rank_memory, state_sizes
from cluster.planner.overlap import messages_of
from cluster.planner.residency import largest, needed
from cluster.planner.rulebook import Case, keeps_all
from cluster.planner.search import Choices, divisors, legal
from cluster.planner.software import Software
from cluster.planner.stages import distinct_ranks
from cluster.planner.steptime import Step, step
from core.model.config import ModelConfig

KINDS = ("none", "selective", "full")  # of recomputation, from what takes least time to what takes least memory
BUT_MICROBATCHES = attrgetter(
    *(f.name for f in fields(Layout) if f.name not in ("microbatch", "microbatches", "recompute"))
)
BUT_ZERO = attrgetter(*(f.name for f in fields(Layout) if f.name not in ("zero", "reduce", "reshard", "recompute")))
OWN_MEMORY = ("here", "megatron-2021")  # programs that are held to hold what this project does
ITEM = 2  # bytes of a weight
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
    model: ModelConfig, machine: Machine, world: int, batch: int, fixed: Choices, software: Software | None = None
) -> Iterator[tuple[Layout, RankMemory | None]]:
    """Layouts that keep the rules and could be best, and what each holds; None where it does not fit.

    Of layouts that differ in recomputation only the one that computes least again of those that fit: what is computed
    again takes time and nothing else. And none with larger microbatches than one that does not fit.
    """
    machine = with_equal_nodes(machine, world)
    tried = choices(model, machine, world, batch, fixed)
    kinds = [kind for kind in KINDS if kind in tried["recompute"]]
    states: dict[tuple, bool] = {}  # whether weights, gradients and optimizer fit without anything else

    def has_states(layout: Layout) -> bool:
        key = (layout.tp, layout.cp, layout.ep, layout.etp, layout.pp, layout.v, layout.schedule, layout.zero)
        if key not in states:
            states[key] = states_fit(model, layout, machine, software)
        return states[key]

    too_much: set[tuple] = set()
    settled: set[tuple] = set()  # fit with ZeRO-1 and nothing computed again: to shard more takes time and nothing else
    overlaps = software is not None and software.overlapped
    for layout in legal(model, machine, world, batch, tried | {"recompute": kinds[:1]}, partial(could_be_best, fixed)):
        key, but_zero = BUT_MICROBATCHES(layout), BUT_ZERO(layout)
        if key in too_much or (layout.zero > 1 and but_zero in settled):
            continue
        if not has_states(layout):
            yield layout, None
            too_much.add(key)
            continue
        need, order = None, kinds
        if len(kinds) == len(KINDS) and layout.microbatch * layout.pp > 1:
            order = ("none", "full", "selective")  # where the last resort does not fit nothing does
        rest: tuple[Layout, RankMemory] | None = None
        for kind in order:
            again = replace(layout, recompute=kind)
            if kind != kinds[0] and not keeps_all(Case(again, model, machine, world, batch), advice=True):
                continue
            need = fits(model, again, machine, software)
            if kind == "full" and order is not kinds:
                if need is None:
                    yield again, None
                    break
                rest = again, need
                continue
            yield again, need
            if need is not None:
                if overlaps and layout.zero == 1 and kind == "none" and fewer_messages(model, layout, software):
                    settled.add(but_zero)
                break
        else:
            if rest:
                yield rest
                need = rest[1]
        if need is None:
            too_much.add(key)


def plans(
    model: ModelConfig, machine: Machine, world: int, batch: int, software: Software, fixed: Choices
) -> tuple[list[Plan], int]:
    """The layouts that fit and could be best, the fastest first, and how many were tried.

    Args:
        fixed: the values that may be tried, by field of `Layout`, where not all.
    """
    machine = with_equal_nodes(machine, world)
    found = list(fitting(model, machine, world, batch, fixed, software))
    fit = [Plan(x, need, step(model, x, machine, software)) for x, need in found if need is not None]
    return sorted(fit, key=lambda plan: plan.step.seconds), len(found)


def something_that_fits(
    model: ModelConfig, machine: Machine, world: int, batch: int, fixed: Choices, software: Software | None = None
) -> str | None:
    """Flags with which there is a plan: another batch, or more ranks, or nothing decided of the layout."""
    node = machine.node
    least = node * ceil(16 * model_parameters(model) / (USABLE * machine.memory * node))  # for weights and their states
    if least > MOST_RANKS:
        return None
    worlds = [world, node * ceil(world / node), *(k * least for k in (1, 2, 4, 8) if k * least > world)]
    for decided in (fixed, {}):
        for ranks in dict.fromkeys(worlds):
            for samples in dict.fromkeys((batch, ceil(batch / ranks) * ranks, max(1, batch // ranks) * ranks)):
                if any(need for _, need in fitting(model, machine, ranks, samples, decided, software)):
                    free = " and no flag of the layout" if fixed and not decided else ""
                    return f"--world {ranks} --batch {samples}{free}"
    return None


def could_be_best(fixed: Choices, layout: Layout) -> bool:
    """Whether no other layout does the same for less, or a flag says this one."""
    return not (
        (layout.tp > 1 and not layout.sp and "sp" not in fixed)
        or (layout.pp == 1 and layout.schedule != "1f1b" and "schedule" not in fixed)
        or (layout.cp > 1 and layout.microbatch > 1 and not {"cp", "microbatch"} & fixed.keys())  # fewer full samples
    )


def fits(model: ModelConfig, layout: Layout, machine: Machine, software: Software | None = None) -> RankMemory | None:
    """What the rank holds that holds most; None where that is more than there is.

    Args:
        software: the program whose memory is meant; None, or one without figures of its own: this project.
    """
    if software is not None and software.name not in OWN_MEMORY:
        most = largest(model, layout, software, machine.memory)
        return most if needed(most, layout, software) <= machine.memory else None
    most = None
    for rank in distinct_ranks(model, layout):
        need = rank_memory(model, layout, rank)
        if need.total > USABLE * machine.memory:
            return None
        most = need if most is None or need.total > most.total else most
    return most


def fewer_messages(model: ModelConfig, layout: Layout, software: Software) -> bool:
    """Whether gradients travel in as few messages with ZeRO-1 as they would with ZeRO-3, or fewer."""
    sizes = [x for x in zip(parameters(model, layout), (layout.edp, layout.data), strict=True) if x[1] > 1]
    more = replace(layout, zero=3)
    return all(
        messages_of(model, layout, size, ranks, software) <= messages_of(model, more, size, ranks, software)
        for size, ranks in sizes
    )


def states_fit(model: ModelConfig, layout: Layout, machine: Machine, software: Software | None) -> bool:
    """Whether there is room for a rank's weights and their states alone: then there may be for the rest."""
    weight, gradient, optimizer = state_sizes(ITEM)
    if software is not None and software.name not in OWN_MEMORY:
        gradient, optimizer = software.gradient_held, software.state_held
    experts, others = parameters(model, layout, 0)
    full, shard = experts + others, others / layout.data + experts / layout.edp
    held = weight * (shard if layout.zero == 3 else full) + gradient * (shard if layout.zero >= 2 else full)
    return held + optimizer * (shard if layout.zero else full) <= machine.memory
