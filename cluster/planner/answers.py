"""What to say of a search's layouts: ties, the layouts everybody knows, what more hardware would win. Lecture 03.

The model of time has an error of its own, which `cluster/accuracy.py` measures. Layouts that differ by less are as good
as each other, and the simplest of them is the one to take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.planner.layout import Layout
from cluster.planner.machines import Link, Machine
from cluster.planner.memory import parameters
from cluster.planner.plans import Plan, plans
from cluster.planner.residency import largest, needed
from cluster.planner.rulebook import Case, broken
from cluster.planner.search import Choices, divisors
from cluster.planner.software import EP_OVERLAPPED, Software
from cluster.planner.steptime import step
from core.model.config import ModelConfig

# Of H100 in bfloat16: the median error and that of nine of ten, rounded up; tests/cluster/test_published_runs.py holds
# these, the README's and what is said below to `cluster/accuracy.py`.
RUNS, WITHIN = 375, {"dense": (0.03, 0.12), "mixtures": (0.04, 0.16)}
SAID = "{0[0]:.0%} (median) and {0[1]:.0%} (nine of ten)"
DOMAIN = f"""Held against {RUNS} published runs (cluster/accuracy.py). In bfloat16 on 8 to 8192 H100: dense models of
0.8 to 530 x 10^9 parameters within {SAID.format(WITHIN["dense"])},
mixtures of experts {SAID.format(WITHIN["mixtures"])}; in the median of A100 3 to 20 %,
of 8-bit products 2 to 30 %, of B200 and GB200 5 to 11 % dense and up to 40 % for mixtures. Memory within 6 % (median)
and 16 % (nine of ten). MI300X, L40S, 4090, H200, clouds: by data sheets alone. Not in it: layers of state-space or
linear attention, stragglers, failures, data loading, checkpoints, other jobs on the network. Constants are of named
programs (--software); those of deepspeed and here are borrowed."""


def error_of(model: ModelConfig) -> float:
    """By which the time of a layout may be off, relative, as likely as not."""
    return WITHIN["mixtures" if model.experts else "dense"][0]


# ---- Ties ------------------------------------------------------------------------------------------------------------


def parts_of(layout: Layout) -> int:
    """How complicated a layout is: its axes, and what else one has to know of it."""
    axes = sum(getattr(layout, axis) > 1 for axis in ("tp", "cp", "ep", "etp", "pp"))
    return axes + (layout.ulysses > 1) + (layout.v > 1) + (layout.schedule not in ("1f1b", "interleaved"))


def ties(model: ModelConfig, found: Sequence[Plan]) -> list[Plan]:
    """Those that are as fast as the fastest, as far as the model of time can say."""
    return [p for p in found if p.step.seconds <= (1 + error_of(model)) * found[0].step.seconds]


def simplest(model: ModelConfig, found: Sequence[Plan]) -> Plan:
    """Of the layouts that are tied the one with fewest parts; of these the fastest."""
    return min(ties(model, found), key=lambda plan: (parts_of(plan.layout), plan.step.seconds))


# ---- The layouts that everybody knows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A common layout at its best; `plan` is None where no form of it keeps the rules and fits."""

    name: str
    plan: Plan | None


def known(
    model: ModelConfig, machine: Machine, world: int, batch: int, software: Software, found: Sequence[Plan]
) -> list[Known]:
    """ZeRO-3 alone, as FSDP has it, and tp inside a node with a pipeline outside: at their best, found or searched."""

    def best(name: str, fixed: Choices, alike: object) -> Known:
        some = [plan for plan in found if alike(plan.layout)]
        if not some:
            some = plans(model, machine, world, batch, software, fixed)[0]
        return Known(name, some[0] if some else None)

    alone = {"tp": [1], "cp": [1], "pp": [1], "zero": [3], "ulysses": [1]}
    if model.experts:
        alone["ep"] = [1]
    node = max((t for t in divisors(machine.node) if model.heads % t == 0 and world % t == 0), default=1)
    node = min(node, 8)
    inside = {"tp": [node], "cp": [1], "ulysses": [1], "schedule": ["1f1b", "interleaved"],
              "pp": [p for p in divisors(world // node) if p > 1] or [1]}  # fmt: skip
    return [
        best("FSDP alone", alone, lambda x: x.zero == 3 and x.tp == x.cp == x.ep == x.pp == 1),
        best(f"tp {node} in a node, pp outside" if inside["pp"] != [1] else f"tp {node} in a node", inside,
             lambda x: x.tp == node and x.cp == 1 and x.pp in inside["pp"] and x.schedule in ("1f1b", "interleaved")),
    ]  # fmt: skip


# ---- What would be won -----------------------------------------------------------------------------------------------


def twice_the_network(machine: Machine) -> Machine:
    def half(link: Link) -> Link:
        return replace(link, beta=link.beta / 2)

    return replace(machine, outside=half(machine.outside), beyond=machine.beyond and half(machine.beyond))


def gains(
    model: ModelConfig, machine: Machine, world: int, batch: int, software: Software, best: Plan, fixed: Choices
) -> Iterator[tuple[str, float]]:
    """What, and by how much the best layout then trains faster: tokens a second, relative.

    The search is that of layouts near the best one: with its tp, cp and ep or half and twice of them.
    """
    near = dict(fixed)
    for axis in ("tp", "cp", "ep", "pp"):
        size = getattr(best.layout, axis)
        near.setdefault(axis, sorted({max(1, size // 2), size, 2 * size}))
    before = batch / best.step.seconds
    for what, other in (
        ("twice the network", twice_the_network(machine)),
        ("twice the memory", replace(machine, memory=2 * machine.memory)),
    ):
        found, _ = plans(model, other, world, batch, software, near, shown=1)
        yield what, max(0.0, batch / found[0].step.seconds / before - 1) if found else 0.0
    if best.layout.ep > 1 and not best.layout.by_turns and best.step.parts.get("ep"):
        hidden = step(model, best.layout, machine, replace(software, ep_seen=EP_OVERLAPPED * software.ep_seen))
        yield "all-to-alls behind the other half of a batch", batch / hidden.seconds / before - 1
    more = world + (machine.node if world >= machine.node else 1)
    samples = max(1, round(batch / best.layout.dp)) * max(1, best.layout.dp * more // world)
    free = {"zero": [best.layout.zero, 3], "schedule": [best.layout.schedule, "1f1b"], "ulysses": [1]}
    found, _ = plans(model, machine, more, samples, software, free | fixed | {"microbatch": [1, 2, 4, 8]}, shown=1)
    found = [plan for plan in found if plan.layout.ranks == more]
    name = "one more GPU" if more == world + 1 else f"one more node ({more} GPUs)"
    gain = found[0].layout.batch / found[0].step.seconds / before - 1 if found else 0.0
    yield (name, gain) if gain > 0 else (f"{name}, which divides badly,", 0.0)


# ---- Few devices -----------------------------------------------------------------------------------------------------

# Parameters a second that the host's processors update for each device. NVIDIA-NeMo/Megatron-Bridge, card of CPU
# offloading: 1.27 x 10^9 of Qwen3 30B on each of 16 H100, 0.996 s a step without and 4.189 s with all of it.
HOST_UPDATES = 1.27e9 / (4.189 - 0.996)


@dataclass(frozen=True)
class Offloaded:
    """ZeRO-3 whose gradients and optimizer states are on the host (2101.06840), which this project does not train."""

    layout: Layout
    device: float  # bytes
    host: float  # bytes, for each device
    seconds: float
    room: tuple[float, float]  # bytes that there are of both, for each device

    @property
    def fits(self) -> bool:
        return self.device <= self.room[0] and self.host <= self.room[1]


def offloaded(model: ModelConfig, machine: Machine, world: int, batch: int, software: Software) -> Offloaded | None:
    """The fastest that fits device and host; or where none does the one that holds least; None: the rules allow none.

    The host's memory is for all devices of a node, also where only some of them train.
    """
    best = None
    room = machine.memory, machine.host_memory * machine.node / min(world, machine.node)
    for size in divisors(max(1, batch // world)):
        x = Layout(dp=world, zero=3 if world > 1 else 0, microbatch=size, microbatches=batch // (world * size),
                   recompute="full", loss_chunk=0)  # fmt: skip
        if x.batch != batch or broken(Case(x, model, machine, world, batch)):
            continue
        experts, others = parameters(model, x)
        shard = (experts + others) / world
        memory = largest(model, x, software)
        device = (
            needed(memory, x, software) - memory.optimizer - memory.gradients + 2 * (experts + others) / model.layers
        )
        host = 14 * shard  # gradients of 2 bytes, and of the optimizer weight and moments of 4
        seconds = step(model, x, machine, software).seconds + shard / HOST_UPDATES + 4 * shard / machine.host
        this = Offloaded(x, device, host, seconds, room)
        if best is None or (not this.fits, this.seconds if this.fits else device) < (
            not best.fits, best.seconds if best.fits else best.device):  # fmt: skip
            best = this
    return best


def few(
    model: ModelConfig, machine: Machine, batch: int, software: Software
) -> Iterator[tuple[int, Plan | Offloaded | None]]:
    """For 1 to 8 devices the best plan; or with the optimizer on the host; or None, where neither fits."""
    for world in (1, 2, 4, 8):
        samples = max(1, batch // world) * world
        found, _ = plans(model, machine, world, samples, software, {})
        yield world, simplest(model, found) if found else offloaded(model, machine, world, samples, software)
