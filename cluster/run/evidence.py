"""What the combined run shows and claims: the layout, the one process beside it, what a rank has and sends, a text."""

import argparse
from functools import partial
from statistics import mean

import torch
from tabulate import tabulate

from cluster.planner import hardware, memory, traffic
from cluster.planner.counting import model_parameters, step_flops
from cluster.planner.layout import Layout
from cluster.run.arguments import full_model
from cluster.run.build import TrainSpec
from cluster.run.recipe import adamw_of, groups_by_module
from cluster.run.worker import Worker, planned_muon, sent_by_axis
from core.ledger import Ledger
from core.model.config import ModelConfig
from core.model.gpt import materialize
from core.model.seeded import generator
from core.model.tokenizer import Tokenizer
from core.proof.comparison import gathered
from core.proof.lesson import Run
from core.proof.oracle import Oracle
from expert_parallel.engine.router import end_step
from zero.evidence import muon

LARGEST_SAMPLE = 10**8  # parameters of a model that one process may hold to write text
FALLS = 20  # steps after which the validation loss must have fallen


def show(run: Run, layout: Layout, model: ModelConfig) -> None:
    """The layout, and what the planner says that a rank holds."""
    rows = []
    for rank in range(layout.pp):
        held = memory.rank_memory(model, layout, rank, run.dtype.itemsize, run.args.optimizer == "muon")
        sizes = (held.weights, held.gradients, held.optimizer, held.activations)
        stages = " ".join(map(str, layout.stages_of(rank)))
        rows.append((rank, stages, sum(memory.parameters(model, layout, rank)), *(size / 1e6 for size in sizes)))
    run.say(f"{layout}, {model_parameters(model):,} parameters")
    header = ("pp rank", "stages", "parameters", "weights", "gradients", "optimizer", "activations")
    run.say(tabulate(rows, header, floatfmt=",.3f", intfmt=",") + "\n(planned, MB a rank)\n")


# ---- One process -----------------------------------------------------------------------------------------------------


def one_process(run: Run, spec: TrainSpec) -> Oracle | None:
    """The same training in one process, on rank 0, where it is to be compared."""
    if run.job.rank or not run.args.verify:
        return None
    make, make_optimizer = partial(full_model, moe=spec.moe), spec.make_optimizer
    groups = partial(groups_by_module, weight_decay=spec.weight_decay)
    if spec.muon:
        groups = partial(muon.named_groups, groups)
        make_optimizer = partial(
            muon.OneProcess, head_size=spec.config.head_dim, settings=spec.muon, **adamw_of(run.args).keywords
        )
    oracle = Oracle(spec.config, spec.seed, spec.device, make_optimizer, run.args.clip, make, groups, spec.eos)
    oracle.optimizer.register_step_post_hook(lambda *_: end_step(oracle.model))
    return oracle


def set_lr(oracle: Oracle, lr: float) -> None:
    for group in oracle.optimizer.param_groups:
        group["lr"] = lr


def follow(run: Run, worker: Worker, oracle: Oracle | None) -> None:
    """The one process goes on from where the ranks are. All ranks call it."""
    if run.args.verify:
        weights, states = gathered(run, worker.weights(), worker.states())
        if oracle:
            oracle.adopt(weights, states)


# ---- Claims ----------------------------------------------------------------------------------------------------------


def claim_run(run: Run, layout: Layout, model: ModelConfig, worker: Worker, sent: Ledger, steps: int) -> None:
    """What each rank has and sends, against the planner. All ranks call it."""
    size = sum(p.numel() for p in worker.model.parameters() if p.requires_grad)
    if worker.spec.muon:
        claim_muon(run, layout, model, worker, sent, steps)
    elements = {axis: traffic.elements / max(1, steps) for axis, traffic in sent_by_axis(sent).items()}
    everyone = run.job.gather((worker.pp.index, size, elements))
    if not everyone:
        return
    if layout.zero < 3:  # else parameters are gathered and freed
        cases = [(f"parameters, rank {rank}", sum(memory.parameters(model, layout, index)), size)
                 for rank, (index, size, _) in enumerate(everyone)]  # fmt: skip
        run.evidence.each("parameters on a rank", "the planner's, by rank of the pipeline", cases)
    if not steps or worker.counts_ahead():
        return  # a forward more than the planner knows of
    # Over ep and etp it hangs on what tokens choose.
    plan = {index: traffic.sent(model, layout, index) for index in range(layout.pp)}
    for axis in sorted({axis for by_axis in plan.values() for axis in by_axis} - {"ep", "etp"}):
        sent_by = {f"rank {rank}": (index, [rank]) for rank, (index, _, _) in enumerate(everyone)}
        if layout.zero and axis in ("tp", "pp"):  # they sum shards of gradients: which has how much of them is chance
            sent_by = {f"mean of pp rank {i}": (i, [r for r, e in enumerate(everyone) if e[0] == i]) for i in plan}
        cases = [
            (f"elements over {axis}, {who}", plan[i].get(axis, 0.0), mean(everyone[r][2].get(axis, 0.0) for r in ranks))
            for who, (i, ranks) in sent_by.items()
        ]
        most = max(expected for _, expected, _ in cases)
        formula = f"the planner's, {most:,.0f} at most; counted"
        run.evidence.each(f"elements sent a step over {axis}", formula, cases, 0.02 * most)


def claim_export(run: Run, model: ModelConfig, written: int) -> None:
    """That no number is left out."""
    biases = (
        model.experts * model.moe_layers if model.score == "sigmoid" else 0
    )  # of the selection, which are not trained
    if run.job.rank == 0:
        formula = "the planner's" + f", and {biases:,} biases of selections" * (biases > 0)
        run.evidence.claim("parameters written by --export", formula, model_parameters(model) + biases, written)


def claim_muon(run: Run, layout: Layout, model: ModelConfig, worker: Worker, sent: Ledger, steps: int) -> None:
    """What each rank sends to the owners of matrices, and back, and that they have one moment, not two."""
    counted = sum(traffic.elements for (_, axis), traffic in sent.traffic.items() if axis == "muon") / max(1, steps)
    moments = sum(value.numel() for _, value, _ in worker.states() if value.dim())
    everyone = run.job.gather((planned_muon(worker), counted, moments))
    if not everyone or not steps:
        return
    cases = [
        (f"elements sent a step for Muon, rank {rank}", plan, found) for rank, (plan, found, _) in enumerate(everyone)
    ]
    run.evidence.each("elements sent a step for Muon", "those of shards not with their owner; counted", cases, 1e-6)
    expected = 0
    for index in range(layout.pp):
        of_all, of_matrices = memory.parameters(model, layout, index), memory.matrix_parameters(model, layout, index)
        copies = (1, 1) if layout.zero else (layout.edp, layout.data)
        shards = (layout.ep * layout.etp, layout.tp)
        expected += sum((2 * a - m) * c * s for a, m, c, s in zip(of_all, of_matrices, copies, shards, strict=True))
    formula = f"2 of Adam, 1 of Muon: {expected:,}"
    run.evidence.claim("moments, elements on all ranks", formula, expected, sum(each[2] for each in everyone))


def claim_losses(run: Run, first: int, before: float, after: float) -> None:
    """That no step is lost over a restart, or that a new run has learnt.

    Args:
        first: the steps that an earlier run had done.
        before, after: the validation loss.
    """
    run.say(f"validation loss {before:.4f} before, {after:.4f} after")
    if run.job.rank:
        return
    if first or run.args.save:  # also where a run that should go on has begun at 0
        done = max(first, run.args.steps)
        run.evidence.claim("losses, with those of the checkpoint", "one a step", done, len(run.losses))
    if not first and run.args.steps >= FALLS and not (run.args.init or run.args.hf):
        run.evidence.claim("validation loss has fallen", "0 above that before", 0, max(0.0, after - before))


def say_utilization(run: Run, model: ModelConfig, steps: int) -> None:
    """Model FLOP/s utilization, where it is known what the device can do."""
    known = hardware.of_gpu(run.job.device) if run.job.device.type == "cuda" else None
    if known and known.peak and steps:
        flops = steps * step_flops(model, run.args.batch) / run.job.world_size
        run.say(f"MFU {flops / run.training_seconds / known.peak:.1%}")


def write_text(run: Run, worker: Worker) -> None:
    """A sample of what the model has learnt, by one process with the full weights. All ranks call it."""
    spec = worker.spec
    model = full_model(spec.config, spec.moe)
    if not run.args.sample or sum(p.numel() for p in model.parameters()) > LARGEST_SAMPLE:
        return
    weights = dict(*gathered(run, worker.weights()))
    if run.job.rank:
        return
    model = materialize(model, spec.seed, spec.device, spec.precision).eval()
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
    text = Writing(run.args)
    ids, random = list(text.prompt), generator(spec.seed, "sample")
    with torch.no_grad():
        for _ in range(run.args.sample):
            x = torch.tensor([ids[-spec.config.sequence :]], device=spec.device)
            logits = model(x, lambda head, x: head(x[:, -1:])).flatten()
            ids.append(int(torch.multinomial(logits.double().cpu().softmax(-1), 1, generator=random)))
            if ids[-1] == run.args.eos:
                break
    run.say(f"\nit writes: {text.of(ids)!r}")


class Writing:
    """Of token ids what is shown: the tokenizer's text, or bytes as text; of `--tokens` alone the ids themselves."""

    def __init__(self, args: argparse.Namespace):
        self.tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
        self.bytes = self.tokenizer is None and args.tokens is None
        self.prompt = list(b"The ") if self.bytes else [args.eos or 0]
        if self.tokenizer:  # whose words begin with a blank
            self.prompt = self.tokenizer.encode("The") or self.prompt

    def of(self, ids: list[int]) -> str | list[int]:
        if self.tokenizer:
            return self.tokenizer.decode(ids)
        return bytes(min(i, 255) for i in ids).decode(errors="replace") if self.bytes else ids
