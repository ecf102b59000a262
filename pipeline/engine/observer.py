"""Who is told what a rank of a pipeline computes, and what comes next. Lecture 09."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from pipeline.engine.actions import UNIT_COSTS, Action


class Observer(Protocol):
    """Is told what a rank computes: so it can have weights there in time, and send gradients as soon as they are there.

    Every call is made on all ranks that run the same row of the schedule, in the same order.
    """

    def begins(self, action: Action, then: Sequence[Action], final: bool) -> None:
        """Before an F, B, I or W, and before its input has arrived. Of an F&B both begin, and then both end.

        Args:
            then: the next F, B or I, which reads weights, or the next F&B; none at the end.
            final: whether it is the last B or W of its stage, after which no gradient is added.
        """

    def ends(self, action: Action) -> None:
        """After it has been computed."""

    def done(self) -> None:
        """After the last of all."""


def what_follows(
    row: Sequence[Action], pairs: Mapping[Action, Action] | None = None
) -> dict[Action, tuple[Sequence[Action], bool]]:
    """`then` and `final`, as an observer is told them, of each action of a row.

    Args:
        pairs: the F that are computed by turns with the B that comes next in the row.
    """
    pairs = pairs or {}
    found: dict[Action, tuple[Sequence[Action], bool]] = {}
    then, finished, seconds = (), set(), set(pairs.values())
    for action in reversed([action for action in row if action.kind in UNIT_COSTS]):
        final = action.kind in ("B", "W") and action.stage not in finished
        found[action] = then, final
        finished |= {action.stage} if final else set()
        if action.kind != "W" and action not in seconds:
            then = (action, pairs[action]) if action in pairs else (action,)
    return found
