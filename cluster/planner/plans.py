"""The search behind `cluster.plan`: every layout that keeps the rules and fits the memory, and the time of its step."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from math import ceil, inf
from operator import attrgetter

from cluster.planner.balance import better_split, could_be
from cluster.planner.counting import model_parameters
from cluster.planner.hardware import Machine
from cluster.planner.layout import REDUCE, RESHARD, Layout
from cluster.planner.memory import RankMemory, parameters, rank_memory, state_sizes
from cluster.planner.overlap import messages_of
from cluster.planner.residency import held, largest, needed
from cluster.planner.rulebook import MEANINGFUL, RECOMPUTE, Case, keeps_all
from cluster.planner.search import Choices, divisors, legal, recomputations
from cluster.planner.software import Software
from cluster.planner.steptime import OF_A_LAYER, Step, layer_seconds, step
from core.model.config import ModelConfig
from sequence_parallel.engine.ulysses import CP_KINDS

AGAIN = ("recompute", "recompute_every")
LAST_RESORT = ("full", 1)  # of recomputation: nothing takes less memory, or more time


def all_but(*names: str) -> attrgetter:
    return attrgetter(*(f.name for f in fields(Layout) if f.name not in names))


BUT_MICROBATCHES = all_but("microbatch", "microbatches", *AGAIN)
OF_TIME = attrgetter(*(name for name in OF_A_LAYER if name not in AGAIN))
BUT_ZERO = all_but("zero", "reduce", "reshard", *AGAIN)
OWN_MEMORY = ("here", "megatron-2021")  # programs that are held to hold what this project does
ITEM = 2  # bytes of a weight
USABLE = 0.92  # of a device's memory: the rest is the runtime's, and lost between allocations
MOST_RANKS = 10**6  # of a machine that may be suggested
SHOWN = 10  # plans, the fastest ones, whose layers are split as well as can be
SHORTEST = 2048  # tokens of a sequence that a rank of cp has at least: with fewer its messages are not hidden


@dataclass(frozen=True)
class Plan:
    """A layout, and what it is expected to need."""

    layout: Layout
    memory: RankMemory  # on the rank of the pipeline that holds most
    step: Step


def choices(
    model: ModelConfig, machine: Machine, world: int, batch: int, fixed: Choices, software: Software | None = None
) -> Choices:
    """The values that a search tries: those that can be best, of what the program has."""
    schedules = software.schedules if software else ("1f1b", "interleaved", "zb-h1", "zb-v")
    largest = max(1, model.sequence // SHORTEST)
    usual = {
        "tp": [t for t in divisors(machine.node) if world % t == 0],
        "cp": [c for c in divisors(world) if c <= largest],
        "ulysses": [u for u in (1, 2, 4, 8) if u <= largest],
        "sp": [False, True],
        "zero": [0, 1, 2, 3],
        # DualPipeV hides all-to-alls; without experts it is no faster than ZB-V.
        "schedule": [s for s in schedules if s != "dualpipev" or model.experts],
        "recompute": ["none", "selective", "pointwise", *(["operators"] if more_than_pointwise(model) else []), "full"],
        "recompute_every": [1, 2],
        "microbatch": [b for b in (1, 2, 4, 8, 16) if b <= batch],
        "v": [2, 3, 4, 5, 6, 8],
    }
    return usual | fixed


def more_than_pointwise(model: ModelConfig) -> bool:
    """Whether recomputation by operators forgets more: masks, normalised queries and keys, or scores."""
    return bool(model.dropout or model.qk_norm or model.attention == "softmax")


def with_(layout: Layout, again: tuple[str, int]) -> Layout:
    """With this recomputation: what, and of how many layers one."""
    return replace(layout, recompute=again[0], recompute_every=again[1])


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
    tried = choices(model, machine, world, batch, fixed, software)
    again = recomputations(tried["recompute"], tried["recompute_every"])
    again = [x for x in again if keeps_all(Case(with_(Layout(), x), model), RECOMPUTE)]
    if not again:
        return
    moe = model.moe_layers > 0
    worth = partial(could_be_best, fixed, software, moe)
    first = {name: [value] for name, value in zip(AGAIN, again[0], strict=True)}
    orders: dict[tuple, list[tuple[str, int]]] = {}  # from what takes least time to what takes most

    def in_order(layout: Layout) -> list[tuple[str, int]]:
        key = OF_TIME(layout)
        if key not in orders:
            seconds = software and {x: layer_seconds(model, with_(layout, x), moe, machine, software) for x in again}
            orders[key] = sorted(again, key=seconds.__getitem__) if seconds else again
        return orders[key]

    states: dict[tuple, bool] = {}  # whether weights, gradients and optimizer fit without anything else

    def has_states(layout: Layout) -> bool:
        key = (layout.tp, layout.cp, layout.ep, layout.etp, layout.pp, layout.v, layout.schedule, layout.zero)
        if key not in states:
            states[key] = states_fit(model, layout, machine, software)
        return states[key]

    too_much: set[tuple] = set()
    failed: set[tuple] = set()  # the same with one recomputation
    settled: set[tuple] = set()  # fit with ZeRO-1 and nothing computed again: to shard more takes time and nothing else
    overlaps = software is not None and software.overlapped
    for layout in legal(model, machine, world, batch, tried | first, worth):
        key, but_zero = BUT_MICROBATCHES(layout), BUT_ZERO(layout)
        if key in too_much or (layout.zero > 1 and but_zero in settled):
            continue
        if not has_states(layout):
            yield layout, None
            too_much.add(key)
            continue
        need, order = None, in_order(layout)
        asked = LAST_RESORT in order[1:] and layout.microbatch * layout.pp > 1
        if asked:  # second, for where the last resort does not fit nothing does
            order = [order[0], LAST_RESORT, *(x for x in order[1:] if x != LAST_RESORT)]
        rest: tuple[Layout, RankMemory] | None = None
        for kind in order:
            this = with_(layout, kind)
            need = None if (key, kind) in failed else fits(model, this, machine, software)
            if need is None:
                failed.add((key, kind))
            if kind == LAST_RESORT and asked:
                if need is None:
                    yield this, None
                    break
                rest = this, need
                continue
            yield this, need
            if need is not None:
                if overlaps and layout.zero == 1 and kind[0] == "none" and fewer_messages(model, layout, software):
                    settled.add(but_zero)
                break
        else:
            if rest:
                yield rest
                need = rest[1]
        if need is None:
            too_much.add(key)


def plans(
    model: ModelConfig, machine: Machine, world: int, batch: int, software: Software, fixed: Choices, shown: int = SHOWN
) -> tuple[list[Plan], int]:
    """The layouts that fit and could be best, the fastest first, and how many were tried.

    Args:
        fixed: the values that may be tried, by field of `Layout`, where not all.
        shown: so many, the fastest, are as fast as what is sent when and the split can make them.
    """
    machine = with_equal_nodes(machine, world)
    found = list(fitting(model, machine, world, batch, fixed, software))
    fit = [Plan(x, need, step(model, x, machine, software)) for x, need in found if need is not None]
    fit.sort(key=lambda plan: plan.step.seconds)
    case = Case(Layout(), model, machine, world, batch)
    fit = with_better_exchanges(model, fit, machine, software, fixed, case, shown)
    if "split" not in fixed:
        fit = with_better_splits(model, fit, machine, software, shown)
    return fit, len(found)


def with_better_exchanges(
    model: ModelConfig, found: list[Plan], machine: Machine, software: Software, fixed: Choices, case: Case, shown: int
) -> list[Plan]:
    """The same plans, sorted again, those that can be among the first ones with what sends least of what fits.

    ZeRO-2 and 3 may keep gradients or weights over the microbatches, and cp gather keys and values at once: that takes
    memory, and at best what dp and cp add to the step is gone.
    """
    if not software.exchanges:
        return found
    kept, first = [], [inf] * shown
    for plan in found:
        x, parts = plan.layout, plan.step.parts
        if plan.step.seconds - parts["dp"] - parts["cp"] < first[-1]:
            for reduce, reshard, cp_kind in exchanges_of(x, fixed):
                other = replace(x, reduce=reduce, reshard=reshard, cp_kind=cp_kind)
                if not keeps_all(replace(case, layout=other), MEANINGFUL):
                    continue
                made = step(model, other, machine, software)
                if made.seconds < plan.step.seconds and (need := fits(model, other, machine, software)):
                    plan = Plan(other, need, made)
        kept.append(plan)
        first = sorted([*first, plan.step.seconds])[:shown]
    return sorted(kept, key=lambda plan: plan.step.seconds)


def exchanges_of(layout: Layout, fixed: Choices) -> Iterator[tuple[str, str, str]]:
    """Other values of --reduce, --reshard and --cp-kind that make a difference and that no flag decides."""
    reduces = REDUCE if layout.zero >= 2 and layout.microbatches > 1 and "reduce" not in fixed else (layout.reduce,)
    reshards = RESHARD if layout.zero == 3 and "reshard" not in fixed else (layout.reshard,)
    kinds = CP_KINDS if layout.cp > layout.ulysses and "cp_kind" not in fixed else (layout.cp_kind,)
    now = layout.reduce, layout.reshard, layout.cp_kind
    yield from (each for each in product(reduces, reshards, kinds) if each != now)


def with_better_splits(
    model: ModelConfig, found: list[Plan], machine: Machine, software: Software, shown: int
) -> list[Plan]:
    """The same plans, sorted again, those that can be among the first ones with the splits that make them faster.

    Equal stages are not always as fast, for the head is on one of them.
    """
    kept, first = [], [inf] * shown
    for plan in found:
        x = plan.layout
        shifts = x.pp > 1 and not software.balances
        if shifts and plan.step.seconds < first[-1] * could_be(model, x, machine, software):
            better = better_split(model, x, machine, software, partial(rank_fits, model, machine, software))
            if better:
                plan = Plan(better, fits(model, better, machine, software), step(model, better, machine, software))
        kept.append(plan)
        first = sorted([*first, plan.step.seconds])[:shown]
    return sorted(kept, key=lambda plan: plan.step.seconds)


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


def could_be_best(fixed: Choices, software: Software | None, moe: bool, layout: Layout) -> bool:
    """Whether no other layout does the same for less and the program has it, or a flag says this one."""
    if software and layout.pp > 1 and layout.zero > software.zero_in_pipeline and "zero" not in fixed:
        return False
    alone = layout.data == 1 and (not moe or layout.edp == 1)  # nothing that ZeRO could shard
    return not (
        (alone and layout.zero and "zero" not in fixed)
        or (layout.tp > 1 and not layout.sp and "sp" not in fixed)
        or (layout.pp == 1 and layout.schedule != "1f1b" and "schedule" not in fixed)
        or (layout.cp > 1 and layout.microbatch > 1 and not {"cp", "microbatch"} & fixed.keys())  # fewer full samples
    )


def fits(model: ModelConfig, layout: Layout, machine: Machine, software: Software | None = None) -> RankMemory | None:
    """What the rank holds that holds most; None where that is more than there is.

    Args:
        software: the program whose memory is meant; None, or one without figures of its own: this project.
    """
    room = usable(machine, software)
    if has_own_memory(software):
        most = largest(model, layout, software, room)
        return most if needed(most, layout, software) <= room else None
    most = largest(model, layout, None, room)
    return most if most.total <= room else None


def has_own_memory(software: Software | None) -> bool:
    """Whether the program's memory is another than this project's."""
    return software is not None and software.name not in OWN_MEMORY


def usable(machine: Machine, software: Software | None) -> float:
    """Bytes of a device that plans may fill; where the program's memory is known with what its allocator loses."""
    return machine.memory if has_own_memory(software) else USABLE * machine.memory


def rank_fits(model: ModelConfig, machine: Machine, software: Software, layout: Layout, rank: int) -> bool:
    """Whether rank `rank` of the pipeline holds no more than there is."""
    if has_own_memory(software):
        return needed(held(model, layout, software, rank), layout, software) <= machine.memory
    return rank_memory(model, layout, rank).total <= usable(machine, software)


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
    if has_own_memory(software):
        gradient, optimizer = software.gradient_held, software.state_held
    experts, others = parameters(model, layout, 0)
    full, shard = experts + others, others / layout.data + experts / layout.edp
    held = weight * (shard if layout.zero == 3 else full) + gradient * (shard if layout.zero >= 2 else full)
    return held + optimizer * (shard if layout.zero else full) <= machine.memory
