"""CODE 04: train a mixture of experts over the ranks (专家并行大规模训练), balanced and unbalanced side by side.

    torchrun --nproc_per_node=8 expert_parallel/train.py

    read: train.py:35-66; dispatch.py:33-102; then evidence/training.py

Balance is not only a matter of learning. All ranks wait for the one whose experts have the most tokens, and a rank must
have the memory for what arrives there. So the two trainings are shown by rank: rows computed, rows exchanged, bytes.
Folding of the ranks: 2504.14960, section 3.2. Balancing by a bias: 2408.15664.

b samples in a step, N ranks, B = b/N samples of a rank, S tokens of a sample, E experts, k of them for each token
"""

import argparse
import sys
from dataclasses import replace

from torch import Tensor

from core.gradients import clip_and_total, sum_gradients
from core.model.gpt import GPT, token_loss
from core.proof.arguments import configuration
from core.proof.lesson import Lesson, Run
from core.proof.rules import Rule
from expert_parallel.dispatch import parallelize
from expert_parallel.engine.routing import MoEConfig
from expert_parallel.evidence.course import show_course
from expert_parallel.evidence.flags import add_flags, add_parallel_flags, check, ep_of, moe_of
from expert_parallel.evidence.train import claim_work, count_rows, described, show_balance, show_work, work_of
from expert_parallel.evidence.training import Trained, Version, claim_equal, engine, mesh_of, routers, train_versions

UNBALANCED, BALANCED = "unbalanced", "balanced"


class PlainTraining(Version):
    """One step with experts over the ranks: each method is called once a step, in this order."""

    def forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        dp, edp = self.mesh["dp"], self.mesh["edp"]
        # Forward: this rank's samples (B, S) of (b, S). A loss is the rank's share of the global batch's mean, so that
        # losses and gradients add up over the ranks.
        inputs, targets = (t.chunk(dp.size)[dp.index] for t in (inputs, targets))
        self.masks.seek(step, dp.index * len(inputs))  # for dropout
        loss = token_loss(self.model(inputs), targets, targets.numel() * dp.size)

        # Backward: through the loss and the routers' losses. The gradients of rows go back to their tokens' ranks.
        (loss + sum(router.loss for router in routers(self.model))).backward()

        # What is no expert is replicated over dp, and each rank has seen other tokens: all-reduce over dp.
        sum_gradients(self.rest, dp)
        # An expert has seen the tokens of all ep ranks. Only its replicas have seen others: all-reduce over edp.
        # Divided by nothing: both are sums over the tokens of the global batch.
        sum_gradients(self.experts, edp)
        return loss.detach()

    def clip(self, largest: float, share: Tensor) -> tuple[float, float]:
        dp, edp = self.mesh["dp"], self.mesh["edp"]
        # The norm of the full model's gradient: the ranks' squares added up, replicas counted on the first of them.
        counted = [p.grad for p in self.rest if p.grad is not None and dp.index == 0]
        counted += [p.grad for p in self.experts if p.grad is not None and edp.index == 0]
        return clip_and_total(self.model.parameters(), counted, [dp], largest, share)

    def step(self) -> None:
        self.optimizer.step()  # AdamW, each rank on its own experts and on its replica of the rest
        for router in routers(self.model):
            router.end_step()  # balancing by a bias: no gradient, a rule


def lesson(run: Run) -> None:
    moe = moe_of(run.args)
    nothing = replace(moe.routing, aux=0.0, z=0.0, bias_rate=0.0)
    trained: dict[str, Trained] = {}
    work = {}
    for name, each in ((UNBALANCED, replace(moe, routing=nothing)), (BALANCED, moe)):
        run.say(f"{name}: {described(each.routing)}")
        versions = versions_of(run, each)
        rows = count_rows(versions["engine"].model)
        trained[name] = train_versions(run, each, versions)
        work[name] = run.job.gather(work_of(versions["engine"], rows))
    claim_equal(run, *trained.values())
    if run.job.rank == 0:
        show_balance(run, trained)
        show_work(run, work)
        claim_work(run, trained, work)
        show_course(run)


def versions_of(run: Run, moe: MoEConfig) -> dict[str, Version]:
    args, ep = run.args, ep_of(run.args, run.job.world_size)
    mesh = mesh_of(run, ep)
    plain = PlainTraining(run, parallelize(GPT(configuration(args)), moe, mesh), mesh)
    return {"plain": plain, "engine": engine(run, moe, mesh_of(run, ep, args.etp), args.dispatch)}


BALANCING = Rule("balance", "--aux {aux} --bias-rate {bias_rate}", lambda c: bool(c.aux or c.bias_rate),
                 "nothing would balance the load", lambda c: "--aux 0.05")  # fmt: skip


def refuse(args: argparse.Namespace, ranks: int) -> None:
    check(args, ranks, more=[BALANCING])


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "CODE 04",
        "Expert-parallel training at scale",
        "专家并行大规模训练",
        "A GPT with mixtures of experts, balanced and unbalanced: loss, load, and what each rank has to do.",
    )
    add_flags(frame, layers=1)
    add_parallel_flags(frame)
    frame.parser.set_defaults(steps=30, aux=0.05)
    sys.exit(frame.main(refuse, lesson))
