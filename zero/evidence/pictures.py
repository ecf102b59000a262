"""What one sees of lecture 01: who owns which elements, and when a layer's weights are gathered, used and freed."""

from collections.abc import Mapping, Sequence

from core.proof.figures import grid, owners
from core.proof.language import catalogue
from core.proof.lesson import Run
from core.proof.trainable import Trainable
from core.shards import FlatShard, LocalTensor

Runs = list[tuple[int, int]]  # of elements, in the order of the parameters: from, to
# What happens to the weights of a layer, the colour of its cell and what it is called; between them they are there.
EVENTS = {
    "gathered": ("2", ("gathered", "收集")),
    "forward": ("0", ("forward", "前向")),
    "backward": ("1", ("backward", "反向")),
    "freed": ("7", ("freed", "释放")),
}


def owned(version: Trainable) -> list[Runs]:
    """Of weights, reduced gradients and the optimizer's first moment the elements that this rank has."""
    starts, at = {}, 0
    for name, p in version.model.named_parameters():
        starts[name] = at
        at += p.numel()
    moments: dict[tuple, LocalTensor] = {}  # a part of a parameter may be in several buckets: each has its own
    for (name, _), value, mark in version.states():
        if value.dim():
            moments.setdefault((name, mark), LocalTensor(name, value, mark))
    return [_runs(starts, tensors) for tensors in (version.weights(), version.gradients(), [*moments.values()])]


def _runs(starts: dict[str, int], tensors: Sequence[LocalTensor]) -> Runs:
    found: Runs = []
    for name, value, mark in sorted(tensors, key=lambda t: (starts[t.name], getattr(t.shard, "first", 0))):
        first = starts[name] + (mark.first if isinstance(mark, FlatShard) else 0)
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], first + value.numel()
        else:
            found.append((first, first + value.numel()))
    return found


def draw_owned(run: Run, trained: Mapping[str, Trainable]) -> None:
    """Who has which elements, in either version. All ranks call it."""
    for name, version in trained.items():
        everyone = run.job.gather(owned(version))
        if everyone:
            size = sum(p.numel() for p in version.model.parameters())
            which = catalogue("zh").gettext(name)
            title = f"Who owns which of Ψ = {size:,} elements, {name}", f"Ψ = {size:,} 个元素归谁所有，{which}"
            parts = [("weights", "权重"), ("reduced gradients", "归约后的梯度"), ("moments", "动量")]
            run.draw(owners(title, parts, everyone, size))


def draw_events(run: Run, name: str, order: Sequence[tuple[int, str]], layers: int) -> None:
    """What happened to the layers in the first micro-batch of the run, on rank 0.

    Args:
        order: (layer, event), in time.
    """
    rows, there = [], 0.3  # the shade of weights that have memory
    for layer in range(layers):
        row, shade = [], None
        for at, event in order:
            if at == layer:
                row.append((EVENTS[event][1], EVENTS[event][0]))
                shade = None if event == "freed" else there
            else:
                row.append(("", shade))
        rows.append((f"{layer}", row))
    title = (
        f"The weights of each layer in the first micro-batch on rank 0, {name}, in the order of time",
        f"rank 0 上第一个微批次中各层的权重，{catalogue('zh').gettext(name)}，按时间顺序",
    )
    note = ("Shaded: the full weights of the layer have memory.", "有底色：该层的完整权重占着内存。")
    run.draw(grid(title, ("layer", "层"), [str(i + 1) for i in range(len(order))], rows, note=note))
