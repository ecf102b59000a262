"""Every family in every layout against Hugging Face transformers: the same weights, all logits, the loss and every
gradient, in float64. What ranks and oracle have in common cannot hide here.
"""

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.config import ModelConfig
from core.model.gpt import token_loss
from core.model.hf import from_published
from core.model.precision import POLICIES
from core.shards import LocalTensor, full_tensors
from sequence_parallel import context
from tests.core.test_hf import GPT2, LLAMA, LLAMA3, ROPE, TOLERANCE, YARN, InFloat64, apart, built_by, read_by_us
from tests.pool import Pool

CPU, BATCH, VOCABULARY, SEQUENCE = torch.device("cpu"), 4, 101, 12
LAYERS = {"num_hidden_layers": 4}
NINE = LLAMA | LAYERS | {"intermediate_size": 54}  # 9 heads, 3 of keys and values
SIX = NINE | {"num_attention_heads": 6, "num_key_value_heads": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model type, what its configuration says
    "gpt2": ("gpt2", GPT2 | {"n_layer": 4, "n_positions": SEQUENCE, "n_inner": 54}),
    "llama": ("llama", NINE | {"rope_parameters": LLAMA3, "head_dim": 10}),
    "mistral": ("mistral", NINE | {"rope_parameters": ROPE, "sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", NINE | {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", NINE | {"rope_parameters": YARN | {"truncate": False}, "head_dim": 10}),
}
EIGHT = {  # the same families, for twice as many ranks of tp as heads of keys and values
    "gpt2": FAMILIES["gpt2"][1] | {"n_head": 6},
    "llama": SIX | {"rope_parameters": LLAMA3, "head_dim": 10},
    "mistral": SIX | {"rope_parameters": ROPE, "sliding_window": None},
    "qwen2": SIX | {"rope_parameters": ROPE, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": SIX | {"rope_parameters": ROPE, "head_dim": 10, "num_key_value_heads": 1},
}
DENSE = (  # with 9 heads
    Layout(tp=3, microbatch=4),
    Layout(tp=3, sp=True, microbatch=2, microbatches=2),
    Layout(pp=2, v=2, schedule="interleaved", microbatches=4),
    Layout(cp=2, dp=2, microbatch=2),
    Layout(cp=3, ulysses=3, zero=2, microbatch=4),
    Layout(dp=4, zero=3),
    Layout(tp=3, sp=True, pp=2, schedule="zb-v", v=2, microbatch=1, microbatches=4, recompute="selective"),
)
TOGETHER = (  # with 6
    Layout(tp=2, cp=2, pp=2, microbatches=4, sp=True, recompute="full", zero=1),
    Layout(tp=2, pp=2, dp=2, microbatches=2),
)


class Case(NamedTuple):
    family: str
    layout: Layout
    together: bool


CASES = [
    Case(family, layout, together)
    for family in FAMILIES
    for together, layouts in ((False, DENSE), (True, TOGETHER))
    for layout in layouts
]


class Exact(NamedTuple):
    """What transformers finds."""

    config: ModelConfig
    weights: dict[str, Tensor]  # by our names
    gradients: dict[str, Tensor]
    logits: Tensor
    loss: float
    tokens: Tensor
    targets: Tensor


@cache
def theirs(family: str, together: bool, folder: Path) -> Exact:
    kind, options = FAMILIES[family]
    model = built_by(kind, EIGHT[family] if together else options)
    config = read_by_us(model, None if kind == "gpt2" else SEQUENCE, folder)
    drawn = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(VOCABULARY, (2, BATCH, SEQUENCE), generator=drawn)
    with InFloat64():
        logits = model(tokens, use_cache=False).logits
        loss = token_loss(logits, targets, targets.numel())
        loss.backward()
    weights = dict(from_published(n, p.detach(), config) for n, p in model.named_parameters())
    gradients = dict(from_published(n, p.grad, config) for n, p in model.named_parameters())
    return Exact(config, weights, gradients, logits.detach(), loss.item(), tokens, targets)


class Found(NamedTuple):
    """What one rank finds."""

    loss: float
    gradients: list[LocalTensor]
    logits: list[tuple[Tensor, Tensor, int, Tensor]]  # samples, positions, first column, values


def ours(exact: Exact, layout: Layout) -> Found:
    """One forward and backward of a rank."""
    mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
    make_optimizer = partial(torch.optim.SGD, lr=0.0)
    worker = Worker(TrainSpec(exact.config, None, layout, 0, POLICIES["float64"], CPU, make_optimizer), mesh)
    for name, value, mark in worker.master_weights():
        value.copy_((mark.local(exact.weights[name]) if mark else exact.weights[name]).view_as(value))
    worker.publish()

    logits: list[tuple[Tensor, Tensor, int, Tensor]] = []
    if worker.model.head is not None:

        def note(head: object, x: object, y: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:  # not a forward that is computed again
                rows = worker.mesh["dp"].index * layout.microbatches * layout.microbatch + worker.masks.offset
                samples = torch.arange(rows, rows + layout.microbatch)
                positions = context.local(torch.arange(SEQUENCE)[None], worker.attention)[0]
                logits.append((samples, positions, worker.tp.index * y.shape[-1], y.detach().clone()))

        worker.model.head.register_forward_hook(note)
    worker.zero_grad()
    share = worker.forward_backward(0, exact.tokens, exact.targets)
    gradients = [each._replace(value=each.value.clone()) for each in worker.gradients()]
    _, loss = worker.clip(1e9, share)
    worker.close()
    return Found(loss, gradients, logits)


def put_together(exact: Exact, everyone: Iterable[Found]) -> Tensor:
    """The logits of the batch; what no rank has is NaN."""
    whole = torch.full((BATCH, SEQUENCE, 2 * VOCABULARY), torch.nan, dtype=torch.float64)  # room for a padding
    for found in everyone:
        for samples, positions, first, values in found.logits:
            columns = torch.arange(first, first + values.shape[-1])
            whole[samples[:, None, None], positions[None, :, None], columns] = values
    return whole[..., :VOCABULARY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}:{case.layout}".replace("--", ""))
def test_a_layout_computes_what_transformers_does(pool: Pool, folder: Path, case: Case) -> None:
    exact, layout = theirs(case.family, case.together, folder), case.layout
    rules.check(layout, exact.config, world=layout.ranks, batch=BATCH)
    everyone = pool.run(layout.ranks, ours, exact, layout)
    assert all(found.loss == pytest.approx(exact.loss, rel=TOLERANCE) for found in everyone)
    of_logits = apart(put_together(exact, everyone), exact.logits)
    assert of_logits < TOLERANCE
    worst: dict[str, float] = {}
    for name, value in full_tensors(each for found in everyone for each in found.gradients):
        worst[name] = max(worst.get(name, 0.0), apart(value, exact.gradients[name]))
    assert worst.keys() == exact.gradients.keys()
    name = max(worst, key=worst.__getitem__)
    print(f"| {case.family} | {layout} | {of_logits:.0e} | {worst[name]:.0e} | {name} |")  # pytest -rP
    assert worst[name] < TOLERANCE, name
