"""What one sees of a pipeline on the page: the executed timeline beside the planned one, and who has which layers."""

from collections.abc import Mapping

from core.model.gpt import GPT
from core.proof.arguments import configuration
from core.proof.figures import Figure, Words, grid
from core.proof.lesson import Run
from pipeline.engine.actions import Schedule, most_in_flight, placement, size, stages_of_ranks
from pipeline.engine.validator import Timeline, Verdict, bubble, needed
from pipeline.evidence.claims import Measured, timeline_of
from pipeline.stages import layers_in, partition

# An action on the page: stage, kind, micro-batch, start, end, and on which rank's action it waited, if on another's.
Cell = tuple[int, str, int, float, float, tuple[int, str] | None]


def cells(timeline: Timeline, model: int = 0) -> list[list[Cell]]:
    """Every action of each rank under one cost model, with what it waited for: the last thing it needed to be there."""
    schedule = [[event.label for event in row] for row in timeline]
    rank_of, (stages, _) = placement(schedule), size(schedule)
    made = {
        (a.stage, "B" if a.kind == "I" else a.kind, a.microbatch): (rank, str(a), event.end[model])
        for rank, row in enumerate(timeline)
        for event in row
        for a in [event.label]
    }
    rows = []
    for rank, row in enumerate(timeline):
        rows.append([])
        free = 0.0  # when the rank had done the action before
        for event in row:
            result, waited = needed(event.label, stages), None
            if result and rank_of[result[0], result[2]] != rank and event.start[model] > free:
                waited = made[result][:2]
            rows[-1].append((*event.label, event.start[model], event.end[model], waited))
            free = event.end[model]
    return rows


def timelines(title: Words, shown: Mapping[str, tuple[Words, Timeline, int]], note: Words = "") -> Figure:
    """Timelines under one another.

    Args:
        shown: by a name: what it is, the timeline, and the cost model; 0 are units of time, 1 are seconds.
    """
    found = [
        {"name": what, "rows": cells(timeline, model), "unit": "s" if model else "", "bubble": bubble(timeline, model)}
        for what, timeline, model in shown.values()
    ]
    return {"kind": "timeline", "title": title, "timelines": found, "note": note}


def executed_beside_theory(title: Words, executed: Timeline, planned: Timeline, note: Words = "") -> Figure:
    """What ranks have done, in units of time and in this machine's seconds, and what they should do."""
    shown = {
        "executed": (
            ("executed, in virtual time: forward 1, backward 2", "实际执行，虚拟时间：前向 1，反向 2"),
            executed,
            0,
        ),
        "theory": (("by theory: on virtual devices", "理论：在虚拟设备上"), planned, 0),
        "measured": (("executed, with this machine's own costs", "实际执行，按本机实测的代价"), executed, 1),
    }
    return timelines(title, shown, note)


def draw(run: Run, schedule: Schedule, planned: Verdict, measured: list[Measured]) -> None:
    """What the page of a pipeline lesson shows; on rank 0."""
    title = "The timeline, as executed and by theory", "时间线：实际执行与理论"
    run.draw(executed_beside_theory(title, timeline_of(measured), planned.events))
    draw_stages(run, schedule)
    config, parts = configuration(run.args), stages_of_ranks(schedule)
    expected = []
    for row, stages, m in zip(schedule, parts, measured, strict=True):
        of_stages = sum(p.numel() for p in partition(GPT(config), stages, size(schedule)[0]).parameters())
        expected.append(of_stages * run.precision.bytes + most_in_flight(row, m.by_stage))
    for held in run.held.values():
        for of_rank, m in zip(held, measured, strict=True):
            of_rank["activations"] = m.saved_peak["engine"]
    run.formula = f"{run.precision.bytes} bytes a parameter, and most in flight x bytes of a micro-batch", expected


def draw_stages(run: Run, schedule: Schedule) -> None:
    """Which layers each rank has."""
    stages, _ = size(schedule)

    def cell(stage: int) -> tuple[tuple[str, str], str]:
        layers = layers_in(run.args.layers, stages, stage)
        some = f"{layers[0]}" + f"-{layers[-1]}" * (len(layers) > 1) if layers else "–"
        ends = [words for words, there in (((" + embedding", " + 词嵌入"), stage == 0),
                                           ((" + head", " + 输出头"), stage == stages - 1)) if there]  # fmt: skip
        english, chinese = (f"{text}{''.join(words[i] for words in ends)}" for i, text in enumerate(
            (f"stage {stage}: layers {some}", f"阶段 {stage}：第 {some} 层")))  # fmt: skip
        return (english, chinese), str(stage % 8)

    parts = stages_of_ranks(schedule)
    most = max(map(len, parts))
    rows = [
        (f"rank {rank}", [cell(stage) for stage in mine] + [("", None)] * (most - len(mine)))
        for rank, mine in enumerate(parts)
    ]
    run.draw(
        grid(("Which layers each rank has", "每个 rank 有哪些层"), "rank", [f"{i + 1}" for i in range(most)], rows)
    )
