"""Every family in every layout against Hugging Face transformers: the same weights, all logits, the loss and every
gradient, in float64. What ranks and oracle have in common cannot hide here.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cluster import rules
from cluster.planner.layout import Layout
from cluster.run.arguments import full_model
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.hf import Folder
from cluster.run.load import load_published
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.config import ModelConfig
from core.model.gpt import token_loss
from core.model.hf import from_published
from core.model.precision import POLICIES
from core.proof.full import full_tensors
from core.shards import LocalTensor
from expert_parallel.engine.experts import Experts
from expert_parallel.engine.routing import MoEConfig
from sequence_parallel import context
from tests.core.test_hf import (
    DEEPSEEK,
    GPT2,
    LLAMA,
    LLAMA3,
    ROPE,
    TOLERANCE,
    YARN,
    InFloat64,
    apart,
    built_by,
    saved,
)
from tests.pool import Pool

CPU, BATCH, VOCABULARY, SEQUENCE = torch.device("cpu"), 4, 101, 12
LAYERS = {"num_hidden_layers": 4}
NINE = LLAMA | LAYERS | {"intermediate_size": 54, "rope_parameters": ROPE}  # 9 heads, 3 of keys and values
WIDTH = {"moe_intermediate_size": 18}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model type, what its configuration says
    "gpt2": ("gpt2", GPT2 | {"n_layer": 4, "n_positions": SEQUENCE, "n_inner": 54}),
    "llama": ("llama", NINE | {"rope_parameters": LLAMA3, "head_dim": 10}),
    "mistral": ("mistral", NINE | {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", NINE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", NINE | {"rope_parameters": YARN | {"truncate": False}, "head_dim": 10}),
    "mixtral": ("mixtral", NINE | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3 moe": (
        "qwen3_moe",
        NINE | WIDTH | {"num_experts": 6, "num_experts_per_tok": 2, "head_dim": 10, "norm_topk_prob": True},
    ),
    "deepseek": (
        "deepseek_v3",
        NINE | DEEPSEEK | LAYERS | WIDTH | {"num_attention_heads": 6, "num_key_value_heads": 6},
    ),
}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 2}
ONE_KEY = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10}  # for two ranks of tp
TOGETHER_OPTIONS = {
    "gpt2": {"n_head": 6},
    "llama": SIX | {"head_dim": 10},
    "mistral": SIX,
    "qwen2": ONE_KEY,
    "qwen3": ONE_KEY,
    "mixtral": SIX,
    "qwen3 moe": ONE_KEY,
    "deepseek": {},
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
DENSE_TOGETHER = (  # with 6
    Layout(tp=2, cp=2, pp=2, microbatches=4, sp=True, recompute="full", zero=1),
    Layout(tp=2, pp=2, dp=2, microbatches=2, zero=3),
)
MIXED = (
    Layout(tp=3, sp=True, microbatch=4),
    Layout(pp=2, v=2, schedule="interleaved", microbatches=4),
    Layout(cp=2, dp=2, microbatch=2, ep=2),
    Layout(cp=2, pp=2, ep=2, schedule="dualpipe", microbatches=4),
    Layout(cp=2, pp=2, ep=2, schedule="dualpipev", v=2, microbatches=4),
    Layout(dp=2, ep=2, zero=1, microbatch=2),
    Layout(cp=3, ulysses=3, ep=3, microbatch=4, zero=2),
    Layout(tp=3, sp=True, pp=2, etp=3, schedule="zb-h1", microbatches=4, recompute="full"),
)
MIXED_TOGETHER = (
    Layout(tp=2, cp=2, pp=2, ep=2, etp=2, microbatches=4, sp=True, zero=1),
    Layout(tp=2, sp=True, pp=2, dp=2, ep=2, microbatches=2, zero=3),
)


class Case(NamedTuple):
    family: str
    layout: Layout
    together: bool


CASES = [
    Case(family, layout, together)
    for family in FAMILIES
    for together, layouts in enumerate(
        (MIXED, MIXED_TOGETHER) if family in ("mixtral", "qwen3 moe", "deepseek") else (DENSE, DENSE_TOGETHER)
    )
    for layout in layouts
]


class Exact(NamedTuple):
    """What transformers finds."""

    folder: str  # where it has saved its weights
    gradients: dict[str, Tensor]  # by our names
    logits: Tensor
    loss: float
    tokens: Tensor
    targets: Tensor


@cache
def theirs(family: str, together: bool, folder: Path) -> Exact:
    kind, options = FAMILIES[family]
    model = built_by(kind, options | (TOGETHER_OPTIONS[family] if together else {}))
    weights = folder / f"{family} {together}"
    saved(model, weights)
    drawn = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(VOCABULARY, (2, BATCH, SEQUENCE), generator=drawn)
    with InFloat64():
        logits = model(tokens, use_cache=False).logits
        loss = token_loss(logits, targets, targets.numel())
        loss.backward()
    for p in model.parameters():
        p.data = p.grad
    gradients = {n: g for n, g in saved(model, folder).items() if "correction_bias" not in n}
    gradients = by_our_names(gradients, Folder(str(weights), SEQUENCE).config)
    return Exact(str(weights), gradients, logits.detach(), loss.item(), tokens, targets)


def by_our_names(published: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What is in a file; experts are single there."""
    found: dict[str, Tensor | dict[int, Tensor]] = {}
    for published_name, tensor in published.items():
        name, expert, value = from_published(published_name, tensor, config)
        if expert is None:
            found[name] = value
        else:
            found.setdefault(name, {})[expert] = value
    return {n: torch.stack([v[e] for e in range(len(v))]) if isinstance(v, dict) else v for n, v in found.items()}


class Found(NamedTuple):
    """What one rank finds."""

    loss: float
    gradients: list[LocalTensor]
    logits: list[tuple[Tensor, Tensor, int, Tensor]]  # samples, positions, first column, values


def ours(exact: Exact, layout: Layout, bug: Callable[[Worker], None] | None = None) -> Found:
    """One forward and backward of a rank."""
    mesh = make_mesh(layout, "cpu", Ledger(), 30.0)
    make_optimizer = partial(torch.optim.SGD, lr=0.0)
    folder = Folder(exact.folder, SEQUENCE)
    config = folder.config
    moe = MoEConfig.of(config) if config.experts else None
    worker = Worker(TrainSpec(config, moe, layout, 0, POLICIES["float64"], CPU, make_optimizer, drawn=False), mesh)
    load_published(worker, folder, full_model(config, moe))
    if bug:
        bug(worker)

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
    rules.check(layout, Folder(exact.folder, SEQUENCE).config, world=layout.ranks, batch=BATCH)
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


# ---- The bugs


def not_summed_over_tp(worker: Worker) -> None:
    worker._sum_over_tp = lambda: None


def positions_from_zero(worker: Worker) -> None:
    """Each rank of cp turns its tokens as if they were the first of the sample."""
    for block in worker.model.blocks.values():
        block.attention.rotary.positions = torch.arange


def first_experts(worker: Worker) -> None:
    """A rank has the weights of other experts than its own."""
    for module in worker.model.modules():
        if isinstance(module, Experts):
            for p in module.parameters():
                p.data = p.data.roll(1, 0)


def no_correction(worker: Worker) -> None:
    """The bias that corrects the selection of experts is not read."""
    for name, p in worker.model.named_parameters():
        if name.endswith("router.bias"):
            p.data.zero_()


BUGS = (
    (not_summed_over_tp, "qwen3", Layout(tp=3, microbatch=4), "gradients"),
    (not_summed_over_tp, "mistral", Layout(tp=3, sp=True, microbatch=4), "gradients"),
    (positions_from_zero, "llama", Layout(cp=2, dp=2, microbatch=2), "logits"),
    (first_experts, "mixtral", Layout(dp=2, ep=2, microbatch=2), "logits"),
    (no_correction, "deepseek", Layout(dp=2, ep=2, microbatch=2), "logits"),
)


@pytest.mark.parametrize(("bug", "family", "layout", "where"), BUGS, ids=lambda x: getattr(x, "__name__", None))
def test_a_bug_is_seen(pool: Pool, folder: Path, bug: Any, family: str, layout: Layout, where: str) -> None:
    exact = theirs(family, False, folder)
    everyone = pool.run(layout.ranks, ours, exact, layout, bug)
    of_logits = apart(put_together(exact, everyone), exact.logits)
    assert (of_logits > 1e-3) == (where == "logits")
    found = full_tensors(each for rank in everyone for each in rank.gradients)
    assert max(apart(value, exact.gradients[name]) for name, value in found) > 1e-3
