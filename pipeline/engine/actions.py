"""A pipeline schedule is plain data: for each rank, the list of actions that it carries out in order.

Kinds: F forward; B backward, both halves; I its input gradient alone (dgrad), which the zero-bubble paper (2401.10241)
calls B; W its weight gradients alone (wgrad).

p ranks, S stages, m micro-batches
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import NamedTuple

# The slides count a backward B as two forwards: one for I, one for W.
UNIT_COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class Action(NamedTuple):
    """One thing that a rank does for one micro-batch: kind F, B, I or W, or SEND_F, RECV_F, SEND_B, RECV_B.

    The stage is the one that computes, sends or receives.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Action]]  # Schedule[rank] in order


class ScheduleError(ValueError):
    """A schedule that no pipeline could run; says which rank, which position in its row, and which action."""


class Row(list[Action]):
    """A rank's actions under construction, where it has several stages: counts their micro-batches.

    Args:
        stages: stage and its first micro-batch, of each.
    """

    def __init__(self, *stages: tuple[int, int]):
        super().__init__()
        self._stages = [stage for stage, _ in stages]
        self._next_forward = [first for _, first in stages]
        self._next_backward = [first for _, first in stages]
        self._pending: list[Action] = []  # the W of the I so far, in their order
        self.pairs: set[tuple[Action, Action]] = set()  # a forward and a backward that are meant to overlap

    def forward(self, which: int) -> None:
        """F of the next micro-batch, on stage number `which` of this rank's."""
        self.append(Action(self._stages[which], "F", self._next_forward[which]))
        self._next_forward[which] += 1

    def backward(self, which: int, split: bool = False) -> None:
        """B of the next micro-batch, or I alone: its W is then pending."""
        action = Action(self._stages[which], "I" if split else "B", self._next_backward[which])
        self.append(action)
        self._next_backward[which] += 1
        if split:
            self._pending.append(action._replace(kind="W"))

    def together(self, forward: int, backward: int) -> None:
        """A forward on one stage and a backward on another, which overlap where a device can do both at once."""
        self.forward(forward)
        self.backward(backward)
        self.pairs.add((self[-2], self[-1]))

    def weights(self, which: int | None = None) -> None:
        """The oldest pending W, of this stage or of any."""
        action = next(a for a in self._pending if which is None or a.stage == self._stages[which])
        self._pending.remove(action)
        self.append(action)

    def all_weights(self, which: int) -> None:
        """Every pending W of this stage."""
        for _ in [a for a in self._pending if a.stage == self._stages[which]]:
            self.weights(which)

    def next_forward(self, which: int) -> int:
        """The next micro-batch to go forward."""
        return self._next_forward[which]


# ---- Which rank has which stage --------------------------------------------------------------------------------------


def placement(schedule: Schedule) -> dict[tuple[int, int], int]:
    """The rank that computes a stage for a micro-batch, by (stage, micro-batch).

    Most schedules have each stage on one rank. DualPipe has it on two, and micro-batches go through either.
    """
    return {(action.stage, action.microbatch): rank for rank, row in enumerate(schedule) for action in row}


def stages_of_ranks(schedule: Schedule) -> list[list[int]]:
    """The stages of each rank, in order."""
    return [sorted({action.stage for action in row}) for row in schedule]


def size(schedule: Schedule) -> tuple[int, int]:
    """Stages and micro-batches."""
    actions = [action for row in schedule for action in row]
    return 1 + max(a.stage for a in actions), 1 + max(a.microbatch for a in actions)


def stage_share(schedule: Schedule) -> float:
    """The size of a stage, where 1/p of the model is 1, the unit of costs and memory: p/S."""
    return len(schedule) / size(schedule)[0]


def most_in_flight(row: list[Action], bytes_of: dict[int, int] | None = None) -> int:
    """The most at a time between the forward and the end of the backward, over the rank's stages.

    Args:
        bytes_of: what a micro-batch counts, by stage: 1 without it.
    """
    now = most = 0
    for stage, kind, _ in row:
        counts = bytes_of[stage] if bytes_of else 1
        if kind == "F":
            now += counts
        elif kind in ("B", "W"):
            now -= counts
        most = max(most, now)
    return most


# ---- What travels ----------------------------------------------------------------------------------------------------


def input_of(action: Action) -> Action | None:
    """The receive of what `action` needs from a neighbouring stage; None for a W.

    At the ends of the pipeline no stage sends it: see `sender_of`.
    """
    kind = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B"}.get(action.kind)
    return action._replace(kind=kind) if kind else None


def output_of(action: Action) -> Action | None:
    """The receive, on the next stage in its direction, of what `action` makes; None for a W."""
    receive = input_of(action)
    if receive is None:
        return None
    return receive._replace(stage=action.stage + 1 if action.kind == "F" else action.stage - 1)


def sender_of(receive: Action) -> tuple[int, int]:
    """(stage, micro-batch) that sends this; at the ends of the pipeline there is no such stage."""
    return (receive.stage - 1 if receive.kind == "RECV_F" else receive.stage + 1), receive.microbatch


def messages(schedule: Schedule) -> list[tuple[int, int, Action]]:
    """(sender, receiver, the receive) of every message between two ranks, each sender's in the order of its row."""
    rank_of = placement(schedule)
    found = []
    for rank, row in enumerate(schedule):
        for receive in filter(None, map(output_of, row)):
            receiver = rank_of.get((receive.stage, receive.microbatch), rank)
            if receiver != rank:
                found.append((rank, receiver, receive))
    return found


def routes(schedule: Schedule) -> list[tuple[int, int, str]]:
    """(sender, receiver, "F" or "B") of all messages, as `core.p2p.PointToPoint` wants to know them."""
    return sorted({(sender, receiver, receive.kind[-1]) for sender, receiver, receive in messages(schedule)})


def side_by_side(program: list[Action], pairs: Mapping[Action, Action]) -> list[Action]:
    """Put each forward of a row with communication right before the backward that it overlaps with.

    Its result is then sent when both are done, and what is received in between is posted before.
    """
    out: list[Action] = []
    later: list[Action] = []  # sends of a pair that has begun
    backward = None  # with which the forward last seen is paired
    for action in program:
        if backward is not None and action.kind.startswith("RECV"):
            out.insert(len(out) - 1, action)
        elif backward is not None and action.kind.startswith("SEND"):
            later.append(action)
        else:
            out.append(action)
        if action in pairs:
            backward = pairs[action]
        elif action == backward:
            out, later, backward = out + later, [], None
    return out


def with_communication(schedule: Schedule) -> Schedule:
    """Add sends and receives by rule: a result leaves right after its action, the receive of an input is posted ahead.

    A receive is posted one action before the one that needs it, so the message travels while that action computes.
    Receives from one rank and direction are posted in the order in which that rank sends, which NCCL relies on.
    Where the next stage is on the same rank, nothing is sent.
    """
    travelling: dict[tuple[int, int, str], deque[Action]] = defaultdict(deque)  # by (sender, receiver, kind)
    sender_rank: dict[tuple[int, Action], int] = {}  # by (receiver, receive)
    for sender, receiver, receive in messages(schedule):
        travelling[sender, receiver, receive.kind].append(receive)
        sender_rank[receiver, receive] = sender
    sent = {(sender, receive) for (_, receive), sender in sender_rank.items()}

    program: Schedule = []
    for rank, row in enumerate(schedule):
        out: list[Action] = []
        posted: set[Action] = set()
        for position, action in enumerate(row):
            for soon in row[position : position + 2]:
                receive = input_of(soon)
                sender = sender_rank.get((rank, receive))
                while sender is not None and receive not in posted:
                    out.append(travelling[sender, rank, receive.kind].popleft())
                    posted.add(out[-1])
            out.append(action)
            if (rank, output_of(action)) in sent:
                out.append(action._replace(kind="SEND_F" if action.kind == "F" else "SEND_B"))
        program.append(out)
    return program
