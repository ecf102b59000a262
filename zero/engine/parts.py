"""What of a rank's model is computed at a time: all of it, or one stage of a pipeline. Lectures 01 and 07."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

Named = Sequence[tuple[str, nn.Parameter]]
Users = tuple[int, ...]  # the parts that have a parameter


class Action(Protocol):
    """Of a schedule: kind F, B, I (dgrad) or W (wgrad) of one micro-batch on one stage. Three values, in this order."""

    stage: int
    kind: str
    microbatch: int

    def __iter__(self): ...


@dataclass(frozen=True)
class Parts:
    """The parts of a rank's model.

    Args:
        models: by number, modules with `blocks`. They may share parameters: the tied embedding of first and last stage.
        elsewhere: which ranks of a pipeline have a parameter. What differs in that is not sent together: so those ranks
            have the same shard of what they have in common, and can add it up.
        whole_model: whether the one part is called as a model, and no pipeline says when it begins and ends.
    """

    models: Mapping[int, nn.Module]
    elsewhere: Callable[[nn.Parameter], Hashable] = lambda _: ()
    whole_model: bool = False

    def groups(self, named: Named) -> list[tuple[Users, Named]]:
        """These parameters by the parts that use them and the ranks that have them: what may be sent together."""
        users: dict[nn.Parameter, list[int]] = {}
        for number, model in self.models.items():
            for p in model.parameters():
                users.setdefault(p, []).append(number)
        found: dict[Hashable, tuple[Users, list[tuple[str, nn.Parameter]]]] = {}
        for name, p in named:
            mine = tuple(users[p])
            found.setdefault((mine, self.elsewhere(p)), (mine, []))[1].append((name, p))
        return list(found.values())
