"""Lecture 02: Megatron-LM code overview (Megatron-LM 代码概览), and the combined 3D or 4D run.

    torchrun --nproc_per_node=8 cluster/train.py --tp 2 --pp 2 --dp 2

Megatron-LM's pretrain_gpt.py, step by step; here each step is a few lines, because the topics have the rest:

    Megatron-LM                         here
    parse_args, validate_args           arguments.py, rulebook.py
    initialize_megatron                 core.proof.launch, make_mesh: processes, groups, seeds
    model_provider, get_model           Worker: stages, tp, cp, experts, ZeRO
    setup_model_and_optimizer           Worker, and the last checkpoint
    train_step                          core.proof.training.train: forward, backward, clip, update; Worker
    evaluate_and_print_results          Worker.evaluate
    save_checkpoint                     checkpoint.py, while the training goes on

Unless told `--no-verify`, one process trains beside it, and every step is compared.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

from cluster import dry_run
from cluster.planner import memory, traffic
from cluster.planner.layout import Layout
from cluster.planner.models import Model
from cluster.run.arguments import HELD_OUT, add_all_flags, check, layout_of, learning_rate, model_of, moe_of, peak_of
from cluster.run.checkpoint import Checkpoints
from cluster.run.export import export, load_export
from cluster.run.worker import Worker, make_mesh
from core.ledger import Ledger
from core.model.gpt import GPT, GPTConfig, materialize
from core.model.seeded import generator
from core.model.text import Text
from core.proof.arguments import configuration
from core.proof.launch import Stop
from core.proof.lesson import Lesson, Run
from core.proof.oracle import Oracle
from core.proof.training import gathered, train
from expert_parallel.gating import end_step
from expert_parallel.moe import MoEConfig, to_moe

LARGEST_SAMPLE = 10**8  # parameters of a model that one process may hold to write text
FALLS = 20  # steps after which the validation loss must have fallen


def lesson(run: Run) -> None:
    args, job = run.args, run.job
    # Arguments, and the groups of ranks.
    config, moe = configuration(args), moe_of(args)
    # Of one rank for all: --auto may measure, and two ranks would not measure the same.
    layout = job.share(layout_of(args, args.world or job.world_size) if job.rank == 0 else None)
    if args.dry_run:
        return dry_run.show(run, config, model_of(config, moe), layout, args.rank)
    mesh = make_mesh(layout, job.device.type, Ledger(), job.timeout)
    run.mesh = {name: mesh[name].size for name in ("tp", "cp", "dp", "pp", "ep", "etp", "edp")}
    show(run, layout, model_of(config, moe))

    # Model and optimizer: this rank's part, the one process to compare with, and where an earlier run has stopped.
    optimizer_of = partial(torch.optim.AdamW, lr=args.lr)
    worker = Worker(config, moe, layout, mesh, args.seed, run.dtype, job.device, optimizer_of, args.bucket)
    oracle = one_process(run, config, moe, optimizer_of) if args.verify and job.rank == 0 else None
    checkpoints = Checkpoints(args.save, worker, job, args.keep) if args.save else None
    if args.init:
        or_stop(load_export, worker, args.init)
        follow(run, worker, oracle)
    first = resume(run, worker, oracle, checkpoints)

    # Train.
    training, validation = Text(args.data, args.sequence).split(HELD_OUT)
    judged = tuple(t.to(job.device) for t in validation.batch(args.seed, 0, args.batch))
    ledger, sent = mesh["dp"].ledger, Ledger()

    def evaluate() -> float:
        with ledger.recording_to(Ledger()):  # not what a step sends
            return worker.evaluate(*judged)

    def before_step(step: int) -> None:
        worker.set_lr(learning_rate(args, step))
        if oracle:
            set_lr(oracle, learning_rate(args, step))

    def after_step(step: int, loss: float, seconds: float) -> None:
        if args.evaluate and (step + 1) % args.evaluate == 0:
            run.say(f"step {step + 1}: validation loss {evaluate():.4f}")
        if checkpoints and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            or_stop(checkpoints.save, step + 1, {"step": step + 1, "losses": run.losses})

    before = evaluate()
    with ledger.recording_to(sent):
        worst = train(
            run, {"": worker}, oracle, text=training, first=first, compare=args.verify, before_step=before_step,
            after_step=after_step,
        )[""]  # fmt: skip
    steps, peak = max(0, args.steps - first), peak_of(job.device)
    if peak and steps:
        flops = steps * model_of(config, moe).flops(args.batch) / job.world_size
        run.say(f"MFU {flops / run.training_seconds / peak:.1%}")
    if checkpoints:
        or_stop(checkpoints.wait)
    if args.export:
        or_stop(export, worker, job, args.export)

    # What came of it.
    after = evaluate()
    run.say(f"validation loss {before:.4f} before, {after:.4f} after")
    claim_run(run, layout, model_of(config, moe), worker, sent, steps)
    if oracle and steps:
        worst.claim(run)
    if job.rank == 0 and first:
        done = max(first, args.steps)
        run.evidence.claim("losses, with those of the checkpoint", "one a step", done, len(run.losses))
    elif job.rank == 0 and args.steps >= FALLS and not args.init:
        run.evidence.claim("validation loss has fallen", "0 above that before", 0, max(0.0, after - before))
    write_text(run, worker, config, moe)
    worker.close()


def whole_model(config: GPTConfig, moe: MoEConfig | None) -> GPT:
    """That of one process, on the meta device."""
    return to_moe(GPT(config), moe) if moe else GPT(config)


def one_process(run: Run, config: GPTConfig, moe: MoEConfig | None, optimizer_of: partial) -> Oracle:
    args = run.args
    make = partial(whole_model, moe=moe)
    oracle = Oracle(config, args.seed, run.job.device, run.dtype, optimizer_of, args.clip, make)
    oracle.optimizer.register_step_post_hook(lambda *_: end_step(oracle.model))
    return oracle


def set_lr(oracle: Oracle, lr: float) -> None:
    for group in oracle.optimizer.param_groups:
        group["lr"] = lr


def resume(run: Run, worker: Worker, oracle: Oracle | None, checkpoints: Checkpoints | None) -> int:
    """Go on from the last complete checkpoint, if there is one, whatever layout wrote it; the steps that are done.

    Batches, masks and learning rates follow from the step, so there is nothing else to restore.
    """
    if checkpoints is None:
        return 0
    found = or_stop(checkpoints.latest)
    if found is None:
        return 0
    done = or_stop(checkpoints.load, found)
    run.losses += done["losses"]
    run.say(f"goes on from {found}, step {done['step']}\n")
    follow(run, worker, oracle)
    if done["step"] >= run.args.steps:
        run.say(f"all {run.args.steps} steps are done\n")
    return done["step"]


def follow(run: Run, worker: Worker, oracle: Oracle | None) -> None:
    """The one process goes on from where the ranks are."""
    if run.args.verify:
        weights, states = gathered(run, worker.weights(), worker.states())
        if oracle:
            oracle.adopt(weights, states)


def or_stop(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call of `Checkpoints` returns; its ValueError, which all ranks have, stops the run."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise Stop(str(error)) from error


def show(run: Run, layout: Layout, model: Model) -> None:
    """The layout, and what the planner says that a rank holds."""
    rows = []
    for rank in range(layout.pp):
        held = memory.held(model, layout, rank, run.dtype.itemsize)
        experts, others = memory.parameters(model, layout, rank)
        sizes = (held.weights, held.gradients, held.optimizer, held.activations)
        rows.append((rank, " ".join(map(str, layout.held(rank))), experts + others, *(size / 1e6 for size in sizes)))
    run.say(f"{layout}, {model.parameters():,} parameters")
    header = ("pp rank", "stages", "parameters", "weights", "gradients", "Adam", "activations")
    run.say(tabulate(rows, header, floatfmt=",.3f", intfmt=",") + "\n(planned, MB a rank)\n")


def claim_run(run: Run, layout: Layout, model: Model, worker: Worker, sent: Ledger, steps: int) -> None:
    """What each rank has and sends, against the planner."""
    by_axis: dict[str, float] = {}
    for (operation, name), entry in sent.traffic.items():
        if not name.endswith(("norm", "load")) and operation != "token counts":
            axis = "dp" if name.startswith("cp x dp") else name.split()[0]
            by_axis[axis] = by_axis.get(axis, 0.0) + entry.elements / max(1, steps)
    size = sum(p.numel() for p in worker.model.parameters() if p.requires_grad)
    everyone = run.job.gather((worker.pp.index, size, by_axis))
    if not everyone:
        return
    if layout.zero < 3:  # else parameters are gathered and freed
        each = [(f"parameters, rank {rank}", sum(memory.parameters(model, layout, place)), size)
                for rank, (place, size, _) in enumerate(everyone)]  # fmt: skip
        run.evidence.each("parameters on a rank", "the planner's, by place in the pipeline", each)
    if model.experts or not steps:
        return  # where tokens go is known afterwards
    plan = {place: traffic.sent(model, layout, place) for place in range(layout.pp)}
    for axis in sorted({axis for each in plan.values() for axis in each}):
        cases = [
            (f"elements over {axis}, rank {rank}", plan[place].get(axis, 0.0), found.get(axis, 0.0))
            for rank, (place, _, found) in enumerate(everyone)
        ]
        most = max(expected for _, expected, _ in cases)
        run.evidence.each(
            f"elements sent a step over {axis}", f"the planner's, {most:,.0f} at most", cases, 0.02 * most
        )


def write_text(run: Run, worker: Worker, config: GPTConfig, moe: MoEConfig | None) -> None:
    """A sample of what the model has learnt, by one process with the whole weights."""
    model = whole_model(config, moe)
    if not run.args.sample or sum(p.numel() for p in model.parameters()) > LARGEST_SAMPLE:
        return
    weights = dict(*gathered(run, worker.weights()))
    if run.job.rank:
        return
    model = materialize(model, run.args.seed, run.job.device, run.dtype).eval()
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
    text, random = list(b"The "), generator(run.args.seed, "sample")
    with torch.no_grad():
        for _ in range(run.args.sample):
            logits = model(torch.tensor([text[-config.sequence :]], device=run.job.device))[0, -1]
            text.append(int(torch.multinomial(logits.double().cpu().softmax(-1), 1, generator=random)))
    run.say(f"\nit writes: {bytes(text).decode(errors='replace')!r}")


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "02",
        "Megatron-LM code overview: the combined run",
        "Megatron-LM 代码概览",
        "Tensor, sequence, context, expert, pipeline and data parallelism with ZeRO in one training, in any layout.",
    )
    add_all_flags(frame)
    sys.exit(frame.main(check, lesson))
