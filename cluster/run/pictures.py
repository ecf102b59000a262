"""What one sees of the combined run on its page: who works with whom, what the planner says, and the pipeline."""

from torch import Tensor

from cluster.planner.layout import Layout
from cluster.planner.memory import rank_memory
from cluster.run.worker import Worker
from core.mesh import ORDER, axis_groups, axis_sizes
from core.model.config import ModelConfig
from core.proof.clock import VirtualClock
from core.proof.figures import bars, together
from core.proof.lesson import Run
from core.proof.memory import SavedActivations
from pipeline.engine.step import Trace
from pipeline.engine.validator import validate
from pipeline.evidence.pictures import executed_beside_theory

MOST_RANKS = 256  # that are shown
AXES = {  # of Megatron's order, and what the ranks of a group share
    "tp": ("one layer, a shard of it each", "同一层，各有一片"),
    "cp": ("one sequence, a shard of it each", "同一序列，各有一段"),
    "ep": ("one layer of experts, some of them each", "同一专家层，各有若干专家"),
    "dp": ("other samples: gradients are summed", "不同样本：梯度求和"),
    "pp": ("one model, some of its layers each", "同一模型，各有若干层"),
}


def draw(run: Run, layout: Layout, model: ModelConfig) -> None:
    """Of the layout: the groups of a chosen rank, and what the planner says that each rank holds."""
    sizes = axis_sizes(
        layout.ranks, tp=layout.tp, cp=layout.cp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp
    )
    if run.job.rank or layout.ranks > MOST_RANKS:
        return
    kinds = {name: (what, axis_groups(sizes, name, ORDER)) for name, what in AXES.items() if sizes[name] > 1}
    if kinds:
        title = "Who works together with a rank", "某个 rank 与谁一起工作"
        run.draw(together(title, layout.ranks, kinds))
    muon = run.args.optimizer == "muon"
    held = [rank_memory(model, layout, rank, run.dtype.itemsize, muon) for rank in range(layout.pp)]
    names = ("weights", "gradients", "optimizer", "activations", "gathered", "working")
    series = {name: [getattr(each, name) / 1e6 for each in held] for name in names}
    title = "What the planner says that a rank of each stage holds, MB", "规划器给出的各阶段 rank 持有的字节，MB"
    groups = [f"pp {i}: stages {' '.join(map(str, layout.stages_of(i)))}" for i in range(layout.pp)]
    run.draw(bars(title, "MB", groups, series, stacked=True), chart=True)
    of_stage = {rank: i for group in axis_groups(sizes, "pp", ORDER) for i, rank in enumerate(group)}
    states = [held[of_stage[rank]] for rank in range(layout.ranks)]
    expected = [each.weights + each.gradients + each.optimizer for each in states]
    run.formula = "the planner's weights, gradients and optimizer", expected


def draw_pipeline(run: Run, worker: Worker, batch: tuple[Tensor, Tensor]) -> None:
    """What the first pipeline does in one step more, measured, beside the theory. All ranks call it.

    Args:
        batch: as large as a step's; nothing is updated with it.
    """
    trace = Trace(VirtualClock(run.job.device), SavedActivations([]))
    worker.zero_grad()
    worker.forward_backward(run.args.steps, *batch, trace=trace)
    everyone = run.job.gather((worker.pp.ranks, trace.clock.events))
    if not everyone:
        return
    ranks = everyone[0][0]
    executed = [everyone[rank][1] for rank in ranks]
    planned = validate([[event.label for event in row] for row in executed])
    title = "The first pipeline, as executed and by theory", "第一条流水线：实际执行与理论"
    named = ", ".join(map(str, ranks))
    note = f"Row by row: ranks {named}. One step more, after the last.", f"各行依次为 rank {named}。再执行的一步。"
    run.draw(executed_beside_theory(title, executed, planned.events, note))
