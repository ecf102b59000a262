"""A checkpoint of any stage on any number of ranks goes on in any other, with its optimizer state."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import token_loss
from core.model.text import Text
from core.proof.checkpoint import Checkpoints
from core.proof.launch import Job
from tests.pool import Pool
from tests.zero.test_engine import CLIP, CPU, ENGINES, SEED, Case, Result, equal, one_process, wide
from zero.engine.engine import Engine

BATCH = 24  # for 1, 2, 3, 4 and 8 ranks


def of(engine: Engine, folder: str) -> Checkpoints:
    return Checkpoints(folder, engine, Job(dist.get_rank(), dist.get_world_size(), CPU, "gloo", 30.0))


def go_on(kind: str, case: Case, steps: range, come_from: str | None, save_to: str | None) -> Result:
    """Train the steps of `steps`, from a checkpoint, or to one."""
    axis = Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size())["dp"]
    model = case.model()
    if come_from:
        for p in model.parameters():
            p.data.zero_()  # what is not loaded must show
    stage = ENGINES[kind](model, axis, case.optimizer, case.groups(model), torch.float64, case.elements)
    if come_from:
        checkpoints = of(stage, come_from)
        checkpoints.load(checkpoints.latest())
    losses, norms, gradients = [], [], []
    for step in steps:
        stage.zero_grad()
        inputs, targets = (t.chunk(axis.size)[axis.index] for t in Text(None, 8).batch(SEED, step, BATCH))
        loss = token_loss(model(inputs), targets, BATCH * 8)
        stage.backward(loss)
        gradients = stage.gradients()
        norm, total = stage.clip_and_total(CLIP, loss.detach())
        losses.append(total)
        norms.append(norm)
        stage.step()
    if save_to:
        checkpoints = of(stage, save_to)
        checkpoints.save(steps.stop, {})
        checkpoints.wait()
    return losses, norms, gradients, stage.weights(), stage.states()


CASES = {"plain": Case(steps=4), "frozen": Case(wide(), freeze=("blocks.1", "embed.position"), steps=4),
         "two groups": Case(two_groups=True, steps=4)}  # fmt: skip
ROADS = [(("ddp", 1), ("zero3", 4)), (("zero3", 4), ("zero1", 2)), (("zero1", 8), ("zero2", 3)),
         (("zero2", 3), ("ddp", 2)), (("zero3", 3), ("zero3", 8)), (("zero2", 2), ("zero2", 1))]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "first", "second"), [(CASES["plain"], *road) for road in ROADS]
    + [(CASES[name], *road) for name in ("frozen", "two groups") for road in ROADS[:2]]
)  # fmt: skip
def test_goes_on_in_another_layout(
    pool: Pool, tmp_path: Path, case: Case, first: tuple[str, int], second: tuple[str, int]
) -> None:
    folder = str(tmp_path / "checkpoint")
    pool.run(first[1], go_on, first[0], case, range(2), None, folder)
    assert [p.name for p in tmp_path.rglob("*") if p.is_dir()] == ["checkpoint", "step-00000002"]
    results = pool.run(second[1], go_on, second[0], case, range(2, 4), folder, folder)
    losses, norms, *rest = one_process(replace(case, samples=BATCH), 1)
    equal(results, (losses[2:], norms[2:], *rest))


def early_and_late(folder: str) -> list[str]:
    """The state after a checkpoint from before the first step is loaded into a stage that has trained since."""
    axis = Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size())["dp"]
    case = Case()
    model = case.model()
    stage = ENGINES["zero1"](model, axis, case.optimizer, None, torch.float64, case.elements)
    checkpoints = of(stage, f"{folder}/")
    for _ in range(2):  # the second time over the first
        checkpoints.save(0, {})
    inputs, targets = Text(None, 8).batch(SEED, 0, 2)
    stage.backward(token_loss(model(inputs), targets, 16))
    stage.step()
    assert stage.states()
    checkpoints.load(checkpoints.latest())
    return [str(piece.name) for piece in stage.states()]


def test_an_early_checkpoint_clears_the_state(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, early_and_late, str(tmp_path / "checkpoint")) == [[], []]
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-00000000"]


def load_from(folder: str, case: Case) -> str:
    axis = Mesh("cpu", Ledger(), 30.0, dp=dist.get_world_size())["dp"]
    with pytest.raises(ValueError) as error:
        of(ENGINES["zero1"](case.model(), axis, case.optimizer, None, torch.float64), folder).load(folder)
    return str(error.value)


def test_what_does_not_fit_is_refused(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, go_on, "ddp", CASES["plain"], range(1), None, str(tmp_path))
    folder = str(tmp_path / "step-00000001")
    assert "is no checkpoint" in pool.run(1, load_from, str(tmp_path), CASES["plain"])[0]
    assert "is (12,), not (16,)" in pool.run(1, load_from, folder, Case(wide(hidden=16)))[0]
    assert "has no weights|blocks.2." in pool.run(1, load_from, folder, Case(wide()))[0]
