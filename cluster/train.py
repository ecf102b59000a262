"""Lecture 02: Megatron-LM code overview (Megatron-LM 代码概览), and the combined 3D or 4D run.

    torchrun --nproc_per_node=8 cluster/train.py --tp 2 --pp 2 --dp 2

read: train.py:60-154; run/build.py:105-157; then run/worker.py

Megatron-LM's pretrain_gpt.py, step by step; here each step is a few lines, because the topics have the rest:

    Megatron-LM                         here
    parse_args, validate_args           run/arguments.py, and the rules of all topics
    initialize_megatron                 core.proof.launch, make_mesh: processes, groups, seeds
    model_provider, get_model           build_model: stages, tp, cp, experts
    setup_model_and_optimizer           shard_optimizer: ZeRO; then the last checkpoint
    train_step                          core.proof.training.train: forward_backward, clip and step of the Worker
    evaluate_and_print_results          Worker.evaluate
    save_checkpoint                     core.proof.checkpoint, while the training goes on

Unless told `--no-verify`, one process trains beside it, and every step is compared.
"""

import argparse
import sys
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from cluster import dry_run
from cluster.evidence.order import Order
from cluster.run import evidence, pictures
from cluster.run.arguments import add_all_flags, check, configured, folder_of, full_model, layout_of, model_of, moe_of
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.data import HELD_OUT, data_of
from cluster.run.export import export
from cluster.run.hf import bytes_of
from cluster.run.load import load_export, load_published
from cluster.run.recipe import learning_rate, optimizer_of
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.proof.checkpoint import Checkpoints, agreed
from core.proof.files import FolderLock
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from core.proof.oracle import Oracle
from core.proof.training import train


def lesson(run: Run) -> None:
    """Pretrain, and let others write there afterwards, however it ends."""
    locks: list[FolderLock] = []
    try:
        pretrain(run, locks)
    finally:
        for lock in locks:
            lock.close()


def pretrain(run: Run, locks: list[FolderLock]) -> None:
    """`locks` takes those of the places that are written to, on rank 0."""
    args, job = run.args, run.job
    # Arguments. The layout is one rank's for all: --auto may measure, and two ranks would not measure the same.
    layout = job.share(layout_of(args, args.world or job.world_size) if job.rank == 0 else None)
    config, moe, folder = configured(args), moe_of(args), folder_of(args)
    model = model_of(config, moe)  # as the planner knows it
    if args.dry_run:
        return dry_run.show(run, model, layout, args.rank, optimizer_of(args)[1])

    # Groups of ranks.
    mesh = make_mesh(layout, job.device.type, Ledger(), job.timeout)
    run.mesh = {name: mesh[name].size for name in ("tp", "cp", "dp", "pp", "ep", "etp", "edp")}
    evidence.show(run, layout, model)
    pictures.draw(run, layout, model)

    # This rank's shards of model and optimizer, from where an earlier run has stopped.
    random = args.init == "random" or not (args.init or folder)
    make_optimizer, muon = optimizer_of(args)
    spec = TrainSpec(
        config, moe, layout, args.seed, run.precision, job.device, make_optimizer, args.bucket,
        drawn=random, weight_decay=args.weight_decay, eos=args.eos if args.pack else None, muon=muon,
    )  # fmt: skip
    worker = Worker(spec, mesh)
    order = Order(worker) if worker.pipeline else None
    if args.verify and run.dtype != torch.float64:
        worker.record_choices()
    oracle = evidence.one_process(run, spec)
    for name in ("save", "export"):
        if path := getattr(args, name):
            or_stop(alone, job, name, path, locks)
    checkpoints = worker.checkpoints(args.save, job, args.keep) if args.save else None
    if not random and (checkpoints is None or or_stop(checkpoints.latest) is None):
        if args.init:
            or_stop(load_export, worker, args.init)
        else:
            or_stop(load_published, worker, folder, full_model(config, moe))
        evidence.follow(run, worker, oracle)
    first = resume(run, worker, oracle, checkpoints)

    # Train.
    training, validation = data_of(args).split(HELD_OUT)
    held_out = tuple(t.to(job.device) for t in validation.batch(args.seed, 0, args.batch))
    ledger, sent = mesh["dp"].ledger, Ledger()

    def evaluate() -> float:
        with ledger.recording_to(Ledger()):  # not what a step sends
            return worker.evaluate(*held_out)

    def before_step(step: int) -> None:
        worker.set_lr(learning_rate(args, step))
        if oracle:
            evidence.set_lr(oracle, learning_rate(args, step))

    def after_step(step: int, loss: float, seconds: float) -> None:
        if args.evaluate and (step + 1) % args.evaluate == 0:
            run.say(f"step {step + 1}: validation loss {evaluate():.4f}")
        if checkpoints and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            or_stop(agreed, lambda: [lock.keep() for lock in locks])
            or_stop(checkpoints.save, step + 1, {"step": step + 1, "losses": run.losses, "drawn": drawn_by(args)})

    before = evaluate()
    with ledger.recording_to(sent):
        try:
            compared = train(
                run, {"": worker}, oracle, text=training, first=first, compare=args.verify,
                rows=None if args.verify else worker.rows(args.batch), before_step=before_step, after_step=after_step,
            )[""]  # fmt: skip
        except Stop:
            if checkpoints:
                checkpoints.wait()  # what is being written is not lost
            raise
    if checkpoints:
        or_stop(checkpoints.wait)
    after = evaluate()
    if not isfinite(after):
        raise Stop(f"the validation loss is {after} after the last update: nothing is exported; use a smaller --lr")
    if args.export:
        written = or_stop(export, worker, args.export, full_model(config, moe), bytes_of(args.shard_size), folder)
        evidence.claim_export(run, model, written)

    # What came of it.
    steps = max(0, args.steps - first)
    run.sent = {"": sent}
    evidence.say_utilization(run, model, steps)
    evidence.claim_run(run, layout, model, worker, sent, steps)
    if order:
        order.claim(run, steps)
    if oracle and steps:
        compared.claim(run)
    evidence.claim_losses(run, first, before, after)
    evidence.write_text(run, worker)
    if worker.pipeline and run.page:
        pictures.draw_pipeline(run, worker, held_out)
    worker.close()


def resume(run: Run, worker: Worker, oracle: Oracle | None, checkpoints: Checkpoints | None) -> int:
    """Go on from the last complete checkpoint, if there is one, whatever layout wrote it; the steps that are done.

    Batches, masks and learning rates follow from the step, so there is nothing else to restore.
    """
    found = or_stop(checkpoints.latest) if checkpoints else None
    for name in or_stop(checkpoints.passed_over) if checkpoints else ():
        run.say(f"passes over {run.args.save}/{name}, which is no complete checkpoint")
    if found is None:
        return 0
    done = or_stop(checkpoints.load, found)
    run.losses += done["losses"]
    run.say(f"goes on from {found}, step {done['step']}\n")
    for name, before in done.get("drawn", {}).items():
        if before != (now := drawn_by(run.args)[name]):
            run.say(f"{name} was {before}, and is {now} from here on: not what one run of either would have done\n")
    evidence.follow(run, worker, oracle)
    if done["step"] >= run.args.steps:
        run.say(f"all {run.args.steps} steps are done\n")
    return done["step"]


def drawn_by(args: argparse.Namespace) -> dict[str, Any]:
    """What batches, masks and learning rates of a step follow from, besides the step."""
    names = ("seed", "data", "tokens", "batch", "lr", "min_lr", "warmup", "decay", "cooldown")
    return {f"--{name.replace('_', '-')}": getattr(args, name) for name in names} | {
        "--schedule-steps": args.schedule_steps or args.steps
    }


def alone(job: Job, name: str, path: str, held: list[FolderLock]) -> None:
    """That no other run saves or exports there, held by rank 0. Raises ValueError on all ranks where one does."""

    def take() -> None:
        if name == "save":
            Path(path).mkdir(parents=True, exist_ok=True)
        held.append(FolderLock(f"--{name}", path, beside=name == "export"))

    agreed(lambda: take() if job.rank == 0 else None)


def or_stop(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns; its ValueError, which all ranks have, stops the run."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise Stop(str(error)) from error


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "02",
        "Megatron-LM code overview: the combined run",
        "Megatron-LM 代码概览",
        "Tensor, sequence, context, expert, pipeline and data parallelism with ZeRO in one training, in any layout.",
        fewest_steps=0,
    )
    add_all_flags(frame)
    sys.exit(frame.main(check, lesson))
