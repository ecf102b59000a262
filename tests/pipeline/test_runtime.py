"""The runtime on real processes: equal to one process in every corner, and careful with memory."""

import gc
import importlib
import weakref
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from core.gradients import clip_and_total
from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT, GPTConfig, materialize, token_loss, use_masks
from core.model.linear import Linear
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.p2p import PointToPoint
from core.proof.clock import Event, VirtualClock
from core.proof.memory import SavedActivations
from core.proof.oracle import Oracle, worst_difference
from pipeline.engine.actions import Schedule, size, stages_of_ranks
from pipeline.engine.runtime import Pipeline
from pipeline.engine.step import Trace
from pipeline.engine.validator import bubble, validate
from pipeline.gpipe import COURSE_GRID
from pipeline.runtime import PlainPipeline
from pipeline.schedules import SCHEDULES, build, from_csv
from pipeline.stages import Copies, each_stage, partition
from pipeline.zero_bubble import defer_wgrads
from sequence_parallel.engine.recompute import recompute
from tests.pool import Pool

CPU, SEQUENCE, CLIP = torch.device("cpu"), 8, 0.5
optimizer_of = partial(torch.optim.AdamW, lr=1e-3)


def batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    return Text(None, SEQUENCE).batch(7, step, samples)


def frozen(name: str, prefixes: tuple[str, ...]) -> bool:
    return name.startswith(prefixes)


Result = tuple[list, list, list, list]  # losses, norms, the last step's gradients, the parameters, by full name
Case = tuple[GPTConfig, Schedule] | tuple[GPTConfig, Schedule, str]  # and a split of the layers over the stages


def train_all(cases: list[Case], freeze: tuple[str, ...], steps: int, runtimes: tuple[str, ...]) -> list[list[Result]]:
    """On one rank: each case in each runtime."""
    axis = Mesh("cpu", Ledger(), 30.0, pp=dist.get_world_size())["pp"]
    return [[train(axis, case, freeze, steps, runtime) for runtime in runtimes] for case in cases]


def train(axis: Axis, case: Case, freeze: tuple[str, ...], steps: int, runtime: str) -> Result:
    config, schedule, split = (*case, "")[:3]
    (stages, m), mine = size(schedule), stages_of_ranks(schedule)[axis.index]
    model = materialize(partition(GPT(config), mine, stages, split), 7, CPU, torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen(model.full_name(name), freeze))
    masks = use_masks(model, SampleMasks(7))
    copies = Copies(model, axis, stages_of_ranks(schedule), split)
    loss, shape = partial(token_loss, tokens=m * SEQUENCE), (1, SEQUENCE, config.hidden)
    arguments = (each_stage(model, mine, stages, split), loss, schedule, axis, shape, torch.float64, CPU, masks)
    pipeline = Pipeline(*arguments) if runtime == "engine" else PlainPipeline(*arguments, defer_wgrads(model))
    optimizer = optimizer_of(model.parameters())
    losses, norms, gradients = [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch(step, m))
        masks.seek(step)
        share = pipeline.step(inputs, targets)
        copies.sum_gradients()
        gradients = [(model.full_name(n), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None]
        norm, total = clip_and_total(model.parameters(), copies.counted_once(), [axis], CLIP, share)
        losses.append(total)
        norms.append(norm)
        optimizer.step()
    pipeline.close()
    return losses, norms, gradients, [(model.full_name(n), p.detach()) for n, p in model.named_parameters()]


@cache
def one_process(config: GPTConfig, microbatches: int, freeze: tuple[str, ...], steps: int) -> tuple[list, list, Oracle]:
    oracle = Oracle(config, 7, CPU, optimizer_of, CLIP)
    for name, p in oracle.model.named_parameters():
        p.requires_grad_(not frozen(name, freeze))
    losses, norms = [], []
    for step in range(steps):
        losses.append(oracle.step(*batch(step, microbatches), step))
        norms.append(oracle.norm)
    return losses, norms, oracle


def check_against_one_process(
    pool: Pool, ranks: int, cases: list[Case], freeze: tuple[str, ...] = (), steps: int = 2, plain: bool = True
) -> None:
    runtimes = ("plain", "engine") if plain else ("engine",)
    everyone = pool.run(ranks, train_all, cases, freeze, steps, runtimes)
    for i, (config, schedule, *_) in enumerate(cases):
        losses, norms, oracle = one_process(config, size(schedule)[1], freeze, steps)
        for j in range(len(runtimes)):
            results = [of_rank[i][j] for of_rank in everyone]
            for rank_losses, rank_norms, _, _ in results:
                assert rank_losses == pytest.approx(losses, rel=1e-10)
                assert rank_norms == pytest.approx(norms, rel=1e-10)
            assert worst_difference([g for r in results for g in r[2]], oracle.gradients) < 1e-10
            assert worst_difference([p for r in results for p in r[3]], oracle.parameters()) < 1e-10


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_equals_one_process(pool: Pool, name: str, ranks: int) -> None:
    """Fewer microbatches than stages, a number that is no multiple of them, and more; in the plain runtime too."""
    if name == "dualpipe" and ranks % 2:
        pytest.skip("dualpipe pairs its ranks")
    least = 2 * ranks if name.startswith("dualpipe") else 1
    most = min(3 * ranks - ranks % 2, 18)
    cases = []
    for microbatches in sorted({least, 5 if least == 1 else least + 2, most} if ranks < 8 else {max(least, 5)}):
        schedule = build(name, ranks, microbatches, chunks=2 if ranks == 8 else 3)
        config = GPTConfig(sequence=SEQUENCE, hidden=16, layers=size(schedule)[0], heads=2)
        cases.append((config, schedule))
    check_against_one_process(pool, ranks, cases, plain=ranks in (2, 4))


@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        ((), {"tied": False}),
        ((), {"dropout": 0.3, "attention": "softmax"}),
        (("embed.token",), {}),  # the tied weight: no gradient on either copy
        (("embed", "blocks.0", "blocks.1."), {"tied": False}),  # nothing to train on the first stage
        (("blocks.2", "blocks.3"), {}),  # nothing in the middle, but gradients pass through
        (("norm", "head", "blocks.5", "blocks.4"), {"tied": False}),  # nothing on the last
    ],
)
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h2", "zb-v", "dualpipev"])
def test_variants_equal_one_process(pool: Pool, name: str, freeze: tuple[str, ...], options: dict) -> None:
    config = GPTConfig(sequence=SEQUENCE, hidden=16, layers=6, heads=2, **options)
    check_against_one_process(pool, 3, [(config, build(name, 3, 6))], freeze, plain=not freeze)


def test_any_valid_schedule_runs(pool: Pool) -> None:
    """The runtime knows no schedule: here backwards run in another order than forwards."""
    rows = ["F0 F1 B1 F2 B0 F3 B3 B2", "F0 F1 B1 F2 B0 F3 B3 B2"]
    schedule = [
        [a._replace(kind=c[0], microbatch=int(c[1])) for a, c in zip(row, cells.split(), strict=True)]
        for row, cells in zip(build("gpipe", 2, 4), rows, strict=True)
    ]
    check_against_one_process(pool, 2, [(GPTConfig(sequence=SEQUENCE, hidden=16, layers=2, heads=2), schedule)])


RECOMPUTED = [("dualpipe", "full"), ("dualpipe", "selective"), ("dualpipev", "full"), ("zb-v", "full")]


def recomputed(name: str, kind: str, runtime: str) -> tuple[dict[str, Tensor], int, int]:
    """Gradients of a step that computes layers again in backward; on 2 ranks.

    And the layers whose weights' gradients W has computed, and those of which it should.
    """
    axis, m = Mesh("cpu", Ledger(), 30.0, pp=2)["pp"], 6
    schedule = build(name, 2, m)
    count, mine = size(schedule)[0], stages_of_ranks(schedule)[axis.index]
    config = GPTConfig(sequence=SEQUENCE, hidden=16, layers=count, heads=2, attention="softmax", dropout=0.2)
    model = recompute(materialize(partition(GPT(config), mine, count), 7, CPU, torch.float64), kind)
    masks, copies = use_masks(model, SampleMasks(7)), Copies(model, axis, stages_of_ranks(schedule))
    stages = each_stage(model, mine, count)
    arguments = (stages, partial(token_loss, tokens=m * SEQUENCE), schedule, axis, (1, SEQUENCE, 16))
    inputs, targets = (rearrange(t, "(m b) s -> m b s", m=m) for t in batch(0, m))
    trace = Trace(VirtualClock(CPU), SavedActivations([]))
    if runtime == "engine":
        pipeline = Pipeline(*arguments, torch.float64, CPU, masks)
        pipeline.step(inputs, targets, trace=trace)
    else:
        pipeline = PlainPipeline(*arguments, torch.float64, CPU, masks, defer_wgrads(model))
        pipeline.step(inputs, targets)
    pipeline.close()
    copies.sum_gradients()
    linears = {s: sum(isinstance(layer, nn.Linear) for layer in stage.modules()) for s, stage in stages.items()}
    split = sum(linears[action.stage] for action in schedule[axis.index] if action.kind == "W")
    gradients = {model.full_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, trace.deferred_layers, split


@pytest.mark.parametrize("runtime", ["plain", "engine"])
@pytest.mark.parametrize(("name", "kind"), RECOMPUTED)
def test_recomputation_knows_whether_its_w_comes_later(pool: Pool, name: str, kind: str, runtime: str) -> None:
    """The bug: a layer that is computed again within an I computes its weights' gradients there, or within a B defers.

    Only a schedule with both kinds of backward, as DualPipe's, tells: the last one before decides.
    """
    results = pool.run(2, recomputed, name, kind, runtime)
    schedule = build(name, 2, 6)
    layers = size(schedule)[0]
    config = GPTConfig(sequence=SEQUENCE, hidden=16, layers=layers, heads=2, attention="softmax", dropout=0.2)
    _, _, oracle = one_process(config, 6, (), 1)
    found = [(name, gradient) for gradients, _, _ in results for name, gradient in gradients.items()]
    assert worst_difference(found, oracle.gradients) < 1e-10
    for _, deferred, split in results:
        assert split > 0
        assert runtime == "plain" or deferred == split


def misplaced() -> str:
    axis = Mesh("cpu", Ledger(), 30.0, pp=2)["pp"]
    stage = {axis.index: nn.Identity()}
    with pytest.raises(ValueError, match="puts stages") as error:
        Pipeline(stage, token_loss, build("interleaved", 2, 4), axis, (1,), torch.float64, CPU)
    with pytest.raises(ValueError, match="for 3 ranks, the pipeline has 2"):
        Pipeline(stage, token_loss, build("1f1b", 3, 4), axis, (1,), torch.float64, CPU)
    return str(error.value)


def test_a_schedule_for_other_ranks_is_refused(pool: Pool) -> None:
    assert "puts stages [1, 3] here, not [1]" in pool.run(2, misplaced)[1]


# ---- Memory and messages


class Watched(nn.Module):
    """A stage that remembers its outputs weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.outputs: list[weakref.ref] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.linear(x)
        self.outputs.append(weakref.ref(y.untyped_storage()))
        return y


def outputs_alive_in_first_backward() -> tuple[int, int] | None:
    """On rank 0, when its first backward starts: outputs still in memory, microbatches in flight."""
    axis = Mesh("cpu", Ledger(), 30.0, pp=2)["pp"]
    stage, seen = Watched(), []
    loss, schedule = lambda y, t: y.sum(), build("gpipe", 2, 6)
    pipeline = Pipeline({axis.index: stage}, loss, schedule, axis, (3, 4), torch.float64, CPU)
    backward = pipeline._carry_out["B"]

    def spy(action: object) -> None:
        if not seen:
            pipeline._messages.flush()
            gc.collect()
            seen.append((sum(o() is not None for o in stage.outputs), len(pipeline._kept)))
        backward(action)

    pipeline._carry_out["B"] = spy
    pipeline.step(torch.ones(6, 3, 4, dtype=torch.float64), torch.zeros(6, 1))
    pipeline.close()
    return seen[0] if axis.index == 0 else None


def test_a_sent_output_is_let_go(pool: Pool) -> None:
    assert pool.run(2, outputs_alive_in_first_backward)[0] == (0, 6)


def a_send_does_not_wait() -> str:
    """Rank 0 sends much more than any buffer holds before rank 1 asks for it, then rank 1 takes it backwards."""
    axis = Mesh("cpu", Ledger(), 30.0, pp=2)["pp"]
    messages = PointToPoint(axis, [(0, 1, "F")], CPU)
    if axis.index == 0:
        for tag in range(4):
            messages.send(torch.full((1 << 20,), float(tag)), 1, "F", tag)
        dist.barrier()
        messages.close()
    else:
        dist.barrier()
        got = [messages.receive(torch.empty(1 << 20), 0, "F", tag) for tag in (3, 2, 1, 0)]
        return str([arrive()[0].item() for arrive in got])
    return ""


def test_sends_do_not_block_and_tags_find_their_message(pool: Pool) -> None:
    assert pool.run(2, a_send_does_not_wait)[1] == "[3.0, 2.0, 1.0, 0.0]"


# ---- The course's table, on real processes


def executed_bubble(microbatches: int) -> list[Event]:
    """This rank's events when GPipe runs with these microbatches and a stage that costs next to nothing."""
    axis = Mesh("cpu", Ledger(), 30.0, pp=dist.get_world_size())["pp"]
    schedule = build("gpipe", axis.size, microbatches)
    stages = {axis.index: Watched()}
    pipeline = Pipeline(stages, lambda y, t: y.sum(), schedule, axis, (1, 4), torch.float64, CPU)
    trace = Trace(VirtualClock(CPU), SavedActivations([]))
    pipeline.step(torch.ones(microbatches, 1, 4, dtype=torch.float64), torch.zeros(microbatches, 1), trace=trace)
    pipeline.close()
    return trace.clock.events


@pytest.mark.parametrize(("ranks", "microbatches", "course"), [case for case in COURSE_GRID if case[0] <= 8])
def test_the_courses_table(pool: Pool, ranks: int, microbatches: int, course: float) -> None:
    of_wall, _ = bubble(pool.run(ranks, executed_bubble, microbatches))
    assert of_wall == pytest.approx(course, abs=0.0005)
    assert of_wall == pytest.approx(validate(build("gpipe", ranks, microbatches)).bubble_of_wall, abs=1e-12)


# ---- torch's own pipelines carry out the same order


def torchs_order(name: str, microbatches: int) -> list[str]:
    """What torch.distributed.pipelining really does on this rank, action by action."""
    from torch.distributed.pipelining import PipelineStage, schedules

    rank, ranks, done = dist.get_rank(), dist.get_world_size(), []
    stage = PipelineStage(nn.Linear(4, 4), rank, ranks, CPU)
    for method, kind in (("forward_one_chunk", "F"), ("backward_one_chunk", "B")):

        def spy(index: int, *args: object, _call: object = getattr(stage, method), _kind: str = kind, **more: object):
            done.append(f"{rank}{_kind}{index}")
            return _call(index, *args, **more)

        setattr(stage, method, spy)
    schedule = getattr(schedules, name)(stage, microbatches, loss_fn=lambda y, t: (y - t).square().sum())
    data = torch.ones(microbatches, 4)
    schedule.step(*([data] if rank == 0 else []), **({"target": data} if rank == ranks - 1 else {}))
    return done


@pytest.mark.parametrize(("ours", "torchs"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 3), (4, 4), (4, 9)])
def test_the_order_is_torchs(pool: Pool, ours: str, torchs: str, ranks: int, microbatches: int) -> None:
    executed = pool.run(ranks, torchs_order, torchs, microbatches)
    assert executed == [[str(a) for a in row] for row in build(ours, ranks, microbatches)]


def test_lessons_are_found_by_their_names() -> None:
    assert importlib.import_module("pipeline.1f1b").schedule(1, 1) == build("1f1b", 1, 1)


def test_copies_of_stages_and_of_the_tied_embedding_on_the_same_ranks(pool: Pool) -> None:
    """A head comes last on a rank, the embedding first: what is summed must have one order on both."""
    rows = ["0F0,1F0,0F1,1B0,0B0,0B1", "2F0,2B0,1F1,2F1,2B1,1B1"]
    check_against_one_process(pool, 2, [(GPTConfig(sequence=SEQUENCE, hidden=16, layers=3, heads=2), from_csv(rows))])


def left_after_a_step() -> list[bool]:
    """After a step with split backwards: which inputs of the stages are still in memory, and what is still pending."""
    axis = Mesh("cpu", Ledger(), 30.0, pp=2)["pp"]
    schedule, inputs = build("zb-v", 2, 4), []
    stages = {s: nn.Sequential(Linear(4, 4, dtype=torch.float64)) for s in stages_of_ranks(schedule)[axis.index]}

    class Plain(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Noting(Plain):
        def forward(self, x: Tensor) -> Tensor:
            inputs.append(weakref.ref(x))
            return self.inner(x)

    # Not the first stage: its input is a part of the caller's batch.
    noting = {s: Noting(stage) if s else Plain(stage) for s, stage in stages.items()}
    pipeline = Pipeline(noting, lambda y, t: y.sum(), schedule, axis, (3, 4), torch.float64, CPU)
    pipeline.step(torch.ones(4, 3, 4, dtype=torch.float64), torch.zeros(4, 1))
    pipeline.close()
    gc.collect()
    return [*(ref() is not None for ref in inputs), bool(pipeline._pending), bool(pipeline.deferred.take())]


def test_nothing_is_left_after_a_step(pool: Pool) -> None:
    for rank in pool.run(2, left_after_a_step):
        assert not any(rank)
